"""Samples with an empty float cache, for models whose cache is quantized.

`quantize-kv` puts ``<name>_codes``, ``<name>_scale``, ... in place of a cache ``<name>``. Nothing
is in an empty one, so that both models can be run on one sample and compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnxruntime as ort

PARTS: Final = ("prefix", "codes", "scale", "offset", "window")
_TYPES: Final[dict[str, npt.DTypeLike]] = {
    "tensor(uint8)": np.uint8,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


def with_empty_caches(
    session: ort.InferenceSession, sample: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """``sample`` without what ``session`` does not take, with the parts of empty caches.

    A part is made only where the sample has the cache itself and nothing is in it.
    """
    feeds: dict[str, np.ndarray] = {}
    for spec in session.get_inputs():
        base, _, part = spec.name.rpartition("_")
        whole = sample.get(base)
        if spec.name in sample:
            feeds[spec.name] = sample[spec.name]
        elif part in PARTS and whole is not None and whole.ndim == 4 and whole.shape[2] == 0:
            shape = (*whole.shape[:2], 0, spec.shape[3])
            feeds[spec.name] = np.zeros(shape, _TYPES[spec.type])
    return feeds


def is_quantized_cache(name: str, outputs: Collection[str] | Sequence[str]) -> bool:
    """Whether a model with these outputs gives back the cache ``name`` in parts."""
    return all(f"{name}_{part}" in outputs for part in ("codes", "scale", "offset"))
