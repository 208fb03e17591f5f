"""Claim: rotations and smoothing, folded, make 8- and 4-bit activations safe for a decoder.

    python benchmarks/llm_activations.py                            all rows
    python benchmarks/llm_activations.py --tables w4a4,mx           some of the tables
    python benchmarks/llm_activations.py --cases naive,best         some of the rows
    python benchmarks/llm_activations.py --cache FOLDER             keep rows; go on where it ended
    python benchmarks/llm_activations.py --seeds 8                  learned against random rotations
                                                                    (W8A4, all in blocks of 32)
    python benchmarks/llm_activations.py --speed                    transforms alone, not quantized
    python benchmarks/llm_activations.py --model smollm2.onnx       a model that is built already

SmolLM2-135M-Instruct, perplexity over windows of 512 tokens of the given half of WikiText-2 test,
no BOS, the first 24 by default (``--windows 0`` for all); calibrated on 8 windows of its validation
text. Every linear layer is quantized, the tied output layer included, unless a row says otherwise.
Tables: ``static`` (int8 weights, one scale a channel; activations one fixed scale a tensor),
``token`` (the same, activations one scale a token, found at run time), ``w4a16`` and ``w4a8``
(int4 weights in blocks of 32), ``w4a4``, ``w4a4kv4`` (keys and values in int4 too), ``mx`` (MXFP4
and NVFP4 on both sides). Each configuration is made and evaluated in a process of its own;
transforms that rows share are made once and kept in the cache. KL: mean over every eighth token of
KL(fp32 || quantized).
Share: of the linear layers' multiplications that have both operands quantized.

``--quick`` uses stories260K and two short windows: does it run at all?
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _common as common
import numpy as np
from _common import Column, Row

if TYPE_CHECKING:
    from onnxq.pipeline.runner import RunResult


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to quantize: pipeline text, or a peer.

    Args:
        name: for ``--cases``.
        label: for people.
        passes: behind the transform.
        transform: name of one of ``TRANSFORMS``, or a pipeline text.
        table: the table that it belongs to.
        samples: windows to calibrate on, if not the eight of all.
        peer: not made by onnxq.
    """

    name: str
    label: str
    passes: str = ""
    transform: str = "none"
    table: str = "static"
    samples: int = 0
    peer: bool = False

    @property
    def before(self) -> str:
        """Pipeline text of the transform."""
        return TRANSFORMS.get(self.transform, self.transform)


CLEAN = "canonicalize{opset=21}"
TRANSFORMS = {
    "none": CLEAN,
    "folded": f"{CLEAN}, fold-norm",
    "smooth": f"{CLEAN}, calibrate, smooth-quant",
    "rotate": f"{CLEAN}, fold-norm, rotate",
    "smooth-rotate": f"{CLEAN}, calibrate, smooth-quant, fold-norm, rotate",
    "smooth-quarot": f"{CLEAN}, calibrate, smooth-quant, fold-norm, rotate, online-hadamard",
    "quarot": f"{CLEAN}, fold-norm, rotate, online-hadamard",
    "smooth-rot": f"{CLEAN}, calibrate, smooth-rot, fold-norm, rotate",
    "learned": f"{CLEAN}, calibrate, smooth-rot, fold-norm, calibrate, learn-rotation",
    "block": f"{CLEAN}, fold-norm, rotate{{block=32}}, online-hadamard{{block=32}}",
    "block-learned": f"{CLEAN}, calibrate, smooth-rot{{block=32}}, fold-norm, calibrate, "
    "learn-rotation{block=32 objective=range}",
}

STATIC = "calibrate{method=mse}, assign, qdq"
DOWN = 'partial{layers=["*layers.11/mlp/down_proj*","*layers.28/mlp/down_proj*"]}'
INT4 = "weights=uint4 symmetric-weights=false block=32 weight-method=mse"
HEAD8 = 'set-format{layers=["*lm_head*"] format=int8}'
KL_STEP = 8
SOLVER = "sequential{solver=gptaq}"


