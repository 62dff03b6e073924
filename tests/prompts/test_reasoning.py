"""Reasoning blocks in prompts and answers, on texts and on real tokenizers."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.prompts.conftest import CHATML
from vauban.prompts import (
    decode_answer,
    encode_chat,
    open_reasoning,
    split_reasoning,
    strip_thinking,
)

Make = Callable[..., PreTrainedTokenizerFast]
OPENED = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Plain  answer ", "Plain  answer "),
        ("<think>\nA\n</think>\n\nB", "B"),
        ("\n<think>A</think>B", "B"),
        ("<think>A", ""),
        ("<think></think><think>A</think> B", "B"),
        ("A, so B.\n</think>\n\nC", "C"),
        ("A</think>B </think> C", "B </think> C"),
        ("A</think>Use <channel|> here", "Use <channel|> here"),
        ("See <think>A</think> B", "See <think>A</think> B"),
        ("<think>A</think>Use </longcat_think> here", "Use </longcat_think> here"),
        ("<longcat_think>A</longcat_think>B", "B"),
        ("<|channel>thought\nA<channel|>B", "B"),
        ("<|channel|>analysis<|message|>A<|end|><|channel|>final<|message|>B", "B"),
    ],
)
def test_strip_thinking(text: str, answer: str) -> None:
    assert strip_thinking(text) == answer


@given(st.text(st.characters(exclude_characters="<")), st.text(st.characters(codec="ascii")))
def test_strip_thinking_leaves_the_answer_behind_a_block(thought: str, answer: str) -> None:
    if "<" in answer:
        answer = answer.replace("<", "")
    assert strip_thinking(f"<think>{thought}</think>{answer}") == answer.lstrip()


def test_reasoning_that_was_cut_off_is_told_from_none() -> None:
    assert split_reasoning("<think>They want") == ("They want", "", False)
    assert split_reasoning("They want") == ("", "They want", True)
    assert split_reasoning("<think>A</think><think>B") == ("AB", "", False)


def test_a_prompt_that_opens_the_reasoning_is_recognised(make_tokenizer: Make) -> None:
    for template, opened in (("chatml", ""), ("qwen3", ""), (OPENED, "<think>")):
        tokenizer = make_tokenizer(template)
        assert open_reasoning(tokenizer, encode_chat(tokenizer, "Name one river")) == opened
    # What the user writes is no reasoning of the model's.
    tokenizer = make_tokenizer("chatml")
    assert (
        open_reasoning(tokenizer, encode_chat(tokenizer, "What does <think> mean? <think>")) == ""
    )


def test_an_answer_keeps_the_marks_of_its_reasoning(make_tokenizer: Make) -> None:
    """Also where they are special tokens, which decoding would drop."""
    tokenizer = make_tokenizer(OPENED)
    assert "<think>" in tokenizer.all_special_tokens or "<think>" in tokenizer.get_vocab()
    prompt = encode_chat(tokenizer, "Name one river")

    def decoded(text: str) -> str:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return decode_answer(tokenizer, prompt, ids)

    assert decoded("I cannot say") == "<think>I cannot say"
    answer = decoded("I cannot say</think>\n\nIt is one.</s>")
    assert answer == "<think>I cannot say</think>\n\nIt is one."
    assert split_reasoning(answer) == ("I cannot say", "It is one.", True)
    plain = make_tokenizer("chatml")
    ids = plain.encode("<think>Is it?</think>It is.<|im_end|>", add_special_tokens=False)
    text = decode_answer(plain, encode_chat(plain, "a"), ids)
    assert strip_thinking(text) == "It is."
    ids = plain.encode(" It is.<|im_end|>", add_special_tokens=False)
    assert decode_answer(plain, encode_chat(plain, "a"), ids) == "It is."
