"""Claim: what a target's preset writes computes the same in that target's own runtime.

    python benchmarks/targets.py               the table, in Markdown
    python benchmarks/targets.py --json        one object a line

Every recipe x target on a small Conv + MatMul model and on MiniLM with fixed shapes; what comes out
runs in the runtime that the target is named after, and its output is compared with the float model
in onnxruntime. Runtimes are what `pip install openvino tract iree-base-compiler iree-base-runtime
onnxruntime-qnn` and `npm i --ignore-scripts onnxruntime-web` bring (point NODE_PATH at its
node_modules); those that are not installed are named and left out. QNN is its HTP simulator on
x86, with no node left to the CPU. WebGPU and TensorRT need devices and are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
from _runtimes import RUNTIMES, missing, run

LENGTH = 32
RECIPES = ("w8a8", "w8a8-dynamic", "w4")
LEAST = 0.98
"""Cosine from which on a cell counts as good; below it the target should have refused."""

Feeds = Mapping[str, np.ndarray]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="TARGET", choices=RUNTIMES, default=RUNTIMES)
    arguments = parser.parse_args()
    absent = {name: why for name in RUNTIMES if (why := missing(name))}
    rows: list[dict[str, Any]] = []
    with common.workspace() as folder:
        for case, model, calibration, feeds in cases(folder, arguments.quick):
            for target in RUNTIMES:
                if target in absent or target not in arguments.only:
                    continue
                for recipe in ("fp32", *RECIPES):
                    row = measure(folder, case, model, calibration, feeds, target, recipe)
                    rows.append(row)
                    if arguments.json:
                        print(json.dumps(row), flush=True)
                    else:
                        print(f"{case:12} {target:10} {recipe:14} {told(row)}", file=sys.stderr)
    for name, why in absent.items():
        print(f"not measured: {name}: {why}", file=sys.stderr)
    if not arguments.json:
        print(table(rows))


def cases(folder: Path, quick: bool) -> Iterator[tuple[str, Path, Path, Feeds]]:
    """Name, model, calibration data and the sample that is compared."""
    yield conv_matmul(folder)
    if not quick:
        yield minilm(folder)


def conv_matmul(folder: Path) -> tuple[str, Path, Path, Feeds]:
    """Two convolutions and two linear layers with random weights, on random images."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 13]>
        g (float[1, 3, 16, 16] x) => (float[1, 64] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            r = Relu(a)
            c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, w2, b2)
            d = Relu(c)
            s = Constant <value_ints = [1, 2048]> ()
            f = Reshape(d, s)
            h = MatMul(f, w3)
            hb = Add(h, b3)
            hr = Relu(hb)
            y = MatMul(hr, w4)
        }"""
    )
    shapes = {
        "w1": (16, 3, 3, 3), "b1": (16,), "w2": (32, 16, 3, 3), "b2": (32,),
        "w3": (2048, 128), "b3": (128,), "w4": (128, 64),
    }  # fmt: skip
    for name, shape in shapes.items():
        fan_in = int(np.prod(shape[1:] if len(shape) == 4 else shape[:1]))
        array = (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    images = rng.standard_normal((33, 1, 3, 16, 16)).astype(np.float32)
    onnx.save(model, folder / "conv_matmul.onnx")
    np.savez(folder / "conv_matmul.npz", x=images[:32])
    feeds = {"x": images[32]}
    return "conv+matmul", folder / "conv_matmul.onnx", folder / "conv_matmul.npz", feeds


def minilm(folder: Path) -> tuple[str, Path, Path, Feeds]:
    """MiniLM at 1 x 32 tokens, which a runtime without free shapes takes too."""
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    from onnxq.data.text import encode_texts

    source = folder / "minilm.onnx"
    made = common.run_job("build_model", name="minilm", out=source, settings={})
    if made.error:
        raise SystemExit(f"MiniLM cannot be built: {made.error}")
    model = onnx.load(source)
    free = [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim]
    for name, size in zip(free, (1, LENGTH), strict=True):
        make_dim_param_fixed(model.graph, name, size)
    onnx.save(model, folder / "minilm_fixed.onnx")
    lines = (common.shared_folder() / "data" / "stsb" / "sts-train.csv").read_text("utf-8")
    sentences = [line.split("\t")[5] for line in lines.splitlines()]
    feeds = encode_texts(
        common.spread(sentences, 65),
        source.with_suffix(".tokenizer.json"),
        [value.name for value in model.graph.input],
        LENGTH,
        LENGTH,
    )
    stacked = {name: array[:, None] for name, array in feeds.items()}
    np.savez(folder / "minilm.npz", **{name: array[:64] for name, array in stacked.items()})
    last = {name: array[64] for name, array in stacked.items()}
    return "MiniLM", folder / "minilm_fixed.onnx", folder / "minilm.npz", last


def measure(
    folder: Path, case: str, model: Path, calibration: Path, feeds: Feeds, target: str, recipe: str
) -> dict[str, Any]:
    """One cell: the cosine, or why there is none."""
    import onnxq
    from onnxq.errors import OnnxqError

    row: dict[str, Any] = {
        "case": f"{case} {target} {recipe}",
        "model": case,
        "target": target,
        "recipe": recipe,
        "ours": None,
        "peer": 1.0,
        "peer_name": "fp32 in onnxruntime",
        "ratio": None,
        "unit": "cosine",
    }
    written = model
    if recipe != "fp32":
        written = folder / f"{case}-{target}-{recipe}.onnx"
        options = {"calib": str(calibration), "target": target, "speed_seconds": 0, "threads": 1}
        try:
            onnxq.run(model, recipe, out=written, **options)
        except OnnxqError as error:
            return {**row, "refused": error.code}
    exact, got = run("cpu", model, feeds), run(target, written, feeds)
    if written != model:
        written.unlink()
    if isinstance(exact, str) or isinstance(got, str):
        return {**row, "failed": got if isinstance(got, str) else exact}
    a, b = (array.astype(np.float64).ravel() for array in (exact, got))
    cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return {**row, "ours": cosine, "ratio": cosine}


def told(row: Mapping[str, Any]) -> str:
    """A cell of the table."""
    if row["ours"] is not None:
        bad = "" if row["ours"] >= LEAST else " **bad**"
        return f"{row['ours']:.4f}{bad}"
    return f"refused: {row['refused']}" if "refused" in row else f"fails: {row['failed']}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line a model and target, one column a recipe."""
    lines = [
        "| model | target | " + " | ".join(("fp32", *RECIPES)) + " |",
        "|---|---|" + "---:|" * 4,
    ]
    cells = {(row["model"], row["target"], row["recipe"]): told(row) for row in rows}
    for model, target in dict.fromkeys((row["model"], row["target"]) for row in rows):
        found = (cells[model, target, recipe] for recipe in ("fp32", *RECIPES))
        lines.append(f"| {model} | `{target}` | " + " | ".join(found) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
