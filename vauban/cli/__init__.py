"""The command line: runs the verb that is named, prints errors, returns the exit code.

Exit codes: 0 done, 1 a check failed, 2 bad usage or input, 130 interrupted. A verb's file is
imported when the verb runs, so that `vauban --help` answers at once.

In reading order:
    parsers            the verbs and their flags
    diff_flags         those of diff
    setting_flags      flags that are read off the schema
    search_flags       those of search
    verb_flags         those of steer, surface, compare, report
    console            lines, tables and progress for a terminal, a log or a JSON reader
    whole_run          demo, MODEL, CONFIG.toml
    run_lines          what a run prints
    search             search
    single_stages      measure, cut, evaluate
    saved_directions   probe, steer, geometry
    edit               edit
    diff               diff
    compare            compare
    report             report
    surface            surface
    study              study
    configuration      init, --validate
    doctor             doctor
"""

import difflib
import errno
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import FrameType

from vauban.errors import InputError, VaubanError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vauban` with these arguments (the process's own by default); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Messages of the tokenizers and the Hub do not belong among our lines.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show "α" or "–" gets a question mark, not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with _TerminationAsInterrupt():
            code = _dispatch(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt as error:
        return _fail(_said(error, _interrupted(arguments)), 130, arguments)
    except InputError as error:
        return _fail(_said(error), 2, arguments)
    except VaubanError as error:
        return _fail(_said(error), 1, arguments)
    except BrokenPipeError:
        # The reader (head, less) has gone; Python would complain once more on closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _fail(_said(error, _os_message(error)), 2, arguments)
    except SystemExit as leaving:  # argparse: --help, or wrong usage
        return leaving.code if isinstance(leaving.code, int) else 2


_FILES = {
    "whole_run": ("demo", "target"),
    "search": ("search",),
    "single_stages": ("measure", "cut", "evaluate"),
    "saved_directions": ("probe", "steer", "geometry"),
    "edit": ("edit",),
    "diff": ("diff",),
    "compare": ("compare",),
    "report": ("report",),
    "surface": ("surface",),
    "study": ("study",),
    "configuration": ("init", "validate"),
    "doctor": ("doctor",),
}
"""The file of each verb; the function is called as the verb is."""


def _dispatch(arguments: list[str]) -> int:
    from vauban.cli import parsers

    if not arguments:
        print(parsers.short_help())
        return 0
    verb = arguments[0]
    if verb in parsers.VERBS:
        options = parsers.verb_parser(verb).parse_args(arguments[1:])
    else:
        _check_verb(verb, parsers.VERBS)
        options = parsers.main_parser().parse_args(arguments)
        verb = "validate" if options.validate else "target"
    file = next(file for file, verbs in _FILES.items() if verb in verbs)
    run = getattr(importlib.import_module(f"vauban.cli.{file}"), verb)
    return int(run(options))


def _check_verb(word: str, verbs: Collection[str]) -> None:
    """InputError for a slip in a verb's name, which would otherwise be taken for a model."""
    near = difflib.get_close_matches(word, verbs, 1, 0.75)
    if near and word.isalpha() and not Path(word).exists():
        raise InputError(
            f"{word!r} is no command, and no folder here; did you mean `vauban {near[0]}`?"
        )


def _interrupted(arguments: Sequence[str]) -> str:
    if arguments[:1] == ["study"]:
        return (
            "interrupted; what was finished is kept in a hidden folder beside the output, and the "
            "same command goes on from there."
        )
    if arguments[:1] == ["search"]:
        return (
            "interrupted; finished trials are kept in the storage file, and the same command goes "
            "on from there."
        )
    return "interrupted; nothing half-written is left."


def _said(error: BaseException, message: str | None = None) -> str:
    """An error's message and its notes: what was kept, and how one goes on."""
    return "\n".join([message or str(error), *getattr(error, "__notes__", ())])


def _fail(message: str, code: int, arguments: Sequence[str]) -> int:
    print(f"vauban: {message}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False))
    return code


def _os_message(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in _NO_ROOM:
        return f"{place}no room left on the disk; no model was written. Free space or change -o."
    return f"{place}{error.strerror or error}"


class _TerminationAsInterrupt:
    """Lets SIGTERM clean up like Ctrl-C: half-written folders are removed on the way out."""

    def __enter__(self) -> None:
        self._before = None
        # Only the main thread may set signal handlers; elsewhere (a notebook) none is set.
        try:
            self._before = signal.signal(signal.SIGTERM, self._interrupt)
        except ValueError:
            return

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    @staticmethod
    def _interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt
