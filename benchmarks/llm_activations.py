"""Claim: rotations and smoothing, all folded, make static 8-bit activations safe for a decoder.

    python benchmarks/llm_activations.py                          the table
    python benchmarks/llm_activations.py --json                   one object a line
    python benchmarks/llm_activations.py --cases naive,best       some of the cases
    python benchmarks/llm_activations.py --model smollm2.onnx     a model that is built already

SmolLM2-135M-Instruct, perplexity over windows of 512 tokens of the given half of WikiText-2 test,
no BOS, the first 24 by default (``--windows 0`` for all); calibrated on 8 windows of its validation
text. Every linear layer is quantized, the tied output layer included, unless a case says otherwise:
weights in int8 with one scale an output channel, activations in 8 bits with one scale a tensor.
Each configuration is made and evaluated in a process of its own. KL: mean over tokens of
KL(fp32 || quantized). Share: of the linear layers' multiplications that run on integers.

``--quick`` uses stories260K and two short windows: does it run at all?
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
from _common import Column, Row

SMOOTH = "calibrate, smooth-quant"
ROTATE = "fold-norm, rotate"
STATIC = "calibrate{method=mse}, assign, qdq"
DOWN = 'partial{layers=["*layers.11/mlp/down_proj*","*layers.28/mlp/down_proj*"]}'


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to quantize: pipeline text, or a peer."""

    name: str
    label: str
    passes: str = ""
    peer: bool = False


CASES = (
    Case("fp32", "fp32", peer=True),
    Case("ort-dynamic", "ORT dynamic int8, per channel", peer=True),
    Case("naive", "static, min-max", "canonicalize, calibrate{margin=1.0}, assign, qdq"),
    Case("mse", "static, MSE", f"canonicalize, {STATIC}"),
    Case("smooth", "smooth-quant", f"canonicalize, {SMOOTH}, {STATIC}"),
    Case("rotate", "rotate R1 R2", f"canonicalize, {ROTATE}, {STATIC}"),
    Case("rotate-r4", "rotate R1 R2 R4", f"canonicalize, {ROTATE}, online-hadamard, {STATIC}"),
    Case("smooth-rotate", "smooth-quant + R1 R2", f"canonicalize, {SMOOTH}, {ROTATE}, {STATIC}"),
    Case(
        "best",
        "smooth-quant + R1 R2 R4",
        f"canonicalize, {SMOOTH}, {ROTATE}, online-hadamard, {STATIC}",
    ),
    Case(
        "naive-partial",
        "static, MSE, 2 down_proj in float",
        "canonicalize, calibrate{method=mse}, assign, " + DOWN + ", qdq",
    ),
    Case(
        "best-partial",
        "best, auto-partial max-drop=1",
        f"canonicalize, {SMOOTH}, {ROTATE}, online-hadamard, calibrate{{method=mse}}, assign, "
        "sensitivity{metric=kl samples=1}, auto-partial{max-drop=1 samples=4}, qdq",
    ),
    Case("dynamic", "dynamic, per tensor", "canonicalize, assign{mode=dynamic}, qdq"),
    Case(
        "dynamic-rotate",
        "dynamic, per tensor, R1 R2 R4",
        f"canonicalize, {ROTATE}, online-hadamard, assign{{mode=dynamic}}, qdq",
    ),
    Case(
        "dynamic-best",
        "dynamic, smooth-quant + R1 R2 R4",
        f"canonicalize, {SMOOTH}, {ROTATE}, online-hadamard, assign{{mode=dynamic}}, qdq",
    ),
)
QUICK = ("fp32", "naive", "best")

PERPLEXITY = Column("perplexity", "perplexity", "perplexity", "lower", "{:.3f}")
COLUMNS = (
    PERPLEXITY,
    Column("worse", "% over fp32", "%", "lower"),
    Column("kl", "KL nats", "nats", "lower", "{:.4f}"),
    Column("share", "int8 share %", "%", "higher", "{:.1f}"),
    Column("seconds", "made in s", "s", "lower", "{:.0f}"),
    Column("peak", "peak MB", "MB", "lower", "{:.0f}"),
    Column("size", "file MB", "MB", "lower", "{:.0f}"),
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all cases share."""

    source: Path
    tokenizer: Path
    calibration: Path
    text: Path
    folder: Path
    window: int
    windows: int
    samples: int
    threads: int


def windows_of(setup: Setup, path: Path, count: int) -> list[np.ndarray]:
    """The first windows of a text, ``[1, window]`` token ids each; 0 for all."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(setup.tokenizer))
    ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
    whole = len(ids) // setup.window
    return [
        np.array([ids[i * setup.window : (i + 1) * setup.window]], np.int64)
        for i in range(min(count or whole, whole))
    ]


def make(setup: Setup, case: Case) -> Path:
    """Quantize; the path of the result."""
    path = setup.folder / f"{case.name}.onnx"
    if case.name == "fp32":
        return setup.source
    if case.name == "ort-dynamic":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(setup.source, path, per_channel=True, weight_type=QuantType.QInt8)
        return path
    from onnxq.calibration.data import open_data
    from onnxq.graph import io
    from onnxq.pipeline.runner import Pipeline

    model = io.load(setup.source)
    ids = windows_of(setup, setup.calibration, setup.samples + 4)
    samples = [{"input_ids": window} for window in ids]
    result = Pipeline(case.passes).run(
        model,
        data=open_data(samples[: setup.samples], model),
        holdout=open_data(samples[setup.samples :], model),
        threads=setup.threads,
        verify=False,
    )
    io.save(result.model, path)
    return path


def log_probabilities(setup: Setup, path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each window ``log p [S - 1, V]`` of the next token, and the tokens that came."""
    session = common.open_session(path, setup.threads)
    for ids in windows_of(setup, setup.text, setup.windows):
        logits = session.run(["logits"], {"input_ids": ids})[0][0, :-1]
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        yield logits, ids[0, 1:]


def evaluate(setup: Setup, path: Path, is_reference: bool) -> dict[str, float]:
    """Perplexity and KL; the reference leaves its log-probabilities for the others."""
    loss = divergence = 0.0
    count = 0
    for number, (p, tokens) in enumerate(log_probabilities(setup, path)):
        loss -= float(p[np.arange(len(tokens)), tokens].astype(np.float64).sum())
        count += len(tokens)
        file = setup.folder / f"reference{number}.npy"
        if is_reference:
            np.save(file, p.astype(np.float16))
        else:
            exact = np.load(file).astype(np.float32)
            divergence += float((np.exp(exact) * (exact - p)).sum(dtype=np.float64))
    return {"perplexity": math.exp(loss / count), "kl": divergence / count}


def share_of_integers(setup: Setup, path: Path) -> float:
    """Percent of the multiplications of linear layers that are no longer in float."""
    from onnxq.graph import io
    from onnxq.graph.match import analyze
    from onnxq.passes.decide.measure import multiplications

    def cost(file: Path) -> int:
        return sum(multiplications(linear) for linear in analyze(io.load(file)).linears)

    return 100.0 * (1.0 - cost(path) / cost(setup.source))


def work(setup: Setup, case: Case) -> dict[str, float]:
    """Make and evaluate one case; runs in a process of its own."""
    began = time.perf_counter()
    path = make(setup, case)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / common.MB
    figures = {
        "seconds": seconds,
        "peak": peak,
        "size": sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*")) / common.MB,
        "share": share_of_integers(setup, path),
        **evaluate(setup, path, case.name == "fp32"),
    }
    if case.name != "fp32":
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
    return figures


def measure(setup: Setup, cases: Sequence[Case]) -> Iterator[Row]:
    """One row a case, each in a fresh process."""
    exact = 0.0
    for case in cases:
        row = Row(case.name, case.label, not case.peer)
        context = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                row.figures = pool.submit(work, setup, case).result()
            exact = exact or row.figures["perplexity"]
            row.figures["worse"] = 100 * (row.figures["perplexity"] / exact - 1)
        except Exception as error:  # a row that failed says so, and the others go on
            row.error = " ".join(str(error).split())[:300]
        yield row


def setup_of(options: Namespace, folder: Path) -> Setup:
    """Build the model if none is given, and find the texts."""
    data = common.shared_folder() / "data"
    name = "stories260k" if options.quick else "smollm2"
    source = options.model
    if source is None:
        from onnxq import models

        source = folder / f"{name}.onnx"
        models.build(name, source, checkpoint=data / name if options.quick else None)
    tokenizer = source.with_name(source.name.removesuffix(".onnx") + ".tokenizer.json")
    if options.quick:
        text = next((data / "stories260k").glob("*.txt"))
        return Setup(source, tokenizer, text, text, folder, 64, 2, 4, options.threads)
    texts = data / "wikitext2"
    return Setup(
        source,
        tokenizer,
        texts / "wiki.valid.tokens",
        texts / "wiki.test.first-half.raw",
        folder,
        512,
        options.windows,
        8,
        options.threads,
    )


def chosen(options: Namespace) -> list[Case]:
    """The cases asked for; fp32 is always first, for the others are compared with it."""
    names = options.cases.split(",") if options.cases else list(QUICK if options.quick else ())
    unknown = set(names) - {case.name for case in CASES}
    if unknown:
        known = ", ".join(case.name for case in CASES)
        raise SystemExit(f"no case {', '.join(sorted(unknown))}; there are: {known}")
    return [case for case in CASES if not names or case.name in (*names, "fp32")]


def compare(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Ours against each peer: above 1 is better."""
    peers = [row for row in rows if not row.ours]
    for row in rows:
        if row.ours:
            yield from common.compare_rows(row.name, row, peers, COLUMNS)


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, help="smollm2.onnx with its tokenizer beside it")
    parser.add_argument("--windows", type=int, default=24, help="windows evaluated; 0 for all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", default="", help="comma-separated names")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    options = parser.parse_args()
    cases = chosen(options)
    with common.workspace() as folder:
        setup = setup_of(options, folder)
        rows = []
        for row in measure(setup, cases):
            rows.append(row)
            what = row.error or f"perplexity {row.cell(PERPLEXITY)}"
            print(f"{row.label}: {what}", file=sys.stderr, flush=True)
    if options.json:
        common.emit(compare(rows))
    elif options.markdown:
        print(common.markdown_table(rows, COLUMNS))
    else:
        common.print_table(f"{setup.source.stem}, W8A8; {common.machine()}", rows, COLUMNS)
    if any(row.error for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
