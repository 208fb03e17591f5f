"""Claim: whole models with our packed products run faster than onnxruntime's own int4 and int8.

    python benchmarks/end_to_end.py                      both tables
    python benchmarks/end_to_end.py --models smollm2     one
    python benchmarks/end_to_end.py --json               one object a line
    python benchmarks/end_to_end.py --markdown           the tables of docs/kernels.md
    python benchmarks/end_to_end.py --quick              stories260K and few sentences

Weights are rounded to nearest, INT4 in symmetric blocks of 32, and activations of our W4A8 by the
same blocks, as onnxruntime's MatMulNBits has both; "GPTQ" rounds weights on text: 32 windows of
wiki.valid, or for MiniLM 128 sentences of STS-B train. MiniLM: one sentence of 128 tokens; Spearman
x 100 over STS-B dev pairs. SmolLM2-135M with a key/value cache: a prompt of 128 tokens, then one
token after those 128; perplexity on windows of 512 tokens of wiki.test. Its output layer, a fifth
of the weights and tied to the embedding, stays float but where the row says otherwise;
onnxruntime's int4 cannot reach it behind its Transpose. onnxruntime's dynamic int8 also rounds
embeddings, with one scale a tensor. One thread, all models in turn in one process: medians of
processor time, and speed-ups over fp32 as medians over rounds, so that other load hardly counts.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import _common as common
from _common import Column, Row

from onnxq.runtime import usable_library

PROMPT, WINDOW, ROUNDS = 128, 512, 25
CALIBRATION = {"minilm": 128, "smollm2": 32}
HEAD = "/lm_head/MatMul"
FLOAT_HEAD = 'partial{layers=["*lm_head*"]}'
INT4 = "assign{mode=weight-only weights=int4 block=32}"
INT4_LAYERS = INT4.replace("mode=weight-only", "mode=weight-only embeddings=float")
INT8_LAYERS = "assign{mode=dynamic embeddings=float}"
PACK = "pack{activations=int8-group}"
GPTQ_LAYERS = (
    f"simplify-attention, calibrate, {INT4_LAYERS}, {FLOAT_HEAD}, gptq{{damping=0.01}}, {PACK}"
)
PER_CHANNEL = {"per_channel": True}
BUILDERS = {"minilm": "minilm", "smollm2": "smollm2-135m"}
PREPARED = "canonicalize{opset=21}"


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One way to quantize: a job of ``_jobs.py`` with its options."""

    name: str
    label: str
    job: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    peers: tuple[str, ...] = ()


def ours(name: str, label: str, passes: str, *peers: str) -> Configuration:
    """One of our pipelines behind the preparation that all share."""
    return Configuration(name, label, "onnxq_passes", {"passes": passes}, ("fp32", *peers))


MINILM = (
    Configuration("ort-w4", "ORT MatMulNBits, int4", "ort_w4"),
    Configuration("ort-int8", "ORT dynamic int8", "ort_dynamic", {"keywords": PER_CHANNEL}),
    ours("w4a8", "onnxq W4A8, int8 embedding", f"{INT4}, {PACK}, qdq", "ort-w4"),
    ours(
        "w4a8-gptq",
        "onnxq W4A8, GPTQ, int8 embedding",
        f"simplify-attention, calibrate, {INT4}, gptq{{damping=0.01}}, {PACK}, qdq",
        "ort-w4",
    ),
    ours("w8a8", "onnxq W8A8 per token", "assign{mode=dynamic}, pack, qdq", "ort-int8"),
)
SMOLLM2 = (
    Configuration("ort-w4", "ORT MatMulNBits, int4", "ort_w4"),
    Configuration(
        "ort-int8",
        "ORT dynamic int8",
        "ort_dynamic",
        {"keywords": {**PER_CHANNEL, "nodes_to_exclude": [HEAD]}},
    ),
    ours("w4a8", "onnxq W4A8", f"{INT4_LAYERS}, {FLOAT_HEAD}, {PACK}", "ort-w4"),
    ours("w4a8-gptq", "onnxq W4A8, GPTQ", GPTQ_LAYERS, "ort-w4"),
    ours(
        "w4a8-head",
        "onnxq W4A8, output layer int8",
        f'{INT4_LAYERS}, set-format{{layers=["*lm_head*"] format=int8g32}}, {PACK}',
        "ort-w4",
    ),
    ours("w8a8", "onnxq W8A8 per token", f"{INT8_LAYERS}, {FLOAT_HEAD}, pack", "ort-int8"),
)

