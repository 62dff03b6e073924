"""What has to happen before `import mlx.core`, and what to say when mlx has no back end.

On Linux the CPU wheel of mlx bundles reference BLAS. Opened with RTLD_GLOBAL *before* mlx, the
system's OpenBLAS takes its place: 4 -> 260 GFLOP/s in float32 on two cores. Opened afterwards it
does nothing. This file imports no mlx.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator

from threadpoolctl import ThreadpoolController

from vauban.errors import InputError, VaubanWarning

_BACKENDS = {"mlx-cpu": "cpu", "mlx-cuda-12": "cuda12", "mlx-cuda-13": "cuda13"}
openblas_loaded = False


def prefer_openblas() -> None:
    """Open `libopenblas.so.0` for mlx's CPU back end on Linux; `VAUBAN_BLAS=0` turns it off.

    Does nothing on macOS. Where mlx is already imported it can no longer help, so it says so once.
    """
    global openblas_loaded
    if not sys.platform.startswith("linux") or os.environ.get("VAUBAN_BLAS") == "0":
        return
    if "mlx.core" in sys.modules:
        warnings.warn(
            "mlx was imported before vauban, so float32 on this CPU stays about 60 times slower "
            "than with OpenBLAS. Put `import vauban` first (VAUBAN_BLAS=0 silences this line).",
            VaubanWarning,
            stacklevel=3,
        )
        return
    # Absent OpenBLAS is not an error: everything works, only slower, and `vauban doctor` says so.
    with contextlib.suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
        openblas_loaded = True


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS to one thread: between small products its threads spin, and slow everything else.

    Matters where NumPy and mlx each bring an OpenBLAS; does nothing to Accelerate.
    """
    with _blas().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _blas() -> ThreadpoolController:
    """The BLAS libraries of this process, looked for once: NumPy and mlx are there by then."""
    return ThreadpoolController()


def check_backend() -> None:
    """Raise InputError with one clear line when mlx's back end is missing or installed twice."""
    if not sys.platform.startswith("linux"):
        return
    found = []
    for name, extra in _BACKENDS.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.distribution(name)
            found.append((name, extra))
    if not found:
        raise InputError(
            "mlx has no back end on this machine: install one of "
            "`pip install 'vauban[cpu]'`, `'vauban[cuda12]'` or `'vauban[cuda13]'`."
        )
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        keep = found[-1][1]
        raise InputError(
            f"{names} are both installed and overwrite each other's libmlx.so: "
            f"`pip uninstall -y mlx {' '.join(n for n, _ in found)}`, then "
            f"`pip install 'vauban[{keep}]'` with the one back end you want."
        )
