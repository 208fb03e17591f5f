"""Claim: rounding a large model to 4 bits needs the memory of a few tensors, not of the model.

    python benchmarks/large_model.py             the table
    python benchmarks/large_model.py --json      one object a line
    python benchmarks/large_model.py --quick     0.2 GB: does it run at all?

A synthetic decoder-like chain of MatMuls in fp32 with external data, 3.5 GB by default: 4096 x 4096
attention weights, 4096 x 16384 feed-forward weights (268 MB, the largest). Ours: ``canonicalize,
assign{mode=weight-only weights=int4 block=32}, qdq`` from file to file. Peer: ``onnx.load`` and
``MatMulNBitsQuantizer`` (RTN, the same blocks and bits), saved with external data. Each in a
process of its own, in turn, ``--rounds`` times; the processor time is the least of them, imports
included, the peak resident memory the largest, pages of mapped files included. Everything lies in a
temporary folder, which goes.
"""

from __future__ import annotations

from pathlib import Path

import _common as common
from _common import Column, Cost, Row

PASSES = "canonicalize, assign{mode=weight-only weights=int4 block=32}, qdq"
COLUMNS = (
    Column("peak", "peak MB", "10^6 bytes", "lower", "{:.0f}"),
    Column("cpu", "CPU s", "s", "lower", "{:.1f}"),
    Column("size", "MB", "10^6 bytes", "lower", "{:.0f}"),
)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--gb", type=float, default=3.5, help="10^9 bytes of fp32 weights")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    size, width = (0.2, 1024) if arguments.quick else (arguments.gb, 4096)
    with common.workspace() as folder:
        base = folder / "large.onnx"
        count = write_model(base, size, width)
        rows = measure(base, folder, 1 if arguments.quick else arguments.rounds)
    title = f"{size:g} GB of fp32 weights, {count} layers"
    if arguments.json:
        common.emit(common.compare_rows(f"rtn-int4 {size:g} GB", rows[0], rows[1:], COLUMNS))
    elif arguments.markdown:
        print(common.markdown_table(rows, COLUMNS))
    else:
        common.print_table(f"{title}; {common.machine()}", rows, COLUMNS)


def write_model(path: Path, gigabytes: float, width: int) -> int:
    """A chain of MatMuls with external data, written tensor by tensor; returns their number."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    noise = rng.standard_normal(width * width, dtype=np.float32) * np.float32(width**-0.5)
    shapes, total = [], 0
    block = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    while total < gigabytes * 1e9:
        shape = block[len(shapes) % len(block)]
        shapes.append(shape)
        total += 4 * shape[0] * shape[1]
    if shapes[-1][1] != width:  # come back to the width of the output
        shapes.append((4 * width, width))
    nodes, tensors, offset = [], [], 0
    with path.with_suffix(".data").open("wb") as data:
        for number, shape in enumerate(shapes):
            tensor = TensorProto(
                name=f"w{number}", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL
            )
            tensor.dims.extend(shape)
            length = 4 * shape[0] * shape[1]
            facts = {"location": f"{path.stem}.data", "offset": offset, "length": length}
            for key, value in facts.items():
                tensor.external_data.add(key=key, value=str(value))
            for part in range(length // noise.nbytes):
                np.roll(noise, 17 * number + part).tofile(data)
            offset += length
            tensors.append(tensor)
            before = "x" if number == 0 else f"y{number - 1}"
            nodes.append(
                helper.make_node("MatMul", [before, f"w{number}"], [f"y{number}"], f"layer{number}")
            )
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", width])],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["T", width])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    )
    onnx.checker.check_model(str(path))
    return len(shapes)


def measure(base: Path, folder: Path, rounds: int) -> list[Row]:
    """Ours and the peer, in turn."""
    from onnxq.graph import io

    jobs = (
        ("onnxq", "onnxq RTN, int4 g32", "onnxq_passes", {"passes": PASSES}),
        ("ort-rtn", "ORT MatMulNBits RTN, sym g32", "ort_w4", {"external": True}),
    )
    found: dict[str, list[Cost]] = {name: [] for name, *_ in jobs}
    sizes: dict[str, int] = {}
    for _ in range(rounds):
        for name, _, job, options in jobs:
            out = folder / f"{name}.onnx"
            found[name].append(common.run_job(job, model=base, out=out, **options))
            if out.is_file():
                sizes[name] = io.size_on_disk(out)
            for left in folder.glob(f"{name}.onnx*"):
                left.unlink()
    rows = []
    for name, label, _, _ in jobs:
        row = Row(name, label, name == "onnxq")
        row.error = next((cost.error for cost in found[name] if cost.error), None)
        if row.error is None:
            row.figures.update(
                peak=max(cost.peak_mb for cost in found[name]),
                cpu=min(cost.cpu_s for cost in found[name]),
                size=sizes[name] / common.MB,
            )
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
