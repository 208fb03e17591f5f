"""Claim: 8 bits a key or value cost a decoder nothing, 4 bits with rotated keys little.

    python benchmarks/kv_cache.py                       the table
    python benchmarks/kv_cache.py --json                one object a line
    python benchmarks/kv_cache.py --cases int8,int4     some of the cases
    python benchmarks/kv_cache.py --model smollm2.onnx  a model with a cache, built already

SmolLM2-135M-Instruct on windows of 256 tokens of the given half of WikiText-2 test, no BOS, one
token a step through the cache, so that every token reads what quantization left of those before
it. Cache: bytes a token after the last step. ``--quick``: stories260K and one short window.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from pathlib import Path

import _common as common
import numpy as np
from _common import Column, Row

ROTATE = "online-hadamard{sites=[qk]}"
CASES = (
    ("int8", "8 bits a token and head", "quantize-kv"),
    ("int4", "4 bits a token and head", "quantize-kv{bits=4}"),
    ("int4-rotated", "the same, keys rotated", f"{ROTATE}, quantize-kv{{bits=4}}"),
    ("int4-channel", "4 bits, keys a channel", "quantize-kv{bits=4 keys=channel}"),
    ("int4-window", "4 bits, prefix=4 window=32", "quantize-kv{bits=4 prefix=4 window=32}"),
    ("int2-channel", "2 bits, keys a channel", "quantize-kv{bits=2 keys=channel window=32}"),
)
COLUMNS = (
    Column("perplexity", "perplexity", "perplexity", "lower", "{:.3f}"),
    Column("worse", "% over fp32", "%", "lower"),
    Column("bytes", "cache, bytes a token", "bytes", "lower", "{:.0f}"),
    Column("shrink", "smaller", "x fp32", "higher", "{:.2f}x"),
    Column("cpu", "CPU ms a token", "ms", "lower", "{:.1f}"),
)


def judge(row: Row, path: Path, windows: list[np.ndarray], exact: Row | None) -> None:
    """Perplexity, bytes and time of one model."""
    from onnxq.evaluation.decode import CachedDecoder
    from onnxq.evaluation.perplexity import negative_log_likelihood

    decoder = CachedDecoder(common.open_session(path, 1))
    loss, count, began = 0.0, 0, time.process_time()
    for ids in windows:
        logits = decoder.run(ids, 1)
        loss += negative_log_likelihood(logits[0, :-1], ids[0, 1:].tolist())
        count += ids.shape[1] - 1
    row.figures["cpu"] = 1e3 * (time.process_time() - began) / count
    row.figures["perplexity"] = math.exp(loss / count)
    row.figures["bytes"] = decoder.cache_bytes / windows[-1].shape[1]
    base = row if exact is None else exact
    row.figures["worse"] = 100 * (row.figures["perplexity"] / base.figures["perplexity"] - 1)
    row.figures["shrink"] = base.figures["bytes"] / row.figures["bytes"]


def measure(arguments: Namespace, folder: Path) -> list[Row]:
    """One row a case, fp32 first."""
    from tokenizers import Tokenizer

    from onnxq import models
    from onnxq.graph import io
    from onnxq.pipeline.runner import Pipeline

    data = common.shared_folder() / "data"
    base = arguments.model
    if base is None:
        base = folder / "model.onnx"
        name = "stories260k" if arguments.quick else "smollm2-135m"
        checkpoint = data / "stories260k" if arguments.quick else None
        models.build(name, base, checkpoint=checkpoint, kv_cache=True)
    text = data / "wikitext2" / "wiki.test.first-half.raw"
    if arguments.quick:
        text = next((data / "stories260k").glob("*.txt"))
    tokenizer = Tokenizer.from_file(str(base.with_name(base.stem + ".tokenizer.json")))
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    length = 48 if arguments.quick else 256
    count = 1 if arguments.quick else arguments.windows
    windows = [np.array([ids[i * length : (i + 1) * length]], np.int64) for i in range(count)]
    wanted = arguments.cases.split(",") if arguments.cases else [name for name, _, _ in CASES]
    rows = [Row("fp32", "fp32", ours=False)]
    judge(rows[0], base, windows, None)
    for name, label, passes in CASES:
        if name not in wanted:
            continue
        row, path = Row(name, label, ours=True), folder / "quantized.onnx"
        io.save(Pipeline(passes).run(base, verify=False).model, path)
        judge(row, path, windows, rows[0])
        rows.append(row)
    return rows


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, help="a decoder with its tokenizer beside it")
    parser.add_argument("--windows", type=int, default=4, help="windows evaluated")
    parser.add_argument("--cases", default="", help="comma-separated names")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    with common.workspace() as folder:
        rows = measure(arguments, folder)
    if arguments.json:
        for row in rows[1:]:
            common.emit(common.compare_rows(row.name, row, rows[:1], COLUMNS))
    elif arguments.markdown:
        print(common.markdown_table(rows, COLUMNS))
    else:
        common.print_table(f"Decoding through the cache; {common.machine()}", rows, COLUMNS)


if __name__ == "__main__":
    main()
