"""Claim: the CUDA kernels are right, and reach the goals of docs/cuda.md on an H200.

    python benchmarks/cuda.py                          the tables
    python benchmarks/cuda.py --json                   one object a line
    python benchmarks/cuda.py --results out.json       write the objects and the device to a file
    python benchmarks/cuda.py --docs docs/cuda.md      write the table of goals there
    python benchmarks/cuda.py --plan                   what would be measured; needs no GPU

Not measured yet. Needs a GPU, PyTorch and the CUDA library (``make cuda``);
without one it says what is missing and measures nothing. With onnxruntime-gpu its own operators are
timed too.

Each kernel is first run on poisoned outputs and compared with float64. Times are of CUDA graphs
that hold as many launches as there are copies of the weight (or of the activations, for kernels
without one): together more than three times the L2 cache, so that everything comes from memory. The
median of the replays counts. ``ratio`` is the peer's time over ours.

A 16 MB weight at M <= 8 should take no longer than its bytes at 65 % of 4.8 TB/s: 5.4 us on an
H200.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _common import Column, Row, parser, print_table
from _cuda import Device, Weight, missing, product_error, to_device
from _cuda_goals import BF16, COPY, CUBLAS, FP8_ALONE, GOALS, table, write_table
from _cuda_inputs import fp8_scales, plain_matrix, weight_of
from _cuda_peers import copies, cublas_int8, cublaslt_fp8, peers, time_graph

from onnxq import custom_ops
from onnxq.custom_ops.block_format import block_attributes
from onnxq.custom_ops.cuda_calls import Activations
from onnxq.formats import parse_format
from onnxq.solvers.hadamard import hadamard_matrix

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192))
QUICK_SHAPES = ((1024, 1024),)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
QUICK_ROWS = (1, 16, 256)
MANY_ROWS = (256, 1024, 4096)
QUICK_MANY_ROWS = (256,)
KINDS = ("int4_g128", "int4_g32", "mxfp4_g32", "nvfp4_g16", "int8_g128", "fp8_g128", "fp8")
LENGTHS = (1024, 4096, 8192)
COLUMNS = (
    Column("us", "us", "us", "lower"),
    Column("gbps", "GB/s", "GB/s", "higher", "{:.0f}"),
    Column("tflops", "TFLOP/s", "TFLOP/s", "higher", "{:.1f}"),
    Column("error", "error / budget", "", "lower", "{:.3f}"),
    Column("ratio", "peer / ours", "", "higher"),
)


def shapes(*, quick: bool) -> tuple[tuple[int, int], ...]:
    """K and N."""
    return QUICK_SHAPES if quick else SHAPES


def few_rows(*, quick: bool) -> tuple[int, ...]:
    """M of products with weights that alone are quantized."""
    return QUICK_ROWS if quick else ROWS


def many_rows(*, quick: bool) -> tuple[int, ...]:
    """M of products whose operands both are."""
    return QUICK_MANY_ROWS if quick else MANY_ROWS


def products(device: Device, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Every kind of weight at every M, beside its peers."""
    import torch

    rng = np.random.default_rng()
    for k, n in shapes(quick=quick):
        half = [torch.randn(n, k, device="cuda", dtype=torch.float16)]
        half += [half[0].clone() for _ in range(copies(half[0].nbytes) - 1)]
        cublas: dict[int, float] = {}
        int4: dict[int, float] = {}
        for kind in KINDS:
            packed = weight_of(kind, k, n, rng)
            weight = Weight(device, packed)
            weights = [weight, *(weight.copy() for _ in range(copies(weight.stored_bytes) - 1))]
            matrix = plain_matrix(packed)
            bias = torch.zeros(n, device="cuda", dtype=torch.float64)
            for m in few_rows(quick=quick):
                x = torch.randn(m, k, device="cuda").half()
                runs = [device.product(x, one) for one in weights]
                runs[-1][0]()
                torch.cuda.synchronize()
                error = product_error(runs[-1][1], x, matrix, bias, expanded=m > 128)
                ours = time_graph([run for run, _ in runs])
                if m not in cublas:
                    y = torch.empty(m, n, device="cuda", dtype=torch.float16)
                    calls = [lambda x=x, y=y, w=w: torch.matmul(x, w.T, out=y) for w in half]
                    cublas[m] = time_graph(calls)
                row = {
                    "case": kind, "M": m, "K": k, "N": n, "unit": "us", "ours": ours,
                    "gbps": (weight.stored_bytes + 2 * m * (k + n)) / ours / 1e3,
                    "tflops": 2.0 * m * k * n / ours / 1e6,
                    "error": error, "stored": weight.stored_bytes,
                }  # fmt: skip
                yield {**row, **_against(CUBLAS, cublas[m], ours)}
                if kind == "int4_g32":
                    int4[m] = ours
                elif kind == "mxfp4_g32":
                    yield {**row, **_against("our int4_g32", int4[m], ours)}
                for name, other in peers(kind, x, k, n):
                    yield {**row, **_against(name, other, ours)}


