"""The docstrings: their examples run, and every public name has one, with errors and shapes."""

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path

import pytest

import vauban
from vauban import quick

PACKAGE = Path(vauban.__path__[0])
MODULES = sorted(
    "vauban." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8") and path.name != "__init__.py"
)
PUBLIC = sorted(
    [(vauban, name) for name in vauban.__all__] + [(quick, name) for name in quick.__all__],
    key=lambda pair: (pair[1], pair[0].__name__),
)
IDS = [f"{owner.__name__.removeprefix('vauban.')}.{name}" for owner, name in PUBLIC]
# (n, d), (L+1, P, d), (d,), (..., in): short names between commas, one of them with a letter.
SHAPE = re.compile(r"\((?=[^()]*[A-Za-z])(?:[\w+'./-]{1,6}, ?)+(?:[\w+'./-]{1,6})?\)")
# Arguments that are arrays whatever their annotation says.
ARRAYS = {"X", "y", "keys", "residuals", "update", "weight", "refusal_direction"}


def value_of(owner: object, name: str) -> object:
    """The public object; the function of a module that can be called."""
    value = getattr(owner, name)
    return type(value).__call__ if inspect.ismodule(value) else value


def text_of(owner: object, name: str) -> str:
    """The docstring; of a constant, which has none of its own, the text below its assignment."""
    value = value_of(owner, name)
    if callable(value):
        return inspect.getdoc(value) or ""
    home = importlib.import_module(vauban._HOME[name])
    for module in (home, *map(importlib.import_module, MODULES)):
        body = ast.parse(inspect.getsource(module)).body
        for line, below in pairwise(body):
            target = line.target if isinstance(line, ast.AnnAssign) else None
            if isinstance(line, ast.Assign):
                target = line.targets[0]
            named = isinstance(target, ast.Name) and target.id == name
            if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                return textwrap.dedent(f"    {below.value.value}")
    return ""


def raised_by(function: object) -> set[str]:
    """vauban's errors that a function raises, or a function of the same file that it calls."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(function)))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    names, errors, todo = set(), set(), [function.__name__]
    while todo:
        name = todo.pop()
        if name in names or name not in functions:
            continue
        names.add(name)
        for node in ast.walk(functions[name]):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                errors.add(ast.unparse(node.exc.func))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                todo.append(node.func.id)
    return {error for error in errors if error.endswith(("Error", "Candidate"))}


def arrays_of(value: object) -> list[str]:
    """Names of the arguments, or of the fields of a value, that are arrays."""
    if is_dataclass(value):
        hints = {f.name: str(f.type) for f in fields(value)}
        return [name for name, hint in hints.items() if re.match(r"(mx\.array|np\.ndarray)", hint)]
    if not inspect.isfunction(value):
        return []
    signature = inspect.signature(value)
    hints = {p.name: str(p.annotation) for p in signature.parameters.values()}
    found = [
        name
        for name, hint in hints.items()
        if hint.startswith("mx.array") or (name in ARRAYS and hint == "Any")
    ]
    returned = str(signature.return_annotation)
    return [*found, *(["what is returned"] if returned.startswith("mx.array") else [])]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_file_run(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_examples_are_found() -> None:
    assert len(MODULES) > 90
    for name in ("vauban.errors", "vauban.search.trials", "vauban.quick.abliterate"):
        assert name in MODULES


@pytest.mark.parametrize(("owner", "name"), PUBLIC, ids=IDS)
def test_a_public_name_has_a_summary_and_an_example(owner: object, name: str) -> None:
    text = text_of(owner, name)
    summary = text.split("\n\n")[0].split(">>>")[0].strip()
    assert len(summary) > 15 and summary[-1] in ".:"
    examples = doctest.DocTestParser().get_examples(text)
    assert any(example.want or example.exc_msg for example in examples), "an example that gives"
    assert all(not example.options.get(doctest.SKIP) for example in examples), "that is run"
    if not callable(value_of(owner, name)):  # doctest does not see what stands below a constant
        example = doctest.DocTest(examples, {name: getattr(owner, name)}, name, None, 0, text)
        assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize(("owner", "name"), PUBLIC, ids=IDS)
def test_a_public_name_says_what_it_raises_and_which_shapes(owner: object, name: str) -> None:
    value, text = value_of(owner, name), text_of(owner, name).split(">>>")[0]
    if inspect.isfunction(value):
        missing = {error for error in raised_by(value) if error not in text}
        assert not missing, "errors that the code raises and the docstring does not name"
    arrays = arrays_of(value)
    assert not arrays or SHAPE.search(text), f"no shape is given for {arrays}"


def test_the_checks_notice_what_is_missing() -> None:
    from vauban.directions.estimators import fit_mean_difference

    assert raised_by(fit_mean_difference) == {"InputError"}
    assert arrays_of(fit_mean_difference) == ["X", "y"]
    assert SHAPE.search("X (n, d)") and SHAPE.search("values (..., in)")
    for other in ("(see there)", "(0, 1)", "(harmless, harmful)", "(Arditi et al. 2024)"):
        assert not SHAPE.search(other)
