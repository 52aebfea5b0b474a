"""What the sampler's kernels compute with: logarithm, exponential, the generator's hash, floats that order as integers.

Nothing here is a library's: integer arithmetic, and float32 sums and products that every launch keeps apart
(`enable_fp_fusion=False`). So the interpreter, by which the tests run, and a GPU give the same bits. The polynomials
are Cephes' (Moshier, 1989). Against float64 `exponential` and `logarithm` err by less than a unit in the last place,
and `log_standard_exponential` by at most 6e-7 (tests/text/sampling/test_sampler_kernels.py).
"""

# mypy: disable-error-code="no-untyped-def"
# (arguments of kernels are pointers and numbers of a compiler, not Python values)

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(1 << 31))
"""The key of what is no token; -inf has a larger one."""
NO_TOKEN = tl.constexpr(-(1 << 63))
"""`packed` of what is no token."""


@triton.jit
def ordered(x):
    """float32 → int32 keys of the same order, NaN the largest of all and equal zeros equal."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(x == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def from_ordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def packed(key, token, is_token):
    """int64 whose maximum is the first token of those with the largest key; what is no token loses to any that is."""
    return tl.where(is_token, (key.to(tl.int64) << 32) | (0xFFFFFFFF - token.to(tl.int64)), NO_TOKEN)


@triton.jit
def token_of(pack):
    return 0xFFFFFFFF - (pack & 0xFFFFFFFF)


@triton.jit
def score_of(pack):
    return from_ordered((pack >> 32).to(tl.int32))


@triton.jit
def exponential(x):
    """e^x for x <= 0; 0 below -80."""
    near = tl.where(x > -80.0, x, -80.0)
    n = tl.floor(near * 1.44269504088896341 + 0.5)
    r = (near - n * 0.693359375) + n * 2.12194440e-4
    y = 1.9875691500e-4 * r + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = y * (r * r) + r + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x > -80.0, y * power, 0.0)


@triton.jit
def mass(x):
    """e^x for x <= 0 as an integer, in units of 2^-40: sums of such are exact, whatever their order."""
    return (exponential(x) * 1099511627776.0).to(tl.int64)


@triton.jit
def logarithm(x):
    """Of a positive normal number."""
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23  # of 2^n, so that what is left lies between the roots of 1/2 and 2
    f = (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    y = 7.0376836292e-2 * f - 1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f - 1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f - 1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f - 2.4999993993e-1
    y = y * f + 3.3333331174e-1
    e = n.to(tl.float32)
    y = y * f * z - e * 2.12194440e-4 - 0.5 * z
    return f + y + e * 0.693359375


@triton.jit
def splitmix64(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def draw_state(seed_state, position, stream):
    """`gumbel._state`, of a seed that went through splitmix64 already."""
    return splitmix64(seed_state.to(tl.uint64) ^ ((position.to(tl.uint64) << 8) | stream))


@triton.jit
def log_standard_exponential(hashed, state):
    """`GumbelNoise.log_exponential` for tokens whose ids are hashed, with the keys in `state`."""
    x = hashed.to(tl.uint32) ^ (state & 0xFFFFFFFF).to(tl.uint32)
    x = x * 0x7FEB352D
    x = (x ^ (x >> 15)) ^ (state >> 32).to(tl.uint32)
    x = x * 0x846CA68B
    x = x ^ (x >> 16)
    u = (tl.abs(x.to(tl.int32, bitcast=True).to(tl.float32)) + 0.5) * 4.656612873077393e-10
    u = tl.minimum(u, 0.999999940395355224609375)
    rest = 1.0 - u
    # -log(1 - u), with what was lost when 1 - u was rounded.
    return logarithm((u - (1.0 - rest)) - logarithm(rest))


@triton.jit
def uniform_of(state):
    """`gumbel.uniform`, rounded to float32."""
    return (((state >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16).to(tl.float32)
