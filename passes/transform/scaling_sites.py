"""Where a per-channel scale can be moved from an activation into the weights that read it.

At a site, linear layers compute ``x W``; with ``s > 0`` they may compute ``(x / s) (diag(s) W)``
instead. What differs is how ``x / s`` comes about:

==========  ============================================================  ============
writer      ``1 / s`` goes into                                           cost at run
==========  ============================================================  ============
norm        gamma and beta of the norm that wrote ``x``                   none
value       the value layer, through attention (each head's channels)     none
up          the up projection of a gated MLP                              none
mul         one multiplication in front of the readers                    small
==========  ============================================================  ============

A norm whose output something else reads too (the residual add of a post-norm block) cannot take
the scale; there the multiplication remains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.errors import InternalError
from onnxq.graph.edit import (
    add_initializer,
    fresh_name,
    insert_after,
    replace_const,
    set_bias,
    set_weight,
)
from onnxq.graph.match import (
    Attention,
    FusedAttention,
    Linear,
    Norm,
    Structure,
    const_tensor,
)
from onnxq.passes.contract import Skip

Float = npt.NDArray[np.float32]
Writer = Literal["norm", "value", "up", "mul"]


@dataclass(frozen=True)
class ScalingSite:
    """Linear layers that read the same activation, and what can take ``1 / s`` before them.

    Args:
        x: the activation, ``[..., K]``.
        readers: the layers that read it.
        writer: what takes ``1 / s``.
        norm: the norm, for ``norm``.
        linear: the layer that wrote the channels, for ``value`` and ``up``.
        channel_map: ``[K]`` output channel of ``linear`` behind each input channel.
    """

    x: ir.Value
    readers: tuple[Linear, ...]
    writer: Writer
    norm: Norm | None = None
    linear: Linear | None = None
    channel_map: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The first reader, and how many more there are."""
        more = f" +{len(self.readers) - 1}" if len(self.readers) > 1 else ""
        return self.readers[0].name + more

    @property
    def channels(self) -> int:
        """K."""
        return self.readers[0].in_features

    def weight(self) -> Float:
        """``[K, N]``: the readers' weights side by side."""
        return np.concatenate([_as_in_out(r) for r in self.readers], axis=1)

    def constrain(self, scale: Float) -> Float:
        """The scale nearest to ``scale`` that the writer can take.

        Channels that one output channel of ``linear`` feeds (repeated heads) get their largest.
        """
        if not self.channel_map:
            return scale
        index = np.asarray(self.channel_map)
        merged = np.zeros(self.linear_width, np.float32)
        np.maximum.at(merged, index, scale)
        constrained: Float = merged[index]
        return constrained

    @property
    def linear_width(self) -> int:
        """Output channels of ``linear``."""
        return self.linear.out_features if self.linear is not None else self.channels


def find_scaling_sites(structure: Structure) -> tuple[list[ScalingSite], list[Skip]]:
    """All sites of a graph, and the candidates that are none, with the reason."""
    sites: list[ScalingSite] = []
    skipped: list[Skip] = []
    taken: set[Linear] = set()
    for found in (_norm_sites, _value_sites, _up_sites, _mul_sites):
        for site in found(structure, skipped):
            if not taken.isdisjoint(site.readers):
                continue
            shared = [r.name for r in site.readers if r.is_weight_shared]
            if shared:
                skipped.append(Skip(site.name, f"the weight of {shared[0]} has other readers"))
                continue
            taken.update(site.readers)
            sites.append(site)
    return sites, skipped


def _norm_sites(structure: Structure, skipped: list[Skip]) -> Iterator[ScalingSite]:
    for norm in structure.norms:
        readers = _matrix_readers(structure, norm.output)
        if not readers:
            continue
        if structure.other_readers_of(norm.output) or structure.is_output(norm.output):
            continue
        if len(readers) < len(structure.readers_of(norm.output)):
            skipped.append(Skip(norm.name, "a Conv reads the norm too"))
        elif not all(_constants_of(norm)):
            skipped.append(Skip(norm.name, "gamma or beta is converted on the way to the norm"))
        elif any(reader.in_features != norm.features for reader in readers):
            skipped.append(Skip(norm.name, "the norm's channels are not those of its readers"))
        else:
            yield ScalingSite(norm.output, readers, "norm", norm=norm)


def _value_sites(structure: Structure, skipped: list[Skip]) -> Iterator[ScalingSite]:
    attentions: list[Attention | FusedAttention] = [
        *structure.attentions,
        *structure.fused_attentions,
    ]
    for attention in attentions:
        way = structure.v_to_o(attention)
        if isinstance(way, str):
            skipped.append(Skip(attention.name, f"value to output: {way}"))
            continue
        if way.value.is_weight_shared:
            skipped.append(Skip(attention.name, "the value layer's weight has other readers"))
            continue
        yield ScalingSite(
            way.output.x, (way.output,), "value", linear=way.value, channel_map=way.channel_map
        )


