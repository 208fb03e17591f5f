"""Claim: `w8a8` keeps a mobile CNN's accuracy at a quarter of its size, whatever its BatchNorms.

    python benchmarks/efficientnet_w8a8.py             the table
    python benchmarks/efficientnet_w8a8.py --json      one object a line
    python benchmarks/efficientnet_w8a8.py --markdown  as Markdown

EfficientNet-lite0, in a file with BatchNorm folded and in one without. Calibrated on 64 images,
evenly spread; top-1 is over the other 436, so no image serves both ends. Peers get the same
images as arrays, after onnxruntime's own `quant_pre_process`. Latency: one image, all models of a
file in turn in one process.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import _common as common
from _common import Column, Row

PREPROCESSING = "resize=256,crop=224,mean=127,std=128,layout=nchw"
CALIBRATION = 64
FILES = ("model.onnx", "model_unfused_bn.onnx")
PEERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "ort-static-per-channel",
        "ORT static, per channel, U8",
        {"unsigned": True, "keywords": {"per_channel": True}},
    ),
    ("ort-static-default", "ORT static, defaults", {}),
)


def columns(threads: list[int]) -> list[Column]:
    found = [
        Column("top1", "top-1 %", "percent", "higher"),
        Column("drop", "drop, points", "points", "lower"),
        Column("size", "MB", "10^6 bytes", "lower", "{:.2f}"),
        Column("shrink", "smaller", "x fp32", "higher", "{:.2f}x"),
    ]
    for n in threads:
        found.append(Column(f"ms_{n}t", f"ms, {n} t", "ms", "lower", "{:.2f}"))
        found.append(Column(f"speedup_{n}t", "x fp32", "x fp32", "higher", "{:.2f}x"))
    found.append(Column("make_cpu", "CPU s to make", "s", "lower", "{:.1f}"))
    found.append(Column("make_peak", "peak MB", "10^6 bytes", "lower", "{:.0f}"))
    return found


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=60, help="timed runs of each model")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    shown = columns(arguments.threads)
    for name in FILES[:1] if arguments.quick else FILES:
        with common.workspace() as folder:
            rows = measure(name, arguments, folder)
        fp32, ours, *peers = rows
        if arguments.json:
            common.emit(
                common.compare_rows(f"efficientnet-{name} w8a8", ours, [fp32, *peers], shown)
            )
        elif arguments.markdown:
            print(f"`{name}`\n\n{common.markdown_table(rows, shown)}")
        else:
            common.print_table(f"EfficientNet-lite0 {name}; {common.machine()}", rows, shown)


def measure(name: str, arguments: Namespace, folder: Path) -> list[Row]:
    shared = common.shared_folder()
    base = shared / "models" / "efficientnet-lite0" / name
    split(shared / "data" / "imagenet500", folder, arguments.quick)
    prepared = folder / "prepared.onnx"
    written = common.run_job(
        "write_image_feeds",
        model=base,
        images=folder / "calibration",
        spec=PREPROCESSING,
        out=folder / "feeds",
    )
    if written.error:
        raise SystemExit(f"the calibration images cannot be prepared: {written.error}")
    preparation = common.run_job("ort_prepare", model=base, out=prepared)
    paths = {"fp32": base}
    rows = [Row("fp32", "fp32")]
    keywords = {"calib": str(folder / "calibration"), "images": PREPROCESSING}
    out = folder / "w8a8.onnx"
    cost = common.run_job("onnxq_run", model=base, passes="w8a8", out=out, keywords=keywords)
    rows.append(Row("w8a8", "onnxq `w8a8`", ours=True, error=cost.error))
    rows[-1].figures.update(make_cpu=cost.cpu_s, make_peak=cost.peak_mb)
    paths["w8a8"] = out
    for peer, label, options in PEERS:
        out = folder / f"{peer}.onnx"
        cost = common.run_job(
            "ort_static", model=prepared, out=out, feeds=folder / "feeds", **options
        )
        rows.append(Row(peer, label, error=preparation.error or cost.error))
        rows[-1].figures.update(make_cpu=cost.cpu_s, make_peak=cost.peak_mb)
        paths[peer] = out
    alive = {row.name: paths[row.name] for row in rows if row.error is None}
    judge(rows, alive, folder)
    for threads in arguments.threads:
        latency(rows, alive, folder, threads, 3 if arguments.quick else arguments.rounds)
    return rows


def split(source: Path, folder: Path, quick: bool) -> None:
    """Links to the calibration images in one folder, to the others with their labels in another."""
    lines = [line for line in (source / "labels.txt").read_text().splitlines() if line.strip()]
    chosen = set(common.spread(lines, 8 if quick else CALIBRATION))
    rest = [line for line in lines if line not in chosen]
    if quick:
        rest = common.spread(rest, 16)
    for part, members in (("calibration", chosen), ("evaluation", rest)):
        (folder / part).mkdir()
        for line in members:
            image = line.split("\t")[0]
            (folder / part / image).symlink_to((source / image).resolve())
    (folder / "evaluation" / "labels.txt").write_text("\n".join(rest) + "\n")


def judge(rows: list[Row], paths: dict[str, Path], folder: Path) -> None:
    """Top-1 on the images that nothing was calibrated on, and sizes."""
    from onnxq.evaluation import evaluate
    from onnxq.graph import io

    float_top1 = float_size = 0.0
    for row in rows:
        if row.name not in paths:
            continue
        session = common.open_session(paths[row.name], 1)
        found = evaluate(session, "imagenet", folder / "evaluation", spec=PREPROCESSING)
        size = io.size_on_disk(paths[row.name]) / common.MB
        float_top1, float_size = float_top1 or found.value, float_size or size
        row.figures.update(
            top1=found.value, drop=float_top1 - found.value, size=size, shrink=float_size / size
        )


def latency(
    rows: list[Row], paths: dict[str, Path], folder: Path, threads: int, rounds: int
) -> None:
    import numpy as np

    with np.load(next((folder / "feeds").glob("*.npz"))) as arrays:
        feeds = dict(arrays)
    timings = common.time_models(paths, feeds, threads, rounds, "fp32")
    for row in rows:
        if row.name in timings:
            row.figures[f"ms_{threads}t"] = timings[row.name].ms
            row.figures[f"speedup_{threads}t"] = timings[row.name].speedup


if __name__ == "__main__":
    main()
