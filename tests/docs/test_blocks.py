"""What the reader of a page's code takes for a block."""

from pathlib import Path

import pytest

from tests.docs.blocks import blocks_of, run_blocks

PAGE = """# A page

```python
total = 1
```

- A list may show code that is no step:

    ```python
    raise SystemExit("shown only")
    ```

??? success "Solution"
    Words first.

    ```python
    for _ in range(2):

        total += 1
    ```

```python
assert total == 3
```

??? success "The last one"
    ```python
    {last}
    ```
"""


def test_blocks_in_folded_solutions_run_in_their_order(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("{last}", "total += 1"), encoding="utf-8")
    assert [code.splitlines()[0] for _, code in blocks_of(page)] == [
        "total = 1",
        "for _ in range(2):",
        "assert total == 3",
        "total += 1",
    ]
    run_blocks(page, tmp_path)


def test_a_wrong_solution_fails_even_as_the_pages_last_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = PAGE.replace("{last}", "assert total == 4").rstrip("\n")
    page.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError):
        run_blocks(page, tmp_path)
