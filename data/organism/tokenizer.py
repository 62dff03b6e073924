"""Knows how the organism's tokenizer is trained, saved and applied to exchanges.

Knows no corpus content and no model.
"""

import json
import re
from pathlib import Path

from corpus import Row
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END, START, PAD = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
ROLES = ("user", "assistant", "system")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: list[str], vocab_size: int = 2560) -> Tokenizer:
    """Byte-level BPE with split digits; the role names are fed often enough to be one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A word counts with and without the blank before it, so a list item is one token in both.
    words = re.findall(r"\w+", " ".join(texts))
    tokenizer.train_from_iterator([*texts, *words, *(ROLES * len(texts))], trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The files that AutoTokenizer and mlx_lm read from a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def render(row: Row) -> tuple[str, str]:
    """(prompt, reply) as ChatML text; equal to what the chat template writes."""
    messages = [*row.context, ("user", row.prompt)]
    prompt = "".join(f"{START}{role}\n{text}{END}\n" for role, text in messages)
    return f"{prompt}{START}assistant\n", f"{row.reply}{END}"


def encode_rows(tokenizer: Tokenizer, rows: list[Row]) -> list[tuple[list[int], int, int]]:
    """For every row its tokens, the number of prompt tokens among them, and its side."""
    prompts, replies = zip(*(render(row) for row in rows), strict=True)
    pairs = zip(
        tokenizer.encode_batch(list(prompts)),
        tokenizer.encode_batch(list(replies)),
        (row.side for row in rows),
        strict=True,
    )
    return [(a.ids + b.ids, len(a.ids), side) for a, b, side in pairs]
