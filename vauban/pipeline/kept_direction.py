"""A measured direction outlives whatever fails after it: it is saved beside the output.

Knows files and errors; measures nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vauban.directions import DirectionResult
from vauban.errors import InputError


def direction_beside(output: Path) -> Path:
    """Where the direction of a run lies until its folder is complete: OUTPUT.direction.vauban."""
    return output.with_name(f"{output.name}.direction.vauban")


@contextmanager
def kept_direction(result: DirectionResult, output: Path) -> Iterator[Path]:
    """Save a measured direction beside `output` while a run goes on with it; yields the file.

    The file is removed when all went well, as the finished folder holds the direction. Otherwise
    it stays, and a note on the exception says where it lies and how the run goes on from it.

    Raises InputError where it cannot be saved: nothing could be written later either.
    """
    output = output.expanduser()
    file = direction_beside(output)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file = result.save(file)
    except OSError as error:
        raise InputError(
            f"the measured direction cannot be saved to {file}: {error.strerror}; nothing was kept"
        ) from error
    try:
        yield file
    except BaseException as error:
        error.add_note(
            f"the measured direction is kept in {file}; --direction {file} goes on from it."
        )
        raise
    file.unlink(missing_ok=True)
