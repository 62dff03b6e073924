"""The course's pages have one skeleton, and pictures for both schemes that load fast."""

import re

import pytest

from tests.docs.blocks import ROOT, run_blocks

COURSE = ROOT / "docs" / "course"
PARTS = sorted(COURSE.glob("*.md"))


@pytest.mark.parametrize("page", PARTS, ids=lambda page: page.name)
def test_a_part_asks_a_question_and_ends_with_solved_exercises(page):
    text = page.read_text(encoding="utf-8")
    question = text.split("\n\n")[1]
    assert question.startswith("**") and question.endswith("?**"), "the question comes first"
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings[-3:] == ["What to remember", "Exercises", "Next"]
    exercises = text.split("## Exercises")[1].split("## Next")[0]
    titles = re.findall(r"^\*\*(\d)\.", exercises, re.M)
    assert titles == [str(n + 1) for n in range(len(titles))] and 3 <= len(titles) <= 5
    solutions = re.split(r"^\*\*\d\.", exercises, flags=re.M)[1:]
    assert all('??? success "Solution"\n' in s and "    ```python\n" in s for s in solutions)


@pytest.mark.parametrize("page", PARTS, ids=lambda page: page.name)
def test_its_pictures_come_in_light_and_dark(page):
    text = page.read_text(encoding="utf-8")
    pictures = re.findall(
        r"!\[(.+)\]\(\.\./assets/course/(\S+)-(light|dark)\.(\w+)#only-(\w+)\)", text
    )
    assert pictures and len(pictures) == text.count("![")
    for light, dark in zip(pictures[::2], pictures[1::2], strict=True):
        assert light[1] == dark[1] and (light[2], dark[2]) == ("light", "dark")
    for _, name, scheme, kind, shown in pictures:
        assert scheme == shown
        assert (
            COURSE.parent / "assets/course" / f"{name}-{scheme}.{kind}"
        ).stat().st_size < 150_000


@pytest.mark.parametrize("page", PARTS, ids=lambda page: page.name)
def test_its_code_runs_solutions_included(page, tmp_path, monkeypatch, capsys, environment):
    monkeypatch.chdir(tmp_path)
    run_blocks(page, tmp_path, environment)
