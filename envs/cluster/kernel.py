"""The decorators of all kernels: compiled once, kept on disk, free of reference counts and allocation.

Numba's own disk cache watches a kernel's file, not the files of the kernels that it calls: after an update of
one file, callers elsewhere would go on with the old code. So all kernels share a cache folder named after the
hash of all their sources.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_ROOM = Path(__file__).resolve().parent.parent
_CONFIG: Any = numba.config  # a module that makes its names as it is imported


def _cache_folder() -> str:
    """Folder of the compiled kernels of exactly these sources."""
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(_ROOM.rglob("*.py")):
        text = path.read_bytes()
        if b"kernel" in text:
            digest.update(text)
    for base in (os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME"), Path.home() / ".cache"):
        if base and os.access(base, os.W_OK):
            break
    else:
        base = tempfile.gettempdir()
    return str(Path(base) / "servegym" / digest.hexdigest()[:16])


_FOLDER = _cache_folder()


def _compiled(**options: Any) -> Callable[[Callable], Any]:
    def decorate(function: Callable) -> Any:
        # The cache folder is chosen when a function is decorated; other users of numba keep theirs.
        before = _CONFIG.CACHE_DIR
        _CONFIG.CACHE_DIR = _FOLDER
        try:
            return numba.njit(cache=True, error_model="numpy", **options)(function)
        finally:
            _CONFIG.CACHE_DIR = before

    return decorate


# Without numba's runtime (`_nrt`) no references are counted: kernels cannot allocate, and passing the world
# costs nothing. NumPy's error model leaves out the checks for division by zero; every divisor is >= 1.
kernel = _compiled(_nrt=False, nogil=True)
inlined = _compiled(_nrt=False, nogil=True, forceinline=True)
