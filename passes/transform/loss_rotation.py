"""Rotations learned by the loss of the quantized network (SpinQuant).

Liu et al., arXiv 2405.16406. Where a layer reads x, the rotated network rounds ``x R``; since the
rotation is folded into weights, it computes what this network computes with ``Q(x R) R'`` in the
place of x. So the weights stay as they are (in float: what SpinQuant does when GPTQ follows), and
the loss, the cross-entropy of next tokens, has a gradient by R through the rounding, which passes
it on inside of the range (straight-through).

R moves on the orthogonal matrices: with the skew matrix ``A = G R' - R G'`` of the gradient G and
momentum M of such, ``R <- (I + t/2 M)^-1 (I - t/2 M) R``. SpinQuant approximates that by a few
fixed-point steps; here it is solved. Steps follow a cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.linalg

from onnxq.errors import DataError
from onnxq.graph.match import Linear, Structure, ValueToOutput, analyze
from onnxq.passes.contract import Context, PassReport, Progress
from onnxq.passes.transform.residual import ResidualStream, find_residual_streams
from onnxq.passes.transform.rotate import (
    attentions_of,
    rotate_stream,
    rotate_values,
    why_no_blocks,
    why_not_rotatable,
)
from onnxq.passes.transform.torch_graph import Reading, Tensor, TorchGraph
from onnxq.solvers.hadamard import random_rotation
from onnxq.solvers.learn_rotation import cayley, nearest_orthogonal

Float64 = npt.NDArray[np.float64]
MOMENTUM = 0.9
LARGEST_TURN = 0.03
"""Spectral bound in radians on the first step; it falls like a cosine."""


@dataclass(frozen=True, eq=False)
class Site:
    """Where a rotation acts.

    Attributes:
        readings: inputs of layers that are rounded behind it.
        rotations: keys of the matrices, one for each equal share of the channels, in order.
    """

    readings: Sequence[Reading]
    rotations: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """How activations are rounded while learning.

    Attributes:
        bits: of asymmetric integers.
        group: channels that share a scale; 0 for a whole token.
    """

    bits: int
    group: int


@dataclass(frozen=True)
class LossOptions:
    """Those of ``learn-rotation``; ``rows`` is the number of samples."""

    r1: bool
    r2: bool
    steps: int
    rows: int
    block: int
    bits: int


def turn_by_loss(
    options: LossOptions,
    model: ir.Model,
    ctx: Context,
    rng: np.random.Generator,
    report: PassReport,
) -> None:
    """Learn R1 and R2 together, and fold them into the weights of ``model``."""
    structure = analyze(model)
    streams = _streams(structure, options, ctx, report)
    ways = _ways(structure, options, ctx, report)
    if not streams and not ways:
        return
    start: dict[str, Float64] = {}
    sites: list[Site] = []
    for name, stream in streams.items():
        start[name] = _draw(stream.width, options.block, rng)
        readers = [r for norm in stream.norms for r in structure.readers_of(norm.output)]
        sites.append(Site([_reading(reader) for reader in readers], [name]))
    for name, (way, kinds) in ways.items():
        start |= {f"{name}.{k}": _draw(way.head_dim, options.block, rng) for k in set(kinds)}
        sites.append(Site([_reading(way.output)], [f"{name}.{k}" for k in kinds]))
    covered = {reading for site in sites for reading in site.readings}
    readings = [_reading(layer) for layer in structure.linears if layer.kind != "conv"]
    plain = [reading for reading in readings if reading not in covered]
    samples = [dict(feeds) for feeds in islice(ctx.data or (), options.rows)]
    size = options.block

    def mask(product: Float64) -> Float64:
        if not size or size == len(product):
            return product
        places = np.arange(len(product)) // size
        return np.where(places[:, None] == places[None], product, 0.0)

    learned, before, after = learn_by_loss(
        TorchGraph(model), samples, sites, plain, start, Grid(options.bits, size),
        steps=options.steps, mask=mask, progress=ctx.progress,
    )  # fmt: skip
    for name, stream in streams.items():
        rotate_stream(structure, stream, learned[name])
        order = size or stream.width
        report.change(name, f"R1: learned by the loss, order {order}")
    for name, (way, kinds) in ways.items():
        distinct = list(dict.fromkeys(kinds))
        rotate_values(way, [learned[f"{name}.{k}"] for k in distinct])
        report.change(name, f"R2: {len(distinct)} learned by the loss, order {way.head_dim}")
    report.note(
        f"loss of next tokens, int{options.bits} activations, {len(samples)} samples: "
        f"{before:.4f} nats, then {after:.4f}"
    )


def _reading(layer: Linear) -> Reading:
    return layer.node, 1 - layer.weight_index


def _streams(
    structure: Structure, options: LossOptions, ctx: Context, report: PassReport
) -> dict[str, ResidualStream]:
    """Residual streams that can be turned; a reason for each other one."""
    found: dict[str, ResidualStream] = {}
    for stream in find_residual_streams(structure) if options.r1 else []:
        reason = why_not_rotatable(structure, stream) or why_no_blocks(stream.width, options.block)
        if reason is None and any(norm.kind == "layernorm" for norm in stream.norms):
            reason = "a LayerNorm subtracts the mean; fold it with fold-norm{centre=true}"
        if reason is not None:
            report.skip(stream.name, f"R1: {reason}")
        elif ctx.budget.take(stream.name):
            found[stream.name] = stream
    if options.r1 and not found and not report.skipped:
        report.skip("residual stream", "R1: the graph has no norms")
    return found


def _ways(
    structure: Structure, options: LossOptions, ctx: Context, report: PassReport
) -> dict[str, tuple[ValueToOutput, list[int]]]:
    """Values that can be turned, and for each head the number of the value head that it repeats."""
    found: dict[str, tuple[ValueToOutput, list[int]]] = {}
    for attention in attentions_of(structure) if options.r2 else []:
        way = structure.v_to_o(attention)
        reason = way if isinstance(way, str) else why_no_blocks(way.head_dim, options.block)
        if not isinstance(way, str) and (way.value.is_weight_shared or way.output.is_weight_shared):
            reason = "its weights are shared"
        if isinstance(way, str) or reason is not None:
            report.skip(attention.name, f"R2: {reason}")
        elif ctx.budget.take(attention.name):
            heads = np.asarray(way.channel_map).reshape(way.num_heads, way.head_dim)
            numbers: dict[tuple[int, ...], int] = {}
            kinds = [numbers.setdefault(tuple(int(c) for c in h), len(numbers)) for h in heads]
            found[attention.name] = (way, kinds)
    if options.r2 and not attentions_of(structure):
        report.skip("attention", "R2: the graph has no attention")
    return found


def _draw(width: int, block: int, rng: np.random.Generator) -> Float64:
    """Randomized Hadamard matrices on the diagonal."""
    size = block or width
    blocks = [random_rotation(size, rng).matrix for _ in range(width // size)]
    return np.asarray(scipy.linalg.block_diag(*blocks), np.float64)


def learn_by_loss(
    graph: TorchGraph,
    samples: Sequence[Mapping[str, np.ndarray]],
    sites: Sequence[Site],
    plain: Sequence[Reading],
    start: Mapping[str, Float64],
    grid: Grid,
    *,
    steps: int,
    mask: Callable[[Float64], Float64],
    progress: Progress,
) -> tuple[dict[str, Float64], float, float]:
    """The rotations after ``steps`` steps, one sample each in turn, and the mean loss at both ends.

    Where the mean loss has not fallen, the start is given back.

    Args:
        graph: the network with its norms folded.
        samples: feeds with ``input_ids [N, S]``.
        sites: what is rounded behind rotations.
        plain: inputs that are rounded as they are.
        start: orthogonal matrices by key.
        grid: of all of them.
        steps: gradients taken.
        mask: what a step may move of a matrix (blocks).
        progress: is told of every step.

    Raises:
        DataError: ``DATA-METRIC``: there are no token ids, or no logits for them.
    """
    torch = graph.torch
    matrices = dict(start)
    memory = {key: np.zeros_like(matrix) for key, matrix in start.items()}

    def loss_of(feeds: Mapping[str, np.ndarray], tensors: Mapping[str, Tensor]) -> Tensor:
        instead: dict[Reading, Callable[[Tensor], Tensor]] = {}
        for site in sites:
            function = _rotated(torch, [tensors[key] for key in site.rotations], grid)
            instead.update(dict.fromkeys(site.readings, function))
        for reading in plain:
            instead[reading] = lambda x: rounded(torch, x, grid)
        return _next_token_loss(torch, graph.run(feeds, instead), feeds)

    def mean_loss() -> float:
        fixed = {key: graph.tensor(matrix) for key, matrix in matrices.items()}
        with torch.no_grad():
            return float(np.mean([float(loss_of(feeds, fixed)) for feeds in samples]))

    before = mean_loss()
    for step in range(steps):
        progress("learn-rotation", step, steps)
        tensors = {k: graph.tensor(m).requires_grad_() for k, m in matrices.items()}
        loss_of(samples[step % len(samples)], tensors).backward()
        turn = LARGEST_TURN * 0.5 * (1 + np.cos(np.pi * step / steps))
        for key, matrix in matrices.items():
            gradient = tensors[key].grad
            if gradient is None:
                continue
            product = mask(gradient.numpy().astype(np.float64) @ matrix.T)
            memory[key] = MOMENTUM * memory[key] + (product - product.T)
            size = np.linalg.norm(memory[key], 2)
            if size > 0:
                matrices[key] = cayley(memory[key] * (turn / size)) @ matrix
    matrices = {key: nearest_orthogonal(matrix) for key, matrix in matrices.items()}
    after = mean_loss()
    return (matrices, before, after) if after < before else (dict(start), before, before)


def _rotated(torch: Any, matrices: Sequence[Tensor], grid: Grid) -> Callable[[Tensor], Tensor]:
    """``x -> Q(x R) R'``."""

    def function(x: Tensor) -> Tensor:
        size = matrices[0].shape[0]
        parts = x.reshape(*x.shape[:-1], len(matrices), 1, size)
        stacked = torch.stack(list(matrices))
        turned = rounded(torch, (parts @ stacked).reshape(x.shape), grid)
        back = turned.reshape(parts.shape) @ stacked.transpose(-1, -2)
        return back.reshape(x.shape)

    return function


