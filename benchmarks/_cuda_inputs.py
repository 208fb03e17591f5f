"""Random operands for the CUDA kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from _cuda import to_device

from onnxq.custom_ops.defs import quant_mat_mul
from onnxq.custom_ops.packed_weight import PackedWeight, integer_levels, pack_table
from onnxq.formats import parse_format


def weight_of(kind: str, k: int, n: int, rng: np.random.Generator) -> PackedWeight:
    """Random codes; scales that are powers of two, so that every type of scale holds them."""
    name, _, group_text = kind.partition("_g")
    group = int(group_text or k)
    if name == "int4":
        levels, _ = integer_levels(4, signed=True)
    elif name == "int8":
        levels, _ = integer_levels(8, signed=True)
    else:
        bits = 4 if name in ("mxfp4", "nvfp4") else 8
        levels = np.asarray(
            parse_format("fp4e2m1" if bits == 4 else "fp8e4m3").decode(
                np.arange(1 << bits, dtype=np.uint8)
            ),
            np.float32,
        )
    codes = rng.choice(np.flatnonzero(np.isfinite(levels)).astype(np.uint8), size=(n, k))
    scale = np.exp2(rng.integers(-8, -4, size=(n, -(-k // group)))).astype(np.float32)
    stored = {"mxfp4": "e8m0", "nvfp4": "e4m3"}.get(name, "float16")
    return pack_table(
        codes,
        levels,
        scale,
        group=group,
        scale_type=stored,
        int8_activations=False,
    )


def plain_matrix(packed: PackedWeight) -> Any:
    """W ``[N, K]`` in float64 on the device."""
    a = packed.attributes
    names = ("codes", "scales", "zero_points", "levels")
    level, scale = quant_mat_mul.weight_parts(
        *(packed.inputs[name] for name in names), a["K"], a["N"], a["group"], a["exponent_scales"]
    )
    wide = np.repeat(scale, int(a["group"]), axis=1)[:, : int(a["K"])]
    return to_device(level * wide).double() * float(np.float32(a["factor"]))


@dataclass(frozen=True)
class Fp8Scales:
    """Random scales as cuBLASLt reads them.

    Args:
        rows: ``[M]``, or by blocks ``[K / 128, M]``.
        columns: ``[N]``, or by blocks ``[N / 128, K / 128 rounded up to 4s]``.
        block: 0 or 128.
    """

    rows: Any
    columns: Any
    block: int

    def apply(self, x: Any, w: Any) -> tuple[Any, Any]:
        """Both operands times their scales, in float64."""
        if not self.block:
            return x * self.rows.double()[:, None], w * self.columns.double()[:, None]
        of_x = self.rows.double().T.repeat_interleave(self.block, dim=1)
        of_w = self.columns.double()[:, : x.shape[1] // self.block]
        of_w = of_w.repeat_interleave(self.block, dim=0).repeat_interleave(self.block, dim=1)
        return x * of_x, w * of_w


def fp8_scales(m: int, k: int, n: int, block: int) -> Fp8Scales:
    """Numbers from 0.5 to 1.5."""
    import torch

    if not block:
        return Fp8Scales(torch.rand(m, device="cuda") + 0.5, torch.rand(n, device="cuda") + 0.5, 0)
    columns = torch.rand(n // block, -(-k // block // 4) * 4, device="cuda") + 0.5
    return Fp8Scales(torch.rand(k // block, m, device="cuda") + 0.5, columns, block)
