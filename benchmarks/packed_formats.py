"""Claim: every weight format runs packed, smaller than float and with the accuracy of its bits.

    python benchmarks/packed_formats.py                    MiniLM, the table; some minutes
    python benchmarks/packed_formats.py --quick            three formats
    python benchmarks/packed_formats.py --json             one object a line
    python benchmarks/packed_formats.py --only int3 nf4    some of them

all-MiniLM-L6-v2 with `assign{mode=... weights=...}, pack, qdq`: no calibration, weights rounded to
nearest. Cosine of the token embeddings with fp32 over sentences of the shared data's STS-B dev set.
Speed: one sentence of 128 tokens, every model in turn with fp32 in one process, on one thread,
processor time; MB are of 10^6 bytes, embeddings (INT8) included.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
from _common import Column, Row

SENTENCES, LENGTH = 32, 128
PREPARE = "canonicalize{opset=21}"


@dataclass(frozen=True)
class Configuration:
    """A format of weights and what becomes of activations."""

    name: str
    assign: str
    pack: str = ""

    @property
    def passes(self) -> str:
        """The pipeline."""
        return f"{PREPARE}, assign{{{self.assign}}}, pack{{{self.pack}}}, qdq"


def weight_only(name: str, weights: str, block: int = 0, pack: str = "") -> Configuration:
    """Weights in a format; activations INT8 by token where its levels allow that."""
    group = f" block={block}" if block else ""
    return Configuration(name, f"mode=weight-only weights={weights}{group}", pack)


CONFIGURATIONS = (
    weight_only("int8", "int8"),
    weight_only("int8-float", "int8", pack="activations=float"),
    Configuration("int8-outliers", "mode=dynamic", "outliers=6"),
    weight_only("int6-g32", "int6", 32),
    weight_only("int4-g32", "int4", 32),
    weight_only("int4-g128", "int4", 128),
    weight_only("int3-g32", "int3", 32),
    weight_only("int2-g32", "int2", 32),
    weight_only("fp8e4m3", "fp8e4m3"),
    weight_only("fp8e5m2", "fp8e5m2"),
    weight_only("mxfp8e4m3", "mxfp8e4m3"),
    weight_only("mxfp8e5m2", "mxfp8e5m2"),
    weight_only("mxfp6e2m3", "mxfp6e2m3"),
    weight_only("mxfp6e3m2", "mxfp6e3m2"),
    weight_only("mxfp4", "mxfp4"),
    weight_only("mxint8", "mxint8"),
    weight_only("nvfp4", "nvfp4"),
    weight_only("nf4", "nf4"),
    weight_only("ternary-g32", "ternary", 32),
    weight_only("binary-g32", "binary", 32),
    weight_only("seq2-g32", "seq2", 32),
    Configuration("w4a4-mxfp4", "mode=per-token weights=mxfp4 activations=mxfp4"),
    Configuration("w4a4-nvfp4", "mode=per-token weights=nvfp4 activations=nvfp4"),
    Configuration("w4a4-int4-g32", "mode=per-token weights=int4 block=32 activations=int4g32"),
    Configuration("w8a8-mxfp8", "mode=per-token weights=mxfp8e4m3 activations=mxfp8e4m3"),
)
QUICK = ("int8", "int3-g32", "w4a4-mxfp4")
COLUMNS = (
    Column("cosine", "cosine", "cosine", "higher", "{:.4f}"),
    Column("size", "MB", "10^6 bytes", "lower", "{:.1f}"),
    Column("cpu_ms", "CPU ms", "ms", "lower", "{:.1f}"),
    Column("cpu_speedup", "x fp32", "x fp32", "higher", "{:.2f}x"),
)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each model")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these formats")
    arguments = parser.parse_args()
    with common.workspace() as folder:
        rows = list(measure(arguments, folder))
    if arguments.json:
        for row in rows[1:]:
            common.emit(common.compare_rows(f"packed {row.name}", row, [rows[0]], COLUMNS))
    else:
        common.print_table(f"MiniLM, packed; {common.machine()}", rows, COLUMNS)


def measure(arguments: Namespace, folder: Path) -> Iterator[Row]:
    """fp32, then every configuration; each against fp32 in turn."""
    import onnxq

    names = arguments.only or (QUICK if arguments.quick else [c.name for c in CONFIGURATIONS])
    unknown = set(names) - {c.name for c in CONFIGURATIONS}
    if unknown:
        raise SystemExit(f"no configuration {', '.join(sorted(unknown))}")
    base = folder / "minilm.onnx"
    made = common.run_job("build_model", name="minilm", out=base, settings={})
    if made.error:
        raise SystemExit(f"MiniLM cannot be built: {made.error}")
    feeds = sentence_feeds(base, 4 if arguments.quick else SENTENCES)
    reference = common.open_session(base, 1)
    expected = [reference.run(None, feed)[0] for feed in feeds]
    yield Row("fp32", "fp32", figures={"cosine": 1.0, "size": base.stat().st_size / common.MB})
    for configuration in CONFIGURATIONS:
        if configuration.name not in names:
            continue
        path = folder / "packed.onnx"
        row = Row(configuration.name, configuration.name, ours=True)
        try:
            onnxq.run(base, configuration.passes, out=path, verify=False, speed_seconds=0)
        except onnxq.OnnxqError as error:
            row.error = str(error)
            yield row
            continue
        packed = common.open_session(path, 1)
        cosines = [cosine(e, packed.run(None, f)[0]) for e, f in zip(expected, feeds, strict=True)]
        row.figures = {"cosine": float(np.mean(cosines)), "size": path.stat().st_size / common.MB}
        row.figures |= speed(reference, packed, arguments.rounds)
        yield row
        path.unlink()


def speed(reference: Any, packed: Any, rounds: int) -> dict[str, float]:
    """Of one sentence of full length, against fp32 in turn."""
    ids = np.random.default_rng(0).integers(1000, 30000, size=(1, LENGTH))
    names = [given.name for given in reference.get_inputs()]
    values = [ids, np.ones_like(ids), np.zeros_like(ids)]
    feed = dict(zip(names, values, strict=False))
    runs = {
        "fp32": lambda: reference.run(None, feed),
        "packed": lambda: packed.run(None, feed),
    }
    timing = common.interleave(runs, rounds, "fp32")["packed"]
    return {"cpu_ms": timing.cpu_ms, "cpu_speedup": timing.cpu_speedup}


def sentence_feeds(model: Path, count: int) -> list[dict[str, Any]]:
    """Sentences of the dev set, encoded one by one."""
    from minilm_w8a8 import read_sentences
    from tokenizers import Tokenizer

    data = common.shared_folder() / "data" / "stsb"
    tokenizer = Tokenizer.from_file(str(model.with_suffix(".tokenizer.json")))
    tokenizer.no_padding()
    feeds = []
    for text in common.spread(read_sentences(data / "sts-dev.csv"), count):
        ids = np.array([tokenizer.encode(text).ids[:LENGTH]], np.int64)
        zeros = np.zeros_like(ids)
        feeds.append(
            {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": zeros}
        )
    return feeds


def cosine(expected: Any, got: Any) -> float:
    """Of the mean embeddings of a sentence."""
    a, b = (x[0].astype(np.float64).mean(axis=0) for x in (expected, got))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


if __name__ == "__main__":
    main()
