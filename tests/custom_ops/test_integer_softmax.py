"""What the kernel of IntegerSoftmax refuses."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.errors import DataError
from onnxq.runtime import Library, session
from onnxq.solvers.integer_only import exp_constants
from tests.custom_ops.cases import Case, model_of


def _model(**changes: int) -> bytes:
    attributes = {**exp_constants(1e-3).attributes(), "bits": 8, "rounding": 0, **changes}
    inputs = {"x": np.zeros((2, 3), np.int32), "mask": np.zeros(1, np.int32)}
    return model_of("IntegerSoftmax", Case("one", inputs, {}, attributes))


def test_an_exponential_that_starts_too_low_is_refused(library: Library) -> None:
    """With exp(0) = 2^14 or less the product with 2^32 / sum can leave 32 bits."""
    shift = exp_constants(1e-3).shift
    session(_model(), threads=1, library=library.path)
    with pytest.raises(DataError, match=r"IntegerSoftmax: .*exp\(0\) is 16383, not near 32767"):
        session(_model(shift=shift + 1), threads=1, library=library.path)
