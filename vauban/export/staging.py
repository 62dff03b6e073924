"""An output folder appears complete or not at all. Knows paths only.

The work is done in a hidden folder beside the target, which is renamed when everything is written
and synced. A killed process leaves at most that hidden folder; the next run removes it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vauban.errors import InputError
from vauban.export.interrupted import read_record


def check_output(
    output_dir: str | Path, *, force: bool = False, source: str | Path | None = None
) -> Path:
    """The absolute target; InputError when it exists without `force` or lies inside the source.

    Of a link the folder it points to, which is then replaced and not the link.
    """
    target = Path(output_dir).expanduser().absolute()
    if target.is_symlink():
        target = target.resolve()
    if source is not None and Path(source).exists():
        inside = Path(source).resolve()
        resolved = target.parent.resolve() / target.name
        if resolved == inside or inside in resolved.parents:
            raise InputError(f"the output {target} lies in the source model's folder {inside}")
        if resolved in inside.parents:
            raise InputError(f"the output {target} holds the source model's folder {inside}")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} exists and is a file; expected a folder to create")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise InputError(f"{target} exists; choose another folder or pass force (--force)")
    return target


@contextmanager
def staged(
    output_dir: str | Path,
    *,
    force: bool = False,
    source: str | Path | None = None,
    resume_key: str | None = None,
    keep_interrupted: bool = False,
) -> Iterator[Path]:
    """Yield a staging folder; renamed to `output_dir` on a normal exit, removed on any exception.

    What a killed process left beside the target is taken up where its `resume_key` is the same,
    and removed otherwise. With `keep_interrupted` Ctrl-C leaves it as a kill does.

    With `force` an existing folder is replaced as a whole, so no stale file can survive. A full
    disk becomes an InputError that says how much room there is.
    """
    target = check_output(output_dir, force=force, source=source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.parent / f".{target.name}.partial-{os.getpid()}"
        if not _take_up(target, staging, resume_key):
            staging.mkdir()
    except OSError as error:
        raise InputError(f"cannot write to {target.parent}: {error.strerror}") from error
    keep = False
    try:
        yield staging
        _publish(staging, target)
    except KeyboardInterrupt:
        keep = keep_interrupted
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent).free
            raise InputError(
                f"the disk is full ({free / 1e6:.0f} MB free at {target.parent}); "
                "no model was written"
            ) from error
        raise
    finally:
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Path) -> None:
    for path in staging.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    aside = None
    if target.exists():
        aside = target.parent / f".{target.name}.partial-old-{os.getpid()}"
        target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        if aside is not None:
            aside.rename(target)
        raise
    if aside is not None:
        shutil.rmtree(aside)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _take_up(target: Path, staging: Path, key: str | None) -> bool:
    """Rename one abandoned folder of the same key to `staging`; remove the others."""
    taken_up = False
    others = target.parent.glob(f".{target.name}.partial-*")
    for path in sorted(others, key=lambda p: (p != staging, p)):
        pid = path.name.rsplit("-", 1)[-1]
        if not pid.isdigit() or (path != staging and _alive(int(pid))):
            continue
        if key is not None and not taken_up and read_record(path).get("key") == key:
            path.rename(staging)
            taken_up = True
        else:
            shutil.rmtree(path, ignore_errors=True)
    return taken_up


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
