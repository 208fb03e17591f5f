"""Measure many sites one at a time without running what lies before them again.

The graph is cut behind every few sites. Whatever is done to a site of segment k, the float values
that enter the segment are the same, and so is the float rest of the model behind it::

    [ float, run once ] -> [ segment k, one site quantized ] -> [ float rest, one session ] -> score

so that a site costs its segment and the rest: half of the model on average, with one session of
the rest for all sites of a segment. The score is that of the whole model, bit by bit, since every
operator computes the same in both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from onnxq.graph.edit import remove_dead
from onnxq.graph.match.values import reads, value_name
from onnxq.graph.tensors import copy_model
from onnxq.passes.decide.measure import Feeds, PlanMeter, Score, with_only
from onnxq.passes.plan import QuantPlan
from onnxq.passes.sites import site_names
from onnxq.runtime.workspace import Workspace, run_samples

if TYPE_CHECKING:
    import onnxruntime as ort

SITES_A_SEGMENT: Final = 8
"""Sites that share one session of the rest: about what a decoder's block has."""


def measure_each(
    meter: PlanMeter, model: ir.Model, plan: QuantPlan, sites: Sequence[str]
) -> Iterator[tuple[str, Score]]:
    """The score of each site quantized alone, in graph order.

    Args:
        meter: of ``model``; it scores outputs against the float ones.
        model: in float; it is not changed.
        plan: what the sites are quantized by.
        sites: to measure, each once.
    """
    ordered, places = in_order(model, plan, sites)
    cuts = _Cuts(model, meter.samples[0])
    stores: list[Feeds] = [dict(sample) for sample in meter.samples]
    begin = -1
    nodes = {name: at for at, name in enumerate(site_names(model.graph).values())}
    if ordered and nodes[ordered[0]] > 0:
        with Workspace() as workspace, contextlib.suppress(_CannotCutError):
            end = nodes[ordered[0]] - 1
            stores = _Segment(meter, cuts, workspace, stores, begin, end).advance()
            begin = end
    for at in range(0, len(ordered), SITES_A_SEGMENT):
        group = ordered[at : at + SITES_A_SEGMENT]
        end = places[group[-1]]
        with Workspace() as workspace:
            try:
                segment = _Segment(meter, cuts, workspace, stores, begin, end)
            except _CannotCutError:
                for site in ordered[at:]:
                    yield site, meter.measure(with_only(plan, site))
                return
            for site in group:
                yield site, segment.score(with_only(plan, site))
            stores, begin = segment.advance(), end


def in_order(
    model: ir.Model, plan: QuantPlan, sites: Sequence[str]
) -> tuple[list[str], dict[str, int]]:
    """``sites`` in graph order, and where each planned site ends."""
    places = _places(model, plan)
    return sorted(sites, key=places.__getitem__), places


def _places(model: ir.Model, plan: QuantPlan) -> dict[str, int]:
    """Where each planned site ends: at its node, or where the value lies that it has quantized."""
    outputs = {name: site.output for name, site in plan.sites.items() if site.output}
    written = {value_name(v): at for at, node in enumerate(model.graph) for v in node.outputs}
    return {
        name: max(at, written.get(outputs.get(name, ""), at))
        for at, name in enumerate(site_names(model.graph).values())
    }


class _Cuts:
    """Where values of a graph live.

    Args:
        model: sorted, as ONNX demands.
        sample: names of the inputs that are given.
    """

    def __init__(self, model: ir.Model, sample: Feeds) -> None:
        self.model = model
        self.nodes = list(model.graph)
        self.place: dict[ir.Value, int] = dict.fromkeys(model.graph.inputs, -1)
        for at, node in enumerate(self.nodes):
            self.place.update(dict.fromkeys(node.outputs, at))
        self._constants = {
            v for v in model.graph.initializers.values() if value_name(v) not in sample
        }
        for node in self.nodes:
            if all(v in self._constants for v in reads(node)):
                self._constants.update(node.outputs)

    def live(self, end: int) -> list[ir.Value]:
        """Values that stand at ``end`` and are read behind it or given back; no constants."""
        wanted = chain(
            chain.from_iterable(reads(node) for node in self.nodes[end + 1 :]),
            self.model.graph.outputs,
        )
        found = dict.fromkeys(
            v for v in wanted if v not in self._constants and self.place.get(v, end + 1) <= end
        )
        return list(found)


class _CannotCutError(Exception):
    """A value between the parts is no tensor, or is read in two versions."""


