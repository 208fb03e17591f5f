"""Texts into the inputs of a transformer: ``input_ids``, ``attention_mask`` and their relatives.

Symbols: N texts, S tokens of the longest one after padding, P past tokens (always 0 here).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = npt.NDArray[Any]

TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""Inputs that can be computed from texts; anything else must be a cache, which starts empty."""

_PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>")


@dataclass(frozen=True)
class InputSpec:
    """What a model says of one input.

    Attributes:
        name: the input's name.
        dtype: what to cast to.
        shape: sizes; ``None`` or a string where the size is free.
    """

    name: str
    dtype: npt.DTypeLike = np.int64
    shape: tuple[int | str | None, ...] = ()


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded token ids.

    Attributes:
        ids: ``[N, S]`` int64. mask: ``[N, S]`` int64, 1 for a token and 0 for padding.
        types: ``[N, S]`` int64, segment of each token.
    """

    ids: Array
    mask: Array
    types: Array


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer without the padding and truncation its file may ask for.

    Raises:
        DataError: ``DATA-TOKENIZER`` when the file is missing or not a tokenizer's JSON.
    """
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise DataError(
            "DATA-TOKENIZER",
            f"there is no tokenizer at {path}",
            "give the tokenizer.json that belongs to the model with --tokenizer",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            "DATA-TOKENIZER",
            f"{path} is not a tokenizer's JSON file: {error}",
            "give the tokenizer.json that belongs to the model with --tokenizer",
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def find_tokenizer(model_path: str | Path) -> Path | None:
    """``<stem>.tokenizer.json`` or ``tokenizer.json`` beside a model, whichever exists first."""
    path = Path(model_path)
    for candidate in (path.with_suffix(".tokenizer.json"), path.with_name("tokenizer.json")):
        if candidate.is_file():
            return candidate
    return None


def tokenize(
    texts: Sequence[str], tokenizer: Tokenizer, max_length: int, pad_to: int | None = None
) -> TokenBatch:
    """Encode with special tokens, truncate to ``max_length``, pad on the right.

    Args:
        texts: N texts, at least one.
        tokenizer: from :func:`load_tokenizer`.
        max_length: most tokens of a text, special tokens included.
        pad_to: S; the longest of the texts by default.

    Raises:
        DataError: ``DATA-EMPTY`` without texts, ``DATA-TEXT-LENGTH`` when a text does not fit.
    """
    if not texts:
        raise DataError("DATA-EMPTY", "there are no texts to encode", "give at least one text")
    specials = tokenizer.num_special_tokens_to_add(False)
    if max_length <= specials or (pad_to is not None and pad_to < 1):
        raise DataError(
            "DATA-TEXT-LENGTH",
            f"max_length={max_length}, pad_to={pad_to}: no room for a token beside the "
            f"{specials} special ones",
            "choose larger lengths",
        )
    tokenizer.enable_truncation(max_length)
    try:
        encodings = tokenizer.encode_batch(list(texts))
    finally:
        tokenizer.no_truncation()
    longest = max(len(encoding.ids) for encoding in encodings)
    length = pad_to or max(longest, 1)
    if longest > length:
        raise DataError(
            "DATA-TEXT-LENGTH",
            f"a text has {longest} tokens and pad_to is {length}",
            f"set max_length to {length} to cut longer texts",
        )
    ids = np.full((len(texts), length), _pad_id(tokenizer), dtype=np.int64)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for row, encoding in enumerate(encodings):
        count = len(encoding.ids)
        ids[row, :count] = encoding.ids
        types[row, :count] = encoding.type_ids
        mask[row, :count] = 1
    return TokenBatch(ids, mask, types)


def token_feeds(batch: TokenBatch, inputs: Sequence[InputSpec]) -> dict[str, Array]:
    """Feeds for a model's inputs; a key/value cache starts empty (P = 0).

    Raises:
        DataError: ``DATA-INPUT-UNKNOWN`` for an input that cannot be made from texts,
            ``DATA-INPUT-SHAPE`` when a fixed size of the model differs from the batch's.
    """
    known: Mapping[str, Array] = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "token_type_ids": batch.types,
        "position_ids": np.maximum(np.cumsum(batch.mask, axis=1) - 1, 0),
    }
    feeds: dict[str, Array] = {}
    for spec in inputs:
        value = known.get(spec.name)
        if value is None:
            value = _empty_cache(spec, batch.ids.shape[0])
        feeds[spec.name] = _fitted(value, spec)
    return feeds


def encode_texts(
    texts: Sequence[str],
    tokenizer_path: str | Path,
    input_names: Sequence[str | InputSpec],
    max_length: int,
    pad_to: int | None = None,
) -> dict[str, Array]:
    """Texts into feeds in one call: load the tokenizer, encode, pick the model's inputs.

    Args:
        texts: N texts.
        tokenizer_path: a ``tokenizer.json``.
        input_names: what the model takes; a name alone stands for an int64 input.
        max_length: most tokens of a text.
        pad_to: S; the longest of the texts by default.

    Raises:
        DataError: see :func:`load_tokenizer`, :func:`tokenize`, :func:`token_feeds`.
    """
    specs = [InputSpec(item) if isinstance(item, str) else item for item in input_names]
    batch = tokenize(texts, load_tokenizer(tokenizer_path), max_length, pad_to)
    return token_feeds(batch, specs)


def _pad_id(tokenizer: Tokenizer) -> int:
    """Id of the padding token; 0 where there is none, as the mask hides it anyway."""
    ids = (tokenizer.token_to_id(token) for token in _PAD_TOKENS)
    return next((int(i) for i in ids if i is not None), 0)


def _empty_cache(spec: InputSpec, batch: int) -> Array:
    """``[N, H_kv, 0, d]`` for a cache input, which has four sizes of which two are fixed."""
    shape = spec.shape
    if len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int):
        return np.zeros((batch, shape[1], 0, shape[3]))
    raise DataError(
        "DATA-INPUT-UNKNOWN",
        f"the model's input {spec.name!r} cannot be made from texts",
        f"known inputs are {', '.join(TOKEN_INPUTS)} and key/value caches [N, H, P, d] with fixed "
        "H and d; give the inputs as .npz instead",
    )


def _fitted(value: Array, spec: InputSpec) -> Array:
    for axis, (wanted, got) in enumerate(zip(spec.shape, value.shape, strict=False)):
        if isinstance(wanted, int) and wanted != got:
            raise DataError(
                "DATA-INPUT-SHAPE",
                f"input {spec.name!r} has size {wanted} in dimension {axis}, the texts give {got}",
                "set the batch size and the padded length to the model's fixed sizes",
            )
    return value.astype(spec.dtype)
