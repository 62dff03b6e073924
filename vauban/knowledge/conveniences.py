"""The methods of `Editor` that call functions of later rooms, one line each.

With `vauban.edits.conveniences` the only file of the package that imports from its right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Conveniences:
    """Mixed into `Editor`; every method passes the editor on to the function that it names."""

    def export(
        self: Any,
        model_path: str | Path,
        output_dir: str | Path,
        precision: str | None = None,
        force: bool = False,
    ) -> Path:
        """Write the edited model as a folder that `mlx_lm.load` opens, with its ledger beside it.

        `precision` None or "same": packed matrices are packed again in their own format, exactly
        along the edited keys; "8bit" and "float" name another format for the edited ones.
        """
        from vauban.export.fact_edits import export_facts

        return export_facts(self, model_path, output_dir, precision, force=force)
