"""Claim: our rounding loses less perplexity of an LLM than onnxruntime's at equal bits.

    python benchmarks/llm_weights.py                     the table
    python benchmarks/llm_weights.py --json              one object a line
    python benchmarks/llm_weights.py --only gptq-asym-g32 ort-rtn-asym-g32
    python benchmarks/llm_weights.py --cache FOLDER      keep rows; go on where it ended
    python benchmarks/llm_weights.py --peers venv/bin/python    for ORT's HQQ (torch), and Olive
    python benchmarks/llm_weights.py --quick             stories260K: does it run at all?

SmolLM2-135M-Instruct, whose weights were 4-bit before (GGUF Q4_1, blocks of 32), so INT4 looks
better on it than on a float model. Therefore the gains of its RMSNorms are folded into the weights
that follow (same function, the old grid gone); ``--original`` leaves them. All start from that
graph; the embedding and the output layer stay float, so that bits are those of the 210 layers.
Calibration: 16 windows of 512 tokens of wiki.valid, or as many as the row's name says. Evaluation:
perplexity on windows of 512 of the given half of wiki.test, no BOS; KL divergence from fp32 in
nats, over every eighth token. Formats that onnxruntime has no kernel for are evaluated on a float
graph that holds the values of the codes; a test holds it to the model that is written. Cost: a
process of its own, imports and loading included.
"""

from __future__ import annotations

import json
import math
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _common as common
from _common import Column, Cost, Row

WINDOW, CALIBRATION, KL_STEP = 512, 16, 8
HEAD = "/lm_head/MatMul"
FLOAT_HEAD = 'partial{layers=["*lm_head*"]}'


@dataclass(frozen=True)
class Configuration:
    """One way to round; ``plan`` and ``solver`` are pipeline text, ``ort`` a peer's options."""

    name: str
    label: str
    plan: str = ""
    solver: str = ""
    ort: dict[str, Any] | None = None
    job: str = "ort_w4"
    """The peer's job."""
    python: Path | None = None
    """Interpreter of the peer's environment."""
    peers: tuple[str, ...] = ()
    calibration: int = CALIBRATION
    decoded: bool = False
    """Evaluated on the float graph that holds the rounded values, which is quicker."""

    def passes(self, cache: Path | None = None) -> str:
        """The whole pipeline; ``cache`` keeps what ``sequential`` has finished."""
        moments = [] if "sequential" in self.solver or "hqq" in self.solver else ["calibrate"]
        solver = self.solver
        if cache is not None and solver.startswith("sequential"):
            options = solver.removeprefix("sequential").strip("{}")
            solver = f"sequential{{{options} cache={json.dumps(str(cache.resolve()))}}}"
        steps = [*(moments if self.solver else []), self.plan, FLOAT_HEAD, solver, "qdq"]
        return ", ".join(step for step in steps if step)


def weights(fmt: str, more: str = "") -> str:
    return f"assign{{mode=weight-only embeddings=float weights={fmt}{more}}}"


def integers(bits: int, group: int, symmetric: bool) -> str:
    if symmetric:
        return weights(f"int{bits}", f" block={group}")
    return weights(f"uint{bits}", f" symmetric-weights=false block={group}")


