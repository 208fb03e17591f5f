"""Claim: the recipes carry over to a decoder and to a tiny classifier with hardly a loss.

    python benchmarks/small_models.py          the tables
    python benchmarks/small_models.py --json   one object a line

stories260K (Llama, 5 layers, hidden 64): perplexity on a TinyStories excerpt; the first fifth of
the text is for calibration and the rest is what is evaluated, in windows of 512 tokens. BERT-tiny
on SST-2: accuracy on dev and test, calibrated on 64 train sentences. Peers: onnxruntime's own
quantizers on the same samples. Both models are small enough that a rounding step shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _common as common
from _common import Column, Row

RECIPES = ("w8a8", "w8a8-dynamic", "w4")
PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "w8a8": (
        "ORT static, per channel, U8",
        "ort_static",
        {"unsigned": True, "keywords": {"per_channel": True}},
    ),
    "w8a8-dynamic": (
        "ORT dynamic, per channel",
        "ort_dynamic",
        {"keywords": {"per_channel": True}},
    ),
    "w4": ("ORT MatMulNBits, b32", "ort_w4", {}),
}
STORIES_COLUMNS = (
    Column("perplexity", "perplexity", "perplexity", "lower", "{:.3f}"),
    Column("size", "MB", "10^6 bytes", "lower", "{:.3f}"),
)
SST2_COLUMNS = (
    Column("dev", "dev accuracy %", "percent", "higher"),
    Column("test", "test accuracy %", "percent", "higher"),
    Column("size", "MB", "10^6 bytes", "lower", "{:.2f}"),
)
Judge = Callable[[Any], dict[str, float]]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    for title, case, columns, measured in (
        ("stories260K, perplexity", "stories260k", STORIES_COLUMNS, stories),
        ("BERT-tiny, SST-2", "sst2-bert-tiny", SST2_COLUMNS, sst2),
    ):
        with common.workspace() as folder:
            rows = measured(folder, arguments.quick)
        if arguments.json:
            by_name = {row.name: row for row in rows}
            for recipe in RECIPES:
                peers = [by_name["fp32"], by_name[f"ort-{recipe}"]]
                common.emit(
                    common.compare_rows(f"{case} {recipe}", by_name[recipe], peers, columns)
                )
        elif arguments.markdown:
            print(f"{title}\n\n{common.markdown_table(rows, columns)}")
        else:
            common.print_table(title, rows, columns)


def stories(folder: Path, quick: bool) -> list[Row]:
    data = common.shared_folder() / "data" / "stories260k"
    base = folder / "stories260k.onnx"
    made = common.run_job("build_model", name="stories260k", out=base, checkpoint=str(data))
    if made.error:
        raise SystemExit(f"stories260K cannot be built: {made.error}")
    text = (data / "TinyStories-valid-30KB.txt").read_text("utf-8")
    cut = text.index("\n", len(text) // 5)
    (folder / "calibration.txt").write_text(text[:cut], "utf-8")
    (folder / "evaluation.txt").write_text(text[cut + 1 :], "utf-8")
    tokenizer = base.with_suffix(".tokenizer.json")

    def judge(session: Any) -> dict[str, float]:
        from onnxq.evaluation import evaluate

        found = evaluate(
            session,
            "perplexity",
            folder / "evaluation.txt",
            tokenizer=tokenizer,
            limit=2 if quick else None,
            window=512,
        )
        return {"perplexity": found.value}

    return all_rows(base, tokenizer, folder, judge)


def sst2(folder: Path, quick: bool) -> list[Row]:
    shared = common.shared_folder()
    data = shared / "data" / "sst2"
    base = shared / "models" / "sst2-bert-tiny" / "model.onnx"
    lines = (data / "train.tsv").read_text("utf-8").splitlines()[1:]
    texts = [line.split("\t")[0] for line in common.spread(lines, 64)]
    (folder / "calibration.txt").write_text("\n".join(texts) + "\n", "utf-8")
    tokenizer = base.with_name("tokenizer.json")

    def judge(session: Any) -> dict[str, float]:
        from onnxq.evaluation import evaluate

        limit = 100 if quick else None
        return {
            part: evaluate(
                session, "sst2", data / f"{part}.tsv", tokenizer=tokenizer, limit=limit
            ).value
            for part in ("dev", "test")
        }

    return all_rows(base, tokenizer, folder, judge)


def all_rows(base: Path, tokenizer: Path, folder: Path, judge: Judge) -> list[Row]:
    """fp32, and each recipe with its peer."""
    written = common.run_job(
        "write_feeds",
        model=base,
        texts=folder / "calibration.txt",
        tokenizer=tokenizer,
        out=folder / "feeds",
    )
    if written.error:
        raise SystemExit(f"the calibration texts cannot be encoded: {written.error}")
    rows = [Row("fp32", "fp32")]
    paths = {"fp32": base}
    for recipe in RECIPES:
        out = paths[recipe] = folder / f"{recipe}.onnx"
        keywords: Mapping[str, str] = {
            "calib": str(folder / "calibration.txt"),
            "tokenizer": str(tokenizer),
        }
        cost = common.run_job("onnxq_run", model=base, passes=recipe, out=out, keywords=keywords)
        rows.append(Row(recipe, f"onnxq `{recipe}`", ours=True, error=cost.error))
        label, job, options = PEERS[recipe]
        out = paths[f"ort-{recipe}"] = folder / f"ort-{recipe}.onnx"
        cost = common.run_job(job, model=base, out=out, feeds=folder / "feeds", **options)
        rows.append(Row(f"ort-{recipe}", label, error=cost.error))
    for row in rows:
        if row.error is None:
            row.figures.update(judged(paths[row.name], row, judge))
    return rows


def judged(path: Path, row: Row, judge: Judge) -> dict[str, float]:
    """The figures of one model; a model that does not run says so in its row."""
    from onnxq.graph import io

    try:
        return {**judge(common.open_session(path, 1)), "size": io.size_on_disk(path) / common.MB}
    except Exception as error:  # a peer may write what onnxruntime refuses
        row.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return {}


if __name__ == "__main__":
    main()
