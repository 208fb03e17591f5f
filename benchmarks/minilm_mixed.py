"""Claim: ranges for groups of channels, and 16 bits for few tensors, beat one range a tensor.

    python benchmarks/minilm_mixed.py                       the table
    python benchmarks/minilm_mixed.py --json                one object a line
    python benchmarks/minilm_mixed.py --cases w8a8,peg      some of the cases
    python benchmarks/minilm_mixed.py --model minilm.onnx   a model that is built already

all-MiniLM-L6-v2, static W8A8, calibrated on 64 STS-B train sentences; cosine of mean-pooled
embeddings with fp32 over 200 dev sentences. Size: the file. Time: processor time of one thread on
one sentence of 128 tokens, all models in turn, as a multiple of fp32's speed.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
from _common import Column, Row
from minilm_w8a8 import read_sentences

CALIBRATION, SENTENCES, LENGTH = 64, 200, 128
HEAD = "canonicalize{opset=21}, simplify-attention, calibrate, assign"
MIXED = "mixed-precision{levels=[int8,int16] max-latency=%s}"
CASES = (
    ("w8a8", "one range a tensor", f"{HEAD}, qdq"),
    ("peg-neighbours", "peg, channels unsorted", f"{HEAD}, peg{{permute=false spread=1}}, qdq"),
    ("peg", "peg", f"{HEAD}, peg{{spread=1}}, qdq"),
    ("peg-few", "peg where it matters", f"{HEAD}, peg, qdq"),
    ("outlier-split", "outlier-split", f"{HEAD}, outlier-split{{threshold=8 relative=true}}, qdq"),
    ("mixed-1.1", "mixed-precision, 1.1 x the time", f"{HEAD}, {MIXED % 1.1}, qdq"),
    ("mixed-1.3", "mixed-precision, 1.3 x the time", f"{HEAD}, {MIXED % 1.3}, qdq"),
)
COLUMNS = (
    Column("cosine", "cosine", "cosine", "higher", "{:.5f}"),
    Column("noise", "1 - cosine, 1e-3", "1e-3", "lower", "{:.3f}"),
    Column("size", "MB", "10^6 bytes", "lower", "{:.2f}"),
    Column("speed", "x fp32, CPU time", "x fp32", "higher", "{:.2f}x"),
    Column("cpu", "CPU s to make", "s", "lower", "{:.1f}"),
)


def measure(arguments: Namespace, folder: Path) -> list[Row]:
    """One row a case, fp32 first."""
    from onnxq import models
    from onnxq.data.text import encode_texts, load_tokenizer
    from onnxq.evaluation import embed
    from onnxq.graph import io

    base, quick = arguments.model, arguments.quick
    if base is None:
        base = folder / "minilm.onnx"
        models.build("minilm", base)
    tokenizer = base.with_name(base.stem + ".tokenizer.json")
    data = common.shared_folder() / "data" / "stsb"
    calibration = folder / "calibration.txt"
    train = common.spread(read_sentences(data / "sts-train.csv"), 8 if quick else CALIBRATION)
    calibration.write_text("\n".join(train))
    texts = common.spread(read_sentences(data / "sts-dev.csv"), 8 if quick else SENTENCES)
    loaded = load_tokenizer(tokenizer)

    def vectors(path: Path) -> np.ndarray:
        session = common.open_session(path, 1)
        return embed(session, texts, loaded, batch=1, max_length=LENGTH)

    exact = vectors(base)
    rows = [Row("fp32", "fp32", ours=False)]
    paths: dict[str, Path] = {"fp32": base}
    wanted = arguments.cases.split(",") if arguments.cases else [name for name, _, _ in CASES]
    for name, label, passes in CASES:
        if name not in wanted:
            continue
        row, out = Row(name, label, ours=True), folder / f"{name}.onnx"
        keywords: dict[str, Any] = {"calib": str(calibration), "tokenizer": str(tokenizer)}
        keywords |= {"threads": 1, "speed_seconds": 0, "allow_noop": True}
        job = common.run_job("onnxq_run", model=base, passes=passes, out=out, keywords=keywords)
        row.figures["cpu"], row.error = job.cpu_s, job.error
        if job.error is None:
            found = vectors(out)
            row.figures["cosine"] = cosine = float(np.mean(np.sum(exact * found, axis=1)))
            row.figures["noise"] = 1000 * (1 - cosine)
            paths[name] = out
        rows.append(row)
    ids = ["a good day for a walk in the park with a dog and a ball " * 12]
    session = common.open_session(base, 1)
    feeds = encode_texts(ids, tokenizer, [i.name for i in session.get_inputs()], LENGTH)
    timings = common.time_models(paths, feeds, 1, 3 if quick else 20, "fp32")
    for row in rows:
        if row.name in paths:
            row.figures["size"] = io.size_on_disk(paths[row.name]) / common.MB
            row.figures["speed"] = timings[row.name].cpu_speedup
    return rows


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, help="minilm.onnx with its tokenizer beside it")
    parser.add_argument("--cases", default="", help="comma-separated names")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    with common.workspace() as folder:
        rows = measure(arguments, folder)
    if arguments.json:
        peers = [row for row in rows if row.name in ("fp32", "w8a8")]
        for row in rows:
            if row not in peers:
                common.emit(common.compare_rows(row.name, row, peers, COLUMNS))
    elif arguments.markdown:
        print(common.markdown_table(rows, COLUMNS))
    else:
        common.print_table(f"MiniLM, W8A8; {common.machine()}", rows, COLUMNS)


if __name__ == "__main__":
    main()