def _up_sites(structure: Structure, skipped: list[Skip]) -> Iterator[ScalingSite]:
    for mlp in structure.gated_mlps:
        product, up = mlp.mul.outputs[0], mlp.up.output
        read_twice = structure.other_readers_of(product) or len(up.uses()) != 1
        if read_twice or structure.is_output(product) or structure.is_output(up):
            skipped.append(Skip(mlp.down.name, "the gated product or the up layer is read twice"))
            continue
        if mlp.up.is_weight_shared:
            skipped.append(Skip(mlp.down.name, "the up layer's weight has other readers"))
            continue
        yield ScalingSite(
            mlp.down.x,
            (mlp.down,),
            "up",
            linear=mlp.up,
            channel_map=tuple(range(mlp.down.in_features)),
        )


def _mul_sites(structure: Structure, _: list[Skip]) -> Iterator[ScalingSite]:
    by_x: dict[ir.Value, list[Linear]] = {}
    for linear in structure.linears:
        if linear.kind != "conv":
            by_x.setdefault(linear.x, []).append(linear)
    for x, readers in by_x.items():
        yield ScalingSite(x, tuple(readers), "mul")


def _matrix_readers(structure: Structure, value: ir.Value) -> tuple[Linear, ...]:
    return tuple(r for r in structure.readers_of(value) if r.kind != "conv")


def apply_scale(graph: ir.Graph, site: ScalingSite, scale: Float) -> None:
    """Rewrite the site: ``diag(s) W`` in the readers, ``1 / s`` at the writer.

    Args:
        graph: the graph that holds the site.
        site: a site of the graph as it is.
        scale: ``[K]``, positive; folded in float64.
    """
    wide = np.asarray(scale, np.float64)
    for reader in site.readers:
        _scale_weight(reader, wide, reader.in_axis)
    if site.writer == "mul":
        _insert_mul(graph, site, 1.0 / wide)
    elif site.norm is not None:
        _scale_norm(site.norm, 1.0 / wide)
    elif site.linear is not None:
        at_writer = np.ones(site.linear_width)
        at_writer[np.asarray(site.channel_map)] = wide
        bias = site.linear.b
        _scale_weight(site.linear, 1.0 / at_writer, site.linear.out_axis)
        if bias is not None:
            set_bias(site.linear, bias / at_writer)


def _as_in_out(linear: Linear) -> Float:
    w = linear.w
    return w if linear.in_axis == 0 else np.ascontiguousarray(w.T)


def _along(factor: npt.NDArray[np.float64], axis: int, rank: int) -> npt.NDArray[np.float64]:
    return factor.reshape([-1 if i == axis else 1 for i in range(rank)])


def _scale_weight(linear: Linear, factor: npt.NDArray[np.float64], axis: int) -> None:
    stored = linear.w.astype(np.float64)
    set_weight(linear, stored * _along(factor, axis, stored.ndim))


def _scale_norm(norm: Norm, factor: npt.NDArray[np.float64]) -> None:
    for places in _constants_of(norm):
        for node, index in places:
            _scale_vector(node, index, factor)


def _constants_of(norm: Norm) -> list[list[tuple[ir.Node, int]]]:
    """For gamma and beta: the nodes of the norm that read it, and at which input."""
    return [
        [
            (node, index)
            for node in norm.nodes
            for index, read in enumerate(node.inputs)
            if read is value
        ]
        for value in dict.fromkeys((norm.gamma, norm.beta))
        if value is not None
    ]


def _scale_vector(node: ir.Node, index: int, factor: npt.NDArray[np.float64]) -> None:
    """Multiply the constant ``[D]`` (leading ones allowed) that ``node`` reads, for it alone."""
    value = node.inputs[index]
    tensor = None if value is None else const_tensor(value) or value.const_value
    if tensor is None:
        raise InternalError("STALE-MATCH", f"input {index} of {node.name} is not constant")
    array = tensor.numpy()
    scaled = array.astype(np.float64) * factor
    replace_const(node, index, scaled.astype(array.dtype).reshape(array.shape))


def _insert_mul(graph: ir.Graph, site: ScalingSite, factor: npt.NDArray[np.float64]) -> None:
    weight = const_tensor(site.readers[0].weight) or site.readers[0].weight.const_value
    if weight is None:
        raise InternalError("STALE-MATCH", f"the weight of {site.name} is not constant")
    dtype = (site.x.dtype or weight.dtype).numpy()
    name = fresh_name(graph, f"{site.x.name}_smooth")
    constant = add_initializer(graph, f"{name}_scale", factor.astype(dtype))
    mul = ir.Node("", "Mul", [site.x, constant], num_outputs=1, name=name)
    out = mul.outputs[0]
    out.name, out.type, out.shape = name, site.x.type, site.x.shape
    insert_after(site.x, mul)
    for reader in site.readers:
        for index, read in enumerate(reader.node.inputs):
            if read is site.x:
                reader.node.replace_input_with(index, out)
