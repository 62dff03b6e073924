"""Whether a small program that a model wrote passes its tests, in a process of its own.

The program is read before it runs: imports beyond a few modules of computation, and names that
reach files, processes or the interpreter, are not run and do not pass. The process has no more than
two seconds, no environment and an empty folder. That bounds accidents; it is no sandbox against an
author who wants to break out. Knows Python; knows no model.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence

_FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S)
_MODULES = frozenset(
    {"math", "re", "string", "collections", "itertools", "functools", "operator", "typing"}
)
_FORBIDDEN = frozenset(
    {
        *("open", "exec", "eval", "compile", "input", "globals", "locals", "vars", "getattr"),
        *("setattr", "delattr", "breakpoint", "exit", "quit", "help", "memoryview"),
    }
)
_SECONDS = 2.0
# Limits where the system has them: processor time in seconds, memory in bytes, no written file.
_LIMITED = """\
try:
    import resource as r
    for name, value in (("RLIMIT_CPU", 2), ("RLIMIT_AS", 2**30), ("RLIMIT_FSIZE", 0)):
        r.setrlimit(getattr(r, name), (value, value))
except (ImportError, AttributeError, ValueError, OSError):
    pass
"""


def program_in(answer: str) -> str:
    """The program of an answer: its first fenced block, else the text from the first `def` on.

    >>> program_in("Here it is:\\n```python\\ndef f():\\n    return 1\\n```\\nDone.")
    'def f():\\n    return 1\\n'
    """
    fenced = _FENCE.search(answer)
    if fenced:
        return fenced[1]
    start = re.search(r"^(?:def|from|import) ", answer, re.M)
    return answer[start.start() :] if start else answer


def is_harmless(program: str) -> bool:
    """Whether a program only computes: it parses, imports little, names nothing that reaches out.

    >>> is_harmless("import math\\nx = math.pi"), is_harmless("open('x', 'w')")
    (True, False)
    """
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        if any(name not in _MODULES for name in names):
            return False
        if isinstance(node, ast.Name) and (node.id in _FORBIDDEN or node.id.startswith("__")):
            return False
        # A module of the list holds others: re.enum.sys.
        if isinstance(node, ast.Attribute) and (
            node.attr.startswith("_") or node.attr in ("sys", "os", "modules", "builtins")
        ):
            return False
    return True


def passes(answer: str, tests: Sequence[str]) -> bool:
    """Whether the program in `answer` runs and every expression of `tests` is true behind it.

    >>> passes("def double(x):\\n    return 2 * x", ["double(2) == 4"])
    True
    """
    program = program_in(answer)
    if not is_harmless(program):
        return False
    checks = "".join(f"\nassert {test}" for test in tests)
    source = f"{_LIMITED}\n{program}{checks}\nprint('passed')"
    with tempfile.TemporaryDirectory() as folder:
        try:
            finished = subprocess.run(
                [sys.executable, "-I", "-S", "-c", source],
                cwd=folder, env={}, stdin=subprocess.DEVNULL, capture_output=True,
                timeout=_SECONDS + 3,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return finished.returncode == 0 and finished.stdout.endswith(b"passed\n")
