"""Claim: on a GPU, SmolLM2-135M with packed weights reads and writes text faster than in float16.

    python benchmarks/cuda_decoder.py                    prefill and decode through onnxruntime-gpu
    python benchmarks/cuda_decoder.py --json             one object a line
    python benchmarks/cuda_decoder.py --quick --cpu      stories260K on the CPU: does it run at all?

Not measured yet: no GPU was at hand. Needs onnxruntime-gpu and the CUDA library (``make cuda``);
without CUDA it says what is missing and measures nothing. Inputs and results stay on the device;
medians of interleaved runs. ``same`` is the share of prompt positions whose likeliest next token is
that of float16. Weights are rounded to nearest: this is about speed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
from _common import Column, Row
from _cuda import missing

PREPARED = "canonicalize{opset=21}, simplify-attention, fold-norm"
CASES = (
    ("w4a16", "INT4 weights, float16 activations",
     "assign{mode=weight-only weights=int4 block=32}, pack{activations=float}"),
    ("w4a16-ort", "the same in onnxruntime's MatMulNBits",
     "assign{mode=weight-only weights=int4 block=32}, qdq"),
    ("w8a8", "INT8 weights, INT8 a token",
     "assign{mode=per-token activations=int8 weights=int8}, pack"),
    ("fp8", "FP8 weights, float16 activations",
     "assign{mode=weight-only weights=fp8e4m3}, pack{activations=float}"),
)  # fmt: skip
COLUMNS = (
    Column("prefill", "prefill, ms", "ms", "lower"),
    Column("prefill_ratio", "fp16 / this", "x", "higher"),
    Column("decode", "decode, ms a token", "ms", "lower"),
    Column("decode_ratio", "fp16 / this", "x", "higher"),
    Column("same", "same next token", "", "higher", "{:.3f}"),
)
PROMPT, QUICK_PROMPT = 512, 24
ROUNDS, QUICK_ROUNDS = 30, 2
BASE = "fp16"


class Decoder:
    """A session whose tokens and cache stay on a device.

    Args:
        path: of the model.
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, path: Path, device: str) -> None:
        from onnxq.runtime import session

        providers = ["cuda", "cpu"] if device == "cuda" else ["cpu"]
        self._device = device
        self._session: Any = session(path, providers)

    def bind(self, ids: Any, past: dict[str, Any] | None) -> Callable[[], Any]:
        """What runs ``ids [1, S]`` behind a past once, and gives the binding with its results."""
        import onnxruntime as ort

        binding, length = self._session.io_binding(), 0
        for given in self._session.get_inputs():
            if not given.name.startswith("past_key_values"):
                continue
            dtype = np.float16 if given.type == "tensor(float16)" else np.float32
            empty = np.zeros((1, given.shape[1], 0, given.shape[3]), dtype)
            value = self._held(empty) if past is None else past[given.name]
            length = value.shape()[2]
            binding.bind_ortvalue_input(given.name, value)
        total = length + ids.shape[1]
        tokens = {
            "input_ids": ids,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(length, total, dtype=np.int64)[None],
        }
        for name, array in tokens.items():
            binding.bind_ortvalue_input(name, self._held(array))
        for output in self._session.get_outputs():
            binding.bind_output(output.name, self._device)
        options = ort.RunOptions()

        def run() -> Any:
            self._session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()
            return binding

        return run

    def results(self, binding: Any) -> tuple[Any, dict[str, Any]]:
        """Logits in numpy, and the cache under the names of the inputs."""
        names = [output.name for output in self._session.get_outputs()]
        values = dict(zip(names, binding.get_outputs(), strict=True))
        past = {
            name.replace("present.", "past_key_values."): value
            for name, value in values.items()
            if name.startswith("present.")
        }
        return values["logits"].numpy(), past

    def _held(self, array: Any) -> Any:
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)


