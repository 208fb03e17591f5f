"""Claim: equalization and bias correction give a CNN back what one weight scale a tensor costs it.

    python benchmarks/cnn_per_tensor.py             the table
    python benchmarks/cnn_per_tensor.py --json      one object a line
    python benchmarks/cnn_per_tensor.py --markdown  as Markdown

EfficientNet-lite0 with its 49 BatchNormalizations in the file; static W8A8 with one scale a weight,
as some hardware wants it. Calibrated on 64 images, top-1 over the other 436; SQNR and cosine are of
the logits. One scale a channel is the bar.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import _common as common
from _common import Column, Row
from efficientnet_w8a8 import PREPROCESSING, split

TENSOR = "assign{weight-scales=tensor}"
MSE = "assign{weight-scales=tensor weight-method=mse}"
EQUALIZE = "canonicalize, equalize{clip=min}"
CASES = (
    ("per-channel", "one scale a channel", "canonicalize, calibrate, assign, qdq"),
    ("per-tensor", "one scale a tensor", f"canonicalize, calibrate, {TENSOR}, qdq"),
    ("mse", "the same, by MSE", f"canonicalize, calibrate, {MSE}, qdq"),
    ("bias", "+ correct-bias", f"canonicalize, calibrate, {TENSOR}, correct-bias, qdq"),
    ("equalize-keep", "+ equalize", f"canonicalize, equalize, calibrate, {TENSOR}, qdq"),
    ("equalize", "+ equalize{clip=min}", f"{EQUALIZE}, calibrate, {TENSOR}, qdq"),
    (
        "both",
        "+ equalize{clip=min}, correct-bias",
        f"{EQUALIZE}, calibrate, {TENSOR}, correct-bias, qdq",
    ),
)
COLUMNS = (
    Column("top1", "top-1 %", "percent", "higher"),
    Column("drop", "drop, points", "points", "lower"),
    Column("cosine", "cosine", "", "higher", "{:.4f}"),
    Column("sqnr", "SQNR dB", "dB", "higher", "{:.1f}"),
    Column("cpu", "CPU s to make", "s", "lower", "{:.1f}"),
)


def measure(arguments: Namespace, folder: Path) -> list[Row]:
    """One row a case, fp32 first."""
    from onnxq.calibration.data import open_data
    from onnxq.evaluation import evaluate
    from onnxq.graph import io
    from onnxq.pipeline.compare import compare_models

    shared = common.shared_folder()
    base = shared / "models" / "efficientnet-lite0" / "model_unfused_bn.onnx"
    split(shared / "data" / "imagenet500", folder, arguments.quick)
    data = open_data(folder / "evaluation", io.load(base), images=PREPROCESSING)

    def judge(row: Row, path: Path) -> None:
        session = common.open_session(path, 1)
        found = evaluate(session, "imagenet", folder / "evaluation", spec=PREPROCESSING)
        row.figures["top1"] = found.value
        row.figures["drop"] = rows[0].figures["top1"] - found.value if rows else 0.0

    rows: list[Row] = []
    fp32 = Row("fp32", "fp32", ours=False)
    judge(fp32, base)
    rows.append(fp32)
    for name, label, passes in CASES:
        row = Row(name, label, ours=True)
        path = folder / f"{name}.onnx"
        images = {"passes": passes, "keywords": {"calib": str(folder / "calibration")}}
        images["keywords"] |= {"images": PREPROCESSING, "threads": 1}  # type: ignore[operator]
        job = common.run_job("onnxq_run", model=base, out=path, **images)
        row.figures["cpu"], row.error = job.cpu_s, job.error
        if job.error is None:
            judge(row, path)
            worst = compare_models(base, path, data, seconds=0, limit=32).worst
            assert worst is not None
            row.figures.update(cosine=worst.cosine_mean, sqnr=worst.sqnr_db)
        rows.append(row)
    return rows


def recovered(rows: Sequence[Row]) -> float:
    """Percent of the top-1 points lost by one scale a tensor that the last case gives back."""
    by_name = {row.name: row.figures.get("top1", 0.0) for row in rows}
    lost = by_name["per-channel"] - by_name["per-tensor"]
    return 100 * (by_name["both"] - by_name["per-tensor"]) / lost if lost > 0 else 0.0


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    with common.workspace() as folder:
        rows = measure(arguments, folder)
    if arguments.json:
        for row in rows[3:]:
            common.emit(common.compare_rows(row.name, row, rows[1:3], COLUMNS))
        return
    if arguments.markdown:
        print(common.markdown_table(rows, COLUMNS))
    else:
        common.print_table(f"EfficientNet-lite0, W8A8; {common.machine()}", rows, COLUMNS)
    print(f"of what one scale a tensor loses, {recovered(rows):.0f} % is given back")


if __name__ == "__main__":
    main()
