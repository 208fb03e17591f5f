"""Tokenizers of checkpoints that carry a vocabulary but no ``tokenizer.json``.

Both functions return the JSON that the ``tokenizers`` library reads; the library itself is not
needed to write it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from onnxq.errors import UnsupportedError

_FIRST_LEARNT_ID = 259
"""SentencePiece with byte fallback: unk, bos, eos, then 256 bytes."""

_GGUF_CONTROL = 3
"""``gguf.TokenType.CONTROL``: never made from text, skipped when decoding."""


def tokenizer_json(tokenizer: Mapping[str, Any]) -> str:
    """The tokenizer of a :class:`~onnxq.models.checkpoints.LlamaCheckpoint` as JSON text.

    Raises:
        UnsupportedError: ``UNSUPPORTED-TOKENIZER-UNKNOWN`` for another pre-tokenizer than SmolLM's.
    """
    if tokenizer["kind"] == "sentencepiece-bpe":
        content = _sentencepiece(tokenizer["tokens"], tokenizer["scores"])
    elif tokenizer["pre"] == "smollm":
        content = _byte_level(tokenizer["tokens"], tokenizer["merges"], tokenizer["types"])
    else:
        raise UnsupportedError(
            "UNSUPPORTED-TOKENIZER-UNKNOWN",
            f"pre-tokenizer {tokenizer['pre']!r} is not known; only 'smollm' is",
            "build from a SmolLM checkpoint",
        )
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _sentencepiece(tokens: Sequence[str], scores: Sequence[float]) -> dict[str, Any]:
    """SentencePiece BPE with byte fallback, as llama2.c encodes: space, characters, merges.

    llama2.c merges the pair whose union has the highest score. That equals a merge list sorted by
    falling score which holds, for each piece, every split of it into two pieces. Text gets one
    space in front, and ``<s>`` with ``add_special_tokens``.
    """
    names = ["<unk>", "<s>", "</s>", *tokens[3:]]
    ids = {token: i for i, token in enumerate(names)}
    learnt = sorted(range(_FIRST_LEARNT_ID, len(names)), key=lambda i: (-scores[i], i))
    merges = [[a, b] for i in learnt for a, b in _splits(names[i], ids)]
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    decoders = [
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return _tokenizer(
        special=[(i, names[i]) for i in range(3)],
        normalizer={"type": "Prepend", "prepend": " "},
        pre_tokenizer=None,
        post_processor=template,
        decoder={"type": "Sequence", "decoders": decoders},
        model={"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
        vocab=ids,
        merges=merges,
    )


def _splits(piece: str, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to cut a piece into two known pieces, those with the lowest ids first."""
    halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
    known = [(a, b) for a, b in halves if a in ids and b in ids]
    return sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _byte_level(
    tokens: Sequence[str], merges: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    """GPT-2 byte-level BPE with digits split one by one, as SmolLM2 was trained; no BOS."""
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pre_tokenizers = [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", **byte_level},
    ]
    return _tokenizer(
        special=[(i, tokens[i]) for i, kind in enumerate(types) if kind == _GGUF_CONTROL],
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": pre_tokenizers},
        post_processor=None,
        decoder={"type": "ByteLevel", **byte_level},
        model={"unk_token": tokens[0], "fuse_unk": False, "byte_fallback": False},
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[merge.split(" ") for merge in merges],
    )


def _tokenizer(
    *,
    special: Sequence[tuple[int, str]],
    model: Mapping[str, Any],
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    **stages: Any,
) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": text, **flags, "special": True} for i, text in special]
    bpe = {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "ignore_merges": False,
        **model,
        "vocab": vocab,
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **stages,
        "model": bpe,
    }