def _against(name: str, other: float, ours: float) -> dict[str, Any]:
    return {"peer_name": name, "peer": other, "ratio": other / ours}


def dynamic_products(device: Device, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Rows quantized on the way, to INT8, with and without outliers; packed weights."""
    import torch

    rng = np.random.default_rng()
    cases = (
        ("int8 rows x packed int8", 0.0),
        ("the same, outliers from 6 on", 6.0),
    )
    for k, n in shapes(quick=quick):
        half = [torch.randn(n, k, device="cuda", dtype=torch.float16)]
        half += [half[0].clone() for _ in range(copies(half[0].nbytes) - 1)]
        packed = weight_of("int8", k, n, rng)
        for case, threshold in cases:
            weight = Weight(device, packed)
            weights = [weight, *(weight.copy() for _ in range(copies(weight.stored_bytes) - 1))]
            matrix = plain_matrix(packed)
            for m in (*few_rows(quick=quick), *many_rows(quick=quick)):
                x = torch.randn(m, k, device="cuda").half()
                x[:, 7] *= 10 if threshold > 0 else 1
                runs = [device.dynamic_product(x, one, threshold=threshold) for one in weights]
                runs[-1][0]()
                torch.cuda.synchronize()
                ours = time_graph([run for run, _ in runs])
                y = torch.empty(m, n, device="cuda", dtype=torch.float16)
                fp16 = [lambda x=x, y=y, w=w: torch.matmul(x, w.T, out=y) for w in half]
                row = {
                    "case": case, "M": m, "K": k, "N": n, "unit": "us", "ours": ours,
                    "gbps": (weight.stored_bytes + 2 * m * (k + n)) / ours / 1e3,
                    "tflops": 2.0 * m * k * n / ours / 1e6, "stored": weight.stored_bytes,
                    "error": rounding_error(runs[-1][1], x, matrix, Activations.INT8),
                }  # fmt: skip
                yield {**row, **_against(CUBLAS, time_graph(fp16), ours)}
                if m >= min(MANY_ROWS):
                    other = cublas_int8(m, k, n)
                    yield {**row, **_against("cuBLAS INT8 to int32, no scales", other, ours)}


def rounding_error(y: Any, x: Any, matrix: Any, activations: Activations) -> float:
    """The error as a share of what rounding rows allows: half a step of INT8, or 2^-4 of FP8.

    A row's rounding errors are independent: their sum is a few standard deviations of the product.
    """
    wide = x.double()
    exact = wide @ matrix.T
    if activations == Activations.INT8:
        each = wide.abs().amax(dim=1, keepdim=True) / 127 / 12**0.5
        spread = each * matrix.square().sum(dim=1).sqrt()
    else:
        spread = (wide.square() @ matrix.square().T).sqrt() * 2.0**-4 / 3**0.5
    return _share(y.double(), exact, 7 * spread + exact.abs() * 2.0**-10 + 1e-6)


def fp8_products(device: Device, *, quick: bool) -> Iterator[dict[str, Any]]:
    """FP8 operands on cuBLASLt: scales by token and channel, and by blocks of 128."""
    import torch

    for k, n in shapes(quick=quick):
        w = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
        ws = [w, *(w.clone() for _ in range(copies(n * k) - 1))]
        wide = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16)]
        wide += [wide[0].clone() for _ in range(copies(wide[0].nbytes) - 1)]
        for m in many_rows(quick=quick):
            x = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
            alone = cublaslt_fp8(x, k, n)
            a, y = x.to(torch.bfloat16), torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            bf16 = time_graph([lambda w=w, a=a, y=y: torch.matmul(a, w.T, out=y) for w in wide])
            for block in (0, 128):
                scales = fp8_scales(m, k, n, block)
                runs = [
                    device.matrix_product(
                        x, one, x_scales=scales.rows, weights_scales=scales.columns,
                        scale_block=block,
                    )
                    for one in ws
                ]  # fmt: skip
                runs[-1][0]()
                torch.cuda.synchronize()
                left, right = scales.apply(x.double(), w.double())
                exact, size = left @ right.T, left.abs() @ right.abs().T
                ours = time_graph([run for run, _ in runs])
                budget = exact.abs() * 2.0**-8 + size * 2.0**-10
                row = {
                    "case": "fp8 128-block" if block else "fp8 x fp8",
                    "M": m, "K": k, "N": n, "unit": "us", "ours": ours,
                    "gbps": (n * k + m * (k + 2 * n)) / ours / 1e3,
                    "tflops": 2.0 * m * k * n / ours / 1e6,
                    "error": _share(runs[-1][1].double(), exact, budget),
                }  # fmt: skip
                yield {**row, **_against(FP8_ALONE, alone, ours)}
                yield {**row, **_against(BF16, bf16, ours)}


def float8_products(device: Device, *, quick: bool) -> Iterator[dict[str, Any]]:
    """DynamicFloat8MatMul: rows rounded to FP8 on the way, with one scale or one for each 128."""
    import torch

    for k, n in shapes(quick=quick):
        w = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
        ws = [w, *(w.clone() for _ in range(copies(n * k) - 1))]
        wide = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16)]
        wide += [wide[0].clone() for _ in range(copies(wide[0].nbytes) - 1)]
        for m, block in itertools.product(
            (*few_rows(quick=quick), *many_rows(quick=quick)), (0, 128)
        ):
            x = torch.randn(m, k, device="cuda").to(torch.bfloat16)
            scales = fp8_scales(m, k, n, block)
            weights_scales = scales.columns if block else scales.columns.reshape(n, 1)
            runs = [device.float8_product(x, one, weights_scales, block) for one in ws]
            runs[-1][0]()
            torch.cuda.synchronize()
            ours = time_graph([run for run, _ in runs])
            _, matrix = scales.apply(torch.zeros(m, k, device="cuda").double(), w.double())
            row = {
                "case": "fp8 rows x fp8 128-block" if block else "fp8 rows x fp8",
                "M": m, "K": k, "N": n, "unit": "us", "ours": ours,
                "gbps": (n * k + 2 * m * (k + n)) / ours / 1e3,
                "tflops": 2.0 * m * k * n / ours / 1e6,
                "error": rounding_error(runs[-1][1], x, matrix, Activations.FLOAT8),
            }  # fmt: skip
            y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            bf16 = [lambda w=w, x=x, y=y: torch.matmul(x, w.T, out=y) for w in wide]
            yield {**row, **_against(BF16, time_graph(bf16), ours)}
            if m >= min(MANY_ROWS):
                yield {**row, **_against(FP8_ALONE, cublaslt_fp8(x, k, n), ours)}
                for name, other in peers("fp8", x.half(), k, n) if not block else ():
                    yield {**row, **_against(name, other, ours)}


def rows_kernels(device: Device, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Hadamard, alone and with quantization, and per-token quantization, beside a copy."""
    import torch

    for k in LENGTHS[:1] if quick else LENGTHS:
        m = 64 if quick else (1 << 25) // k  # 64 MB of float16
        x = torch.randn(m, k, device="cuda").half()
        xs = [x, *(x.clone() for _ in range(copies(x.nbytes) - 1))]
        core, scale = to_device(hadamard_matrix(1).astype(np.float32)), 1 / math.sqrt(k)
        dense = to_device(hadamard_matrix(k).astype(np.float64))
        exact = x[:8].double() @ dense * float(np.float32(scale))
        rounded = [device.hadamard(one, core, k, scale) for one in xs]
        fused = [device.hadamard(one, core, k, scale, group=k) for one in xs]
        quantized = [device.per_token(one) for one in xs]
        for run, *_ in (rounded[0], fused[0], quantized[0]):
            run()
        torch.cuda.synchronize()
        errors = {
            "hadamard": _share(rounded[0][1][:8].double(), exact, exact.abs() * 2.0**-11 + 2e-4),
            "hadamard+int8": _share(
                fused[0][1][:8].double() * fused[0][2][:8].double(),
                exact,
                fused[0][2][:8].double() * 0.51 + exact.abs() * 2.0**-11 + 2e-4,
            ),
            "per-token int8": _share(
                quantized[0][1].double() * quantized[0][2][:, None].double(),
                x.double(),
                quantized[0][2][:, None].double() * 0.5001,
            ),
        }
        cases: list[tuple[str, Any, int]] = [
            ("hadamard", rounded, 2),
            ("hadamard+int8", fused, 1),
            ("per-token int8", quantized, 1),
        ]
        for name in ("mxfp4", "nvfp4", "fp8e4m3"):
            attributes = block_attributes(parse_format(name))
            runs = [device.quantize_block(one, attributes) for one in xs]
            runs[0][0]()
            torch.cuda.synchronize()
            (wanted,) = custom_ops.get("QuantizeBlock").reference(
                x[:8].float().cpu().numpy(), **attributes
            )
            wrong = runs[0][1][:8].cpu() != torch.from_numpy(wanted).half()
            errors[f"blocks {name}"] = 2.0 * int(wrong.sum())  # the reference's bits
            cases.append((f"blocks {name}", runs, 2))
        for name, runs, out_bytes in cases:
            size = m * k * (2 + out_bytes)
            ours = time_graph([run for run, *_ in runs])
            half = torch.empty(size // 2, device="cuda", dtype=torch.uint8)
            froms = [torch.randint_like(half, 256) for _ in xs]
            copy = time_graph([lambda f=f, h=half: h.copy_(f) for f in froms])
            yield {
                "case": name, "M": m, "K": k, "N": k, "unit": "us", "ours": ours,
                "gbps": size / ours / 1e3, "error": errors[name],
                **_against(COPY, copy, ours),
            }  # fmt: skip


def _share(got: Any, exact: Any, budget: Any) -> float:
    import torch

    return float(torch.nan_to_num(((got - exact).abs() / budget).max(), nan=float("inf")))


WORK = (products, dynamic_products, fp8_products, float8_products, rows_kernels)


def plan(*, quick: bool) -> list[str]:
    """What would be measured, a line each."""
    few, many = few_rows(quick=quick), many_rows(quick=quick)
    lines = [f"goal: {goal.text} >= {goal.bound:.2f}" for goal in GOALS]
    for k, n in shapes(quick=quick):
        lines.append(f"K {k} N {n}: weights {', '.join(KINDS)} at M {', '.join(map(str, few))}")
        lines.append(f"K {k} N {n}: both operands in 8 bits at M {', '.join(map(str, many))}")
    lengths = LENGTHS[:1] if quick else LENGTHS
    lines.append(f"rows of {', '.join(map(str, lengths))}: Hadamard, per token, blocks")
    return lines


def options() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__ or "")
    made.add_argument("--results", type=Path, help="write rows and device to this JSON file")
    made.add_argument("--docs", type=Path, help="write the table of goals into this page")
    made.add_argument("--plan", action="store_true", help="print what would be measured, and stop")
    return made.parse_args()


def main() -> int:
    """Check, time, print; leaves exit code 1 when a result lies outside of its budget."""
    chosen = options()
    if chosen.plan:
        print("\n".join(plan(quick=chosen.quick)))
        return 0
    problem = missing()
    if problem is not None:
        sys.stderr.write(f"cuda.py measures nothing here: {problem}\n")
        return 0
    import torch

    device = Device()
    name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}"
    rows: list[dict[str, Any]] = []
    for work in WORK:
        for row in work(device, quick=chosen.quick):
            rows.append(row)
            if chosen.json:
                print(json.dumps(row), flush=True)
    if not chosen.json:
        print_table("CUDA kernels", [_shown(row) for row in rows], COLUMNS)
        print(table(rows, name))
    if chosen.results is not None:
        chosen.results.write_text(json.dumps({"device": name, "rows": rows}, indent=1))
    if chosen.docs is not None:
        write_table(chosen.docs, table(rows, name))
    wrong = [row for row in rows if not row["error"] <= 1]
    for row in wrong:
        sys.stderr.write(f"outside of the budget: {row}\n")
    return 1 if wrong else 0


def _shown(row: dict[str, Any]) -> Row:
    label = f"{row['case']} M {row['M']} K {row['K']} N {row['N']} / {row['peer_name']}"
    figures = {key: row[key] for key in ("gbps", "tflops", "error", "ratio") if key in row}
    return Row(label, label, True, {"us": row["ours"], **figures})


if __name__ == "__main__":
    raise SystemExit(main())
