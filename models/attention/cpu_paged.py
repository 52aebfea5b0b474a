# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, misc, untyped-decorator"
"""Decodes on CPU straight from the paged cache, in bfloat16: one compiled loop in place of gathers and products.

Torch's kernels want a sequence's keys as one matrix, and oneDNN reorders the values at every product: 32 decodes over
about 220 positions, 8 heads of 128, take 90 ms for 28 layers by those kernels, with all that must be copied for them,
and 50 by this loop (two threads, Intel Xeon with AMX; to read the memory takes 35). And no sequence knows of its mates:
a decode has the same bits alone and in any batch. Numba compiles it at start, in 2 s; it comes with the extra `cpu`.

The arithmetic is float32 throughout. A number in bfloat16 is the upper half of a float32, so
that a pair of them, read as one 32-bit word, is two shifts away from two numbers: H/2 = C words a row, the even
features in their lower halves. The threads are those of torch's OpenMP: others would have to share the cores with them,
for they spin for a while after each kernel.

Legend: S decoding sequences, N query heads, K key/value heads, G = N / K, C words of a head, P positions of a block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from models.attention.base import KVCacheSpec

_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be reordered into vector lanes; infinities and NaN keep their meaning."""
_WORDS_A_LINE = 16

_process = ctypes.CDLL(None)
IS_AVAILABLE = hasattr(_process, "GOMP_parallel")
"""GNU's OpenMP, or one that answers to its name as Intel's and LLVM's do, is in this process: torch's."""
if IS_AVAILABLE:
    _run_on_all = _process.GOMP_parallel
    _run_on_all.argtypes, _run_on_all.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    _thread_num, _num_threads = _process.omp_get_thread_num, _process.omp_get_num_threads
    _thread_num.argtypes = _num_threads.argtypes = ()


@dataclass(frozen=True, slots=True)
class PagedDecodes:
    """Sequences with one new token each, for one step."""

    tables: np.ndarray
    """[S, blocks], int64; columns a sequence does not use hold anything."""
    spans: np.ndarray
    """[S, 2], int64: the first position each sees, and the end of its positions."""
    cuts: np.ndarray
    """[shares + 1], int64: where each thread's share of the pairs of sequence and key/value head begins and ends."""


_ADDRESSES = ("kv", "tables", "spans", "cuts", "queries", "out", "lse")
_SIZES = ("num_blocks", "num_kv_heads", "num_sequences", "num_heads", "table_width", "num_shares")
_TASK = np.dtype([*((name, np.int64) for name in (*_ADDRESSES, *_SIZES)), ("scale", np.float32)], align=True)
"""One call of the loop, for all threads."""


