"""Claim: the memory of calibration does not grow with the number of samples, whatever the method.

    python benchmarks/calibration_memory.py          the table
    python benchmarks/calibration_memory.py --json   one object a line

MiniLM, STS-B train sentences padded to 128 tokens, each calibration in a process of its own.
Ours: `canonicalize, calibrate{method=M}, assign`, that is from the file to chosen ranges. Peer:
`create_calibrator` of onnxruntime, for MatMul and Gather alone (the layers that an expert
quantizes; `quantize_static` by default watches more and needs more). It has no MSE method.
Peak resident memory and processor time of the whole process. A peer is stopped at --limit-gb of
address space.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import _common as common
import minilm_w8a8 as minilm
from _common import Column, Row

METHODS = ("minmax", "percentile", "entropy", "mse")
PEER_METHODS = ("minmax", "percentile", "entropy")
SAMPLES = (16, 64, 256)
COLUMNS = (
    Column("peak", "peak MB", "10^6 bytes", "lower", "{:.0f}"),
    Column("cpu", "CPU s", "s", "lower", "{:.1f}"),
)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--limit-gb", type=float, default=16.0, help="address space of a peer")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    samples = [2, 4] if arguments.quick else arguments.samples
    methods = ["minmax"] if arguments.quick else arguments.methods
    with common.workspace() as folder:
        base = prepare(folder, max(samples))
        pairs = []
        for method in methods:
            for count in samples:
                pair = measure(base, folder, method, count, arguments.limit_gb)
                if arguments.json:
                    common.emit(
                        common.compare_rows(
                            f"calibration-memory {method} {count} samples",
                            pair[0],
                            pair[1:],
                            COLUMNS,
                        )
                    )
                pairs += pair
    if arguments.markdown:
        print(common.markdown_table(pairs, COLUMNS))
    elif not arguments.json:
        common.print_table("Calibration of MiniLM, sentences of 128 tokens", pairs, COLUMNS)


def prepare(folder: Path, count: int) -> Path:
    """Build the model and write ``count`` padded sentences as arrays."""
    base = folder / "minilm.onnx"
    made = common.run_job("build_model", name="minilm", out=base)
    if made.error:
        raise SystemExit(f"MiniLM cannot be built: {made.error}")
    source = common.shared_folder() / "data" / "stsb" / "sts-train.csv"
    texts = common.spread(minilm.read_sentences(source), count)
    (folder / "calibration.txt").write_text("\n".join(texts) + "\n", "utf-8")
    written = common.run_job(
        "write_feeds",
        model=base,
        texts=folder / "calibration.txt",
        tokenizer=base.with_suffix(".tokenizer.json"),
        pad_to=minilm.LENGTH,
        out=folder / "all",
    )
    if written.error:
        raise SystemExit(f"the calibration texts cannot be encoded: {written.error}")
    return base


def measure(base: Path, folder: Path, method: str, count: int, limit_gb: float) -> list[Row]:
    """Ours, and the peer where it has the method."""
    feeds = folder / f"feeds-{count}"
    if not feeds.is_dir():
        feeds.mkdir()
        for path in common.spread(sorted((folder / "all").glob("*.npz")), count):
            (feeds / path.name).symlink_to(path)
    runs: Sequence[tuple[str, str, bool]] = [("onnxq_calibrate", f"onnxq {method}, {count}", True)]
    if method in PEER_METHODS:
        runs = [*runs, ("ort_calibrate", f"ORT {method}, {count}", False)]
    rows = []
    for job, label, ours in runs:
        cost = common.run_job(
            job,
            model=base,
            method=method,
            feeds=feeds,
            op_types=["MatMul", "Gather"],
            limit_gb=None if ours else limit_gb,
        )
        row = Row("onnxq" if ours else "onnxruntime calibrator", label, ours, error=cost.error)
        row.figures.update(peak=cost.peak_mb, cpu=cost.cpu_s)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
