"""Squared distances between vectors of whole numbers of 16 bits, a tile of tokens to all centroids: for compiled loops.

numba has no vectors, and its arrays do not stay in registers; so the instructions are put together here. One adds two
products of 16 bits each to a sum of 32: x86 and ARM have it, for 8 to 32 products at a time, and LLVM finds it in what
is written out below. Every lane of a vector is a centroid, so that nothing is summed across a vector; where half of
the lanes would be idle, two lanes share a centroid.

Vectors of at most `RADIUS` in length have squared distances that fit 32 bits, whatever their number of values.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

# Of the CPU, as numba has them.
FEATURES = config.CPU_FEATURES or binding.get_host_cpu_features().flatten()  # type: ignore[attr-defined]
LANES = 16 if "+avx512bw" in FEATURES else 8  # centroids in a vector of sums
FEW = LANES // 2  # so many centroids have two lanes each
VALUES = 4  # of vectors, or a multiple: in a step to few centroids
TILE = 8  # tokens at a time; their sums stay in registers
RADIUS = 2**14
NOWHERE = 2**30 + 2**29  # squared length of a centroid that is none: farther than any, a token's added

INT16, INT32, INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
SUMS, PAIRS, PRODUCTS = ir.VectorType(INT32, LANES), ir.VectorType(INT16, 2 * LANES), ir.VectorType(INT32, 2 * LANES)
ZERO = ir.Constant(SUMS, None)
MOST = ir.Constant(SUMS, [INT32(2**31 - 1)] * LANES)


def _lanes(numbers) -> ir.Constant:
    return ir.Constant(SUMS, [INT32(number) for number in numbers])


def _spread(builder: Any, value: Any, lanes: int = LANES) -> Any:
    """A vector that holds `value` in every lane."""
    nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(nothing, value, INT32(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(INT32, lanes), [INT32(0)] * lanes))


def _place(builder: Any, array: Any, index: Any, target: ir.Type) -> Any:
    """Pointer to a `target` that begins with element `index` of the array's data."""
    return builder.bitcast(builder.gep(array.data, [index]), target.as_pointer())


def _arrays(context, builder, signature, arguments) -> list[Any]:
    """Arguments, arrays among them as structures with `data` and `shape`."""
    both = zip(signature.args, arguments, strict=True)
    return [context.make_array(t)(context, builder, a) if isinstance(t, types.Array) else a for t, a in both]


def _width(builder: Any, array: Any) -> Any:
    return cgutils.unpack_tuple(builder, array.shape)[1]


def _pair_products(builder: Any, x: Any, y: Any) -> Any:
    """x[0] y[0] + x[1] y[1] in every lane, of vectors of pairs: vpmaddwd, or with the sum it goes to vpdpwssd."""
    product = builder.mul(builder.sext(x, PRODUCTS), builder.sext(y, PRODUCTS))
    nothing = ir.Constant(PRODUCTS, ir.Undefined)
    halves = (builder.shuffle_vector(product, nothing, _lanes(range(odd, 2 * LANES, 2))) for odd in (0, 1))
    return builder.add(*halves)


