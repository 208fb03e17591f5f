"""``prefix-tokens``: put a few tokens in front of every text, for good, in the key/value cache.

A decoder parks attention on its first tokens, and some layer answers with activations that are
hundreds of times larger than all others. Static ranges have to cover them, and then hardly resolve
the rest. With those tokens in front once, their keys and values computed ahead in float and stored
in the model, no token of the text becomes one of them (PrefixQuant, arXiv 2410.05265)::

    past' = Concat(prefix, past)     mask' = Concat(ones, mask)     positions' = positions + P
    present = Slice(present', P:)

Inputs and outputs keep their names, shapes and meaning; the model computes what it computed behind
those tokens. Only graphs with a cache can: others have no place for keys that no token wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.calibration.sessions import Workspace
from onnxq.errors import DataError, PreconditionError, SpecError
from onnxq.graph.edit import Names, add_initializer, insert_after, insert_before
from onnxq.graph.match import analyze, is_op
from onnxq.graph.match.values import attr_int
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.online_hadamard import closing_layers

Array = npt.NDArray[Any]

IDS: Final = "input_ids"
MASK: Final = "attention_mask"
POSITIONS: Final = "position_ids"
_MIN_OPSET = 15
_CACHE_RANK = 4


@dataclass(frozen=True)
class Cache:
    """One cache of a decoder.

    Attributes:
        past: the graph input ``[N, H, P, d]``.
        concat: the node that puts new tokens behind it; its output is a graph output.
        axis: of the tokens.
    """

    past: ir.Value
    concat: ir.Node
    axis: int


@dataclass(frozen=True)
class PrefixTokens(Pass):
    """Bake the keys and values of a few first tokens into the model.

    Args:
        tokens: their ids; found on the calibration data when empty.
        ratio: a token is an outlier where its largest inner activation is so many times the median
            token's.
        most: how many tokens at most are put in front when they are searched for.
    """

    name: ClassVar[str] = "prefix-tokens"
    summary: ClassVar[str] = "put tokens that cause outliers in front, in the key/value cache"
    invalidates: ClassVar = (STATISTICS,)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = None
    needs_data: ClassVar[bool] = True

    tokens: tuple[int, ...] = ()
    ratio: float = 64.0
    most: int = 4

    def __post_init__(self) -> None:
        if any(token < 0 for token in self.tokens):
            raise SpecError("SPEC-RANGE", f"tokens={list(self.tokens)}: ids are not below 0")
        if not self.ratio > 1 or self.most < 1:
            raise SpecError("SPEC-RANGE", f"ratio={self.ratio} most={self.most}: above 1, and 1")

    def candidates(self, model: ir.Model) -> list[str]:
        """Caches, by the name of their input."""
        return [str(cache.past.name) for cache in find_caches(model.graph)]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Choose the tokens, compute their keys and values, and put them in front of each cache."""
        report = PassReport()
        caches = find_caches(model.graph)
        if not caches or model.graph.inputs[0].name is None or _input(model.graph, IDS) is None:
            report.skip("the model", "it has no key/value cache; build or export it with one")
            return report
        if model.opset_imports.get("", 0) < _MIN_OPSET:
            report.skip("the model", f"needs opset {_MIN_OPSET}; put `canonicalize` first")
            return report
        tokens = self.tokens or self._search(model, ctx, report)
        if not tokens:
            report.skip(
                "the model", f"no token is {self.ratio:g} times the median: nothing to gain"
            )
            return report
        prefix = _keys_and_values(model, caches, tokens, ctx.threads)
        _shift_inputs(model.graph, len(tokens))
        names = Names(model.graph)
        for cache, array in zip(caches, prefix, strict=True):
            _put_in_front(model.graph, cache, array, names)
            report.change(str(cache.past.name), f"{len(tokens)} tokens in front")
        report.note(f"tokens {', '.join(map(str, tokens))}")
        return report

    def _search(self, model: ir.Model, ctx: Context, report: PassReport) -> tuple[int, ...]:
        """Tokens that make outliers, the most frequent first; the one of the first place last."""
        inside: Counter[int] = Counter()
        first: Counter[int] = Counter()
        samples = places = 0
        for ids, outlier in self._outliers(model, ctx):
            samples += 1
            places += int(outlier.sum())
            first.update(ids[:1][outlier[:1]].tolist())
            inside.update(ids[1:][outlier[1:]].tolist())
        if not samples or not places:
            return ()
        wanted = min(self.most, max(1, round(places / samples)))
        last = [token for token, _ in _ranked(first)[:1]]
        found = [token for token, _ in _ranked(inside) if token not in last]
        chosen = (*found[: wanted - len(last)], *last)
        report.note(f"{places / samples:.1f} outliers a sample in {samples} samples")
        return tuple(chosen)

    def _outliers(self, model: ir.Model, ctx: Context) -> Iterable[tuple[Array, Array]]:
        """For each sample the tokens ``[S]``, and which of them are outliers in some layer."""
        assert ctx.data is not None
        with Workspace(model, ctx.threads) as workspace:
            observed = workspace.model.clone()
            peaks = _observe_peaks(observed)
            session = workspace.session(observed)
            for number, feeds in enumerate(ctx.data):
                arrays = [each.numpy() for each in session.run(peaks, feeds, number)]
                found = np.stack(arrays).reshape(len(peaks), -1)
                median = np.maximum(np.median(found, axis=1, keepdims=True), 1e-30)
                yield np.asarray(feeds[IDS]).reshape(-1), (found > self.ratio * median).any(axis=0)


