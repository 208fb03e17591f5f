"""Folded transforms leave no node behind, in any order that the pipeline allows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.errors import PipelineError
from onnxq.pipeline.grammar import parse
from onnxq.pipeline.runner import Pipeline
from onnxq.pipeline.validate import validate
from tests.passes.helpers import ops, relative_error
from tests.passes.transform.wide import EXACT, TOKENS, llama, outputs, pre_layernorm

MODELS = {
    "llama": llama,
    "untied": lambda: llama(tied=False),
    "outlier": lambda: llama(hidden=32, heads=4, kv_heads=2, outlier=30.0),
    "layernorm": lambda: pre_layernorm(opset=18),
    "decomposed": lambda: pre_layernorm(opset=18, spelling="decomposed"),
}
FOLDED = (
    "fold-norm, rotate",
    "calibrate, smooth-quant{mul=none}, fold-norm, rotate",
    "calibrate, smooth-quant{mul=none}, fold-norm, calibrate, learn-rotation{steps=5}",
    "fold-norm, rotate, fold-norm, rotate{seed=3 block=4}",
)
WRITTEN_ANEW = {"LayerNormalization", "ReduceMean", "Sub", "Pow", "Sqrt", "Div", "Mul", "Add",
                "RMSNormalization", "Constant", "Identity"}  # fmt: skip


def transformed(model: ir.Model, spec: str) -> ir.Model:
    from onnxq.calibration.data import open_data

    data = open_data([dict(TOKENS)] * 2, model)
    return Pipeline(spec).run(model, data=data, holdout=data, verify=False).model


@pytest.mark.parametrize("spec", FOLDED)
@pytest.mark.parametrize("name", MODELS)
def test_no_node_is_left_over(name: str, spec: str) -> None:
    model = MODELS[name]()
    done = transformed(model, spec)
    for old, new in zip(outputs(model, TOKENS), outputs(done, TOKENS), strict=True):
        assert relative_error(old, new) <= EXACT
    if name in ("layernorm", "decomposed"):
        # A LayerNorm whose mean was folded away is an RMSNorm, spelled anew: no product is added.
        products = Counter({k: v for k, v in ops(done).items() if k not in WRITTEN_ANEW})
        assert products == Counter({k: v for k, v in ops(model).items() if k not in WRITTEN_ANEW})
    else:
        assert ops(done) == ops(model)
        assert not done.functions


@pytest.mark.parametrize(
    ("order", "fix"),
    [
        ("rotate", "put it before pass 1"),
        ("smooth-quant, fold-norm", "`calibrate` provides it"),
        ("calibrate, fold-norm, smooth-quant", "put another `calibrate` after pass 2 `fold-norm`"),
        ("fold-norm, calibrate, rotate, smooth-quant", "after pass 3 `rotate`"),
        ("calibrate, assign, fold-norm, rotate, qdq", "put `fold-norm` before pass 2 `assign`"),
        ("calibrate, assign, online-hadamard, qdq", "put `online-hadamard` before pass 2"),
        ("calibrate, assign, smooth-quant, qdq", "put `smooth-quant` before pass 2"),
        ("fold-norm, rotate, calibrate, online-hadamard, assign, qdq", "another `calibrate`"),
        ("calibrate, gptq, assign, qdq", "`assign` provides it; put it before pass 2"),
    ],
)
def test_a_wrong_order_is_refused_with_the_fix(order: str, fix: str) -> None:
    with pytest.raises(PipelineError) as caught:
        validate(parse(order))
    assert fix in caught.value.hint


def test_the_recommended_order_holds() -> None:
    validate(
        parse(
            "canonicalize{opset=21}, prefix-tokens, calibrate, clip-activation, calibrate, "
            "smooth-rot, fold-norm, calibrate, learn-rotation, low-rank-split, calibrate, "
            "assign{mode=per-token weights=int4 block=32 activations=int4}, gptq, qdq, sanity"
        )
    )


def test_tokens_do_not_matter() -> None:
    """The function stays on tokens that calibration never saw."""
    model = llama(hidden=32, heads=4, kv_heads=2, outlier=30.0)
    done = transformed(model, FOLDED[2])
    other = {"input_ids": np.arange(8)[None]}
    for old, new in zip(outputs(model, other), outputs(done, other), strict=True):
        assert relative_error(old, new) <= EXACT
