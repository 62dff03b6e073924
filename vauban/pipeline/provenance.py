"""What makes a run repeatable: versions, the platform, the hashes of weight files.

Knows files and installed packages; nothing of prompts, models or figures.
"""

import hashlib
import importlib.metadata
import platform
from pathlib import Path

import vauban
from vauban._common import Progress

_PACKAGES = ("mlx", "mlx-lm", "numpy", "safetensors", "transformers", "tokenizers")
_CHUNK = 1 << 22


def versions() -> dict[str, str]:
    """The versions of vauban, Python and the packages that figures depend on."""
    found = {"vauban": vauban.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found


def system() -> dict[str, str]:
    """The operating system and processor."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
    }


def hash_files(
    folder: str | Path, pattern: str, *, stage: str, progress: Progress | None = None
) -> dict[str, str]:
    """sha256 of every file in `folder` that matches, by name.

    Args:
        stage: what `progress` calls this work; it is told bytes done and bytes in all.
    """
    files = sorted(path for path in Path(folder).glob(pattern) if path.is_file())
    total = sum(path.stat().st_size for path in files)
    done = 0
    found = {}
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(stage, done, total)
        found[path.name] = digest.hexdigest()
    return found
