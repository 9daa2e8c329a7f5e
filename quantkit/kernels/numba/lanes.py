"""Sixteen float32 side by side as one value of numba code: arithmetic on them compiles to vector instructions.

Sixteen rows of a matrix go through the same steps, row r in lane r; a loop over columns then keeps its sums in
registers. Left to LLVM's own vectoriser, such loops spill every sum to memory. On processors with narrower registers
LLVM splits the sixteen. Nothing is reordered or contracted but where `fma` asks for it: results don't depend on the
machine. Numba caches a kernel by its own file: after a change here, remove the ``__pycache__`` beside it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar, cast

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.extending import intrinsic, models, overload, register_model

ROWS = 16

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile what is called from Python."""
    return _compiled(function)


def part(function: Function) -> Function:
    """Compile what kernels call. It can't make arrays: counting the references of those that it is given would cost
    more than its work."""
    return _compiled(function, _nrt=False)


def inlined(function: Function) -> Function:
    """Compile an innermost loop as a part of its caller: a call would send all sums through memory."""
    return _compiled(function, _nrt=False, forceinline=True)


def _compiled(function: Function, **options: bool) -> Function:
    compile_: Any = njit
    return cast("Function", compile_(cache=True, nogil=True, **options)(function))


_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, ROWS)
_HALVES = ir.VectorType(ir.HalfType(), ROWS)


class Lanes(types.Type):
    """Numba's type of the sixteen."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


LANES = Lanes()


def _intrinsic(build: Callable[..., Any]) -> Any:
    """numba's decorator; calls of the result don't have the parameters of ``build``, which type checkers can't know."""
    return intrinsic(build)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _address(context: Any, builder: Any, array_type: Any, array: Any, place: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [place]), _VECTOR.as_pointer())


@_intrinsic
def load(typing: Any, array: Any, place: Any) -> Any:
    """load(array (n,) float32, place): lanes from array[place : place + 16]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature.args[0], *args), align=4)

    return LANES(array, types.intp), generate


@_intrinsic
def store(typing: Any, array: Any, place: Any, value: Any) -> Any:
    """store(array (n,) float32, place, lanes): write array[place : place + 16]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, signature.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@_intrinsic
def store_bytes(typing: Any, array: Any, place: Any, value: Any) -> Any:
    """store_bytes(array (n,) uint8, place, lanes): write lanes that are whole numbers of 0 to 255."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, place, value = args
        data = context.make_array(signature.args[0])(context, builder, array).data
        bytes_ = ir.VectorType(ir.IntType(8), ROWS)
        address = builder.bitcast(builder.gep(data, [place]), bytes_.as_pointer())
        wide = builder.fptosi(value, ir.VectorType(ir.IntType(32), ROWS))
        builder.store(builder.trunc(wide, bytes_), address, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@_intrinsic
def splat(typing: Any, value: Any) -> Any:
    """The same number in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        empty = ir.Constant(_VECTOR, ir.Undefined)
        first = builder.insert_element(empty, args[0], ir.Constant(ir.IntType(32), 0))
        order = ir.Constant(ir.VectorType(ir.IntType(32), ROWS), [0] * ROWS)
        return builder.shuffle_vector(first, empty, order)

    return LANES(types.float32), generate


def _instruction(name: str) -> Any:
    """An intrinsic (lanes, lanes) -> lanes that is one instruction of LLVM's builder."""

    @_intrinsic
    def emit(typing: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args)

        return LANES(left, right), generate

    return emit


def _function(name: str, arguments: int) -> Any:
    """An intrinsic of so many lanes that calls LLVM's function of this name."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * arguments)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{ROWS}f32"), args)

    if arguments == 1:

        @_intrinsic
        def emit_one(typing: Any, value: Any) -> Any:
            return LANES(value), generate

        return emit_one
    if arguments == 2:

        @_intrinsic
        def emit_two(typing: Any, left: Any, right: Any) -> Any:
            return LANES(left, right), generate

        return emit_two

    @_intrinsic
    def emit_three(typing: Any, left: Any, right: Any, addend: Any) -> Any:
        return LANES(left, right, addend), generate

    return emit_three


_add, _sub, _mul, _div = map(_instruction, ("fadd", "fsub", "fmul", "fdiv"))
fma = _function("fma", 3)
"""a * b + c, rounded once."""
rint = _function("rint", 1)
"""To integers, ties to even."""
absolute = _function("fabs", 1)


def _selection(comparison: str) -> Any:
    @_intrinsic
    def emit(typing: Any, left: Any, right: Any, yes: Any, no: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.select(builder.fcmp_ordered(comparison, args[0], args[1]), args[2], args[3])

        return LANES(left, right, yes, no), generate

    return emit


where_less = _selection("<")
"""where_less(a, b, yes, no): lanes of ``yes`` where a < b, else of ``no``."""


@_intrinsic
def least(typing: Any, left: Any, right: Any) -> Any:
    """The smaller of each two."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return LANES(left, right), generate


@_intrinsic
def most(typing: Any, left: Any, right: Any) -> Any:
    """The larger of each two."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return LANES(left, right), generate


@_intrinsic
def half(typing: Any, value: Any) -> Any:
    """Rounded to float16 and back."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.fptrunc(args[0], _HALVES), _VECTOR)

    return LANES(value), generate


def _overloaded(operation: Any, instruction: Any) -> None:
    """Let numba code write lanes with an operator; one side may be a number."""

    def both(left: Any, right: Any) -> Any:
        return instruction(left, right)

    def right_number(left: Any, right: Any) -> Any:
        return instruction(left, splat(right))

    def left_number(left: Any, right: Any) -> Any:
        return instruction(splat(left), right)

    @overload(operation)
    def choose(left: Any, right: Any) -> Any:
        lanes = isinstance(left, Lanes), isinstance(right, Lanes)
        if lanes == (True, True):
            return both
        if lanes == (True, False) and isinstance(right, types.Number):
            return right_number
        if lanes == (False, True) and isinstance(left, types.Number):
            return left_number
        return None


for _operation, _emit in ((operator.add, _add), (operator.sub, _sub), (operator.mul, _mul), (operator.truediv, _div)):
    _overloaded(_operation, _emit)
