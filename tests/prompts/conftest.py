"""Real small tokenizers: a byte-level BPE under the chat templates that models come with."""

from collections.abc import Callable

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes the BOS token itself and knows no system role.
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
PLAIN_TURNS = "{% for m in messages %}User: {{ m.content }}\nAssistant:{% endfor %}"
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "qwen3": QWEN3, "turns": PLAIN_TURNS, None: None}

SENTENCES = [
    "user assistant system [INST] [/INST] User: Assistant:",
    "Name one river in Peru",
    "Is seven a prime number?",
    "Write a line about snow.\nIt falls.\nIt melts.\n",
    "How do I sharpen a chisel?\nIs it hard?\n",
]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """make(template, bos=True): a tokenizer; `template` a name of TEMPLATES or a Jinja text."""

    def make(template: str | None, *, bos: bool = True) -> PreTrainedTokenizerFast:
        bpe = Tokenizer(models.BPE())
        # Punctuation and a newline behind it become one word, as in Llama 3 and Qwen.
        words = Regex(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*|\s+")
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator(SENTENCES * 4, trainer)
        if bos:
            bpe.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token="<s>",
            eos_token="</s>",
            chat_template=TEMPLATES.get(template, template),
        )

    return make
