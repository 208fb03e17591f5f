"""Inferred shapes do not reach the output, where they would cost speed."""

from __future__ import annotations

from pathlib import Path

from onnxq.passes.decide.assign import Assign
from onnxq.passes.lower.qdq import Qdq
from onnxq.passes.prepare.canonicalize import Canonicalize

from ..helpers import apply, fused_ops, model_of, normal

BLOCK = """g (float[B,S,64] x) => (float[B,S,64] y) {
  h = LayerNormalization<axis = -1>(x, g, b)
  m = MatMul(h, w)
  a = Add(m, c)
  r = Add(a, h)
  y = LayerNormalization<axis = -1>(r, g, b)
}"""
WEIGHTS = {
    "g": normal(64, seed=1),
    "b": normal(64, seed=2),
    "c": normal(64, seed=3),
    "w": normal(64, 64, seed=4),
}


def test_inner_values_carry_no_shapes_and_the_slow_fusion_stays_away(
    tmp_path: Path,
) -> None:
    model = model_of(BLOCK, WEIGHTS, opset=17)
    after = apply(model, Canonicalize(), Assign(mode="dynamic"), Qdq()).model
    fused = fused_ops(apply(model, Canonicalize()).model, tmp_path)
    assert fused["SkipLayerNormalization"] == 1, "the fusion to stay away from is gone: drop this"
    inner = [v for node in after.graph for v in node.outputs if not v.is_graph_output()]
    assert all(v.shape is None for v in inner)
    assert "SkipLayerNormalization" not in fused_ops(after, tmp_path)
