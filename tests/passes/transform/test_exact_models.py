"""Every transform on every builder and spelling, in float64: the runner itself checks 1e-6."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from onnxq.calibration.data import open_data
from onnxq.errors import EquivalenceError
from onnxq.graph.edit import Names, insert_after, insert_before
from onnxq.models.bert import SPELLINGS, build_bert
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.transform.rotate import Rotate
from onnxq.pipeline.hooks import EXACT
from onnxq.pipeline.runner import Pipeline, RunResult
from tests.models.test_bert import CONFIG, POSITIONS, VOCAB, random_weights
from tests.passes.transform.wide import llama, pre_layernorm, widen

RNG = np.random.default_rng(5)
TOKENS = [{"input_ids": RNG.integers(0, 50, (2, 9))} for _ in range(3)]
SENTENCES = [
    {
        "input_ids": RNG.integers(0, VOCAB, (2, 9)),
        "attention_mask": np.array([[1] * 9, [1] * 6 + [0] * 3], np.int64),
        "token_type_ids": np.zeros((2, 9), np.int64),
    }
    for _ in range(3)
]
assert POSITIONS >= 9

FIRST = "canonicalize{opset=21}, simplify-attention, "
TRANSFORMS = {
    "clean": "canonicalize{opset=21}, simplify-attention",
    "smooth-quant": FIRST + "calibrate, smooth-quant",
    "smooth-quant-folded": FIRST + "calibrate, smooth-quant{mul=none}",
    "shift-scale": FIRST + "calibrate, shift-scale",
    "awq-scale": FIRST + "calibrate, awq-scale",
    "fold-norm": FIRST + "fold-norm",
    "rotate": FIRST + "fold-norm, rotate",
    "rotate-blocks": FIRST + "fold-norm, rotate{block=4}",
    "learn-rotation": FIRST + "fold-norm, calibrate, learn-rotation{steps=4}",
    "learn-blocks": FIRST + "fold-norm, calibrate, learn-rotation{steps=4 block=4 objective=range}",
    "online-hadamard": FIRST + "online-hadamard{sites=[down,qk]}",
    "smooth-rot": FIRST + "calibrate, smooth-rot",
    "clip-activation": FIRST + "calibrate, clip-activation{limit=1e6}",
    "reassemble-channels": FIRST + "calibrate, reassemble-channels",
    "low-rank-split": FIRST + "low-rank-split{rank=2}",
    "all": FIRST + "calibrate, smooth-quant, fold-norm, rotate, online-hadamard{sites=[down,qk]}, "
    "low-rank-split{rank=2}",
}
KEPT = ("clip-activation",)
"""Promises nothing in general; with such a limit it keeps the function too."""


def bert(spelling: str) -> ir.Model:
    proto = build_bert(random_weights(), CONFIG, spelling=spelling, metadata={})
    return in_float(widen(ir.from_proto(proto)), "Erf", "Gelu")


def in_float(model: ir.Model, *types: str) -> ir.Model:
    """Compute operators of ``types`` in float32: onnxruntime has no kernel of them in float64."""
    names = Names(model.graph)

    def cast(x: ir.Value, to: ir.DataType) -> ir.Node:
        node = ir.node("Cast", [x], {"to": to}, name=names.fresh("to"))
        node.outputs[0].name = names.fresh("to_output")
        node.outputs[0].type = ir.TensorType(to)
        return node

    for node in list(model.graph):
        if node.op_type not in types or node.domain:
            continue
        x, out = node.inputs[0], node.outputs[0]
        assert x is not None
        before, after = cast(x, ir.DataType.FLOAT), cast(out, ir.DataType.DOUBLE)
        insert_before(node, before)
        readers = list(out.uses())
        insert_after(node, after)
        for use in readers:
            if use.node is not after:
                use.node.replace_input_with(use.idx, after.outputs[0])
        node.replace_input_with(0, before.outputs[0])
        out.type = ir.TensorType(ir.DataType.FLOAT)
    return model


MODELS: dict[str, Callable[[], ir.Model]] = {
    "llama": llama,
    "llama-untied": lambda: llama(tied=False),
    "llama-gqa": lambda: llama(hidden=32, heads=4, kv_heads=1, inner=48, outlier=30.0),
    "llama-cache": lambda: llama(kv_cache=True),
    "pre-layernorm": lambda: pre_layernorm(opset=18),
    "pre-layernorm-decomposed": lambda: pre_layernorm(opset=18, spelling="decomposed"),
    **{f"bert-{spelling}": functools.partial(bert, spelling) for spelling in SPELLINGS},
}


def samples_for(name: str) -> list[dict[str, np.ndarray]]:
    if name.startswith("bert"):
        return SENTENCES
    if name != "llama-cache":
        return TOKENS
    past = {
        f"past_key_values.{layer}.{kind}": RNG.standard_normal((2, 2, 4, 6))
        for layer in range(2)
        for kind in ("key", "value")
    }
    places = {
        "attention_mask": np.ones((2, 13), np.int64),
        "position_ids": np.broadcast_to(np.arange(4, 13), (2, 9)).copy(),
    }
    return [{**feeds, **places, **past} for feeds in TOKENS]


def run(name: str, spec: str | list[Pass]) -> RunResult:
    model = MODELS[name]()
    data = open_data(samples_for(name), model)
    return Pipeline(spec).run(model, data=data, holdout=data)


QUICK = ("all", "shift-scale")


@pytest.mark.parametrize(
    "spec", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in TRANSFORMS]
)
@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays(name: str, spec: str) -> None:
    """The run itself raises if an output moves by more than 1e-6."""
    result = run(name, TRANSFORMS[spec])
    assert result.model.graph.outputs[0].dtype == ir.DataType.DOUBLE
    checked = [s for s in result.reports if s.max_error is not None]
    assert len(checked) >= len(result.reports) - (spec in KEPT)
    assert all(step.max_error <= EXACT for step in checked)


class Wrong(Rotate):
    """A rotation that is a millionth off at one place, which float32 could not tell."""

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        report = super().run(model, ctx)
        head = next(v for v in model.graph.initializers.values() if v.shape and len(v.shape) == 2)
        assert head.const_value is not None
        array = head.const_value.numpy().copy()
        array *= 1 + 5e-6 * np.random.default_rng(0).standard_normal(array.shape)
        head.const_value = ir.tensor(array, name=head.name)
        return report


def test_what_float32_could_not_tell_is_caught() -> None:
    from onnxq.passes.transform.fold_norm import FoldNorm

    with pytest.raises(EquivalenceError, match="promises 1e-06"):
        run("llama", [FoldNorm(), Wrong()])
