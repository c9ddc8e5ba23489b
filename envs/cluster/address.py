"""Named tuples of arrays that kernels take by address.

Numba hands a tuple to a kernel field by field, an array as its pointer, shape and strides: a world is some
three hundred words, copied at every call from one kernel to the next, and compiled into each. A named tuple
that is registered here is laid down once, when Python calls a kernel; from then on one pointer goes around,
and a kernel loads the words that it uses.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

from llvmlite import ir
from numba import types
from numba.core import boxing, cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import NativeValue, lower_getattr_generic, register_model, typeof_impl, unbox

_POINTER = ir.IntType(8).as_pointer()
_Class = TypeVar("_Class", bound=type)


class ByAddress(types.Type):
    """The type in kernels of a registered named tuple; `fields` is the tuple's own type."""

    def __init__(self, fields: Any) -> None:
        self.fields = fields
        # Symbols are named after types: by their fields worlds would have names of thousands of letters.
        digest = hashlib.sha256(str(fields).encode()).hexdigest()[:16]
        super().__init__(f"{fields.instance_class.__name__}_{digest}")


@register_model(ByAddress)
class _Address(PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _POINTER)


@infer_getattr
class _Fields(AttributeTemplate):
    key = ByAddress

    def generic_resolve(self, kind: Any, name: str) -> Any:  # type: ignore[override]
        names = kind.fields.fields
        return kind.fields[names.index(name)] if name in names else None


def by_address(named_tuple: _Class) -> _Class:
    """Let kernels take this class of named tuples by address. Fields: arrays, numbers, or such tuples."""

    @typeof_impl.register(named_tuple)
    def type_of(value: Any, context: Any) -> ByAddress:
        kinds = [typeof_impl(field, context) for field in value]
        return ByAddress(types.BaseTuple.from_types(kinds, named_tuple))

    return named_tuple


def _layout(context: Any, kind: Any) -> ir.Type:
    return ir.LiteralStructType([context.get_data_type(field) for field in kind.fields])


@unbox(ByAddress)
def _lay_down(kind: Any, obj: Any, c: Any) -> NativeValue:
    """Write the fields into the stack frame of Python's call, which outlives the kernel."""
    native = boxing.unbox_tuple(kind.fields, obj, c)
    place = cgutils.alloca_once(c.builder, _layout(c.context, kind))
    values = cgutils.unpack_tuple(c.builder, native.value, len(kind.fields))
    for k, (field, value) in enumerate(zip(kind.fields, values, strict=True)):
        target = cgutils.gep_inbounds(c.builder, place, 0, k)
        c.builder.store(c.context.data_model_manager[field].as_data(c.builder, value), target)
    address = c.builder.bitcast(place, _POINTER)
    return NativeValue(address, cleanup=native.cleanup, is_error=native.is_error)


@lower_getattr_generic(ByAddress)
def _read(context: Any, builder: Any, kind: Any, address: Any, name: str) -> Any:
    place = builder.bitcast(address, _layout(context, kind).as_pointer())
    k = kind.fields.fields.index(name)
    data = _load(builder, cgutils.gep_inbounds(builder, place, 0, k))
    return context.data_model_manager[kind.fields[k]].from_data(builder, data)


def _load(builder: Any, place: Any) -> Any:
    """Word by word, so that only those that are used are loaded; no store ever changes them."""
    kind = place.type.pointee
    if isinstance(kind, ir.Aggregate):
        whole = ir.Constant(kind, ir.Undefined)
        for k in range(len(kind)):
            whole = builder.insert_value(whole, _load(builder, cgutils.gep_inbounds(builder, place, 0, k)), k)
        return whole
    word = builder.load(place)
    word.set_metadata("invariant.load", builder.module.add_metadata([]))
    return word
