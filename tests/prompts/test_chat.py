"""The one path to token ids, against real tokenizers and the templates models come with."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from vauban.errors import InputError, VaubanWarning
from vauban.prompts import (
    common_prefix,
    conversation_text,
    encode_chat,
    has_chat_template,
    post_instruction_positions,
    template_variables,
    use_template_args,
)

Make = Callable[..., PreTrainedTokenizerFast]
WRAPPERS = [pytest.param(lambda t: t, id="transformers"), pytest.param(TokenizerWrapper, id="mlx")]
PROMPT = "How do I sharpen a chisel?"
HEADER = "<|im_end|>\n<|im_start|>assistant\n"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("chatml", f"<|im_start|>user\n{PROMPT}{HEADER}"),
        ("llama2", f"<s>[INST] {PROMPT} [/INST]"),
        ("qwen3", f"<|im_start|>user\n{PROMPT}{HEADER}{EMPTY_THOUGHT}"),
    ],
)
def test_the_template_is_applied_once(
    make_tokenizer: Make, wrap: Callable[[Any], Any], template: str, text: str
) -> None:
    tokenizer = make_tokenizer(template)
    # The tokenizer itself adds a BOS, so encoding the rendered text plainly doubles Llama's.
    assert tokenizer.encode(text)[0] == tokenizer.bos_token_id
    ids = encode_chat(wrap(tokenizer), PROMPT)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert type(ids) is list and all(type(token) is int for token in ids)
    assert ids == encode_chat(wrap(tokenizer), [{"role": "user", "content": PROMPT}])


def test_a_doubled_bos_is_taken_off_wherever_it_comes_from(make_tokenizer: Make) -> None:
    class AddsSpecialTokens(PreTrainedTokenizerFast):
        """As some remote tokenizers do: renders, then encodes with special tokens, as a batch."""

        def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
            options.update(tokenize=False)
            text = PreTrainedTokenizerFast.apply_chat_template(self, conversation, **options)
            return self([text])

    plain = make_tokenizer("llama2")
    other = AddsSpecialTokens(
        tokenizer_object=plain.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=plain.chat_template,
    )
    raw = other.apply_chat_template([{"role": "user", "content": PROMPT}])["input_ids"][0]
    assert raw[:2] == [plain.bos_token_id] * 2
    assert encode_chat(other, PROMPT) == encode_chat(plain, PROMPT) == raw[1:]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_thinking_is_off_unless_asked_for(make_tokenizer: Make, wrap: Callable[[Any], Any]) -> None:
    tokenizer = make_tokenizer("qwen3")
    closed = encode_chat(wrap(tokenizer), PROMPT)
    assert tokenizer.decode(closed).endswith(HEADER + EMPTY_THOUGHT)
    assert closed == encode_chat(wrap(tokenizer), PROMPT, enable_thinking=False)
    opened = encode_chat(wrap(tokenizer), PROMPT, enable_thinking=True)
    assert tokenizer.decode(opened).endswith(HEADER)


@pytest.mark.parametrize(
    ("template", "switch"),
    [
        ("chatml", {}),
        ("qwen3", {"enable_thinking": False}),
        ("{{ messages[0].content }}{% if thinking %}x{% endif %}", {"thinking": False}),
        ("{{ messages[0].content }}{{ thinking is defined }}", {"thinking": False}),
        # A field of a message, as OpenAI's gpt-oss has it, is no switch.
        ("{% for m in messages %}{{ m.content }}{{ m.thinking is defined }}{% endfor %}", {}),
    ],
)
def test_the_switch_is_given_only_to_templates_that_know_it(
    make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch, template: str, switch: dict[str, bool]
) -> None:
    tokenizer = make_tokenizer(template)
    original, seen = tokenizer.apply_chat_template, {}

    def spy(*args: Any, **options: Any) -> Any:
        seen.update(options)
        return original(*args, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", spy)
    encode_chat(tokenizer, "a")
    assert {key: value for key, value in seen.items() if "thinking" in key} == switch


def test_renderers_in_python_are_asked_for_no_thinking(make_tokenizer: Make) -> None:
    def render(messages: Any, add_generation_prompt: bool, enable_thinking: bool) -> str:
        return f"<s>{messages[-1]['content']}|{add_generation_prompt}|{enable_thinking}"

    tokenizer = TokenizerWrapper(make_tokenizer(None), chat_template=render)
    assert tokenizer.decode(encode_chat(tokenizer, "a")) == "<s>a|True|False"
    assert tokenizer.decode(encode_chat(tokenizer, "a", enable_thinking=True)) == "<s>a|True|True"

    class OwnRenderer(PreTrainedTokenizerFast):
        def apply_chat_template(
            self, conversation: Any, thinking: bool = True, **options: Any
        ) -> Any:
            return self.encode(f"{conversation[-1]['content']}|{thinking}")

    own = OwnRenderer(tokenizer_object=make_tokenizer(None).backend_tokenizer, bos_token="<s>")
    for one in (own, TokenizerWrapper(own)):
        assert has_chat_template(one)
        assert own.decode(encode_chat(one, "a"), skip_special_tokens=True) == "a|False"
        assert own.decode(encode_chat(one, "a", thinking=True), skip_special_tokens=True) == (
            "a|True"
        )


def test_conversations_and_the_generation_prompt(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name one river."},
        {"role": "assistant", "content": "Rio"},
    ]
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName one river.<|im_end|>\n"
    asked = encode_chat(tokenizer, turns[:2])
    answered = encode_chat(tokenizer, tuple(turns))
    assert tokenizer.decode(asked) == start + "<|im_start|>assistant\n"
    assert tokenizer.decode(answered) == start + "<|im_start|>assistant\nRio<|im_end|>\n"
    bare = encode_chat(tokenizer, turns[:2], add_generation_prompt=False)
    assert tokenizer.decode(bare) == start
    prefill = encode_chat(tokenizer, turns, continue_final_message=True)
    assert tokenizer.decode(prefill) == start + "<|im_start|>assistant\nRio"
    other = encode_chat(tokenizer, turns, chat_template="{{ messages | length }}")
    assert tokenizer.decode(other) == "3"


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_template_that_rejects_a_role_is_an_input_error(
    make_tokenizer: Make, wrap: Callable[[Any], Any]
) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(InputError, match=r"the roles system, user: no system role here\. Many"):
        encode_chat(wrap(make_tokenizer("llama2")), turns)
    named = make_tokenizer("llama2")
    named.name_or_path = "org/name"
    with pytest.raises(InputError, match="the chat template of org/name rejects"):
        encode_chat(wrap(named), turns)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ([], "a list of messages that is not empty"),
        (7, "expected a text or a list of messages"),
        ([{"role": "user"}], "message 0 is {'role': 'user'}; expected a mapping with role"),
        ([{"role": "user", "content": "a"}, "b"], "message 1 is 'b'"),
    ],
)
def test_messages_of_the_wrong_form(make_tokenizer: Make, given_: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        encode_chat(make_tokenizer("chatml"), given_)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["tokenize", "return_dict", "return_tensors"])
def test_the_form_of_the_result_is_fixed(make_tokenizer: Make, name: str) -> None:
    with pytest.raises(InputError, match=f"leave out '{name}'"):
        encode_chat(make_tokenizer("chatml"), PROMPT, **{name: True})


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_without_a_template_the_text_is_encoded_plainly_and_that_is_said_once(
    make_tokenizer: Make, wrap: Callable[[Any], Any]
) -> None:
    inner = make_tokenizer(None)
    tokenizer = wrap(inner)
    assert not has_chat_template(tokenizer)
    with pytest.warns(VaubanWarning, match="has no chat template"):
        ids = encode_chat(tokenizer, PROMPT)
    assert ids == inner.encode(PROMPT) and ids[0] == inner.bos_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turns = [{"role": "system", "content": "A"}, {"role": "user", "content": "B"}]
        assert encode_chat(wrap(inner), turns) == inner.encode("A\n\nB")
        assert encode_chat(tokenizer, "<s>B") == inner.encode("B")
        assert post_instruction_positions(tokenizer) == (-1,)
        with pytest.raises(InputError, match="takes texts only"):
            encode_chat(tokenizer, [{"role": "user", "content": ["B"]}])
    with pytest.warns(VaubanWarning, match="has no chat template"):
        encode_chat(wrap(make_tokenizer(None)), PROMPT)


def test_asking_for_positions_says_nothing_about_a_missing_template(make_tokenizer: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert post_instruction_positions(make_tokenizer(None)) == (-1,)


def test_long_things_are_shown_short(make_tokenizer: Make) -> None:
    with pytest.raises(InputError) as caught:
        encode_chat(make_tokenizer("chatml"), [["x" * 1000]])
    assert "message 0 is ['xxx" in str(caught.value) and len(str(caught.value)) < 250


def test_a_prompt_without_tokens_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(None, bos=False)
    with (
        pytest.warns(VaubanWarning, match="no chat template"),
        pytest.raises(InputError, match="'' gives no tokens"),
    ):
        encode_chat(tokenizer, "")


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize(
    ("template", "suffix"),
    [
        ("chatml", HEADER),
        ("llama2", " [/INST]"),
        ("qwen3", HEADER + EMPTY_THOUGHT),
        ("turns", "Assistant:"),
    ],
)
def test_post_instruction_positions_hold_the_template_and_nothing_of_the_prompt(
    make_tokenizer: Make, wrap: Callable[[Any], Any], template: str, suffix: str
) -> None:
    tokenizer = make_tokenizer(template)
    positions = post_instruction_positions(wrap(tokenizer))
    assert positions == tuple(range(-len(positions), 0))
    # In "turns" the newline behind the message merges with a full stop but not with a letter.
    for prompt in ("Snow", "Is it hard?", "It melts.", "42"):
        ids = encode_chat(tokenizer, prompt)
        assert tokenizer.decode([ids[p] for p in positions]) == suffix


def test_post_instruction_positions_follow_the_template_arguments(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("qwen3")
    thinking = post_instruction_positions(tokenizer, enable_thinking=True)
    ids = encode_chat(tokenizer, PROMPT, enable_thinking=True)
    assert tokenizer.decode([ids[p] for p in thinking]) == HEADER
    tail = "{{ messages[0].content }} [/INST]"
    assert len(post_instruction_positions(make_tokenizer(None), chat_template=tail)) == len(
        make_tokenizer(None).encode(" [/INST]", add_special_tokens=False)
    )


def test_templates_with_nothing_behind_the_message(make_tokenizer: Make) -> None:
    assert post_instruction_positions(make_tokenizer("[INST] {{ messages[0].content }}")) == (-1,)
    with pytest.raises(InputError, match="leaves out the user's message"):
        post_instruction_positions(make_tokenizer("[INST] [/INST]"))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1), min_size=1, max_size=5))
def test_common_prefix_is_the_longest_that_leaves_every_list_a_token(
    rows: list[list[int]],
) -> None:
    length = common_prefix(rows)
    shortest = min(map(len, rows))
    assert 0 <= length <= shortest - 1
    assert all(row[:length] == rows[0][:length] for row in rows)
    if length < shortest - 1:
        assert len({row[length] for row in rows}) > 1


def test_common_prefix_of_nothing() -> None:
    assert common_prefix([]) == common_prefix([[], [1]]) == 0


def test_a_conversation_as_text_names_its_roles() -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who?"},
    ]
    assert conversation_text(turns) == "User: Hi\n\nAssistant: Hello.\n\nUser: Who?"
    assert conversation_text(turns[:1]) == conversation_text("Hi") == "Hi"


def test_importing_the_room_loads_no_heavy_library() -> None:
    code = (
        "import sys, vauban.prompts; "
        "print([m for m in ('transformers', 'datasets', 'mlx_lm', 'mlx.core', 'numpy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_arguments_of_the_template_hold_for_every_later_prompt(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("qwen3")
    silent = encode_chat(tokenizer, "Name one river")
    assert template_variables(tokenizer) >= {"enable_thinking"}
    use_template_args(tokenizer, {"enable_thinking": True})
    thinking = encode_chat(tokenizer, "Name one river")
    assert thinking != silent and thinking == silent[: len(thinking)]
    assert encode_chat(tokenizer, "Name one river", enable_thinking=False) == silent
    use_template_args(tokenizer, {})
    assert encode_chat(tokenizer, "Name one river") == silent


def test_unknown_template_arguments_are_named(make_tokenizer: Make) -> None:
    with pytest.raises(InputError, match=r"does not read 'enable_thought'; it reads: .*thinking"):
        use_template_args(make_tokenizer("qwen3"), {"enable_thought": True})
    with pytest.raises(InputError, match="does not read 'tokenize'"):
        use_template_args(make_tokenizer("qwen3"), {"tokenize": False})
    with pytest.raises(InputError, match="does not read"):
        use_template_args(make_tokenizer(None), {"enable_thinking": True})
