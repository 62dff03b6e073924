"""Where the bundled prompt sets and the model organism lie. Knows paths, reads nothing."""

from pathlib import Path


def data_dir() -> Path:
    """The folder that holds `prompts/`, `texts/` and `organism/`.

    In a wheel the data stand inside the package, in a checkout beside it.
    """
    package = Path(__file__).resolve().parent
    inside = package / "data"
    return inside if inside.is_dir() else package.parent / "data"