def _joined(builder: Any, sums: Any, parts: int) -> Any:
    """Sums of `parts` lanes side by side, in the first lanes; zeros in the others."""
    if parts == 1:
        return sums
    zeros = [LANES] * (LANES - LANES // parts)  # lanes of the second operand
    lanes = ([*range(part, LANES, parts), *zeros] for part in range(parts))
    return reduce(builder.add, [builder.shuffle_vector(sums, ZERO, _lanes(which)) for which in lanes])


def _square_distances(parts: int) -> Any:
    """A function for compiled code: distances of the tokens queue[start : start + TILE], into `out` [TILE, padded].

    tokens: int16 [count, dim], dim a multiple of `VALUES`; squares: int32 [count], their squared lengths; padded: a
    multiple of `LANES`. packed: int32 [padded / LANES, dim / 2 / parts, LANES], pairs of values, those of a centroid by
    turns in `parts` lanes side by side; centroid_squares: int32 [padded], `NOWHERE` where there is no centroid.
    """

    @intrinsic
    def square_distances(_typing, queue, start, tokens, squares, packed, centroid_squares, out):
        def generate(context, builder, signature, arguments):
            arrays = _arrays(context, builder, signature, arguments)
            queue, start, tokens, squares, packed, centroid_squares, out = arrays
            several = ir.IntType(32 * parts)  # a token's values that meet one vector of centroids' values
            steps = builder.udiv(_width(builder, tokens), INT64(2 * parts))
            rows, lengths = [], []
            for i in range(TILE):
                token = builder.load(builder.gep(queue.data, [builder.add(start, INT64(i))]))
                rows.append(_place(builder, tokens, builder.mul(token, _width(builder, tokens)), several))
                lengths.append(builder.load(builder.gep(squares.data, [token])))
            sums = [cgutils.alloca_once(builder, SUMS) for _ in range(TILE)]
            with cgutils.for_range(builder, builder.udiv(_width(builder, out), INT64(LANES))) as vector:
                for total in sums:
                    builder.store(ZERO, total)
                first = builder.mul(vector.index, steps)
                with cgutils.for_range(builder, steps) as step:
                    place = builder.mul(builder.add(first, step.index), INT64(LANES))
                    centroids = builder.load(_place(builder, packed, place, PAIRS), align=4)
                    for row, total in zip(rows, sums, strict=True):
                        values = builder.load(builder.gep(row, [step.index]), align=4)
                        token = builder.bitcast(_spread(builder, values, LANES // parts), PAIRS)
                        products = _pair_products(builder, token, centroids)
                        builder.store(builder.add(builder.load(total), products), total)
                lane = builder.mul(vector.index, INT64(LANES))
                its_squares = builder.load(_place(builder, centroid_squares, lane, SUMS), align=4)
                for i in range(TILE):
                    product = _joined(builder, builder.load(sums[i]), parts)
                    both = builder.add(its_squares, _spread(builder, lengths[i]))
                    place = _place(builder, out, builder.add(builder.mul(INT64(i), _width(builder, out)), lane), SUMS)
                    builder.store(builder.sub(both, builder.add(product, product)), place, align=4)
            return context.get_dummy_value()

        return types.void(queue, start, tokens, squares, packed, centroid_squares, out), generate

    return square_distances


square_distances, square_distances_to_few = _square_distances(1), _square_distances(2)


def _two_least(_typing, values, i):
    """The least of row i, the first place where it stands, and the least of all other places; int32 each."""

    def generate(context, builder, signature, arguments):
        values, i = _arrays(context, builder, signature, arguments)
        width = _width(builder, values)
        row = builder.mul(i, width)
        reduction = ir.FunctionType(INT32, [SUMS])
        across = cgutils.get_or_insert_function(builder.module, reduction, f"llvm.vector.reduce.smin.v{LANES}i32")

        def least(candidates: Callable[[Any, Any], Any]) -> Any:
            """The least of what `candidates` makes of vectors of values and their places."""
            slot = cgutils.alloca_once(builder, SUMS)
            builder.store(MOST, slot)
            with cgutils.for_range(builder, builder.udiv(width, INT64(LANES))) as vector:
                lane = builder.mul(vector.index, INT64(LANES))
                value = builder.load(_place(builder, values, builder.add(row, lane), SUMS), align=4)
                places = builder.add(_lanes(range(LANES)), _spread(builder, builder.trunc(lane, INT32)))
                found, before = candidates(value, places), builder.load(slot)
                builder.store(builder.select(builder.icmp_signed("<", found, before), found, before), slot)
            return builder.call(across, [builder.load(slot)])

        def equal(x: Any, number: Any) -> Any:
            return builder.icmp_signed("==", x, _spread(builder, number))

        lowest = least(lambda value, _: value)
        first = least(lambda value, place: builder.select(equal(value, lowest), place, MOST))
        second = least(lambda value, place: builder.select(equal(place, first), MOST, value))
        return context.make_tuple(builder, signature.return_type, (lowest, first, second))

    return types.UniTuple(types.int32, 3)(values, i), generate


two_least: Any = intrinsic(_two_least)
