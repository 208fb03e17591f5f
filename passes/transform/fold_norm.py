"""``fold-norm``: move gamma, beta and the mean of every norm into the layers around it.

With ``n`` the normalised value and W ``[K, N]`` a linear layer that reads ``n * gamma + beta``::

    (n * gamma + beta) W + b = n (diag(gamma) W) + (b + beta W)         1. gamma and beta

Afterwards gamma is 1 and beta 0. A LayerNorm also subtracts the mean over channels. If nothing but
LayerNorms reads a residual stream, each writer can subtract its own share of the mean beforehand::

    mean(sum_i y_i) = sum_i mean(y_i),   W <- W - mean over outputs,  b <- b - mean(b)
                                                                        2. centring

and ``LayerNorm(x) = RMSNorm(x)`` exactly: the node becomes an RMSNorm (QuaRot, arXiv 2404.00456,
section 4; SliceGPT, arXiv 2401.15024, appendix A.1). A tied embedding gets a copy of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir

from onnxq.graph.edit import (
    Names,
    add_initializer,
    insert_before,
    remove_dead,
    replace_const,
    replace_value,
)
from onnxq.graph.match import Linear, Norm, Structure, analyze, is_op
from onnxq.passes.contract import Context, Key, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.folding import (
    Float64,
    bias64,
    norm_vector,
    put_bias,
    put_norm_vector,
    put_weight,
    stored64,
    weight64,
)
from onnxq.passes.transform.residual import ResidualStream, find_residual_streams

RMS_OPSET: Final = 23
"""Since this opset the standard has RMSNormalization."""


@dataclass(frozen=True)
class FoldedNorms:
    """Norms whose gamma is 1 and beta 0, by name, so that rotations may pass through them.

    Args:
        names: the norms that were folded or were plain already.
        kept: norm -> why it kept its gamma.
    """

    names: tuple[str, ...]
    kept: dict[str, str]

    def to_storage(self) -> tuple[dict[str, object], dict[str, np.ndarray]]:
        """As JSON."""
        return {"names": list(self.names), "kept": self.kept}, {}

    @classmethod
    def from_storage(cls, header: dict[str, object], arrays: dict[str, np.ndarray]) -> FoldedNorms:
        """The inverse of :meth:`to_storage`."""
        names, kept = header["names"], header["kept"]
        assert isinstance(names, list)
        assert isinstance(kept, dict)
        return cls(tuple(names), kept)


FOLDED_NORMS: Final = Key("folded-norms", FoldedNorms, "norms whose gamma is 1 and beta is 0")


@dataclass(frozen=True)
class FoldNorm(Pass):
    """Fold norm scales and shifts into readers, and means into the writers of the residual.

    Args:
        centre: turn LayerNorms into RMSNorms where the mean can be folded into the writers.
    """

    name: ClassVar[str] = "fold-norm"
    summary: ClassVar[str] = "fold norm gamma, beta and mean into the layers around it"
    provides: ClassVar = (FOLDED_NORMS,)
    invalidates: ClassVar = (STATISTICS,)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4
    may_match_nothing: ClassVar[bool] = True

    centre: bool = True

    def candidates(self, model: ir.Model) -> list[str]:
        """The norms."""
        return [norm.name for norm in analyze(model).norms]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Fold every norm that only linear layers read, then centre the streams that allow it."""
        report = PassReport()
        plain, kept = self._fold_all(model, ctx, report)
        if self.centre:
            _centre_all(model, ctx, report)
        remove_dead(model.graph)
        for what, node, reason in analyze(model).rejected:
            if what == "norm":
                report.skip(node, reason)
        ctx.artifacts.put(FOLDED_NORMS, FoldedNorms(tuple(plain), kept))
        return report

    def _fold_all(
        self, model: ir.Model, ctx: Context, report: PassReport
    ) -> tuple[list[str], dict[str, str]]:
        plain: list[str] = []
        kept: dict[str, str] = {}
        structure = analyze(model)
        names = [norm.name for norm in structure.norms]
        if not names:
            report.skip("the model", "it has no norms")
        for done, name in enumerate(names):
            ctx.progress("fold-norm", done, len(names))
            norm = next(n for n in structure.norms if n.name == name)
            if is_plain(norm):
                plain.append(name)
                report.skip(name, "gamma is 1 and beta 0 already")
                continue
            reason = why_not_foldable(structure, norm)
            if reason is not None:
                kept[name] = reason
                report.skip(name, reason)
                continue
            if not ctx.budget.take(name):
                continue
            plain.append(name)
            if _fold(structure, norm, report):
                structure = analyze(model)
        ctx.progress("fold-norm", len(names), len(names))
        return plain, kept