SIZE = Column("size", "MB", "10^6 bytes", "lower", "{:.1f}")


def speed(key: str, title: str) -> tuple[Column, Column]:
    """Milliseconds, and times as fast as fp32."""
    return (
        Column(f"{key}_ms", f"{title} ms", "ms", "lower", "{:.2f}"),
        Column(f"{key}_speedup", "x fp32", "x fp32", "higher", "{:.2f}x"),
    )


COLUMNS = {
    "minilm": (
        Column("sts_dev", "STS dev", "spearman-x100", "higher"),
        SIZE,
        *speed("sentence", "128 tokens"),
    ),
    "smollm2": (
        Column("perplexity", "perplexity", "perplexity", "lower"),
        SIZE,
        *speed("prefill", "prompt of 128"),
        *speed("decode", "next token"),
    ),
}
CONFIGURATIONS = {"minilm": MINILM, "smollm2": SMOLLM2}


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=sorted(COLUMNS), default=sorted(COLUMNS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed runs of each model")
    parser.add_argument("--windows", type=int, default=8, help="windows of perplexity")
    parser.add_argument("--pairs", type=int, default=300, help="sentence pairs of STS-B")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    if usable_library() is None:
        raise SystemExit("no kernels to measure: `onnxq doctor` says why")
    if arguments.quick:
        arguments.rounds, arguments.windows, arguments.pairs = 3, 2, 20
    for name in arguments.models:
        with common.workspace() as folder:
            rows = measure(name, arguments, folder)
        show(name, arguments, rows)


def show(name: str, arguments: Namespace, rows: list[Row]) -> None:
    """Print one model's table."""
    title = "stories260k" if arguments.quick and name == "smollm2" else name
    by_name = {row.name: row for row in rows}
    if arguments.json:
        for configuration in CONFIGURATIONS[name]:
            peers = [by_name[p] for p in configuration.peers]
            case = f"{title} {configuration.name}"
            row = by_name[configuration.name]
            common.emit(common.compare_rows(case, row, peers, COLUMNS[name]))
    elif arguments.markdown:
        print(common.markdown_table(rows, COLUMNS[name]))
        print(
            f"{title}, {time.strftime('%Y-%m-%d')}, {common.machine()}, one thread; "
            f"load average {os.getloadavg()[1]:.1f} from all processes.\n"
        )
    else:
        common.print_table(f"{title}; {common.machine()}", rows, COLUMNS[name])


def measure(name: str, arguments: Namespace, folder: Path) -> list[Row]:
    """fp32 and each configuration: made, judged, timed in turn."""
    base = build(name, arguments.quick, folder)
    rows, paths = [Row("fp32", "fp32")], {"fp32": base}
    for configuration in CONFIGURATIONS[name]:
        out = folder / f"{configuration.name}.onnx"
        options = dict(configuration.options)
        if "calibrate" in options.get("passes", ""):
            options["feeds"] = calibration(name, base, arguments, folder)
        cost = common.run_job(configuration.job, model=base, out=out, **options)
        mine = configuration.job == "onnxq_passes"
        row = Row(configuration.name, configuration.label, mine, error=cost.error)
        if cost.error is None:
            paths[configuration.name] = out
        rows.append(row)
    judge = judge_sentences if name == "minilm" else judge_text
    timed = time_sentence if name == "minilm" else time_decoder
    sessions = {key: common.open_session(path, 1) for key, path in paths.items()}
    for row in rows:
        if row.name in paths:
            row.figures.update(judge(sessions[row.name], base, arguments))
            row.figures["size"] = size_of(paths[row.name])
    for key, timings in timed(sessions, base, arguments).items():
        for row in rows:
            if row.name in timings:
                row.figures[f"{key}_ms"] = timings[row.name].cpu_ms
                row.figures[f"{key}_speedup"] = timings[row.name].cpu_speedup
    return rows


def build(name: str, quick: bool, folder: Path) -> Path:
    """The float model, prepared as all configurations take it; its tokenizer lies beside it."""
    built, base = folder / "built.onnx", folder / "base.onnx"
    options: dict[str, Any] = {"name": BUILDERS[name], "out": built}
    if name == "smollm2":
        options["settings"] = {"kv_cache": "true"}
        if quick:
            checkpoint = common.shared_folder() / "data" / "stories260k"
            options.update(name="stories260k", checkpoint=str(checkpoint))
    for job, given in (
        ("build_model", options),
        ("onnxq_passes", {"model": built, "passes": PREPARED, "out": base}),
    ):
        done = common.run_job(job, **given)
        if done.error:
            raise SystemExit(f"{name} cannot be built: {done.error}")
    built.with_suffix(".tokenizer.json").rename(base.with_suffix(".tokenizer.json"))
    return base


def calibration(name: str, base: Path, arguments: Namespace, folder: Path) -> Path:
    """A folder of samples: windows of text for a decoder, sentences for an encoder."""
    import numpy as np

    from onnxq.data.text import encode_texts, load_tokenizer
    from onnxq.graph import io

    out = folder / "calibration"
    if out.exists():
        return out
    out.mkdir()
    count, data = 2 if arguments.quick else CALIBRATION[name], common.shared_folder() / "data"
    tokenizer = base.with_suffix(".tokenizer.json")
    inputs = io.load(base).graph.inputs
    if name == "minilm":
        lines = (data / "stsb" / "sts-train.csv").read_text("utf-8").splitlines()
        texts = [line.split("\t")[5] for line in lines[:: len(lines) // count][:count]]
        names = [str(value.name) for value in inputs]
        samples = [encode_texts([text], tokenizer, names, PROMPT) for text in texts]
    else:
        file = data / "wikitext2" / "wiki.valid.tokens"
        if arguments.quick:
            file = data / "stories260k" / "TinyStories-valid-30KB.txt"
        ids = load_tokenizer(tokenizer).encode(file.read_text("utf-8")).ids[: count * WINDOW]
        pasts = [value for value in inputs if str(value.name).startswith("past_key_values")]
        samples = [
            decoder_inputs(np.array([ids[at : at + WINDOW]], np.int64), pasts)
            for at in range(0, len(ids), WINDOW)
        ]
    for number, sample in enumerate(samples):
        np.savez(out / f"{number:04}.npz", **sample)
    return out


def decoder_inputs(ids: Any, pasts: Any) -> dict[str, Any]:
    """``ids: [1, S]`` without a past; ``pasts`` are values ``[1, heads, length, d]``."""
    import numpy as np

    feeds = {str(p.name): np.zeros((1, p.shape[1], 0, p.shape[3]), np.float32) for p in pasts}
    feeds["input_ids"] = ids
    feeds["attention_mask"] = np.ones(ids.shape, np.int64)
    feeds["position_ids"] = np.arange(ids.shape[1], dtype=np.int64)[None]
    return feeds


def size_of(path: Path) -> float:
    from onnxq.graph import io

    return io.size_on_disk(path) / common.MB


def judge_sentences(session: Any, base: Path, arguments: Namespace) -> dict[str, float]:
    """Spearman's correlation with people's judgement, x 100."""
    from onnxq.evaluation import evaluate

    pairs = common.shared_folder() / "data" / "stsb" / "sts-dev.csv"
    tokenizer = base.with_suffix(".tokenizer.json")
    found = evaluate(session, "sts", pairs, tokenizer=tokenizer, limit=arguments.pairs)
    return {"sts_dev": found.value}


def time_sentence(
    sessions: dict[str, Any], base: Path, arguments: Namespace
) -> dict[str, dict[str, common.Timing]]:
    from onnxq.data.text import encode_texts

    lines = (common.shared_folder() / "data" / "stsb" / "sts-dev.csv").read_text("utf-8")
    text = " ".join(line.split("\t")[5] for line in lines.splitlines()[:40])
    names = [a.name for a in sessions["fp32"].get_inputs()]
    feeds = encode_texts([text], base.with_suffix(".tokenizer.json"), names, PROMPT)
    return {"sentence": in_turn(dict.fromkeys(sessions, feeds), sessions, arguments.rounds)}


def judge_text(session: Any, base: Path, arguments: Namespace) -> dict[str, float]:
    """Perplexity, each window without a past."""
    from onnxq.evaluation.perplexity import negative_log_likelihood

    windows = token_windows(base, arguments)
    total = 0.0
    for ids in windows:
        (logits,) = session.run(["logits"], decoder_feeds(session, ids[None], None))
        total += negative_log_likelihood(logits[0, :-1], ids[1:].tolist())
    return {"perplexity": math.exp(total / (len(windows) * (WINDOW - 1)))}


def token_windows(base: Path, arguments: Namespace) -> Any:
    """``[windows, 512]`` token ids, without BOS."""
    import numpy as np

    from onnxq.data.text import load_tokenizer

    data = common.shared_folder() / "data"
    file = data / "wikitext2" / "wiki.test.first-half.raw"
    if arguments.quick:
        file = data / "stories260k" / "TinyStories-valid-30KB.txt"
    tokenizer = load_tokenizer(base.with_suffix(".tokenizer.json"))
    ids = tokenizer.encode(file.read_text("utf-8"), add_special_tokens=False).ids
    count = arguments.windows
    return np.array(ids[: count * WINDOW], np.int64).reshape(count, WINDOW)


def decoder_feeds(session: Any, ids: Any, past: dict[str, Any] | None) -> dict[str, Any]:
    """What a decoder with a cache reads for ``ids [1, S]`` after ``past``, or after nothing."""
    import numpy as np

    feeds, length = {}, 0
    for given in session.get_inputs():
        if given.name.startswith("past_key_values"):
            empty = np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
            feeds[given.name] = empty if past is None else past[given.name]
            length = feeds[given.name].shape[2]
    total = length + ids.shape[1]
    feeds["input_ids"] = ids
    feeds["attention_mask"] = np.ones((1, total), np.int64)
    feeds["position_ids"] = np.arange(length, total, dtype=np.int64)[None]
    return feeds


def time_decoder(
    sessions: dict[str, Any], base: Path, arguments: Namespace
) -> dict[str, dict[str, common.Timing]]:
    """A prompt without a past, then one token with the prompt's keys and values."""
    ids = token_windows(base, arguments)[:1]
    prompts, steps = {}, {}
    for name, session in sessions.items():
        prompts[name] = decoder_feeds(session, ids[:, :PROMPT], None)
        outputs = [o.name for o in session.get_outputs()]
        results = dict(zip(outputs, session.run(None, prompts[name]), strict=True))
        past = {
            key.replace("present.", "past_key_values."): value
            for key, value in results.items()
            if key.startswith("present.")
        }
        steps[name] = decoder_feeds(session, ids[:, PROMPT : PROMPT + 1], past)
    return {
        "prefill": in_turn(prompts, sessions, arguments.rounds),
        "decode": in_turn(steps, sessions, arguments.rounds),
    }


def in_turn(
    feeds: dict[str, Any], sessions: dict[str, Any], rounds: int
) -> dict[str, common.Timing]:
    """Time one run of each session with its own feeds."""

    def runner(name: str) -> Any:
        return lambda: sessions[name].run(None, feeds[name])

    return common.interleave({name: runner(name) for name in sessions}, rounds, "fp32")


if __name__ == "__main__":
    main()