def rounded(torch: Any, x: Tensor, grid: Grid) -> Tensor:
    """``x [.., K]`` on an asymmetric grid for each token or group; straight-through gradient."""
    groups = x.reshape(*x.shape[:-1], -1, grid.group or x.shape[-1])
    top = 2**grid.bits - 1
    lo = groups.amin(-1, keepdim=True).clamp(max=0)
    hi = groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((hi - lo) / top).clamp(min=1e-30)
    point = torch.round(-lo / scale).detach()
    ratio = groups / scale
    code = ratio + (torch.round(ratio) - ratio).detach()
    return ((torch.clamp(code + point, 0, top) - point) * scale).reshape(x.shape)


def _next_token_loss(
    torch: Any, outputs: Mapping[str, Tensor], feeds: Mapping[str, np.ndarray]
) -> Tensor:
    ids = feeds.get("input_ids")
    logits = next((y for y in outputs.values() if y.ndim == 3), None)
    if ids is None or logits is None or logits.shape[:2] != ids.shape:
        raise DataError(
            "DATA-METRIC",
            "objective=loss needs logits [N, S, V] of the tokens in `input_ids`",
            "use objective=range",
        )
    wanted = torch.from_numpy(np.ascontiguousarray(ids[:, 1:]).astype(np.int64))
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return torch.nn.functional.cross_entropy(flat, wanted.reshape(-1))