def is_plain(norm: Norm) -> bool:
    """Whether gamma is exactly 1, and beta 0 or absent."""
    beta = norm_vector(norm.beta)
    is_one = bool(np.all(stored64(norm.gamma) == 1.0))
    return is_one and (beta is None or not beta.any())


def why_not_foldable(structure: Structure, norm: Norm) -> str | None:
    """Why gamma and beta cannot go into the readers; None if they can."""
    if structure.is_output(norm.output):
        return "its output is an output of the graph"
    others = structure.other_readers_of(norm.output)
    if others:
        return f"shared norm: {others[0].op_type} reads its output too (post-norm residual?)"
    readers = structure.readers_of(norm.output)
    if not readers:
        return "no linear layer reads it"
    conv = next((r for r in readers if r.kind == "conv"), None)
    return None if conv is None else f"{conv.name} is a Conv"


def _fold(structure: Structure, norm: Norm, report: PassReport) -> bool:
    """Fold one norm; True if a reader got a new Add, so that the graph must be matched again."""
    gamma, beta = norm_vector(norm.gamma), norm_vector(norm.beta)
    assert gamma is not None
    has_new_bias = False
    readers = structure.readers_of(norm.output)
    copies = sum(r.is_weight_shared for r in readers)
    for reader in readers:
        weight = weight64(reader)
        shift = None if beta is None or not beta.any() else reader.alpha * (beta @ weight)
        put_weight(reader, gamma[:, None] * weight)
        if shift is not None:
            has_new_bias |= reader.bias is None
            bias = bias64(reader)
            put_bias(reader, shift if bias is None else bias + shift)
    put_norm_vector(norm, norm.gamma, np.ones_like(gamma))
    if norm.beta is not None and beta is not None:
        put_norm_vector(norm, norm.beta, np.zeros_like(beta))
    detail = f"into {len(readers)} readers"
    if copies:
        detail += f", {copies} of them got a copy of a shared weight"
    report.change(norm.name, "gamma" if beta is None else "gamma and beta", detail)
    return has_new_bias


# Centring -------------------------------------------------------------------------------------


def _centre_all(model: ir.Model, ctx: Context, report: PassReport) -> None:
    structure = analyze(model)
    for stream in find_residual_streams(structure):
        if not any(norm.kind == "layernorm" for norm in stream.norms):
            continue
        reason = _why_not_centred(stream)
        if reason is not None:
            report.skip(stream.name, f"LayerNorms keep their mean: {reason}")
        elif ctx.budget.take(stream.name):
            _centre_writers(stream)
            names = Names(model.graph)
            for norm in stream.norms:
                _drop_mean(model, norm, names)
            report.change(
                stream.name,
                f"{len(stream.norms)} LayerNorms became RMSNorms",
                f"mean folded into {len(stream.writers) + len(stream.embeddings)} writers",
            )


def _why_not_centred(stream: ResidualStream) -> str | None:
    if stream.blockers:
        return stream.blockers[0]
    if stream.linears:
        return f"{stream.linears[0].name} reads the residual without a norm"
    for norm in stream.norms:
        if norm.kind != "layernorm":
            return f"{norm.name} is an RMSNorm and sees the mean"
        if norm.beta is not None and stored64(norm.beta).any():
            return f"{norm.name} kept its beta"
        if norm.spelling not in ("LayerNormalization", "decomposed"):
            return f"{norm.name} is a {norm.spelling}"
        if norm.x.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            return f"{norm.x.dtype} squares may overflow outside of the operator"
    return None


