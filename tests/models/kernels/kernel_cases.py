"""The fused kernels within their stated bounds of float64. A script: Triton reads TRITON_INTERPRET when imported.

TRITON_INTERPRET=1 python kernel_cases.py        on CPU, by the interpreter
python kernel_cases.py                           compiled, where there is a GPU
"""

from __future__ import annotations

import itertools

import torch

from models.kernels import modulate, norm_rotate, rms_norm, silu_mul

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = {torch.bfloat16: 8 if DEVICE.type == "cuda" else 7, torch.float16: 11, torch.float32: 24}
"""Bits p of a rounding by 2^-p. The interpreter cuts bfloat16 off where a device rounds to nearest."""
DTYPES = tuple(PRECISION)
SHAPES = [(1, 1), (1, 64), (3, 100), (2, 257), (5, 1152), (1, 4096), (2, 3072), (7, 24)]
"""Rows and features."""
LAYOUTS = ((0, 1e-3), (16, 30.0))
"""Features between rows, and the standard deviation of inputs."""
random = torch.Generator().manual_seed(0)


def draw(*shape: int, dtype: torch.dtype, size: float = 1.0, gap: int = 0, mean: float = 0.0) -> torch.Tensor:
    """Normal numbers; with a gap the rows lie apart, and between them is what must not be read."""
    around = torch.full((*shape[:-1], shape[-1] + gap), float("nan"))
    around[..., : shape[-1]] = mean + size * torch.randn(shape, generator=random)
    return around.to(DEVICE, dtype)[..., : shape[-1]]


def check(name: str, out: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor | float) -> float:
    """Within 2^-p of `exact` and `slack` beside. The largest share of that bound that was met."""
    assert out.device.type == DEVICE.type and exact.dtype == torch.float64
    least = torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps / 2
    bound = 2.0 ** -PRECISION[out.dtype] * exact.abs() + slack + least
    share = float(((out.double() - exact).abs() / bound).max())
    assert share <= 1, f"{name} {tuple(out.shape)} {out.dtype}: {share:.2f} of the bound"
    return share


def rms_norm_cases() -> float:
    worst = 0.0
    for (rows, width), dtype, (gap, size) in itertools.product(SHAPES, DTYPES, LAYOUTS):
        x, weight = draw(rows, width, dtype=dtype, size=size, gap=gap), draw(width, dtype=dtype)
        exact = rms_norm.rms_norm_reference(x.double(), weight.double(), 1e-5)
        worst = max(worst, check("rms_norm", rms_norm.rms_norm(x, weight, 1e-5), exact, 2.0**-19 * exact.abs()))

        residual = draw(rows, width, dtype=dtype, gap=gap)
        total = residual.double() + x.double()
        out = rms_norm.add_rms_norm_(residual, x, weight, 1e-5)
        check("the residual's sum", residual, total, 0.0)
        exact = rms_norm.rms_norm_reference(residual.double(), weight.double(), 1e-5)
        worst = max(worst, check("add_rms_norm_", out, exact, 2.0**-19 * exact.abs()))
    heads = draw(3, 4, 24, dtype=torch.float32)
    assert rms_norm.rms_norm(heads, torch.ones(24, device=DEVICE), 1e-5).shape == heads.shape
    across = draw(64, 3, dtype=torch.float32).t()
    exact = rms_norm.rms_norm_reference(across.double(), torch.ones(64, device=DEVICE).double(), 1e-5)
    check("across", rms_norm.rms_norm(across, torch.ones(64, device=DEVICE), 1e-5), exact, 2.0**-19 * exact.abs())
    assert rms_norm.rms_norm(heads[:0], torch.ones(24, device=DEVICE), 1e-5).shape == (0, 4, 24)
    return worst


