"""Models in float64, so that an exact rewrite shows an error of 1e-15 and a wrong one does not."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from onnxq.models.checkpoints import LlamaCheckpoint, LlamaConfig
from onnxq.models.llama import build_llama

Array = npt.NDArray[Any]

EXACT = 1e-6
"""What issue and reference ask of every folding: relative difference in float64."""

TOKENS = {"input_ids": np.random.default_rng(3).integers(0, 50, (2, 9))}


def widen(model: ir.Model) -> ir.Model:
    """``model`` in float64 throughout, in place."""
    graph = model.graph
    narrow, wide = ir.DataType.FLOAT, ir.DataType.DOUBLE
    for value in (*graph.inputs, *graph.initializers.values(), *_written(graph)):
        if value.dtype == narrow:
            value.type = ir.TensorType(wide)
        tensor = value.const_value
        if tensor is not None and tensor.dtype == narrow:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float64), name=value.name)
    for node in graph:
        for key, attribute in list(node.attributes.items()):
            if key == "to" and attribute.as_int() == narrow.value:
                node.attributes[key] = ir.AttrInt64(key, wide.value)
            elif attribute.type == ir.AttributeType.TENSOR:
                tensor = attribute.as_tensor()
                if tensor.dtype == narrow:
                    array = tensor.numpy().astype(np.float64)
                    node.attributes[key] = ir.AttrTensor(key, ir.tensor(array))
    return model


def _written(graph: ir.Graph) -> list[ir.Value]:
    return [output for node in graph for output in node.outputs]


def outputs(model: ir.Model, feeds: Mapping[str, Array], *names: str) -> list[Array]:
    """The model's outputs, or the values called ``names``, as onnxruntime computes them."""
    copy = model.clone()
    known = {value.name: value for value in _written(copy.graph)}
    copy.graph.outputs.extend(known[n] for n in names if known[n] not in copy.graph.outputs)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(copy, path, external_data="weights.bin", size_threshold_bytes=4096)
        session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    found: list[Array] = session.run(
        list(names) or None, {k: v for k, v in feeds.items() if k in wanted}
    )
    return found


def llama(
    *,
    hidden: int = 24,
    heads: int = 4,
    kv_heads: int = 2,
    inner: int = 40,
    layers: int = 2,
    tied: bool = True,
    kv_cache: bool = False,
    outlier: float = 1.0,
    double: bool = True,
) -> ir.Model:
    """A random decoder in float64; ``outlier`` multiplies one channel of the residual stream."""
    rng = np.random.default_rng(0)
    config = LlamaConfig(50, hidden, inner, layers, heads, kv_heads, 64, 1e4, 1e-5)
    wide, narrow = heads * config.head_dim, kv_heads * config.head_dim

    def normal(*shape: int) -> Array:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def gamma() -> Array:
        return rng.uniform(0.3, 2.0, hidden).astype(np.float32)

    table = normal(50, hidden)
    table[:, 5] *= outlier
    weights = {"model.embed_tokens.weight": table, "model.norm.weight": gamma()}
    if not tied:
        weights["lm_head.weight"] = normal(50, hidden)
    for i in range(layers):
        shapes = {
            "self_attn.q_proj": (wide, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, wide),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        prefix = f"model.layers.{i}"
        weights.update({f"{prefix}.{k}.weight": normal(*s) for k, s in shapes.items()})
        weights[f"{prefix}.input_layernorm.weight"] = gamma()
        weights[f"{prefix}.post_attention_layernorm.weight"] = gamma()
    checkpoint = LlamaCheckpoint(config, weights, {})
    proto = build_llama(checkpoint, kv_cache=kv_cache, dtype="float32", metadata={})
    model = ir.from_proto(proto)
    return widen(model) if double else model


def pre_layernorm(*, spelling: str = "operator", opset: int = 17, bias: bool = True) -> ir.Model:
    """Two pre-LN MLP blocks and a head on ``ids``, widths 12 and 20, float64; as text."""
    rng = np.random.default_rng(1)
    lines: list[str] = []
    weights: dict[str, Array] = {
        "table": rng.standard_normal((50, 12)),
        "position": rng.standard_normal((9, 12)),
    }
    axes = "" if opset < 18 else "last = Constant <value_ints = [-1]> ()"
    if axes and spelling != "operator":
        lines.append(axes)
    lines += ["words = Gather (table, input_ids)", "h0 = Add (words, position)"]
    for i in range(2):
        weights[f"g{i}"], weights[f"s{i}"] = rng.uniform(0.3, 2, 12), rng.standard_normal(12)
        weights[f"u{i}"], weights[f"d{i}"] = (
            rng.standard_normal((12, 20)) / 4,
            rng.standard_normal((20, 12)) / 4,
        )
        weights[f"ub{i}"], weights[f"db{i}"] = rng.standard_normal(20), rng.standard_normal(12)
        lines += _layernorm(i, spelling, opset)
        lines.append(f"m{i} = MatMul (n{i}, u{i})")
        lines.append(f"a{i} = Add (m{i}, ub{i})" if bias else f"a{i} = Identity (m{i})")
        lines += [
            f"r{i} = Relu (a{i})",
            f"p{i} = MatMul (r{i}, d{i})",
            f"q{i} = Add (p{i}, db{i})",
            f"h{i + 1} = Add (h{i}, q{i})",
        ]
    weights["g2"], weights["s2"] = rng.uniform(0.3, 2, 12), rng.standard_normal(12)
    weights["head"] = rng.standard_normal((12, 7))
    lines += [*_layernorm(2, spelling, opset), "logits = MatMul (n2, head)"]
    body = "\n".join(lines)
    text = (
        f'<ir_version: 9, opset_import: ["" : {opset}]>\n'
        f"g (int64[2, 9] input_ids) => (double[2, 9, 7] logits) {{\n{body}\n}}"
    )
    return _parsed(text, weights)


def _layernorm(i: int, spelling: str, opset: int) -> list[str]:
    if spelling == "operator":
        return [f"n{i} = LayerNormalization <axis = -1, epsilon = 1e-3> (h{i}, g{i}, s{i})"]
    mean = "<axes = [-1]> (X)" if opset < 18 else "(X, last)"
    return [
        f"mean{i} = ReduceMean {mean.replace('X', f'h{i}')}",
        f"c{i} = Sub (h{i}, mean{i})",
        f"sq{i} = Mul (c{i}, c{i})",
        f"var{i} = ReduceMean {mean.replace('X', f'sq{i}')}",
        f"eps{i} = Constant <value = double {{0.001}}> ()",
        f"ve{i} = Add (var{i}, eps{i})",
        f"std{i} = Sqrt (ve{i})",
        f"z{i} = Div (c{i}, std{i})",
        f"y{i} = Mul (z{i}, g{i})",
        f"n{i} = Add (y{i}, s{i})",
    ]


def _parsed(text: str, weights: Mapping[str, Array]) -> ir.Model:
    import onnx
    import onnx.numpy_helper
    import onnx.parser

    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items())
    proto = onnx.shape_inference.infer_shapes(proto)
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)