def build(folder: Path, *, quick: bool) -> dict[str, Path]:
    """The model in float16 and its quantized forms."""
    options: dict[str, Any] = {"name": "smollm2-135m"}
    half = {"kv_cache": "true", "dtype": "float16"}
    if quick:
        checkpoint = common.shared_folder() / "data" / "stories260k"
        options = {"name": "stories260k", "checkpoint": str(checkpoint)}
        half = {"kv_cache": "true"}
    jobs: list[tuple[str, dict[str, Any]]] = []
    bases = {}
    # Passes quantize float32 layers; with the target they write products of float16.
    for name, settings in ((BASE, half), ("float", {"kv_cache": "true"})):
        built, bases[name] = folder / f"{name}-built.onnx", folder / f"{name}.onnx"
        jobs.append(("build_model", {**options, "out": built, "settings": settings}))
        prepared = {"model": built, "passes": PREPARED, "out": bases[name]}
        jobs.append(("onnxq_passes", prepared))
    paths = {BASE: bases[BASE]}
    for name, _, passes in CASES:
        paths[name] = folder / f"{name}.onnx"
        given = {"model": bases["float"], "passes": passes, "out": paths[name], "target": "cuda"}
        jobs.append(("onnxq_passes", given))
    for job, given in jobs:
        done = common.run_job(job, **given)
        if done.error:
            raise SystemExit(f"{given['out']} cannot be built: {done.error}")
        if "target" in given and not done.result["changed"]:
            raise SystemExit(f"{given['out']}: no layer was quantized")
    return paths


def median_ms(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if number >= 2:  # two to warm up
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


def measure(paths: dict[str, Path], device: str, *, quick: bool) -> dict[str, dict[str, float]]:
    """Figures of every model."""
    rng = np.random.default_rng()
    ids = rng.integers(3, 500, size=(1, (QUICK_PROMPT if quick else PROMPT) + 1))
    decoders = {name: Decoder(path, device) for name, path in paths.items()}
    prefills, steps, likeliest = {}, {}, {}
    for name, decoder in decoders.items():
        prefills[name] = decoder.bind(ids[:, :-1], None)
        logits, past = decoder.results(prefills[name]())
        likeliest[name] = logits[0].argmax(axis=-1)
        steps[name] = decoder.bind(ids[:, -1:], past)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    prefill, decode = median_ms(prefills, rounds), median_ms(steps, rounds)
    return {
        name: {
            "prefill": prefill[name],
            "prefill_ratio": prefill[BASE] / prefill[name],
            "decode": decode[name],
            "decode_ratio": decode[BASE] / decode[name],
            "same": float((likeliest[name] == likeliest[BASE]).mean()),
        }
        for name in decoders
    }


def options() -> Namespace:
    """The command line."""
    made = common.parser(__doc__ or "")
    made.add_argument("--cpu", action="store_true", help="on the CPU, to see that it runs")
    return made.parse_args()


def main() -> int:
    """Build, run, print."""
    chosen = options()
    problem = None if chosen.cpu else missing(torch=False)
    if problem is not None:
        sys.stderr.write(f"cuda_decoder.py measures nothing here: {problem}\n")
        return 0
    labels = {BASE: "float16", **{name: label for name, label, _ in CASES}}
    with common.workspace() as folder:
        paths = build(folder, quick=chosen.quick)
        figures = measure(paths, "cpu" if chosen.cpu else "cuda", quick=chosen.quick)
    if chosen.json:
        for name, found in figures.items():
            for what in ("prefill", "decode") if name != BASE else ():
                row = {
                    "case": f"{name} {what}", "ours": found[what], "peer": figures[BASE][what],
                    "peer_name": "fp16", "ratio": found[f"{what}_ratio"], "unit": "ms",
                    "same": found["same"],
                }  # fmt: skip
                print(json.dumps(row))
        return 0
    table = [Row(name, labels[name], name != BASE, dict(found)) for name, found in figures.items()]
    common.print_table("SmolLM2-135M on a GPU", table, COLUMNS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
