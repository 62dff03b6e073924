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
    reasoning_marks,
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
        ("<|channel|>analysis<|message|>A<|channel|>final <|constrain|>json<|message|>B", "B"),
        ("<|channel|>analysis<|message|>A<|channel|>commentary<|message|>A", ""),
        ("analysisThey greet me.assistantfinalB", "B"),
        ("analysisThey greet me.", ""),
        ("[THINK]A[/THINK]B", "B"),
        ("<thinking>A</thinking>\n\nB", "B"),
        ("<seed:think>A</seed:think>B", "B"),
        ("A</seed:think>B", "B"),
        ("◁think▷A◁/think▷B", "B"),
        ("<thought>\nA\n</thought>\n\nB", "B"),
        ("<|START_THINKING|>A<|END_THINKING|>B", "B"),
        ("<|inner_prefix|>A<|inner_suffix|>B", "B"),
        ("<think>A</think><answer>B</answer>", "B"),
        ("Here is my thought process: A Here is my response: B", "B"),
        ("Use <answer> tags", "Use <answer> tags"),
        ("analysis of the text: it rhymes", "analysis of the text: it rhymes"),
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


def test_marks_are_found_in_a_tokenizer_and_its_template(make_tokenizer: Make) -> None:
    """By what they say, not by the model's name."""
    assert ("<think>", "</think>") in reasoning_marks(make_tokenizer("chatml"))
    tokenizer = make_tokenizer(
        CHATML.replace("assistant\n{%", "assistant\n[THINK]{% set c = '[/THINK]' %}{%")
    )
    assert ("[THINK]", "[/THINK]") in reasoning_marks(tokenizer)
    assert open_reasoning(tokenizer, encode_chat(tokenizer, "Name one river")) == "[THINK]"
    # Two tokens that no list of marks holds.
    tokenizer.add_tokens(["<|deep_reason_start|>", "<|deep_reason_end|>"], special_tokens=True)
    assert ("<|deep_reason_start|>", "<|deep_reason_end|>") in reasoning_marks(tokenizer)
    ids = tokenizer.encode(
        "<|deep_reason_start|>I cannot say<|deep_reason_end|>It is one.</s>",
        add_special_tokens=False,
    )
    plain = encode_chat(make_tokenizer("chatml"), "a")
    assert decode_answer(tokenizer, plain, ids) == "<think>I cannot say</think>It is one."
