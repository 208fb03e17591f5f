"""Run a decoder token by token: what a step gives back of its cache goes into the next one.

A cache input ``past_key_values.<rest>`` belongs to the output ``present.<rest>``, be it floats or
the codes and scales that `quantize-kv` makes of them.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from onnxq.data.text import TOKEN_INPUTS, TokenBatch, token_feeds
from onnxq.errors import DataError
from onnxq.evaluation.base import Array, Session, input_specs, pick_output, run_session

_PAST: Final = "past_key_values."
_PRESENT: Final = "present."


class CachedDecoder:
    """A decoder and its cache.

    Args:
        session: of a model with token inputs, caches, ``logits`` and the caches grown.

    Raises:
        DataError: ``DATA-NO-CACHE``: the model has no cache, or does not give one of them back.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._specs = input_specs(session)
        self._logits = pick_output(session, ("logits",), (3,))
        self._caches = {
            spec.name: spec.name.replace(_PAST, _PRESENT, 1)
            for spec in self._specs
            if spec.name not in TOKEN_INPUTS
        }
        outputs = {output.name for output in session.get_outputs()}
        lost = [name for name, output in self._caches.items() if output not in outputs]
        if lost or not self._caches:
            cause = f"its input {lost[0]!r} has no such output" if lost else "it has no cache"
            raise DataError(
                "DATA-NO-CACHE",
                f"the model cannot decode in steps: {cause}",
                f"caches are inputs {_PAST}* with outputs {_PRESENT}*; build with a cache",
            )
        self._past: dict[str, Array] = {}
        self._length = 0

    @property
    def cache(self) -> dict[str, Array]:
        """The cache after the last step, by the names of the inputs; empty before the first."""
        return dict(self._past)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache after the last step."""
        return sum(array.nbytes for array in self._past.values())

    def reset(self) -> None:
        """Forget all tokens."""
        self._past, self._length = {}, 0

    def step(self, ids: Array) -> Array:
        """Logits ``[N, S, V]`` of S new tokens, ids ``[N, S]``, behind those in the cache."""
        total = self._length + ids.shape[1]
        positions = np.broadcast_to(np.arange(self._length, total), ids.shape)
        feeds = token_feeds(TokenBatch(ids, np.ones_like(ids), np.zeros_like(ids)), self._specs)
        if "attention_mask" in feeds:
            mask = np.ones((ids.shape[0], total), feeds["attention_mask"].dtype)
            feeds["attention_mask"] = mask
        if "position_ids" in feeds:
            feeds["position_ids"] = positions.astype(feeds["position_ids"].dtype)
        feeds.update(self._past)
        logits, *grown = run_session(self._session, [self._logits, *self._caches.values()], feeds)
        self._past = dict(zip(self._caches, grown, strict=True))
        self._length = total
        return logits

    def run(self, ids: Array, size: int) -> Array:
        """Logits ``[N, S, V]`` of a whole text from an empty cache, ``size`` tokens a step."""
        self.reset()
        steps = range(0, ids.shape[1], size)
        return np.concatenate([self.step(ids[:, at : at + size]) for at in steps], axis=1)