def _centre_writers(stream: ResidualStream) -> None:
    """Subtract from everything that is added to the stream its mean over channels."""
    for writer in stream.writers:
        _centre_linear(writer)
    for embedding in stream.embeddings:
        _centre_rows(embedding.node, 0)
    for node, index in stream.constants:
        _centre_rows(node, index)


def _centre_linear(writer: Linear) -> None:
    weight, bias = weight64(writer), bias64(writer)
    put_weight(writer, weight - weight.mean(axis=1, keepdims=True))
    if bias is not None:
        put_bias(writer, bias - bias.mean())


def _centre_rows(node: ir.Node, index: int) -> None:
    value = node.inputs[index]
    assert value is not None
    rows = stored64(value)
    centred = rows - rows.mean(axis=-1, keepdims=True)
    replace_const(node, index, centred.astype(_numpy_type(value)))


def _numpy_type(value: ir.Value) -> np.dtype[np.generic]:
    assert value.dtype is not None
    return value.dtype.numpy()


def _drop_mean(model: ir.Model, norm: Norm, names: Names) -> None:
    if norm.spelling == "decomposed":
        for subtract in [n for n in norm.nodes if is_op(n, "Sub")]:
            source = subtract.inputs[0]
            assert source is not None
            replace_value(subtract.outputs[0], source)
        return
    nodes = _rms_nodes(model, norm, names)
    old = norm.output
    new = nodes[-1].outputs[0]
    new.type, new.shape = old.type, old.shape
    insert_before(norm.root, nodes)
    replace_value(old, new)
    model.graph.remove(norm.root, safe=True)


def _rms_nodes(model: ir.Model, norm: Norm, names: Names) -> list[ir.Node]:
    """RMSNorm with the norm's gamma and epsilon: one operator, or what older opsets have."""
    graph, dtype = model.graph, _numpy_type(norm.x)
    base = norm.root.name or norm.name

    def make(
        op_type: str,
        inputs: list[ir.Value],
        attributes: dict[str, float | int] | None = None,
        num_outputs: int = 1,
    ) -> ir.Node:
        node = ir.node(
            op_type,
            inputs,
            attributes,
            name=names.fresh(f"{base}_{op_type}"),
            num_outputs=num_outputs,
        )
        node.outputs[0].name = names.fresh(f"{base}_{op_type}_output")
        node.outputs[0].type = norm.x.type
        return node

    def constant(what: str, array: Float64 | np.ndarray) -> ir.Value:
        return add_initializer(graph, names.fresh(f"{base}_{what}"), array)

    opset = model.opset_imports.get("", 0)
    if opset >= RMS_OPSET:
        return [
            make("RMSNormalization", [norm.x, norm.gamma], {"epsilon": norm.epsilon, "axis": -1})
        ]
    square = make("Pow", [norm.x, constant("two", np.array(2, dtype))])
    if opset >= 18:
        axes = constant("axes", np.array([-1], np.int64))
        mean = make("ReduceMean", [square.outputs[0], axes], {"keepdims": 1})
    else:
        mean = ir.node(
            "ReduceMean",
            [square.outputs[0]],
            {"axes": [-1], "keepdims": 1},
            name=names.fresh(f"{base}_ReduceMean"),
        )
        mean.outputs[0].name = names.fresh(f"{base}_ReduceMean_output")
    shifted = make("Add", [mean.outputs[0], constant("epsilon", np.array(norm.epsilon, dtype))])
    root = make("Sqrt", [shifted.outputs[0]])
    scaled = make("Div", [norm.x, root.outputs[0]])
    result = make("Mul", [scaled.outputs[0], norm.gamma])
    return [square, mean, shifted, root, scaled, result]