class _Segment:
    """The sites between two cuts.

    Args:
        meter, cuts: of the model.
        workspace: for the sessions.
        stores: for each sample the values that stand at ``begin``, by name.
        begin, end: the segment is ``nodes[begin + 1 : end + 1]``.
    """

    def __init__(
        self,
        meter: PlanMeter,
        cuts: _Cuts,
        workspace: Workspace,
        stores: Sequence[Feeds],
        begin: int,
        end: int,
    ) -> None:
        self._meter, self._cuts, self._workspace = meter, cuts, workspace
        self._begin, self._end = begin, end
        self._incoming = cuts.live(begin)
        self._outgoing = cuts.live(end)
        names = [value_name(v) for v in self._incoming]
        self._stores = [{name: store[name] for name in names if name in store} for store in stores]
        self._exact = self._run_exact()
        self._rest = self._open_rest()

    def advance(self) -> list[Feeds]:
        """The float values that stand at ``end``, for each sample."""
        return self._exact

    def score(self, plan: QuantPlan) -> Score:
        """The score of ``plan``, whose sites lie in this segment."""
        try:
            piece = self._open(*self._lower(plan))
        except _CannotCutError:
            return self._meter.measure(plan)
        outputs = []
        for store, exact in zip(self._stores, self._exact, strict=True):
            changed = {**exact, **piece.run(store)}
            outputs.append({**changed, **self._rest.run(changed)})
        return self._meter.score(outputs)

    def _lower(self, plan: QuantPlan) -> tuple[ir.Model, dict[ir.Value, ir.Value]]:
        """The lowered model, and what it has in place of each value that leaves the segment."""
        model = copy_model(self._cuts.model)
        twins = _twins(self._cuts.model, model)
        nodes = list(zip(self._cuts.nodes, list(model.graph), strict=True))
        self._meter.lower(model, plan)
        found: dict[ir.Value, ir.Value] = {}
        pairs: Iterable[tuple[ir.Value, ir.Value]] = chain(
            chain.from_iterable(
                zip(reads(old), reads(new), strict=True) for old, new in nodes[self._end + 1 :]
            ),
            zip(self._cuts.model.graph.outputs, model.graph.outputs, strict=True),
        )
        outgoing = set(self._outgoing)
        for old, new in pairs:
            if old in outgoing:
                agrees = found.setdefault(old, new) is new
            else:
                agrees = old.is_initializer() or twins[old] is new
            if not agrees:
                raise _CannotCutError(value_name(old))
        return model, found

    def _open(self, model: ir.Model, parts: Mapping[ir.Value, ir.Value]) -> _Piece:
        """The segment of a lowered model, from the values at ``begin`` to those in ``parts``."""
        known = {value_name(v) for v in self._incoming}
        starts = [v for v in _all_values(model.graph) if value_name(v) in known]
        held = set(starts)
        outputs = {value_name(old): new for old, new in parts.items() if new not in held}
        return self._piece(model, starts, outputs, self._stores[0], self._workspace)

    def _run_exact(self) -> list[Feeds]:
        model = copy_model(self._cuts.model)
        twins = _twins(self._cuts.model, model)
        piece = self._open(model, {v: twins[v] for v in self._outgoing})
        found = []
        for store in self._stores:
            values = {**store, **piece.run(store)}
            found.append({value_name(v): values[value_name(v)] for v in self._outgoing})
        return found

    def _open_rest(self) -> _Piece:
        model = copy_model(self._cuts.model)
        twins = _twins(self._cuts.model, model)
        starts = [twins[v] for v in self._outgoing]
        held = set(starts)
        outputs = {value_name(v): v for v in model.graph.outputs if v not in held}
        return self._piece(model, starts, outputs, self._exact[0], None)

    def _piece(
        self,
        model: ir.Model,
        starts: Sequence[ir.Value],
        outputs: Mapping[str, ir.Value],
        store: Feeds,
        workspace: Workspace | None,
    ) -> _Piece:
        """A session of what computes ``outputs`` from ``starts``; ``model`` is used up."""
        if not outputs:
            return _Piece(None, {})
        _cut(model, starts, list(outputs.values()), store)
        names = {kept: value_name(v) for kept, v in outputs.items()}
        return _Piece(self._meter.open(model, workspace), names)


@dataclass(frozen=True)
class _Piece:
    """A part of a model that runs by itself.

    Args:
        session: None where there is nothing to run.
        outputs: names in the session, by the names under which they are kept.
    """

    session: ort.InferenceSession | None
    outputs: dict[str, str]

    def run(self, store: Feeds) -> Feeds:
        """The kept outputs for the values in ``store``."""
        if self.session is None:
            return {}
        (found,) = run_samples(self.session, [store])
        return {kept: found[name] for kept, name in self.outputs.items()}


def _cut(
    model: ir.Model, starts: Sequence[ir.Value], outputs: Sequence[ir.Value], store: Feeds
) -> None:
    """Leave of ``model`` what computes ``outputs`` from ``starts``, whose types ``store`` tells."""
    graph = model.graph
    graph.outputs[:] = list(outputs)
    for value in starts:
        if value.is_graph_input():
            continue
        array = store[value_name(value)]
        if not isinstance(array, np.ndarray):
            raise _CannotCutError(value_name(value))
        dtype = ir.DataType.from_numpy(array.dtype)
        begin = ir.Value(name=value_name(value), type=ir.TensorType(dtype))
        for usage in value.uses():
            usage.node.replace_input_with(usage.idx, begin)
        value.name = None
        graph.inputs.append(begin)
    remove_dead(graph)
    for value in list(graph.inputs):
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)


def _twins(model: ir.Model, copy: ir.Model) -> dict[ir.Value, ir.Value]:
    """Values of the main graph of ``model`` with those of its copy."""
    return dict(zip(_all_values(model.graph), _all_values(copy.graph), strict=True))


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs
