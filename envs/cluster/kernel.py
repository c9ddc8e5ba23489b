"""The decorators of all kernels: compiled once, kept on disk, free of reference counts and allocation.

Numba's own disk cache watches a kernel's file, not the files of the kernels that it calls: after an update of
one file, callers elsewhere would go on with the old code. So all kernels share a cache folder named after the
hash of all their sources.

Numba compiles each kernel together with all that it calls, so a chain of kernels costs the square of its
length. What is called in one or two places is `inlined` before it is compiled at all.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba

from servegym.envs.cluster.address import by_address
from servegym.envs.cluster.indexing import Compiler
from servegym.envs.cluster.state import World
from servegym.envs.costs.tables import CostTables

_ROOM = Path(__file__).resolve().parent.parent
_CONFIG: Any = numba.config  # a module that makes its names as it is imported


def _cache_folder(more: Sequence[str]) -> str:
    """Folder of the compiled kernels of exactly these sources, and of the constants that they compile in."""
    digest = hashlib.sha256(numba.__version__.encode())
    constants = ("address.py", "indexing.py", "kernel.py", "schema.py", "state.py")
    sources = [_ROOM / "costs" / "model.py", _ROOM / "scenario.py", *map(Path, more)]
    sources += [_ROOM / "cluster" / name for name in constants]
    for path in (_ROOM / "cluster").glob("*.py"):
        if b"cluster.kernel import" in path.read_bytes():
            sources.append(path)
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return str(_cache_root() / digest.hexdigest()[:16])


def _cache_root() -> Path:
    """A folder that only this user writes: numba unpickles what it finds there."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    root = Path(named) / "servegym" if named else Path.home() / ".cache" / "servegym"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
    except OSError:
        pass  # no home to write to: compile anew in each process
    return Path(tempfile.mkdtemp(prefix="servegym-"))


def _compiled(folder: str, **options: Any) -> Callable[[Callable], Any]:
    def decorate(function: Callable) -> Any:
        # The cache folder is chosen when a function is decorated; other users of numba keep theirs.
        before = _CONFIG.CACHE_DIR
        _CONFIG.CACHE_DIR = folder
        try:
            compiled = numba.njit(cache=True, error_model="numpy", pipeline_class=Compiler, **options)
            return compiled(function)
        finally:
            _CONFIG.CACHE_DIR = before

    return decorate


def decorators(*sources: str) -> tuple[Callable[[Callable], Any], Callable[[Callable], Any]]:
    """`kernel` and `inlined` for a file whose kernels call those of these files too, beside this room's.

    Without numba's runtime (`_nrt`) no references are counted: kernels cannot allocate, and passing the world
    costs nothing. NumPy's error model leaves out the checks for division by zero; every divisor is >= 1. An
    index of -1 is not the last place (`indexing`).
    """
    folder = _cache_folder(sources)
    return _compiled(folder, _nrt=False, nogil=True), _compiled(
        folder, _nrt=False, nogil=True, inline="always"
    )


kernel, inlined = decorators()
by_address(CostTables)  # not where they are defined, which goes without numba
by_address(World)