def configurations() -> Iterator[Configuration]:
    """Ours and the peers' at each width, group and symmetry, then the other formats."""
    for group in (32, 128):
        for symmetric in (True, False):
            kind = f"{'sym' if symmetric else 'asym'}-g{group}"
            plan, peer = integers(4, group, symmetric), f"ort-rtn-{kind}"
            yield Configuration(
                peer, f"ORT RTN, {kind}", ort={"block": group, "symmetric": symmetric}
            )
            more = ("ort-hqq-g32", "ort-gptq-asym-g32") if kind == "asym-g32" else ()
            peers = (peer, "fp32", *more)
            for name, label, solver in SOLVERS:
                yield Configuration(
                    f"{name}-{kind}", f"onnxq {label}, {kind}", plan, solver, peers=peers
                )
    plan = integers(4, 32, symmetric=False)
    yield Configuration(
        "seq-gptaq-asym-g32-c64",
        "onnxq sequential GPTAQ, asym-g32, 64 windows",
        plan,
        "sequential{solver=gptaq}",
        peers=("ort-rtn-asym-g32", "ort-hqq-g32", "fp32"),
        calibration=64,
    )
    yield Configuration("ort-hqq-g32", "ORT HQQ, g32", ort={"block": 32, "method": "hqq"})
    yield Configuration(
        "ort-gptq-asym-g32", "ORT GPTQ, asym-g32", ort={"block": 32}, job="ort_gptq"
    )
    for method in ("rtn", "hqq", "kquant"):
        yield Configuration(
            f"olive-{method}-g32",
            f"Olive {method}, g32",
            ort={"block": 32, "method": method},
            job="olive_w4",
        )
    yield Configuration(
        "hqq-asym-g32", "onnxq HQQ, real zero points, g32", plan, "hqq", peers=("ort-hqq-g32",)
    )
    for bits, group in ((3, 64), (2, 64)):
        plan = integers(bits, group, symmetric=False)
        name = f"w{bits}-asym-g{group}"
        yield Configuration(f"rtn-{name}", f"onnxq RTN, {name}", plan)
        yield Configuration(
            f"seq-gptaq-{name}",
            f"onnxq sequential GPTAQ, {name}",
            plan,
            "sequential{solver=gptaq}",
            peers=("fp32", f"rtn-{name}"),
        )
    for fmt in ("mxfp4", "nvfp4", "nvfp4-46", "nf4", "mxfp6e2m3", "mxfp8e4m3", "fp8e4m3", "mxint8"):
        peers = ("fp32", "rtn-mxfp4") if fmt.startswith("nvfp4") else ("fp32",)
        yield Configuration(
            f"rtn-{fmt}", f"onnxq RTN, {fmt}", weights(fmt), peers=peers, decoded=True
        )
    for fmt, windows in (("mxfp6e2m3", 32), ("mxint8", CALIBRATION)):
        yield Configuration(
            f"awq-seq-gptq-{fmt}",
            f"onnxq AWQ (duo), sequential GPTQ, {fmt}",
            f"calibrate, awq-scale{{duo=true steps=2}}, {weights(fmt)}",
            "sequential",
            peers=("fp32", f"rtn-{fmt}", f"seq-gptq-{fmt}"),
            calibration=windows,
            decoded=True,
        )
    for fmt in ("mxfp6e2m3", "fp8e4m3", "mxint8", "mxfp4", "nvfp4-46"):
        yield Configuration(
            f"seq-gptq-{fmt}",
            f"onnxq sequential GPTQ, {fmt}",
            weights(fmt),
            "sequential",
            peers=("fp32", f"rtn-{fmt}"),
            decoded=True,
        )


SOLVERS = (
    ("rtn", "RTN", ""),
    ("opt-rtn", "opt-RTN", "opt-rtn"),
    ("gptq", "GPTQ", "gptq{damping=0.01}"),
    ("seq-gptq", "sequential GPTQ", "sequential"),
    ("seq-gptaq", "sequential GPTAQ", "sequential{solver=gptaq}"),
    ("seq-qronos", "sequential Qronos", "sequential{solver=qronos}"),
)
CONFIGURATIONS = tuple(configurations())
QUICK = ("ort-rtn-sym-g32", "rtn-sym-g32", "gptq-asym-g32", "seq-qronos-asym-g32", "rtn-nvfp4")

