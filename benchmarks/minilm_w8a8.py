"""Claim: on a stock BERT encoder the default recipes beat the best hand-tuned onnxruntime setup.

    python benchmarks/minilm_w8a8.py                      the table
    python benchmarks/minilm_w8a8.py --json               one object a line
    python benchmarks/minilm_w8a8.py --markdown           the table of README.md
    python benchmarks/minilm_w8a8.py --readme README.md   write it there

all-MiniLM-L6-v2, calibrated on 64 STS-B train sentences (evenly spread; ours holds back 8 of them
to check itself), the same arrays for every peer. Each configuration is made in a process of its
own by its public interface. Accuracy: cosine of mean-pooled embeddings with fp32 over 200 dev
sentences, Spearman x 100 over the 1,500 dev pairs and the given test pairs. Latency: one sentence
of 128 tokens, all models in turn in one process, speed-up as the median over rounds. Cost of
making: whole process, start and imports included; ours also loads and compares what it wrote.
"""

from __future__ import annotations

import dataclasses
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _common as common
from _common import Column, Cost, Row

CALIBRATION, COSINE_SENTENCES, LENGTH = 64, 200, 128
BEGIN, END = "<!-- minilm: begin -->\n", "<!-- minilm: end -->\n"


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One way to quantize: a job of ``_jobs.py`` with its options, and what it is compared with."""

    name: str
    label: str
    job: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    peers: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.job == "onnxq_run"


STATIC_PEERS = ("fp32", "ort-static-expert", "ort-static-per-channel", "ort-static-default")
CONFIGURATIONS = (
    Configuration("w8a8", "onnxq `w8a8`", "onnxq_run", {"passes": "w8a8"}, STATIC_PEERS),
    Configuration(
        "ort-static-expert",
        "ORT static, hand-tuned (inputs of the 36 weight MatMuls, embedding)",
        "ort_static",
        {"unsigned": True, "weights_only": True, "keywords": {"per_channel": True}},
    ),
    Configuration(
        "ort-static-per-channel",
        "ORT static, per channel, U8",
        "ort_static",
        {"unsigned": True, "keywords": {"per_channel": True}},
    ),
    Configuration("ort-static-default", "ORT static, defaults", "ort_static"),
    Configuration(
        "w8a8-dynamic",
        "onnxq `w8a8-dynamic`",
        "onnxq_run",
        {"passes": "w8a8-dynamic"},
        ("fp32", "ort-dynamic-per-channel", "ort-dynamic-default"),
    ),
    Configuration(
        "ort-dynamic-per-channel",
        "ORT dynamic, per channel",
        "ort_dynamic",
        {"keywords": {"per_channel": True}},
    ),
    Configuration("ort-dynamic-default", "ORT dynamic, defaults", "ort_dynamic"),
    Configuration("w4", "onnxq `w4`", "onnxq_run", {"passes": "w4"}, ("fp32", "ort-w4")),
    Configuration("ort-w4", "ORT MatMulNBits, b32", "ort_w4"),
)
QUICK = ("w8a8", "ort-static-expert", "ort-dynamic-default")

QUALITY = (
    Column("cosine", "cosine", "cosine", "higher", "{:.4f}"),
    Column("sts_dev", "STS dev", "spearman-x100", "higher"),
    Column("sts_test", "STS test", "spearman-x100", "higher"),
    Column("size", "MB", "10^6 bytes", "lower", "{:.1f}"),
)
COST = (
    Column("make_cpu", "CPU s to make", "s", "lower", "{:.1f}"),
    Column("make_peak", "peak MB", "10^6 bytes", "lower", "{:.0f}"),
)


def speed_columns(threads: list[int]) -> list[Column]:
    columns = []
    for n in threads:
        suffix = f"{n} thread{'s' if n > 1 else ''}"
        columns.append(Column(f"ms_{n}t", f"ms, {suffix}", "ms", "lower", "{:.1f}"))
        columns.append(Column(f"speedup_{n}t", "x fp32", "x fp32", "higher", "{:.2f}x"))
    return columns


def cpu_columns(threads: list[int]) -> list[Column]:
    return [
        Column(f"cpu_speedup_{n}t", f"CPU x fp32, {n} t", "x fp32", "higher", "{:.2f}x")
        for n in threads
    ]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40, help="timed runs of each model")
    parser.add_argument("--spelling", choices=("plain", "torchscript", "dynamo"), default="plain")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations and fp32")
    parser.add_argument("--cpu-time", action="store_true", help="also speed-ups of processor time")
    parser.add_argument("--markdown", action="store_true", help="the table of README.md")
    parser.add_argument("--readme", type=Path, help="write the table between its markers there")
    arguments = parser.parse_args()
    with common.workspace() as folder:
        rows = measure(arguments, folder)
    show(arguments, rows)


def show(arguments: Namespace, rows: list[Row]) -> None:
    columns = [*QUALITY, *speed_columns(arguments.threads), *COST]
    everything = [*columns, *cpu_columns(arguments.threads)]
    if arguments.json:
        common.emit(comparisons(arguments.spelling, rows, everything))
    elif arguments.markdown or arguments.readme:
        text = block(arguments.spelling, rows, columns)
        print(text, end="")
        if arguments.readme:
            head, rest = arguments.readme.read_text().split(BEGIN)
            arguments.readme.write_text(head + BEGIN + text + END + rest.split(END)[1])
    else:
        shown = everything if arguments.cpu_time else columns
        common.print_table(f"MiniLM ({arguments.spelling}); {common.machine()}", rows, shown)


def block(spelling: str, rows: list[Row], columns: list[Column]) -> str:
    """The table with the conditions under which it was measured."""
    table = common.markdown_table(rows, columns)
    conditions = f"{time.strftime('%Y-%m-%d')}, {common.machine()}, {spelling} graph"
    return f"{table}\n{conditions}; load average {os.getloadavg()[1]:.1f} from all processes.\n"


def comparisons(spelling: str, rows: list[Row], columns: list[Column]) -> Iterator[dict[str, Any]]:
    by_name = {row.name: row for row in rows}
    for configuration in CONFIGURATIONS:
        if configuration.ours and configuration.name in by_name:
            yield from common.compare_rows(
                f"minilm-{spelling} {configuration.name}",
                by_name[configuration.name],
                [by_name[p] for p in configuration.peers if p in by_name],
                columns,
            )


def chosen(arguments: Namespace) -> list[Configuration]:
    names = arguments.only or (QUICK if arguments.quick else [c.name for c in CONFIGURATIONS])
    unknown = set(names) - {c.name for c in CONFIGURATIONS}
    if unknown:
        raise SystemExit(
            f"no configuration {', '.join(sorted(unknown))}; there are "
            + ", ".join(c.name for c in CONFIGURATIONS)
        )
    return [c for c in CONFIGURATIONS if c.name in names]


def measure(arguments: Namespace, folder: Path) -> list[Row]:
    data = common.shared_folder() / "data" / "stsb"
    base = folder / "minilm.onnx"
    made = common.run_job(
        "build_model", name="minilm", out=base, settings={"spelling": arguments.spelling}
    )
    if made.error:
        raise SystemExit(f"MiniLM cannot be built: {made.error}")
    sentences = common.spread(read_sentences(data / "sts-train.csv"), 16 if arguments.quick else 64)
    (folder / "calibration.txt").write_text("\n".join(sentences) + "\n")
    prepared = base
    if arguments.spelling != "plain":
        # The peers do not look for weights behind a Transpose; their own preparation folds it.
        prepared = folder / "prepared.onnx"
        done = common.run_job("ort_prepare", model=base, out=prepared)
        if done.error:
            raise SystemExit(f"quant_pre_process failed: {done.error}")
    # All are made before this process has imported anything large.
    paths = {"fp32": base}
    rows = [Row("fp32", "fp32")]
    written = common.run_job(
        "write_feeds",
        model=base,
        texts=folder / "calibration.txt",
        tokenizer=base.with_suffix(".tokenizer.json"),
        out=folder / "feeds",
    )
    if written.error:
        raise SystemExit(f"the calibration texts cannot be encoded: {written.error}")
    for configuration in chosen(arguments):
        out = folder / f"{configuration.name}.onnx"
        cost = make(configuration, base if configuration.ours else prepared, out, folder)
        row = Row(configuration.name, configuration.label, configuration.ours, error=cost.error)
        row.figures.update(make_cpu=cost.cpu_s, make_peak=cost.peak_mb)
        if cost.error is None:
            paths[configuration.name] = out
        rows.append(row)
    judge(rows, paths, data, arguments.quick)
    rounds = 3 if arguments.quick else arguments.rounds
    for threads in arguments.threads:
        latency(rows, paths, data, threads, rounds)
    return rows


def make(configuration: Configuration, base: Path, out: Path, folder: Path) -> Cost:
    options: dict[str, Any] = {"model": base, "out": out, **configuration.options}
    if configuration.ours:
        options["keywords"] = {
            "calib": str(folder / "calibration.txt"),
            "tokenizer": str(base.with_suffix(".tokenizer.json")),
        }
    else:
        options["feeds"] = folder / "feeds"
    return common.run_job(configuration.job, **options)


def read_sentences(path: Path) -> list[str]:
    """Both sentences of every pair, in order."""
    cells = (line.split("\t") for line in path.read_text("utf-8").splitlines())
    return [text for row in cells for text in row[5:7]]


def judge(rows: list[Row], paths: dict[str, Path], data: Path, quick: bool) -> None:
    """Size, cosine and Spearman of every model."""
    import numpy as np

    from onnxq.data.text import load_tokenizer
    from onnxq.evaluation import embed, evaluate
    from onnxq.graph import io

    tokenizer_path = paths["fp32"].with_suffix(".tokenizer.json")
    tokenizer = load_tokenizer(tokenizer_path)
    dev = common.spread(read_sentences(data / "sts-dev.csv"), 20 if quick else COSINE_SENTENCES)
    reference = None
    for row in rows:
        if row.name not in paths:
            continue
        path = paths[row.name]
        try:
            session = common.open_session(path, 1)
        except Exception as error:  # a peer may write what onnxruntime refuses
            row.error = f"refused by onnxruntime: {str(error).splitlines()[0]}"
            del paths[row.name]
            continue
        vectors = embed(session, dev, tokenizer, batch=1, max_length=LENGTH)
        reference = vectors if reference is None else reference
        row.figures["cosine"] = float(np.mean(np.sum(vectors * reference, axis=1)))
        row.figures["size"] = io.size_on_disk(path) / common.MB
        for key, name in (("sts_dev", "sts-dev.csv"), ("sts_test", "sts-test-first690.csv")):
            found = evaluate(
                session, "sts", data / name, tokenizer=tokenizer_path, limit=40 if quick else None
            )
            row.figures[key] = found.value


def latency(rows: list[Row], paths: dict[str, Path], data: Path, threads: int, rounds: int) -> None:
    """Milliseconds for one sentence of exactly 128 tokens, and speed-ups over fp32."""
    from onnxq.data.text import encode_texts

    text = " ".join(read_sentences(data / "sts-dev.csv")[:40])
    names = ("input_ids", "attention_mask", "token_type_ids")
    feeds = encode_texts([text], paths["fp32"].with_suffix(".tokenizer.json"), names, LENGTH)
    timings = common.time_models(paths, feeds, threads, rounds, "fp32")
    for row in rows:
        if row.name in timings:
            found = timings[row.name]
            row.figures[f"ms_{threads}t"] = found.ms
            row.figures[f"speedup_{threads}t"] = found.speedup
            row.figures[f"cpu_speedup_{threads}t"] = found.cpu_speedup


if __name__ == "__main__":
    main()