def _static() -> list[Case]:
    partial = "calibrate{method=mse}, assign, sensitivity{metric=kl samples=1}, "
    return [
        Case("ort-dynamic", "ORT dynamic int8, per channel", peer=True),
        Case("naive", "min-max", "calibrate{margin=1.0}, assign, qdq"),
        Case("mse", "MSE", STATIC),
        Case("smooth", "smooth-quant", STATIC, "smooth"),
        Case("rotate", "rotate R1 R2", STATIC, "rotate"),
        Case("rotate-r4", "rotate R1 R2 R4", STATIC, "quarot"),
        Case("smooth-rotate", "smooth-quant + R1 R2", STATIC, "smooth-rotate"),
        Case("best", "smooth-quant + R1 R2 R4", STATIC, "smooth-quarot"),
        Case("static-rot", "smooth-rot + R1 R2", STATIC, "smooth-rot"),
        Case("static-learned", "smooth-rot + learned R1 R2", STATIC, "learned"),
        Case(
            "naive-partial",
            "MSE, 2 down_proj in float",
            f"calibrate{{method=mse}}, assign, {DOWN}, qdq",
        ),
        Case(
            "best-partial",
            "smooth-quant + R1 R2 R4, partial max-drop=1",
            partial + "partial{max-drop=1 samples=4}, qdq",
            "smooth-quarot",
        ),
        Case("dynamic", "dynamic, per tensor", "assign{mode=dynamic}, qdq"),
        Case(
            "dynamic-best",
            "dynamic, per tensor, smooth-quant + R1 R2 R4",
            "assign{mode=dynamic}, qdq",
            "smooth-quarot",
        ),
    ]


def _token() -> list[Case]:
    passes = "assign{mode=per-token}, qdq"
    rows = (
        ("none", "none"),
        ("smooth", "smooth-quant"),
        ("quarot", "R1 R2 R4"),
        ("smooth-quarot", "smooth-quant + R1 R2 R4"),
        ("smooth-rot", "smooth-rot + R1 R2"),
        ("learned", "smooth-rot + learned R1 R2"),
    )
    blocks = "assign{mode=per-token weights=int8 block=32}"
    solved = f"{blocks}, {SOLVER}, qdq"
    best = "smooth-quant + R1 R2 R4, weights in blocks of 32"
    return [
        *(Case(f"token-{t}", label, passes, t, "token") for t, label in rows),
        Case("token-blocks", f"{best}, RTN", f"{blocks}, qdq", "smooth-quarot", "token"),
        Case("token-best", f"{best}, GPTAQ", solved, "smooth-quarot", "token", 16),
    ]


def _w4() -> list[Case]:
    weights = f"assign{{mode=weight-only {INT4}}}"
    both = f"assign{{mode=per-token {INT4} activations=int8}}"
    rows = []
    for table, assign in (("w4a16", weights), ("w4a8", both)):
        plan = f"{assign}, {HEAD8}"
        solved = f"{plan}, {SOLVER}, qdq"
        rows += [
            Case(f"{table}-rtn", "RTN", f"{plan}, qdq", "none", table),
            Case(f"{table}-folded", "norms folded, RTN", f"{plan}, qdq", "folded", table),
            Case(f"{table}-gptaq", "norms folded, GPTAQ", solved, "folded", table, 16),
            Case(f"{table}-rot", "R1 R2 R4, GPTAQ", solved, "quarot", table, 16),
            Case(f"{table}-best", "smooth-quant, R1 R2 R4, GPTAQ",
                 solved, "smooth-quarot", table, 16),
        ]  # fmt: skip
    return rows


