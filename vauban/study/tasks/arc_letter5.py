"""Which questions the task file beside this one keeps. Loaded by lm-eval, knows nothing else."""

from typing import Any


def four_choices(rows: Any) -> Any:
    """The questions that have exactly four choices; the others cannot be answered A to D."""
    return rows.filter(lambda row: len(row["choices"]["text"]) == 4)
