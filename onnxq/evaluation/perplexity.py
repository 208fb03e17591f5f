"""Perplexity of a decoder on a text: ``exp(mean of -log p(token | tokens before it))``.

The text is tokenized once, as a whole and without special tokens, and cut into windows of
``window`` tokens, a window every ``stride`` tokens. A window that would be shorter is left out.
Every token is predicted once: in the first window that holds it, from the tokens before it in that
window. The first token of a window has nothing before it and is not predicted, unless the window
begins with BOS, which counts as one of the ``window`` tokens. With ``stride < window`` later tokens
of the overlap serve as context only. With ``decode`` a window goes through the key/value cache, so
many tokens a step: then a quantized cache shows in the figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxq.data.text import TokenBatch, token_feeds
from onnxq.errors import DataError, SpecError
from onnxq.evaluation.base import (
    Array,
    EvalResult,
    Session,
    Setting,
    Task,
    input_specs,
    pick_output,
    read_text,
    require_finite,
    run_session,
)
from onnxq.evaluation.decode import CachedDecoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ROWS = 64
"""Rows of logits turned into log-probabilities at once; bounds memory with large vocabularies."""


@dataclass(frozen=True)
class _Window:
    """Token ids of one run, of which those from position ``first`` on are predicted."""

    ids: list[int]
    first: int


@dataclass(frozen=True)
class Perplexity(Task):
    """Options of the task; ``limit`` counts windows.

    Attributes:
        window: tokens of a run, BOS included.
        stride: tokens from one window to the next; 0: windows do not overlap.
        bos: ``auto`` begins a window with BOS where the tokenizer does so, ``true`` insists on
            one, ``false`` leaves it out.
        decode: tokens a step, with a key/value cache; 0: a window at once.
    """

    name: ClassVar[str] = "perplexity"
    summary: ClassVar[str] = "decoder perplexity on a text, in windows"
    data_format: ClassVar[str] = "UTF-8 text file"
    default_batch: ClassVar[int] = 1
    needs_tokenizer: ClassVar[bool] = True

    window: int = 512
    stride: int = 0
    bos: str = "auto"
    decode: int = 0

    def __post_init__(self) -> None:
        if self.bos not in ("auto", "true", "false"):
            raise SpecError("SPEC-EVAL-OPTION", f"bos={self.bos!r}", "bos is auto, true or false")
        if self.window < 2 or not 0 <= self.stride <= self.window:
            raise SpecError(
                "SPEC-EVAL-OPTION",
                f"window={self.window}, stride={self.stride}",
                "window is at least 2, and 0 <= stride <= window",
            )
        if self.decode < 0:
            raise SpecError("SPEC-EVAL-OPTION", f"decode={self.decode}", "decode is 0 or more")

    def run(self, setting: Setting) -> EvalResult:
        """Perplexity, with the mean negative log-likelihood in nats in the details."""
        tokenizer = setting.text_tokenizer()
        prefix = self._prefix(tokenizer)
        ids = tokenizer.encode(read_text(setting.data), add_special_tokens=False).ids
        windows = list(self._windows(ids, prefix))
        if not windows:
            raise DataError(
                "DATA-TOO-FEW",
                f"{setting.data} has {len(ids)} tokens, fewer than one window of {self.window}",
                f"set window to {max(2, len(ids))} or less, or give a longer text",
            )
        windows = setting.limited(windows)
        logits_of = self._runner(setting.session)
        total, count = 0.0, 0
        for batch in setting.batches(windows):
            tokens = np.asarray([window.ids for window in batch], dtype=np.int64)
            logits = logits_of(tokens)
            _check_vocabulary(logits, tokenizer)
            for row, window in zip(logits, batch, strict=True):
                targets = window.ids[window.first :]
                total += negative_log_likelihood(row[window.first - 1 : -1], targets)
                count += len(targets)
        mean = require_finite(total / count, "the mean log-likelihood")
        details = {
            "nll-nats": mean,
            "windows": len(windows),
            "window": self.window,
            "stride": self.stride or self.window,
            "bos": bool(prefix),
            "decode": self.decode,
        }
        return EvalResult(self.name, "perplexity", math.exp(mean), count, details)

    def _runner(self, session: Session) -> Callable[[Array], Array]:
        """Ids ``[N, S]`` to logits ``[N, S, V]``: at once, or in steps through the cache."""
        if self.decode:
            decoder = CachedDecoder(session)
            return lambda tokens: decoder.run(tokens, self.decode)
        specs = input_specs(session)
        output = pick_output(session, ("logits",), (3,))

        def run(tokens: Array) -> Array:
            batch = TokenBatch(tokens, np.ones_like(tokens), np.zeros_like(tokens))
            return run_session(session, [output], token_feeds(batch, specs))[0]

        return run

    def _prefix(self, tokenizer: Tokenizer) -> list[int]:
        """The special tokens in front of a text, or none."""
        if self.bos == "false":
            return []
        with_special = tokenizer.encode("a").ids
        without = tokenizer.encode("a", add_special_tokens=False).ids
        # An encoder's closing token must not go in front, so the prefix ends where the text starts.
        prefix = with_special[: with_special.index(without[0])]
        if self.bos == "true" and not prefix:
            raise DataError(
                "DATA-TOKENIZER", "the tokenizer puts no BOS before a text", "set bos=false"
            )
        return list(prefix)

    def _windows(self, ids: Sequence[int], prefix: list[int]) -> Iterator[_Window]:
        length = self.window - len(prefix)
        stride = min(self.stride or length, length)
        predicted = 0
        for start in range(0, len(ids) - length + 1, stride):
            window = prefix + list(ids[start : start + length])
            first = len(prefix) + max(predicted - start, 0)
            yield _Window(window, max(first, 1))
            predicted = start + length


def negative_log_likelihood(logits: Array, targets: Sequence[int]) -> float:
    """Sum of ``-log softmax(logits)[target]`` in nats, in float64.

    Args:
        logits: ``[M, V]``.
        targets: M ids below V.
    """
    total = 0.0
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float64)
        wanted = rows[np.arange(len(rows)), list(targets[start : start + _ROWS])]
        peak = rows.max(axis=1)
        total += float(np.sum(np.log(np.exp(rows - peak[:, None]).sum(axis=1)) + peak - wanted))
    return total


def _check_vocabulary(logits: Array, tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    if logits.ndim != 3 or logits.shape[-1] < size:
        raise DataError(
            "DATA-LABELS",
            f"the model's output is {list(logits.shape)}, the tokenizer knows {size} tokens",
            "give the tokenizer that belongs to the model",
        )
