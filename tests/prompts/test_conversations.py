"""Prompts of several messages in files, and the system message of a tokenizer."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from vauban.errors import InputError
from vauban.prompts import (
    encode_chat,
    instruction_end,
    load_labelled_prompts,
    load_prompts,
    post_instruction_positions,
    resolve_prompts,
    use_system_prompt,
)

Make = Callable[..., PreTrainedTokenizerFast]
TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Name a river."},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def write(path: Path, *rows: Any) -> Path:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_a_file_holds_prompts_and_conversations(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "Name a colour."}, {"messages": TALK, "note": 1})
    plain, talk = load_prompts(file)
    assert plain == "Name a colour." and list(talk) == TALK
    assert {talk: 1}[tuple(talk)] == 1  # hashable, as a text is
    assert pickle.loads(pickle.dumps(talk)) == talk
    assert resolve_prompts(file) == resolve_prompts([plain, TALK]) == [plain, talk]
    assert load_prompts(write(tmp_path, {"messages": TALK})) == [talk]


def test_labelled_rows_write_what_they_read(tmp_path: Path) -> None:
    row = {"messages": TALK, "label": "harmless", "kind": "task"}
    (read,) = load_labelled_prompts(write(tmp_path, row))
    assert list(read.prompt) == TALK and read.kind == "task"
    assert json.loads(json.dumps(read.to_dict())) == row


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "'messages' is []"),
        ("Hi", "'messages' is 'Hi'"),
        (TALK[:2], "the last message is the assistant's"),
        ([TALK[0], SYSTEM, TALK[2]], "message 2: a system message has to be the first"),
        ([{"role": "wizard", "content": "x"}], "message 1: role 'wizard'; expected one of system"),
        ([{"role": "user", "content": " "}], "message 1: content ' '; expected a text"),
        ([{"role": "user"}], "message 1 is {'role': 'user'}; expected a role and a content"),
        ([{"role": ["user"], "content": "x"}], "message 1: role"),
    ],
)
def test_messages_of_the_wrong_form_name_file_and_line(
    tmp_path: Path, messages: Any, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_prompts(write(tmp_path, {"messages": TALK}, {"messages": messages}))
    assert "rows.jsonl, line 2: " in str(caught.value) and said in str(caught.value)


def test_a_system_prompt_holds_for_every_later_prompt_that_has_none(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    bare = encode_chat(tokenizer, "Name a river.")
    asked = encode_chat(tokenizer, [SYSTEM, {"role": "user", "content": "Name a river."}])
    use_system_prompt(tokenizer, "Be brief.")
    assert encode_chat(tokenizer, "Name a river.") == asked != bare
    assert encode_chat(tokenizer, TALK) == encode_chat(tokenizer, [SYSTEM, *TALK])
    other = [{"role": "system", "content": "Be long."}, *TALK]
    assert "Be long" in tokenizer.decode(encode_chat(tokenizer, other))
    assert "Be brief" not in tokenizer.decode(encode_chat(tokenizer, other))
    assert encode_chat(tokenizer, "Name a river.", system_prompt=False) == bare
    use_system_prompt(tokenizer, None)
    assert encode_chat(tokenizer, "Name a river.") == bare


def test_a_template_without_system_role_is_refused_in_its_own_words(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + tokenizer.chat_template
    )
    with pytest.raises(InputError, match="roles system, user: System role not supported"):
        use_system_prompt(tokenizer, "Be brief.")
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(InputError, match="leaves out system messages"):
        use_system_prompt(tokenizer, "Be brief.")
    with pytest.raises(InputError, match="expected a text that is not empty"):
        use_system_prompt(tokenizer, " ")
    assert "Be brief" not in tokenizer.decode(encode_chat(tokenizer, "Hello"))


def test_the_instruction_ends_before_the_templates_tokens(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    end = instruction_end(tokenizer)
    assert end == min(post_instruction_positions(tokenizer)) - 1
    for prompt in ("Name a river in Chile", TALK):
        assert tokenizer.decode([encode_chat(tokenizer, prompt)[end]]).strip() in (
            "Chile",
            ".",
            "e",
        )
    tokenizer.chat_template = None
    assert instruction_end(tokenizer) == -1