def _observe_peaks(observed: ir.Model) -> list[str]:
    """Outputs ``[N, S]`` added: the largest magnitude that each closing layer reads of a token."""
    peaks: list[str] = []
    for down in closing_layers(analyze(observed)):
        wide = ir.node("Cast", [down.x], {"to": ir.DataType.FLOAT})
        size = ir.node("Abs", [wide.outputs[0]])
        if observed.opset_imports[""] >= 18:
            name = Names(observed.graph).fresh("last_axis")
            axes = add_initializer(observed.graph, name, np.array([-1], np.int64))
            peak = ir.node("ReduceMax", [size.outputs[0], axes], {"keepdims": 0})
        else:
            peak = ir.node("ReduceMax", [size.outputs[0]], {"axes": [-1], "keepdims": 0})
        insert_after(down.x, [wide, size, peak])
        out = peak.outputs[0]
        out.name = f"peak_{len(peaks)}_of_a_token"
        out.type = ir.TensorType(ir.DataType.FLOAT)
        observed.graph.outputs.append(out)
        peaks.append(out.name)
    return peaks


def _ranked(counts: Counter[int]) -> list[tuple[int, int]]:
    """By frequency, then by id, so that ties do not depend on the order of samples."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def find_caches(graph: ir.Graph) -> list[Cache]:
    """Inputs of rank 4 to which one Concat appends what becomes an output."""
    found = []
    for value in graph.inputs:
        if value.shape is None or len(value.shape) != _CACHE_RANK:
            continue
        for node in value.consumers():
            axis = attr_int(node, "axis", 0) % _CACHE_RANK if is_op(node, "Concat") else 0
            grows = axis == _CACHE_RANK - 2 and node.inputs[0] is value
            if grows and node.outputs[0].is_graph_output():
                found.append(Cache(value, node, axis))
    return found


def _input(graph: ir.Graph, name: str) -> ir.Value | None:
    return next((value for value in graph.inputs if value.name == name), None)


def _keys_and_values(
    model: ir.Model, caches: list[Cache], tokens: tuple[int, ...], threads: int
) -> list[Array]:
    """What each cache holds ``[1, H, P, d]`` behind the tokens, computed by the model itself."""
    count = len(tokens)
    feeds: dict[str, Array] = {IDS: np.array([tokens], np.int64)}
    for value in model.graph.inputs:
        name = str(value.name)
        if name == MASK:
            feeds[name] = np.ones((1, count), np.int64)
        elif name == POSITIONS:
            feeds[name] = np.arange(count, dtype=np.int64)[None]
        elif any(value is cache.past for cache in caches):
            assert value.shape is not None
            assert value.dtype is not None
            sizes = [s if isinstance(s, int) else 0 for s in value.shape]
            sizes[0] = 1
            feeds[name] = np.zeros(sizes, value.dtype.numpy())
        elif name != IDS:
            raise PreconditionError(
                "PASS-INPUT",
                f"`prefix-tokens`: it does not know what to feed the input {name!r}",
                f"inputs may be {IDS}, {MASK}, {POSITIONS} and caches",
            )
    outputs = [str(cache.concat.outputs[0].name) for cache in caches]
    with Workspace(model, threads) as workspace:
        session = workspace.session(workspace.model.clone())
        found = [each.numpy() for each in session.run(outputs, feeds, 0)]
    if not all(np.isfinite(array).all() for array in found):
        raise DataError(
            "DATA-NOT-FINITE", f"keys or values of tokens {list(tokens)} are not finite"
        )
    return found


def _shift_inputs(graph: ir.Graph, count: int) -> None:
    """The attention mask sees ``count`` tokens more, and positions start behind them."""
    names = Names(graph)
    mask = _input(graph, MASK)
    if mask is not None and mask.uses():
        sizes = ir.node("Shape", [mask], {"start": 0, "end": 1})
        width = add_initializer(graph, names.fresh("prefix_width"), np.array([count], np.int64))
        shape = ir.node("Concat", [sizes.outputs[0], width], {"axis": 0})
        assert mask.dtype is not None
        one = add_initializer(graph, names.fresh("prefix_seen"), np.array(1, mask.dtype.numpy()))
        ones = ir.node("Expand", [one, shape.outputs[0]])
        whole = ir.node("Concat", [ones.outputs[0], mask], {"axis": 1})
        _read_instead(graph, mask, [sizes, shape, ones, whole])
    positions = _input(graph, POSITIONS)
    if positions is not None and positions.uses():
        assert positions.dtype is not None
        shift = np.array(count, positions.dtype.numpy())
        added = add_initializer(graph, names.fresh("prefix_count"), shift)
        _read_instead(graph, positions, [ir.node("Add", [positions, added])])


def _read_instead(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    """What read ``value`` reads the last node's output."""
    readers = list(value.uses())
    insert_before(graph.node(0), nodes)
    new = nodes[-1].outputs[0]
    new.type = value.type
    own = set(nodes)
    for usage in readers:
        if usage.node not in own:
            usage.node.replace_input_with(usage.idx, new)