def _w4a4(cache: str = "") -> list[Case]:
    table = "w4a4kv4" if cache else "w4a4"
    kv = " cache=int4-asym" if cache else ""
    keys = "online-hadamard{sites=[qk]}, " if cache else ""
    assign = f"assign{{mode=per-token {INT4}{kv} activations="
    token = assign + "int4-asym clip=0.9}"
    group = assign + "int4g32-asym}"

    def row(name: str, label: str, plan: str, transform: str, solver: str = "") -> Case:
        label += f", {'GPTAQ' if solver else 'RTN'}"
        before = keys if transform not in ("none", "smooth") else ""
        return Case(name, label, f"{before}{plan}{solver}, qdq", transform, table)

    solver = f", {SOLVER}"
    return [
        row(f"{table}-token", "a token: none", token, "none"),
        row(f"{table}-token-smooth", "a token: smooth-quant", token, "smooth"),
        row(f"{table}-token-quarot", "a token: QuaRot", token, "quarot"),
        row(f"{table}-token-solved", "a token: QuaRot", token, "quarot", solver),
        row(f"{table}-token-learned", "a token: learned", token, "learned", solver),
        row(f"{table}", "g32: none", group, "none"),
        row(f"{table}-smooth", "g32: smooth-quant", group, "smooth"),
        row(f"{table}-full", "g32: QuaRot", group, "quarot"),
        row(f"{table}-quarot", "g32: QuaRot in blocks", group, "block"),
        row(f"{table}-solved", "g32: QuaRot in blocks", group, "block", solver),
        row(f"{table}-learned", "g32: learned in blocks", group, "block-learned", solver),
    ]


def _blocks() -> list[Case]:
    rows: list[Case] = []
    for name in ("mxfp4", "nvfp4"):
        assign = f"assign{{mode=per-token weights={name} activations={name} weight-method=mse}}"
        title = name.upper()
        rows += [
            Case(name, f"{title}, RTN", f"{assign}, qdq", "none", "mx"),
            Case(f"{name}-block", f"{title}, block Hadamard, RTN", f"{assign}, qdq", "block", "mx"),
            Case(f"{name}-rot", f"{title}, R1 R2 R4, RTN", f"{assign}, qdq", "quarot", "mx"),
            Case(f"{name}-learned-rtn", f"{title}, smooth-rot + learned R1 R2, RTN",
                 f"{assign}, qdq", "learned", "mx"),
            Case(f"{name}-learned", f"{title}, smooth-rot + learned R1 R2, GPTAQ",
                 f"{assign}, {SOLVER}, qdq", "learned", "mx"),
            Case(f"{name}-solved", f"{title}, GPTAQ", f"{assign}, {SOLVER}, qdq", "folded", "mx"),
            Case(f"{name}-block-solved", f"{title}, block Hadamard, GPTAQ",
                 f"{assign}, {SOLVER}, qdq", "block", "mx"),
        ]  # fmt: skip
    return rows


CASES = (
    Case("fp32", "fp32", peer=True),
    *_static(), *_token(), *_w4(), *_w4a4(), *_w4a4("int4"), *_blocks(),
)  # fmt: skip
TABLES = {
    "static": "W8A8, static ranges",
    "token": "W8A8, one scale a token",
    "w4a16": "W4A16 g32",
    "w4a8": "W4A8 g32, one scale a token",
    "w4a4": "W4A4 g32, one scale a token",
    "w4a4kv4": "W4A4KV4 g32, one scale a token",
    "mx": "MXFP4 and NVFP4, weights and activations",
}
SEED_PASSES = f"assign{{mode=per-token {INT4} activations=int4-asym clip=0.9}}, qdq"
QUICK = ("fp32", "naive", "best", "w4a4-learned", "nvfp4-block")

