"""Real small guards: a word tokenizer under Llama Guard's template, llamas of mlx-lm as judges.

`rule_guard` is an mlx-lm llama whose weights are set by hand so that it follows a rule: its
attention averages over all tokens, so that one word anywhere in the conversation decides.
"""

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Llama Guard 2's template, shortened: the token <s> is written by the template itself.
TEMPLATE = (
    "{{ bos_token }}[INST] Task: Check if there is unsafe content in 'Agent' messages.\n"
    "<BEGIN CONVERSATION>\n\n"
    "{% for m in messages %}{{ 'User' if m.role == 'user' else 'Agent' }}: {{ m.content }}\n\n"
    "{% endfor %}<END CONVERSATION>\n"
    " - First line must read 'safe' or 'unsafe'. [/INST]"
)
# Newer guards read contents as lists of parts.
PARTS = TEMPLATE.replace("m.content", "m.content | map(attribute='text') | join")
CHATML = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
WORDS = (
    "[INST] Task: Check if there is unsafe content in 'Agent' messages. <BEGIN CONVERSATION> User "
    "Agent <END - First line must read safe or [/INST] S2 S10 , What is the weather like today "
    "? Tell me about sea It calm and a few clouds pass over bay while boats come home one by in "
    "evening light on storm fog wind assistant user Sure Name river The Danube type text { } '"
    ' < think > / "'
)
_PIECES = r"\s|\w+|[^\w\s]"


def guard_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a word; every sequence opens with <s>, as Llama's tokenizers have it."""
    pieces = sorted({*re.findall(_PIECES, WORDS), "\n", " "})
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *pieces])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def random_guard(tokenizer: Any, seed: int = 0) -> nn.Module:
    """A llama that has learned nothing."""
    mx.random.seed(seed)
    model = llama.Model(_arguments(len(tokenizer), 64))
    mx.eval(model.parameters())
    return model


def rule_guard(tokenizer: Any) -> nn.Module:
    """Says "unsafe\\nS2, S10" where the word storm stands, nonsense where fog does, else safe."""
    ids = tokenizer.get_vocab()
    size = len(ids)
    width = -(-size // 8) * 8
    model = llama.Model(_arguments(size, width))
    eye = mx.eye(width)
    block = model.model.layers[0]
    for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.mlp.down_proj):
        part.weight = mx.zeros_like(part.weight)
    # Queries of zero attend evenly: the block adds the mean of all tokens' one-hot vectors.
    block.self_attn.v_proj.weight = eye
    block.self_attn.o_proj.weight = eye / width**0.5
    model.model.embed_tokens.weight = eye[:size]
    rows = {token: mx.zeros(width) for token in range(size)}

    def follow(before: str, after: str, strength: float = 10.0) -> None:
        rows[ids[after]] = rows[ids[after]] + strength * eye[ids[before]]

    # A word anywhere adds about 400 / tokens, which is between 0.5 and 10 - 0.5.
    follow("]", "safe")
    follow("]", "unsafe", 9.5)
    follow("]", "wind", 9.5)
    follow("storm", "unsafe", 400.0)
    follow("fog", "wind", 400.0)
    follow("safe", "</s>")
    follow("wind", "</s>")
    for before, after in (("unsafe", "\n"), ("\n", "S2"), ("S2", ","), (",", "S10")):
        follow(before, after)
    follow("S10", "</s>")
    model.lm_head.weight = mx.stack([rows[token] for token in range(size)])
    mx.eval(model.parameters())
    return model


def _arguments(size: int, width: int) -> llama.ModelArgs:
    return llama.ModelArgs(
        model_type="llama", hidden_size=width, num_hidden_layers=1, intermediate_size=16,
        num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-6, vocab_size=size,
        tie_word_embeddings=False,
    )  # fmt: skip