def _put_in_front(graph: ir.Graph, cache: Cache, prefix: Array, names: Names) -> None:
    past, axis = cache.past, cache.axis
    constant = add_initializer(graph, names.fresh(f"{past.name}_prefix"), prefix)
    sizes = ir.node("Shape", [past], {"start": 0, "end": 1})
    rest = add_initializer(
        graph, names.fresh(f"{past.name}_prefix_shape"), np.array(prefix.shape[1:], np.int64)
    )
    shape = ir.node("Concat", [sizes.outputs[0], rest], {"axis": 0})
    filled = ir.node("Expand", [constant, shape.outputs[0]])
    whole = ir.node("Concat", [filled.outputs[0], past], {"axis": axis})
    _read_instead(graph, past, [sizes, shape, filled, whole])
    present = cache.concat.outputs[0]
    starts, ends, axes = (
        add_initializer(graph, names.fresh(f"{past.name}_{what}"), np.array([number], np.int64))
        for what, number in (
            ("start", prefix.shape[axis]),
            ("end", np.iinfo(np.int64).max),
            ("axis", axis),
        )
    )
    cut = ir.node("Slice", [present, starts, ends, axes])
    insert_after(present, cut)
    out = cut.outputs[0]
    out.type, out.shape = present.type, present.shape
    name, present.shape = present.name, None
    present.name = names.fresh(f"{name}_with_prefix")
    out.name = name
    graph.outputs[list(graph.outputs).index(present)] = out
