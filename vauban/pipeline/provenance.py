"""What makes a run repeatable: versions, the platform, the hashes of weight files.

Knows files and installed packages; nothing of prompts, models or figures.
"""

import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import vauban
from vauban._common import Progress

_PACKAGES = ("mlx", "mlx-lm", "numpy", "safetensors", "transformers", "tokenizers")
_CHUNK = 1 << 22
_TERMS = ("license", "license_name", "license_link", "pipeline_tag")


def versions() -> dict[str, str]:
    """The versions of vauban, Python and the packages that figures depend on."""
    own = {"vauban": vauban.__version__, "python": platform.python_version()}
    return {**own, **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def system() -> dict[str, str]:
    """The operating system and processor."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
    }


def hash_files(
    files: Iterable[Path], *, stage: str, progress: Progress | None = None
) -> dict[str, str]:
    """sha256 of every file, by name.

    Args:
        stage: the name of this work for `progress`, which counts bytes.
    """
    files = sorted(files)
    total = sum(path.stat().st_size for path in files)
    done = 0
    digests = {}
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(stage, done, total)
        digests[path.name] = digest.hexdigest()
    return digests


def card_facts(folder: Path) -> dict[str, str] | None:
    """The terms that a model's README.md names at its top; None without one.

    Only plain `key: value` lines of the Hub's front matter are read.
    """
    card = folder / "README.md"
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
    pairs = (line.partition(":") for line in (head[1] if head else "").splitlines())
    return {key: value.strip() for key, _, value in pairs if key in _TERMS and value.strip()}