PERPLEXITY = Column("perplexity", "perplexity", "perplexity", "lower", "{:.3f}")
COLUMNS = (
    PERPLEXITY,
    Column("worse", "% over fp32", "%", "lower"),
    Column("kl", "KL nats", "nats", "lower", "{:.4f}"),
    Column("share", "quantized %", "%", "higher", "{:.1f}"),
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
    cache: Path
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


def make(setup: Setup, case: Case) -> tuple[Path, dict[str, float]]:
    """Quantize; the path of the result, and what it took."""
    path = setup.folder / f"{case.name}.onnx"
    if case.name == "fp32":
        return setup.source, {"share": 0.0}
    if case.name == "ort-dynamic":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(setup.source, path, per_channel=True, weight_type=QuantType.QInt8)
        return path, {"share": 100.0}
    base, before = transformed(setup, case.before)
    own = dataclasses.replace(setup, samples=case.samples or setup.samples)
    result, figures = run_passes(own, base, case.passes, path)
    figures["seconds"] += before["seconds"]
    figures["peak"] = max(figures["peak"], before["peak"])
    return path, {**figures, "share": share_of_products(setup, result)}


def transformed(setup: Setup, passes: str) -> tuple[Path, dict[str, float]]:
    """The model behind ``passes``, made once and kept in the cache; what it took to make."""
    path = setup.cache / f"{key_of(setup, passes)}.onnx"
    note = path.with_suffix(".json")
    if not note.exists():
        _, figures = run_passes(setup, setup.source, passes, path)
        note.write_text(json.dumps(figures), encoding="utf-8")
    figures = json.loads(note.read_text(encoding="utf-8"))
    return path, figures


def run_passes(
    setup: Setup, source: Path, passes: str, path: Path
) -> tuple[RunResult, dict[str, float]]:
    """Run a pipeline on a file and save the result."""
    from onnxq.calibration.data import open_data
    from onnxq.graph import io
    from onnxq.pipeline.runner import Pipeline

    began = time.perf_counter()
    model = io.load(source)
    ids = windows_of(setup, setup.calibration, setup.samples + 4)
    samples = [{"input_ids": window} for window in ids]
    result = Pipeline(passes).run(
        model,
        data=open_data(samples[: setup.samples], model),
        holdout=open_data(samples[setup.samples :], model),
        threads=setup.threads,
        verify=False,
    )
    io.save(result.model, path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / common.MB
    return result, {"seconds": time.perf_counter() - began, "peak": peak}


def key_of(setup: Setup, passes: str) -> str:
    """Names a model by all that it depends on; a new state of the code needs a new cache."""
    stat = setup.source.stat()
    text = f"{setup.source.name} {stat.st_size} {setup.samples} {setup.window} {passes}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def log_probabilities(setup: Setup, path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each window ``log p [S - 1, V]`` of the next token, and the tokens that came."""
    session = common.open_session(path, setup.threads)
    for ids in windows_of(setup, setup.text, setup.windows):
        logits = session.run(["logits"], {"input_ids": ids})[0][0, :-1]
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        yield logits, ids[0, 1:]


def evaluate(setup: Setup, path: Path, is_reference: bool) -> dict[str, float]:
    """Perplexity and KL; the reference leaves some log-probabilities for the others."""
    loss = divergence = 0.0
    count = compared = 0
    for number, (p, tokens) in enumerate(log_probabilities(setup, path)):
        loss -= float(p[np.arange(len(tokens)), tokens].astype(np.float64).sum())
        count += len(tokens)
        file = setup.folder / f"reference{number}.npy"
        some = p[::KL_STEP]
        if is_reference:
            np.save(file, some)
        else:
            exact = np.load(file)
            divergence += float((np.exp(exact) * (exact - some)).sum(dtype=np.float64))
            compared += len(some)
    return {"perplexity": math.exp(loss / count), "kl": divergence / max(1, compared)}


def share_of_products(setup: Setup, result: RunResult) -> float:
    """Percent of the linear layers' multiplications whose operands are both quantized."""
    from onnxq.graph import io
    from onnxq.graph.match import analyze
    from onnxq.passes.decide.measure import multiplications

    if any("mode=weight-only" in step.spec for step in result.reports):
        return 0.0
    lowered = {
        change.site
        for step in result.reports
        if step.name in ("qdq", "pack")
        for change in step.report.changed
    }
    costs = {each.name: multiplications(each) for each in analyze(io.load(setup.source)).linears}
    return 100.0 * sum(costs[name] for name in costs if name in lowered) / sum(costs.values())


def work(setup: Setup, case: Case) -> dict[str, float]:
    """Make and evaluate one case; runs in a process of its own."""
    path, made = make(setup, case)
    figures = {
        **made,
        "size": sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*")) / common.MB,
        **evaluate(setup, path, case.name == "fp32"),
    }
    if case.name != "fp32":
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
    return figures


def measure(setup: Setup, cases: Sequence[Case]) -> Iterator[Row]:
    """One row a case, each in a fresh process, or from the cache."""
    exact = 0.0
    for case in cases:
        row = Row(case.name, case.label, not case.peer)
        text = f"{case.name} {case.before} {case.passes} {setup.windows}"
        kept = setup.cache / f"row-{key_of(setup, text)}.json"
        context = multiprocessing.get_context("spawn")
        try:
            if kept.exists():
                row.figures = json.loads(kept.read_text(encoding="utf-8"))
            else:
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    row.figures = pool.submit(work, setup, case).result()
                kept.write_text(json.dumps(row.figures), encoding="utf-8")
            exact = exact or row.figures["perplexity"]
            row.figures["worse"] = 100 * (row.figures["perplexity"] / exact - 1)
        except Exception as error:  # a row that failed says so, and the others go on
            row.error = " ".join(str(error).split())[:300]
        yield row


def seed_cases(count: int, block: int) -> list[Case]:
    """Random Hadamard rotations of ``count`` seeds, and the one learned from the first.

    Args:
        count: of random rotations.
        block: channels that are rotated together and share a scale; 0 for whole tokens.
    """
    size = f" block={block}" if block else ""
    online = f"online-hadamard{{block={block}}}"
    passes = f"assign{{mode=per-token weights=int8 activations=int4g{block}-asym}}, qdq"
    cases = [CASES[0]]
    for seed in range(count):
        rotated = f"{CLEAN}, fold-norm, rotate{{seed={seed}{size}}}, {online}"
        label = f"random Hadamard, seed {seed}"
        cases.append(
            Case(f"random-{seed}", label, passes if block else SEED_PASSES, rotated, "w4a4")
        )
    objective = " objective=range" if block else ""
    learned = f"learn-rotation{{seed=0{size}{objective}}}"
    before = f"{CLEAN}, fold-norm, calibrate, {learned}, {online}"
    label = "learned from seed 0"
    return [*cases, Case("learned-0", label, passes if block else SEED_PASSES, before, "w4a4")]


def print_speed(setup: Setup, rounds: int) -> None:
    """CPU time of transformed models, not yet quantized, beside the original's, interleaved."""
    paths = {"original": setup.source}
    for name in ("rotate", "smooth-rotate", "smooth-quarot"):
        paths[name], _ = transformed(setup, TRANSFORMS[name])
    ids = windows_of(setup, setup.text, 1)[0][:, :128]
    found = common.time_models(paths, {"input_ids": ids}, setup.threads, rounds, "original")
    for name, timing in found.items():
        print(
            f"{name}: {timing.cpu_ms:.1f} ms of processor time for {ids.shape[1]} tokens, "
            f"{100 * timing.cpu_speedup:.1f} % of the original's speed"
        )


def print_seeds(rows: Sequence[Row]) -> None:
    """Mean, spread and extremes of the random rotations, and the learned one."""
    found = [r.figures["perplexity"] for r in rows if r.name.startswith("random")]
    learned = rows[-1].figures["perplexity"]
    mean, spread = float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
    print(
        f"int4 activations, {len(found)} random seeds: mean {mean:.3f}, "
        f"standard deviation {spread:.3f}, "
        f"{min(found):.3f} to {max(found):.3f}; learned {learned:.3f}, "
        f"{100 * (1 - learned / mean):.1f} % below the mean"
    )


def setup_of(options: Namespace, folder: Path) -> Setup:
    """Build the model if none is given, and find the texts."""
    cache = options.cache or folder
    cache.mkdir(parents=True, exist_ok=True)
    data = common.shared_folder() / "data"
    name = "stories260k" if options.quick else "smollm2-135m"
    source = options.model
    if source is None:
        from onnxq import models

        source = folder / f"{name}.onnx"
        models.build(name, source, checkpoint=data / name if options.quick else None)
    tokenizer = source.with_name(source.name.removesuffix(".onnx") + ".tokenizer.json")
    if options.quick:
        text = next((data / "stories260k").glob("*.txt"))
        return Setup(source, tokenizer, text, text, folder, cache, 64, 2, 4, options.threads)
    texts = data / "wikitext2"
    return Setup(
        source,
        tokenizer,
        texts / "wiki.valid.tokens",
        texts / "wiki.test.first-half.raw",
        cache,
        cache,
        512,
        options.windows,
        8,
        options.threads,
    )


def chosen(options: Namespace) -> list[Case]:
    """The cases asked for; fp32 is always first, for the others are compared with it."""
    names = options.cases.split(",") if options.cases else list(QUICK if options.quick else ())
    tables = options.tables.split(",") if options.tables else []
    unknown = set(names) - {case.name for case in CASES} | set(tables) - set(TABLES)
    if unknown:
        known = ", ".join((*TABLES, *(case.name for case in CASES)))
        raise SystemExit(f"no case {', '.join(sorted(unknown))}; there are: {known}")
    everything = not (names or tables)
    return [
        case
        for case in CASES
        if everything or case.name in (*names, "fp32") or case.table in tables
    ]


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
    parser.add_argument("--cases", default="", help="comma-separated names of rows")
    parser.add_argument("--tables", default="", help="comma-separated names of tables")
    parser.add_argument("--cache", type=Path, help="folder for finished rows and shared models")
    parser.add_argument("--speed", action="store_true", help="time the transformed models")
    parser.add_argument(
        "--seeds", type=int, default=0, help="compare with so many random rotations"
    )
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    options = parser.parse_args()
    block = 0 if options.quick else 32
    cases = seed_cases(options.seeds, block) if options.seeds else chosen(options)
    with common.workspace() as folder:
        setup = setup_of(options, folder)
        if options.speed:
            print_speed(setup, rounds=3 if options.quick else 15)
            return
        rows = []
        for row in measure(setup, cases):
            rows.append(row)
            what = row.error or f"perplexity {row.cell(PERPLEXITY)}"
            print(f"{row.name}, {row.label}: {what}", file=sys.stderr, flush=True)
        count = len(windows_of(setup, setup.text, setup.windows))
    if options.json:
        common.emit(compare(rows))
    else:
        title = f"{setup.source.stem}, {count} windows of {setup.window}; {common.machine()}"
        print_tables(cases, rows, title, markdown=options.markdown)
    if any(row.error for row in rows):
        raise SystemExit(1)
    if options.seeds:
        print_seeds(rows)


def print_tables(cases: Sequence[Case], rows: Sequence[Row], title: str, *, markdown: bool) -> None:
    """One table for each kind of quantization, the exact model first in each."""
    for table, about in TABLES.items():
        found = [
            r for c, r in zip(cases, rows, strict=True) if c.table == table and r.name != "fp32"
        ]
        if not found:
            continue
        if markdown:
            print(f"{about}; {title}\n")
            print(common.markdown_table([rows[0], *found], COLUMNS) + "\n")
        else:
            common.print_table(f"{about}; {title}", [rows[0], *found], COLUMNS)


if __name__ == "__main__":
    main()
