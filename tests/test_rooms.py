"""The house: one direction of imports, no circle, no long file, a package that opens lightly."""

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vauban

PACKAGE = Path(vauban.__file__).parent
ORDER = (
    *("prompts", "interventions", "claims", "models", "generation", "activations", "directions"),
    *("rounding", "edits", "knowledge", "evaluation", "search", "export", "comparison", "report"),
    *("config", "pipeline", "study", "quick", "cli"),
)
ROOMS = [
    path.parent for path in sorted(PACKAGE.glob("*/__init__.py")) if path.parent.name != "data"
]
FILES = [path for path in sorted(PACKAGE.glob("**/*.py")) if "data" not in path.parts]
# The methods of EditPlan and of Editor that call functions on their right, a line each.
CONVENIENCES = ("vauban.edits.conveniences", "vauban.knowledge.conveniences")
LONGEST = 350


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path, *, types: bool = True) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of vauban's own, wherever it stands.

    `vauban.name` of the package's lazy front counts as an import of the module that defines it.
    Without `types` what only a type checker reads does not count.
    """
    home = vauban._HOME
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name their package in full"
            base = node.module or ""
            names = [
                f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names
            ]
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "vauban":
            names = [home[node.attr]] if node.attr in home else []
        else:
            continue
        yield from ((n, node.lineno) for n in names if n in MODULES and n != "vauban")


def room_of(module: str) -> int:
    """The place of a module's room in the order; files beside the rooms come before all of them."""
    parts = module.split(".")
    return ORDER.index(parts[1]) if len(parts) > 1 and parts[1] in ORDER else -1


def test_every_room_is_in_the_order() -> None:
    assert {room.name for room in ROOMS} <= set(ORDER)


def test_a_room_imports_only_from_its_left() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {imported}"
        for module, path in MODULES.items()
        if module not in ("vauban", "vauban.__main__", *CONVENIENCES)
        for imported, line in imports(path)
        if room_of(imported) > room_of(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_in_a_circle() -> None:
    graph = {
        module: {imported for imported, _ in imports(path, types=False)} - {module}
        for module, path in MODULES.items()
        if module not in ("vauban", *CONVENIENCES)
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_file_is_too_long_to_read_in_one_sitting() -> None:
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in FILES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert not long


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_rooms_first_page_lists_its_files(room: Path) -> None:
    """In reading order, a line each."""
    page = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    _, _, listing = page.partition("In reading order:\n")
    names = (re.match(r"\s*([a-z_]+(?:, [a-z_]+)*)  ", line) for line in listing.splitlines())
    listed = [name for match in names if match for name in match[1].split(", ")]
    files = {p.stem for p in room.glob("*.py")} - {"__init__", "__main__"}
    files |= {p.parent.name for p in room.glob("*/__init__.py")}
    assert sorted(listed) == sorted(files)


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