COLUMNS = (
    Column("perplexity", "perplexity", "perplexity", "lower", "{:.2f}"),
    Column("kl", "KL to fp32", "nats", "lower", "{:.4f}"),
    Column("bits", "bits/weight", "bits", "lower", "{:.3f}"),
    Column("size", "MB", "10^6 bytes", "lower", "{:.1f}"),
    Column("make_cpu", "CPU s to make", "s", "lower", "{:.1f}"),
    Column("make_peak", "peak MB", "10^6 bytes", "lower", "{:.0f}"),
)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--windows", type=int, default=24, help="windows to evaluate; 0 for all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations and fp32")
    parser.add_argument("--original", action="store_true", help="do not fold the norms' gains")
    parser.add_argument("--model", type=Path, help="a SmolLM2 that is built already")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep rows and models there")
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="PYTHON",
        help="interpreter with onnxruntime, torch and olive-ai",
    )
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    common.JOB_SECONDS = 3600.0  # minutes of work, but on a machine that may be busy
    chosen = pick(arguments)
    with common.workspace() as temporary:
        folder = arguments.cache or temporary
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(arguments, chosen, folder)
    if arguments.json:
        by_name = {row.name: row for row in rows}
        for configuration in chosen:
            peers = [by_name[p] for p in configuration.peers if p in by_name]
            case = f"{case_name(arguments)} {configuration.name}"
            common.emit(common.compare_rows(case, by_name[configuration.name], peers, COLUMNS))
    elif arguments.markdown:
        print(common.markdown_table(rows, COLUMNS))
    else:
        common.print_table(f"{case_name(arguments)}; {common.machine()}", rows, COLUMNS)


def case_name(arguments: Namespace) -> str:
    if arguments.quick:
        return "stories260k"
    return "smollm2 original" if arguments.original else "smollm2 folded"


def pick(arguments: Namespace) -> list[Configuration]:
    names = arguments.only or (QUICK if arguments.quick else [c.name for c in CONFIGURATIONS])
    unknown = set(names) - {c.name for c in CONFIGURATIONS}
    if unknown:
        raise SystemExit(
            f"no configuration {', '.join(sorted(unknown))}; there are "
            + ", ".join(c.name for c in CONFIGURATIONS)
        )
    chosen = [c for c in CONFIGURATIONS if c.name in names]
    return [replace(c, python=arguments.peers) if c.ort is not None else c for c in chosen]


def measure(arguments: Namespace, chosen: list[Configuration], folder: Path) -> list[Row]:
    """fp32 and one row a configuration; each model is evaluated and removed before the next."""
    base, tokenizer = build(arguments, folder)
    calibration, evaluation = texts(arguments)
    windows = cut(evaluation, tokenizer, 2 if arguments.quick else arguments.windows)
    judge = Judge(windows, base, folder / f"exact-{base.stem}.npy")
    store = Store(folder / "rows.json", case_name(arguments), len(windows))
    rows = []
    for configuration in (Configuration("fp32", "fp32"), *chosen):
        facts = store.find(configuration.name)
        if facts is None:
            count = 4 if arguments.quick else configuration.calibration
            feeds = folder / f"feeds-{base.stem}-{count}"
            if not feeds.is_dir():
                write_windows(calibration, tokenizer, feeds, count)
            facts = make_and_judge(configuration, base, folder, feeds, judge)
            store.keep(configuration.name, facts)
        row = Row(configuration.name, configuration.label, bool(configuration.plan))
        row.error = facts.get("error")
        row.figures.update(figures_of(facts, len(windows)))
        rows.append(row)
        print_progress(row)
    return rows


