"""A compiler pass of the kernels: an index counts from the start of its array, -1 is not its last place.

Numba asks of every signed index whether it is negative. Kernels never mean the end, so each index is cast to
an unsigned number, for which numba does not ask; episodes take a fifth less time. Where `NUMBA_BOUNDSCHECK`
is set, a negative one is an error.
"""

from __future__ import annotations

from typing import Any

from numba.core import ir, types
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.typed_passes import NopythonRewrites
from numba.core.typing.templates import Signature, signature


def _is_index(call: Any, types_of: Signature | None) -> bool:
    """Whether a call reads or writes places of an array."""
    if types_of is None or not types_of.args or not isinstance(types_of.args[0], types.Array):
        return False
    return isinstance(call, ir.SetItem) or (isinstance(call, ir.Expr) and call.op == "getitem")


def _unsigned(index: Any) -> Any:
    """The type of an index without signs; slices stay as they are."""
    if isinstance(index, types.Tuple | types.UniTuple):
        return types.Tuple([_unsigned(part) for part in index.types])
    return types.uintp if isinstance(index, types.Integer) else index


@register_pass(mutates_CFG=False, analysis_only=False)
class _UnsignedIndices(FunctionPass):
    _name = "servegym_unsigned_indices"

    def __init__(self) -> None:
        FunctionPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        calls = state.calltypes
        found = [(call, types_of) for call, types_of in calls.items() if _is_index(call, types_of)]
        for call, types_of in found:
            array, index, *value = types_of.args
            del calls[call]  # it takes no second value
            calls[call] = signature(types_of.return_type, array, _unsigned(index), *value)
        return bool(found)


class Compiler(CompilerBase):
    """Numba's own pipeline, and the pass behind type inference."""

    def define_pipelines(self) -> list[Any]:
        """The pipelines to try: one."""
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_UnsignedIndices, NopythonRewrites)
        passes.finalize()
        return [passes]