def silu_mul_cases() -> float:
    worst = 0.0
    for (rows, width), dtype, (gap, size) in itertools.product(SHAPES, DTYPES, LAYOUTS):
        gate_up = draw(rows, 2 * width, dtype=dtype, size=size, gap=gap)
        exact, up = silu_mul.silu_mul_reference(gate_up.double()), gate_up[:, width:].double()
        slack = 2.0**-16 * exact.abs() + 2.0**-115 * up.abs()
        worst = max(worst, check("silu_mul", silu_mul.silu_mul(gate_up), exact, slack))
    assert silu_mul.silu_mul(torch.empty(0, 8, device=DEVICE)).shape == (0, 4)
    extremes = torch.tensor([[-1e4, -88.0, 0.0, 88.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    assert silu_mul.silu_mul(extremes).isfinite().all()
    return worst


def modulate_cases() -> float:
    worst = 0.0
    batches = [(1, 1, 64), (1, 3, 100), (3, 2, 257), (2, 5, 1152), (1, 2, 3072), (2, 1, 24)]
    for (rows, tokens, width), dtype, (gap, mean) in itertools.product(batches, DTYPES, ((0, 0.0), (16, 20.0))):
        x, y = (draw(rows, tokens, width, dtype=dtype, gap=gap, mean=mean) for _ in range(2))
        shift, scale, gate = draw(rows, 3 * width, dtype=dtype).chunk(3, -1)
        worst = max(worst, *_modulate_case(x, y, shift, scale, gate))
    # Tokens are the fast dimension of what a patch embedding gives.
    across = draw(2, 64, 5, dtype=torch.float32).transpose(1, 2)
    shift, scale, gate = draw(2, 3 * 64, dtype=torch.float32).chunk(3, -1)
    _modulate_case(across, across, shift, scale, gate)
    assert modulate.modulate(across[:, :0], shift, scale, 1e-6).shape == (2, 0, 64)
    return worst


def _modulate_case(x, y, shift, scale, gate) -> list[float]:
    wide = [tensor.double() for tensor in (x, y, shift, scale, gate)]
    exact_sum = modulate.gate_add_reference(wide[0], wide[4], wide[1])
    sum_slack = 2.0**-23 * (wide[0].abs() + (wide[4][:, None] * wide[1]).abs())
    total, out = modulate.gate_add_modulate(x, gate, y, shift, scale, 1e-6)
    assert torch.equal(total, modulate.gate_add(x, gate, y))
    return [
        check("gate_add", total, exact_sum, sum_slack),
        check("modulate", modulate.modulate(x, shift, scale, 1e-6), *_modulated(wide[0], *wide[2:4])),
        check("gate_add_modulate", out, *_modulated(total.double(), *wide[2:4])),
    ]


def _modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, and what the docstring allows beside the rounding."""
    deviation = (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    norm, root = (x - x.mean(-1, keepdim=True)) / deviation, x.square().mean(-1, keepdim=True).sqrt() / deviation
    slack = 2.0**-18 * ((norm.abs() + root) * (1 + scale[:, None]).abs() + shift[:, None].abs())
    return modulate.modulate_reference(x, shift, scale, 1e-6), slack


def norm_rotate_cases() -> float:
    worst = 0.0
    shapes = [(1, 1, 1, 16), (2, 3, 5, 24), (1, 2, 24, 128), (3, 5, 2, 64)]
    for (rows, tokens, heads, width), dtype in itertools.product(shapes, DTYPES):
        qkv = draw(rows, tokens, 3 * heads, width, dtype=dtype)
        weight = draw(width, dtype=dtype)
        angles = draw(tokens, width // 2, dtype=torch.float32).repeat_interleave(2, -1)
        # Between text before and other tokens behind, which must stay as they are.
        joint = torch.full((rows, tokens + 3, heads, width), float("nan"), dtype=dtype, device=DEVICE)
        for x in (qkv[:, :, heads : 2 * heads], qkv[:, :, :heads]):
            norm_rotate.norm_rotate_into(joint[:, 2:-1], x, weight, 1e-6, angles.cos(), angles.sin())
        wide, (cos, sin) = (qkv[:, :, :heads].double(), weight.double()), (angles.cos().double(), angles.sin().double())
        exact = norm_rotate.norm_rotate_reference(*wide, 1e-6, cos, sin)
        sizes = norm_rotate.norm_rotate_reference(
            wide[0], wide[1], 1e-6, torch.ones_like(cos), torch.zeros_like(sin)
        ).abs()
        pairs = sizes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        slack = 2.0**-18 * (sizes * cos.abs()[:, None] + pairs * sin.abs()[:, None])
        worst = max(worst, check("norm_rotate", joint[:, 2:-1], exact, slack))
        assert joint[:, :2].isnan().all() and joint[:, -1:].isnan().all()
    return worst


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Memory that nobody has written is NaN.
    torch.use_deterministic_algorithms(True)
    for cases in (rms_norm_cases, silu_mul_cases, modulate_cases, norm_rotate_cases):
        print(f"within bounds: {cases.__name__}, at most {cases():.3f} of them", flush=True)