def make_and_judge(
    configuration: Configuration, base: Path, folder: Path, feeds: Path, judge: Judge
) -> dict[str, Any]:
    """What a row is computed from: costs, sizes, and sums for each window."""
    if configuration.name == "fp32":
        return {**sizes(base, base), **judge.exact()}
    out = folder / f"{configuration.name}.onnx"
    kept = folder / f"{configuration.name}.stages" if configuration.decoded else None
    cost = make(configuration, base, out, feeds, cache=kept)
    if cost.error is not None:
        return {"error": cost.error}
    facts: dict[str, Any] = {"make_cpu": cost.cpu_s, "make_peak": cost.peak_mb}
    facts.update(sizes(out, base))
    try:
        if configuration.decoded:
            cost = make(configuration, base, out, feeds, "onnxq_rounded", cache=kept)
            if cost.error is not None:
                return {"error": cost.error}
        facts.update(judge(out))
    except Exception as error:  # a peer may write what onnxruntime refuses
        facts["error"] = f"refused by onnxruntime: {str(error).splitlines()[0]}"
    for left in folder.glob(f"{configuration.name}.*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return facts


def figures_of(facts: dict[str, Any], windows: int) -> dict[str, float]:
    """The columns of a row, over its first ``windows`` windows."""
    found = {k: v for k, v in facts.items() if k not in ("nll", "kl", "error")}
    if "nll" in facts:
        found["perplexity"] = math.exp(sum(facts["nll"][:windows]) / (windows * (WINDOW - 1)))
        divergence = facts["kl"][:windows]
        found["kl"] = sum(divergence) / (windows * len(range(0, WINDOW, KL_STEP)))
    return found


class Store:
    """Rows that were measured, in one JSON file; those with too few windows do not count."""

    def __init__(self, path: Path, case: str, windows: int) -> None:
        self._path, self._case, self._windows = path, case, windows
        self._rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self._rows = json.loads(path.read_text("utf-8"))

    def find(self, name: str) -> dict[str, Any] | None:
        facts = self._rows.get(f"{self._case}: {name}")
        if facts is None or "error" in facts or len(facts["nll"]) < self._windows:
            return None
        return facts

    def keep(self, name: str, facts: dict[str, Any]) -> None:
        self._rows[f"{self._case}: {name}"] = facts
        self._path.write_text(json.dumps(self._rows, indent=1), "utf-8")


def print_progress(row: Row) -> None:
    import sys

    cells = ", ".join(f"{c.title} {row.cell(c)}" for c in COLUMNS)
    print(f"{row.label}: {row.error or cells}", file=sys.stderr, flush=True)


def build(arguments: Namespace, folder: Path) -> tuple[Path, Path]:
    """The model that all configurations start from, and its tokenizer."""
    built = arguments.model
    base = folder / ("original.onnx" if arguments.original else "folded.onnx")
    if base.is_file() and built is not None:
        return base, built.with_suffix(".tokenizer.json")
    if arguments.quick or built is None:
        built = folder / "built.onnx"
        options: dict[str, Any] = {"name": "smollm2-135m", "out": built}
        if arguments.quick:
            checkpoint = common.shared_folder() / "data" / "stories260k"
            options.update(name="stories260k", checkpoint=str(checkpoint))
        made = common.run_job("build_model", **options)
        if made.error:
            raise SystemExit(f"the model cannot be built: {made.error}")
    passes = "canonicalize" if arguments.original else "canonicalize, fold-norm"
    made = common.run_job("onnxq_passes", model=built, passes=passes, out=base)
    if made.error:
        raise SystemExit(f"the model cannot be prepared: {made.error}")
    return base, built.with_suffix(".tokenizer.json")


def texts(arguments: Namespace) -> tuple[str, str]:
    """For calibration and for evaluation."""
    data = common.shared_folder() / "data"
    if arguments.quick:
        text = (data / "stories260k" / "TinyStories-valid-30KB.txt").read_text("utf-8")
        return text[: len(text) // 2], text[len(text) // 2 :]
    folder = data / "wikitext2"
    return (
        (folder / "wiki.valid.tokens").read_text("utf-8"),
        (folder / "wiki.test.first-half.raw").read_text("utf-8"),
    )


def cut(text: str, tokenizer: Path, count: int) -> Any:
    """``[windows, 512]`` token ids, without BOS; all windows if ``count`` is 0."""
    import numpy as np

    from onnxq.data.text import load_tokenizer

    ids = load_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids
    whole = len(ids) // WINDOW
    take = min(count or whole, whole)
    return np.array(ids[: take * WINDOW], np.int64).reshape(take, WINDOW)


def write_windows(text: str, tokenizer: Path, folder: Path, count: int) -> None:
    import numpy as np

    folder.mkdir()
    for number, ids in enumerate(cut(text, tokenizer, count)):
        np.savez(folder / f"{number:04}.npz", input_ids=ids[None])


def make(
    configuration: Configuration,
    base: Path,
    out: Path,
    feeds: Path,
    job: str = "onnxq_passes",
    cache: Path | None = None,
) -> Cost:
    if configuration.ort is not None:
        needs = {"feeds": feeds} if configuration.job == "ort_gptq" else {}
        return common.run_job(
            configuration.job, python=configuration.python, model=base, out=out, exclude=[HEAD],
            **needs, **configuration.ort,
        )  # fmt: skip
    passes = configuration.passes(cache)
    given = feeds if "calibrate" in passes or "sequential" in passes else None
    return common.run_job(job, model=base, passes=passes, out=out, feeds=given)


def sizes(path: Path, base: Path) -> dict[str, float]:
    """File size, and bits a weight of the rounded layers, all that belongs to them counted."""
    from onnxq.graph import io
    from onnxq.graph.match import analyze

    layers = analyze(io.load(base)).linears
    count = sum(x.in_features * x.out_features for x in layers if "lm_head" not in x.name)
    size = io.size_on_disk(path)
    rest = io.size_on_disk(base) - 4 * count
    return {"size": size / common.MB, "bits": 8 * (size - rest) / count}


class Judge:
    """Negative log-likelihood and KL divergence on fixed windows.

    The float model's log-probabilities lie in a file, since those of 24 windows take 300 MB.
    """

    def __init__(self, windows: Any, base: Path, exact: Path) -> None:
        self._windows, self._base, self._path = windows, base, exact

    def exact(self) -> dict[str, Any]:
        """``nll`` of the float model, whose log-probabilities are kept; its ``kl`` is 0."""
        import numpy as np

        from onnxq.evaluation.perplexity import negative_log_likelihood

        session = common.open_session(self._base, 1)
        shape: tuple[int, ...] = (len(self._windows), len(range(0, WINDOW, KL_STEP)))
        target: Any = None
        nll = []
        for number, ids in enumerate(self._windows):
            (logits,) = session.run(["logits"], {"input_ids": ids[None]})
            nll.append(float(negative_log_likelihood(logits[0, :-1], ids[1:].tolist())))
            if target is None:
                shape = (*shape, logits.shape[-1])
                target = np.lib.format.open_memmap(self._path, "w+", np.float32, shape)
            target[number] = log_softmax(logits[0, ::KL_STEP])
        target.flush()
        return {"nll": nll, "kl": [0.0] * len(nll)}

    def _exact(self) -> Any:
        """``[windows, tokens, vocabulary]`` of the float model, made if they are not there."""
        import numpy as np

        if not self._path.is_file() or len(np.load(self._path, mmap_mode="r")) < len(self._windows):
            self.exact()
        return np.load(self._path, mmap_mode="r")

    def __call__(self, path: Path) -> dict[str, Any]:
        """``nll`` and ``kl``, a sum for each window."""
        import numpy as np

        from onnxq.evaluation.perplexity import negative_log_likelihood

        exact = self._exact()
        session = common.open_session(path, 1)
        nll, divergence = [], []
        for number, ids in enumerate(self._windows):
            (logits,) = session.run(["logits"], {"input_ids": ids[None]})
            nll.append(float(negative_log_likelihood(logits[0, :-1], ids[1:].tolist())))
            sure, some = exact[number], log_softmax(logits[0, ::KL_STEP])
            divergence.append(float(np.sum(np.exp(sure) * (sure - some), dtype=np.float64)))
        return {"nll": nll, "kl": divergence}


def log_softmax(logits: Any) -> Any:
    """``[M, V]`` float32."""
    import numpy as np

    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    main()
