"""Find the first rewrite that breaks a model: the pass, and within it the site.

The passes run one by one; after each, the model is compared with the original. The first pass that
breaks a limit is run again, from the model before it, with a smaller and smaller budget of
rewrites, if it asks for one (``Context.budget``); its error as a function of the budget is taken
as rising, as in LLVM's ``opt-bisect-limit``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import onnx_ir as ir

from onnxq.errors import DataError, OnnxqError
from onnxq.graph import io
from onnxq.graph.edit import validate as validate_graph
from onnxq.passes.contract import Artifacts, Budget, Pass, Progress, no_progress
from onnxq.passes.targets import parse_target
from onnxq.pipeline.hooks import VERIFY_SAMPLES, Outputs, worst_output
from onnxq.pipeline.runner import Pipeline, Settings, apply_pass
from onnxq.pipeline.validate import validate
from onnxq.runtime.workspace import Sample, Workspace, run_samples

if TYPE_CHECKING:
    import os

    from onnxq.calibration.data import CalibrationData

MAX_ERROR: Final = 0.2
"""Relative output error above which a pass that quantizes counts as broken (cosine about 0.98)."""


@dataclass(frozen=True)
class BisectStep:
    """The model after one pass, compared with the original and with the model before the pass."""

    number: int
    spec: str
    output: str
    error: float
    added_error: float

    def to_json(self) -> dict[str, Any]:
        """The step as JSON-serialisable data."""
        return dict(vars(self))


@dataclass(frozen=True)
class BisectResult:
    """What a bisection found.

    Args:
        steps: the passes that ran, up to the culprit.
        culprit: the last of them, if it broke its limit; None if no pass did.
        why: what was wrong after the culprit.
        rewrite: number of the first bad rewrite of the culprit, from 1; None if it offers none.
        site: the site of that rewrite.
        rewrites: how many rewrites the culprit makes.
    """

    steps: tuple[BisectStep, ...]
    culprit: BisectStep | None = None
    why: str = ""
    rewrite: int | None = None
    site: str = ""
    rewrites: int = 0

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-serialisable data."""
        return {
            **vars(self),
            "steps": [s.to_json() for s in self.steps],
            "culprit": None if self.culprit is None else self.culprit.to_json(),
        }


@dataclass
class _Probe:
    """Runs models on the samples and judges what it sees."""

    samples: Sequence[Sample]
    space: Workspace
    threads: int
    original: Outputs
    max_error: float

    def outputs(self, model: ir.Model) -> Outputs:
        return list(run_samples(self.space.session(model, threads=self.threads), self.samples))

    def judge(self, owner: Pass, before: Outputs, after: Outputs) -> tuple[str, float, float, str]:
        """Worst output, its error, the error added by ``owner``, and what is wrong, if anything."""
        output, error = worst_output(self.original, after)
        _, added = worst_output(before, after)
        if owner.tolerance is not None and not added <= owner.tolerance:
            return output, error, added, f"it promises {owner.tolerance:.3g} and adds {added:.3g}"
        if not error <= self.max_error:
            why = f"output `{output}` is {error:.3g} from the original, above {self.max_error:.3g}"
            return output, error, added, why
        return output, error, added, ""


def bisect(
    model: ir.Model | str | os.PathLike[str],
    passes: Pipeline | Sequence[Pass] | str,
    data: CalibrationData,
    *,
    target: str = "cpu",
    seed: int = 0,
    threads: int = 1,
    max_error: float = MAX_ERROR,
    samples: int = VERIFY_SAMPLES,
    progress: Progress | None = None,
) -> BisectResult:
    """The first pass, and the first rewrite in it, after which the model is broken.

    A pass is broken when it raises an internal error, leaves an invalid graph or a model that does
    not run, adds more error than its tolerance, or brings an output further than ``max_error``
    (``||original - now|| / ||original||``) from the original.

    Raises:
        DataError: there are no samples, or the original itself does not run.
    """
    pipeline = passes if isinstance(passes, Pipeline) else Pipeline(passes)
    tell = progress or no_progress
    validate(pipeline.passes, registry=pipeline.registry)
    reference = model if isinstance(model, ir.Model) else io.load(model)
    chosen = list(islice(data, samples))
    if not chosen:
        raise DataError("DATA-NO-SAMPLES", "there are no samples to bisect on", "give --calib")
    settings = Settings(data=data, target=parse_target(target), seed=seed, threads=threads)
    probe = _Probe(chosen, Workspace(), threads, [], max_error)
    probe.original = before = probe.outputs(reference)
    current, artifacts = io.copy_model(reference), Artifacts()
    steps: list[BisectStep] = []
    for number, owner in enumerate(pipeline.passes, start=1):
        tell("bisect", number - 1, len(pipeline.passes))
        attempt = _Attempt(probe, owner, reference, pipeline.passes[number:], settings)
        outcome = attempt.run(current, artifacts, before, None)
        steps.append(BisectStep(number, str(owner), outcome.output, outcome.error, outcome.added))
        if outcome.why:
            rewrite = attempt.first_bad(current, artifacts, before, outcome.sites)
            site = outcome.sites[rewrite - 1] if rewrite else ""
            return BisectResult(
                tuple(steps), steps[-1], outcome.why, rewrite, site, len(outcome.sites)
            )
        current, artifacts, before = outcome.model, outcome.artifacts, outcome.outputs
    tell("bisect", len(pipeline.passes), len(pipeline.passes))
    return BisectResult(tuple(steps))


@dataclass
class _Outcome:
    """One run of one pass on copies."""

    model: ir.Model
    artifacts: Artifacts
    outputs: Outputs
    sites: list[str]
    output: str = ""
    error: float = float("inf")
    added: float = float("inf")
    why: str = ""


@dataclass
class _Attempt:
    """Runs one pass from one state, as often as needed."""

    probe: _Probe
    owner: Pass
    reference: ir.Model
    upcoming: Sequence[Pass]
    settings: Settings

    def run(
        self, model: ir.Model, artifacts: Artifacts, before: Outputs, limit: int | None
    ) -> _Outcome:
        """The pass on a copy of the state, with at most ``limit`` rewrites."""
        budget = Budget(limit)
        outcome = _Outcome(io.copy_model(model), copy.deepcopy(artifacts), [], budget.sites)
        try:
            apply_pass(
                self.owner,
                outcome.model,
                outcome.artifacts,
                self.reference,
                self.upcoming,
                self.settings,
                budget,
            )
            validate_graph(outcome.model)
            outcome.outputs = self.probe.outputs(outcome.model)
        except OnnxqError as error:
            outcome.why = f"it failed with {error.code}: {error.cause}"
            return outcome
        outcome.output, outcome.error, outcome.added, outcome.why = self.probe.judge(
            self.owner, before, outcome.outputs
        )
        return outcome

    def first_bad(
        self, model: ir.Model, artifacts: Artifacts, before: Outputs, sites: Sequence[str]
    ) -> int | None:
        """Number of the first rewrite with which the pass is broken; None if it offers none."""
        if not sites or self.run(model, artifacts, before, 0).why:
            return None
        good, bad = 0, len(sites)
        while bad - good > 1:
            middle = (good + bad) // 2
            if self.run(model, artifacts, before, middle).why:
                bad = middle
            else:
                good = middle
        return bad
