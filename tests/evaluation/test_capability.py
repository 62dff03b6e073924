"""The small capability set: what counts as right, and programs that are run."""

import time
from typing import Any

import pytest

import vauban
from vauban._paths import data_dir
from vauban.evaluation.capability import KINDS, names
from vauban.evaluation.run_program import is_harmless, passes, program_in
from vauban.prompts.records import read_objects

ROWS = [row for _, row in read_objects(data_dir() / "prompts" / "capability.jsonl")]


def test_no_task_says_its_own_answer() -> None:
    for row in ROWS:
        for expected in row.get("answer", ()):
            assert not names(row["prompt"], expected), row["prompt"]


def test_arithmetic_is_right() -> None:
    signs = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}
    for row in (row for row in ROWS if row["kind"] == "arithmetic"):
        _, _, a, sign, b, *_ = row["prompt"].replace("?", "").split()
        assert row["answer"] == [str(signs[sign](int(a), int(b)))]


SOLUTIONS = {
    "is_even": "return n % 2 == 0",
    "reverse": "return text[::-1]",
    "factorial": "return 1 if n == 0 else n * factorial(n - 1)",
    "clamp": "return max(low, min(high, x))",
    "gcd": "import math\n    return math.gcd(a, b)",
    "chunks": "return [items[i:i + size] for i in range(0, len(items), size)]",
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_right_program_passes_and_a_wrong_one_does_not(name: str) -> None:
    row = next(row for row in ROWS if f"def {name}(" in row["prompt"])
    head = row["prompt"].split("```python\n")[1].split("```")[0]
    answer = f"Here it is:\n\n```python\n{head}    {SOLUTIONS[name]}\n```\nIt works."
    assert passes(answer, row["tests"])
    assert not passes(answer.replace(SOLUTIONS[name], "return None"), row["tests"])
    assert not passes("I cannot do that.", row["tests"])


def test_programs_that_reach_out_or_never_end_do_not_pass() -> None:
    for program in (
        "import os\ndef f(): return 1",
        "from subprocess import run\ndef f(): return 1",
        "def f(): return open('x').read()",
        "def f(): return ().__class__",
        "def f(): return __builtins__",
        "import re\ndef f(): return re.enum.sys.modules",
        "def f(:",
    ):
        assert not is_harmless(program)
        assert not passes(program, ["f() == 1"])
    start = time.monotonic()
    assert not passes("def f():\n    while True: pass", ["f() == 1"])
    assert time.monotonic() - start < 30
    assert not passes("def f():\n    return [0] * 10**11", ["f()"])


def test_the_program_of_an_answer_is_found() -> None:
    assert program_in("```py\nx = 1\n```\ntext\n```\ny = 2\n```") == "x = 1\n"
    assert program_in("Sure. This is it:\ndef f():\n    return 1") == "def f():\n    return 1"
    assert program_in("```python\ndef f():\n    return") == "def f():\n    return"


def test_names_are_words_of_their_own() -> None:
    assert names("The symbol is Au.", "Au") and not names("August", "Au")
    assert names("= **85**", "85") and not names("185", "85") and not names("85.5", "85")
    assert names("−3 or -3", "3") is False


def test_a_change_that_breaks_a_model_breaks_its_tasks(organism: Any) -> None:
    """The organism knows none of these; what counts is that nothing passes by chance."""
    model, tokenizer = organism
    found = vauban.measure_capability(model, tokenizer, limit=3, max_tokens=8)
    assert found.n == dict.fromkeys(KINDS, 3) and len(found.right) == len(found.answers) == 9
    assert sum(found.right) == sum(found.correct.values())
    assert found.rate("code") == 0.0 and found.interval("code")[1] < 0.6
    assert found.summary().startswith("arithmetic")
