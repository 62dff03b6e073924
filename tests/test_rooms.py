"""The house: one direction of imports between the rooms, and a package that opens lightly."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import vauban

PACKAGE = Path(vauban.__file__).parent
ORDER = (
    *("prompts", "interventions", "models", "activations", "directions", "edits", "knowledge"),
    *("evaluation", "export", "report", "config", "pipeline", "study", "quick", "cli"),
)
# EditPlan.export is a lazy call into the room that writes checkpoints.
ALLOWED_BACKWARDS = {("edits", "export")}


def _imported_rooms(path: Path) -> list[tuple[str, int, bool]]:
    """(room, line, whether the import stands inside a function) for every import of a room."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = "vauban" if node.level else ""
            if node.level:
                parts = path.relative_to(PACKAGE.parent).parts[: -node.level]
                package = ".".join(parts)
            base = ".".join(filter(None, (package, node.module)))
            # `from vauban import models` names a room as well as `from vauban.models import x`.
            names = [base] + [f"{base}.{alias.name}" for alias in node.names if base == "vauban"]
        for name in names:
            parts = name.split(".")
            if parts[0] == "vauban" and len(parts) > 1 and parts[1] in ORDER:
                found.append((parts[1], node.lineno, id(node) in lazy))
    return found


def test_every_room_is_in_the_order():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"data"}
    assert rooms <= set(ORDER), f"rooms without a place in the order: {rooms - set(ORDER)}"


def test_a_room_imports_only_from_its_left():
    wrong = []
    for path in sorted(PACKAGE.glob("*/**/*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        if room not in ORDER:
            continue
        for imported, line, lazy in _imported_rooms(path):
            if ORDER.index(imported) <= ORDER.index(room):
                continue
            if (room, imported) in ALLOWED_BACKWARDS and lazy:
                continue
            wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_names_at_the_top_exist_where_they_are_said_to_be():
    missing = [name for name in vauban.__all__ if not hasattr(vauban, name)]
    assert not missing


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def test_importing_vauban_loads_nothing_heavy():
    heavy = "mlx_lm transformers pydantic matplotlib"
    code = f"import sys, vauban\nprint(*[n for n in '{heavy}'.split() if n in sys.modules])"
    assert _run(code).strip() == ""


def test_help_imports_neither_mlx_nor_models_and_answers_at_once():
    code = (
        "import sys\n"
        "from vauban.cli import main\n"
        "assert main(['--help']) == 0\n"
        "print('LOADED', *[n for n in ('mlx.core', 'mlx_lm', 'transformers') if n in sys.modules])"
    )
    assert _run(code).strip().endswith("LOADED")
    spans = []
    # Processor time, and the best of several: other processes share the machine.
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "vauban", "--help"], capture_output=True, check=True, timeout=60
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spans.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if spans[-1] < 0.5:
            break
    assert min(spans) < 0.5


def test_only_the_command_line_prints():
    printing = []
    for path in sorted(PACKAGE.glob("**/*.py")):
        parts = path.relative_to(PACKAGE).parts
        if parts[0] == "cli" or path.name == "__main__.py" or parts[0] == "data":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "print"
            ):
                printing.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not printing