class PagedDecode:
    """The compiled loop for one shape of cache, on torch's threads."""

    def __init__(self, spec: KVCacheSpec):
        self._spec = spec
        self._share = _compile(spec.block_size, spec.head_dim // 2)

    def plan(self, tables: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]]) -> PagedDecodes:
        """`spans`: of each sequence, the first position it sees and the end of those that will be there."""
        padded = np.zeros((len(tables), max(map(len, tables))), np.int64)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        spans_S2 = np.array(spans, np.int64)
        work = np.cumsum(np.repeat(spans_S2[:, 1] - spans_S2[:, 0], self._spec.num_kv_heads))
        num = min(torch.get_num_threads(), len(work))
        cuts = [0, *np.searchsorted(work, work[-1] * np.arange(1, num) / num).tolist(), len(work)]
        return PagedDecodes(padded, spans_S2, np.array(cuts, np.int64))

    def attend(
        self, q_SNH: torch.Tensor, kv: torch.Tensor, decodes: PagedDecodes, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, N, H], and the log-sum-exp of the scores [S, N]; float32."""
        q_SNH = q_SNH.contiguous()
        out_SNH = torch.empty(q_SNH.shape)
        lse_SN = torch.empty(q_SNH.shape[:2])
        num, num_heads = lse_SN.shape
        arrays = (decodes.tables, decodes.spans, decodes.cuts)
        addresses = (kv.data_ptr(), *(array.ctypes.data for array in arrays), q_SNH.data_ptr(), out_SNH.data_ptr())
        num_shares = len(decodes.cuts) - 1
        sizes = (len(kv), self._spec.num_kv_heads, num, num_heads, decodes.tables.shape[1], num_shares)
        task = np.array((*addresses, lse_SN.data_ptr(), *sizes, scale), _TASK)
        _run_on_all(self._share.address, task.ctypes.data, num_shares, 0)
        return out_SNH, lse_SN


@intrinsic
def _float(_context: Any, word: Any) -> tuple[Any, Callable[..., Any]]:
    """The float32 with these bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def pointer(_context: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return pointer


_words, _integers, _floats = map(_pointer_to, (types.uint32, types.int64, types.float32))


@intrinsic
def _prefetch(_context: Any, row: Any, at: Any) -> tuple[Any, Callable[..., Any]]:
    """Ask for the cache line of `row[at]`: hardware reads ahead to the end of a page only, and there a run ends."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), byte)
        builder.call(function, [address, flag(0), flag(3), flag(1)])  # to read, keep, data
        return context.get_dummy_value()

    return types.void(row, at), generate


@numba.njit(inline="always")
def _low(word):
    return _float(word << np.uint32(16))


@numba.njit(inline="always")
def _high(word):
    return _float(word & np.uint32(0xFFFF0000))


_LOG2_E = np.float32(1.4426950408889634)
_LN_2_UPPER, _LN_2_LOWER = np.float32(0.693359375), np.float32(-2.12194440e-4)


@numba.njit(inline="always", fastmath=_FAST_MATH)
def _exp(number):
    """e to a `number` of at most 0, within 2e-7 of it: a call of the library's own cannot be done in vector lanes.

    2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor series; what is below e^-87 comes out as e^-87, which is nothing.
    """
    number = max(number, np.float32(-87))
    power = np.floor(number * _LOG2_E + np.float32(0.5))
    rest = number - power * _LN_2_UPPER - power * _LN_2_LOWER
    series = np.float32(1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = series * rest + np.float32(factor)
    return series * _float(np.uint32((np.int32(power) + np.int32(127)) << np.int32(23)))


@numba.njit(fastmath={"nnan", "nsz", "reassoc"})
def _largest(scores):
    """Of those that are numbers."""
    top = np.float32(-np.inf)
    for score in scores:
        top = max(top, score)
    return top


@numba.njit(fastmath=_FAST_MATH, error_model="numpy")
def _softmax(scores):
    """In place; returns the log-sum-exp."""
    top, total = _largest(scores), np.float32(0)
    for at in range(len(scores)):
        scores[at] = _exp(scores[at] - top)
        total += scores[at]
    share = np.float32(1) / total
    for at in range(len(scores)):
        scores[at] *= share
    return top + np.log(total)


@cache
def _compile(num_positions: int, num_words: int) -> Any:
    """The loop for blocks of so many positions and heads of so many words: constants, so that it is unrolled."""

    @numba.njit(fastmath=_FAST_MATH)
    def score(block, ahead, query, scores):
        """scores[i, p] = query[i] . block[p] for two queries; `query` is [2, even or odd, C]."""
        even_0, odd_0, even_1, odd_1 = query[0, 0], query[0, 1], query[1, 0], query[1, 1]
        for position in range(num_positions):
            for word in range(0, num_words, _WORDS_A_LINE):
                _prefetch(ahead[position], word)
            row = block[position]
            sum_0 = sum_1 = np.float32(0)
            for at in range(num_words):
                low, high = _low(row[at]), _high(row[at])
                sum_0 += low * even_0[at] + high * odd_0[at]
                sum_1 += low * even_1[at] + high * odd_1[at]
            scores[0, position], scores[1, position] = sum_0, sum_1

    @numba.njit(fastmath=_FAST_MATH)
    def add(block, ahead, weights, total):
        """total[i] += weights[i, p] * block[p], summed over p, for two rows of weights; `total` is as a query."""
        even_0, odd_0, even_1, odd_1 = total[0, 0], total[0, 1], total[1, 0], total[1, 1]
        for start in range(0, num_positions, 4):  # four rows at a time: a total is loaded and stored once for them
            for position in range(start, start + 4):
                for word in range(0, num_words, _WORDS_A_LINE):
                    _prefetch(ahead[position], word)
            a, b, c, d = block[start], block[start + 1], block[start + 2], block[start + 3]
            p, q, r, s = weights[0, start], weights[0, start + 1], weights[0, start + 2], weights[0, start + 3]
            t, u, v, w = weights[1, start], weights[1, start + 1], weights[1, start + 2], weights[1, start + 3]
            for at in range(num_words):
                a_low, b_low, c_low, d_low = _low(a[at]), _low(b[at]), _low(c[at]), _low(d[at])
                a_high, b_high, c_high, d_high = _high(a[at]), _high(b[at]), _high(c[at]), _high(d[at])
                even_0[at] += p * a_low + q * b_low + r * c_low + s * d_low
                odd_0[at] += p * a_high + q * b_high + r * c_high + s * d_high
                even_1[at] += t * a_low + u * b_low + v * c_low + w * d_low
                odd_1[at] += t * a_high + u * b_high + v * c_high + w * d_high

    @numba.njit(error_model="numpy")
    def attend_head(kv, tables, spans, pair, queries, out, lse, scale, query, total, scores):
        """One pair of sequence and key/value head; its query heads two by two. The last three are scratch."""
        num_kv_heads = kv.shape[2]
        num_groups = queries.shape[1] // num_kv_heads
        sequence, kv_head = pair // num_kv_heads, pair % num_kv_heads
        table, first, end = tables[sequence], spans[sequence, 0], spans[sequence, 1]
        begin, stop = first // num_positions, (end - 1) // num_positions + 1
        before, after = first - begin * num_positions, end - begin * num_positions
        for group in range(0, num_groups, 2):
            for row in range(2):
                head = kv_head * num_groups + min(group + row, num_groups - 1)  # the odd one out twice
                for at in range(num_words):
                    query[row, 0, at] = _low(queries[sequence, head, at]) * scale
                    query[row, 1, at] = _high(queries[sequence, head, at]) * scale
            for index in range(begin, stop):
                ahead = kv[table[index + 1], 0, kv_head] if index + 1 < stop else kv[table[begin], 1, kv_head]
                start = (index - begin) * num_positions
                score(kv[table[index], 0, kv_head], ahead, query, scores[:, start : start + num_positions])
            for row in range(2):
                scores[row, :before] = 0
                head = kv_head * num_groups + min(group + row, num_groups - 1)
                lse[sequence, head] = _softmax(scores[row, before:after])
                scores[row, after : (stop - begin) * num_positions] = 0
            total[:] = 0
            for index in range(begin, stop):
                ahead = kv[table[min(index + 1, stop - 1)], 1, kv_head]
                start = (index - begin) * num_positions
                add(kv[table[index], 1, kv_head], ahead, scores[:, start : start + num_positions], total)
            for row in range(2):
                head = kv_head * num_groups + min(group + row, num_groups - 1)
                for at in range(num_words):
                    out[sequence, head, at, 0], out[sequence, head, at, 1] = total[row, 0, at], total[row, 1, at]

    @numba.cfunc(types.void(types.CPointer(numba.from_dtype(_TASK))))
    def share(tasks):
        """What one thread does. Fewer threads than shares take turns."""
        task = numba.carray(tasks, 1)[0]
        num, num_heads, width = task.num_sequences, task.num_heads, task.table_width
        kv = numba.carray(_words(task.kv), (task.num_blocks, 2, task.num_kv_heads, num_positions, num_words))
        tables, spans = (
            numba.carray(_integers(task.tables), (num, width)),
            numba.carray(_integers(task.spans), (num, 2)),
        )
        cuts = numba.carray(_integers(task.cuts), task.num_shares + 1)
        queries = numba.carray(_words(task.queries), (num, num_heads, num_words))
        out = numba.carray(_floats(task.out), (num, num_heads, num_words, 2))
        lse = numba.carray(_floats(task.lse), (num, num_heads))
        query = np.empty((2, 2, num_words), np.float32)
        total = np.empty((2, 2, num_words), np.float32)
        scores = np.empty((2, (width + 1) * num_positions), np.float32)
        for index in range(_thread_num(), task.num_shares, _num_threads()):
            for pair in range(cuts[index], cuts[index + 1]):
                attend_head(kv, tables, spans, pair, queries, out, lse, task.scale, query, total, scores)

    return share
