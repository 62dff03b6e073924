"""Libraries that come with an extra: imported when something needs them, named where missing.

Knows import names only.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from vauban.errors import InputError


def need(module: str, extra: str, what: str) -> ModuleType:
    """The module; InputError that names `what` needs it, and the extra that brings it.

    >>> need("json", "plots", "the plot").dumps([])
    '[]'
    """
    # matplotlib refuses to be imported where this names a backend of another environment (a
    # notebook's kernel); pictures are drawn without one.
    backend = os.environ.pop("MPLBACKEND", None) if module.startswith("matplotlib") else None
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.split(".")[0]
        raise InputError(
            f"{what} needs {library}, which is not installed: pip install 'vauban[{extra}]'"
        ) from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
