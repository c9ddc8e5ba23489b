"""The decorator of all kernels: compiled once, kept on disk, free of reference counts and allocation."""

from __future__ import annotations

from functools import partial

from numba import njit

# Without the runtime (`_nrt`) numba counts no references: kernels cannot allocate, and passing the world
# costs nothing. NumPy's error model leaves out the checks for division by zero; every divisor is >= 1.
kernel = partial(njit, cache=True, _nrt=False, error_model="numpy", nogil=True)
inlined = partial(kernel, forceinline=True)
