"""Run a pipeline on a model in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from onnxq.calibration.data import CalibrationData, open_data
from onnxq.errors import InternalError, SpecError
from onnxq.graph import io
from onnxq.graph.spill import spill_new_tensors
from onnxq.graph.tensors import model_nbytes
from onnxq.passes.conform import check_input, check_output
from onnxq.passes.contract import (
    Artifacts,
    Budget,
    Context,
    DeclaredArtifacts,
    Pass,
    PassReport,
    Progress,
    no_progress,
)
from onnxq.passes.targets import Target, parse_target
from onnxq.pipeline.dump import Dump
from onnxq.pipeline.grammar import parse, spell
from onnxq.pipeline.hooks import VERIFY_SAMPLES, Hook, Step, ValidityHook, VerifyHook
from onnxq.pipeline.validate import validate

if TYPE_CHECKING:
    from onnxq.passes.work import Executor
    from onnxq.pipeline.registry import Registry
    from onnxq.runtime.workspace import Sample


@dataclass(frozen=True)
class StepResult:
    """What one pass did.

    Args:
        number: from 1.
        name: of the pass.
        spec: the pass with its options, as pipeline text.
        report: its changes, skips and notes.
        seconds, cpu_seconds: of the pass alone.
        size: bytes of all weights after the pass.
        max_error: relative error that a check measured, or None where none was made.
        fingerprint: of the model after the pass; None where it was not needed.
        resumed: the result is from an earlier run's dump.
    """

    number: int
    name: str
    spec: str
    report: PassReport
    seconds: float
    cpu_seconds: float
    size: int
    max_error: float | None = None
    fingerprint: str | None = None
    resumed: bool = False

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-serialisable data."""
        return {
            "number": self.number,
            "pass": self.name,
            "spec": self.spec,
            "changed": [vars(c) for c in self.report.changed],
            "skipped": [vars(s) for s in self.report.skipped],
            "notes": self.report.notes,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "size": self.size,
            "max_error": self.max_error,
            "fingerprint": self.fingerprint,
            "resumed": self.resumed,
        }


@dataclass
class RunResult:
    """A finished pipeline.

    Args:
        model: the new model; the one given to :meth:`Pipeline.run` is unchanged.
        reports: one result for each pass.
        artifacts: what the passes found out and what still holds for the new model.
        provenance: what was written into the model's metadata.
    """

    model: ir.Model
    reports: list[StepResult]
    artifacts: Artifacts
    provenance: dict[str, Any]

    def noops(self) -> list[StepResult]:
        """The passes that found nothing to do."""
        return [r for r in self.reports if not r.report.changed]


@dataclass(frozen=True)
class Settings:
    """The inputs of a run besides model and passes."""

    data: CalibrationData | None = None
    holdout: CalibrationData | None = None
    target: Target = field(default_factory=lambda: parse_target("cpu"))
    seed: int = 0
    threads: int = 1
    progress: Progress = no_progress
    executor: Executor | None = None


def check_seed(seed: int) -> None:
    """Refuse a seed that random generators do not take.

    Raises:
        SpecError: ``SPEC-SEED``.
    """
    if seed < 0:
        raise SpecError("SPEC-SEED", f"the seed is {seed}", "use 0 or more")


class Pipeline:
    """An ordered list of passes.

    Args:
        passes: pipeline text, or a list of passes and such texts.
        registry: where names in the text are looked up; by default all installed passes.

    Raises:
        SpecError: the text cannot be understood, or there are no passes.
    """

    def __init__(
        self, passes: str | Sequence[Pass | str], *, registry: Registry | None = None
    ) -> None:
        items = [passes] if isinstance(passes, str) else passes
        self.passes: tuple[Pass, ...] = tuple(
            step
            for item in items
            for step in (parse(item, registry) if isinstance(item, str) else (item,))
        )
        self.registry = registry
        if not self.passes:
            raise SpecError("SPEC-EMPTY", "the pipeline has no passes", "give at least one")

    def __str__(self) -> str:
        return spell(self.passes)

    def __repr__(self) -> str:
        return f"Pipeline({str(self)!r})"

    def run(
        self,
        model: ir.Model | onnx.ModelProto | str | os.PathLike[str],
        *,
        data: CalibrationData | Any = None,
        holdout: CalibrationData | None = None,
        target: str | Target = "cpu",
        seed: int = 0,
        threads: int = 1,
        hooks: Sequence[Hook] = (),
        verify: bool = True,
        dump_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        progress: Progress | None = None,
        executor: Executor | None = None,
    ) -> RunResult:
        """Run all passes on a copy of ``model``.

        Args:
            model: a model or the path of one; it is not changed.
            data: calibration samples, or what :func:`onnxq.calibration.data.open_data` opens: a
                list of dicts of feeds, a path.
            holdout: samples that no pass calibrates on.
            target: runtime that the output is for.
            seed: the only source of randomness.
            threads: for onnxruntime.
            hooks: called around every pass, after the built-in ones.
            verify: check passes that declare a tolerance; needs samples, without them nothing is
                checked and the report of each such pass says so.
            dump_dir: folder for the model, report and artifacts after each pass.
            resume: go on behind the last complete pass in ``dump_dir``.
            progress: called as passes proceed.
            executor: takes the heavy work of passes, see :func:`onnxq.pipeline.executors`.

        Raises:
            SpecError: ``SPEC-SEED``: the seed is negative.
            PipelineError: the order of the passes cannot work.
            DataError: calibration data is missing; ``dump_dir`` belongs to another run.
            UnsupportedError: ``TARGET-*``: the model does not fit the target.
            EquivalenceError: a pass broke its promise.
        """
        check_seed(seed)
        validate(self.passes, has_data=data is not None, registry=self.registry)
        reference = _reference(model)
        if data is not None and not isinstance(data, CalibrationData):
            data = open_data(data, reference)
        settings = Settings(
            data=data,
            holdout=holdout,
            target=parse_target(target) if isinstance(target, str) else target,
            seed=seed,
            threads=threads,
            progress=progress or no_progress,
            executor=executor,
        )
        check_input(reference, settings.target)
        # Before the passes run: they share the input's tensors, and may name those without a name.
        provenance = provenance_of(self.passes, reference, settings)
        dump = _open_dump(dump_dir, resume, self.passes, provenance)
        state = _State(reference, io.copy_to_edit(reference), Artifacts())
        results: list[StepResult] = []
        if dump is not None and resume:
            results = _restore(dump, state)
        samples = _verify_samples(holdout, data) if verify else []
        check = VerifyHook(samples, threads)
        chain = [ValidityHook(), *([check] if samples else []), *hooks]
        with closing(check):
            for number in range(len(results) + 1, len(self.passes) + 1):
                step = _run_step(self.passes, number, state, settings, chain)
                if verify and not samples and step.owner.tolerance is not None:
                    step.report.note("not verified: the run has no samples")
                fingerprint = None if dump is None else dump.write(step)
                results.append(_result(step, fingerprint))
        check_output(state.model, settings.target)
        io.set_provenance(state.model, provenance)
        return RunResult(state.model, results, state.artifacts, provenance)


def _reference(model: ir.Model | onnx.ModelProto | str | os.PathLike[str]) -> ir.Model:
    """The model that a run starts from, whatever names or holds it."""
    if isinstance(model, ir.Model):
        return model
    return io.from_proto(model) if isinstance(model, onnx.ModelProto) else io.load(model)


@dataclass
class _State:
    """What changes during a run."""

    reference: ir.Model
    model: ir.Model
    artifacts: Artifacts


def _run_step(
    passes: Sequence[Pass], number: int, state: _State, settings: Settings, hooks: Sequence[Hook]
) -> Step:
    """Run pass ``number`` with its hooks."""
    owner = passes[number - 1]
    settings.progress(owner.name, number - 1, len(passes))
    step = Step(number, len(passes), owner, state.model, state.artifacts, PassReport())
    for hook in hooks:
        hook.before_pass(step)
    began, cpu = time.perf_counter(), time.process_time()
    step.report = apply_pass(
        owner, state.model, state.artifacts, state.reference, passes[number:], settings
    )
    step.seconds = time.perf_counter() - began
    step.cpu_seconds = time.process_time() - cpu
    for hook in hooks:
        hook.after_pass(step)
    settings.progress(owner.name, number, len(passes))
    return step


def apply_pass(
    owner: Pass,
    model: ir.Model,
    artifacts: Artifacts,
    reference: ir.Model,
    upcoming: Sequence[Pass],
    settings: Settings,
    budget: Budget | None = None,
) -> PassReport:
    """Run one pass and hold it to its declarations.

    Raises:
        InternalError: it provides less than it declares, or returns no report.
    """
    context = Context(
        artifacts=DeclaredArtifacts(artifacts, owner),
        target=settings.target,
        data=settings.data if owner.wants_data() else None,
        holdout=settings.holdout,
        reference=reference,
        upcoming=tuple(upcoming),
        seed=settings.seed,
        threads=settings.threads,
        progress=settings.progress,
        budget=budget or Budget(),
        executor=settings.executor,
    )
    # Passes solve many small systems, on which waiting BLAS threads cost more than they give.
    with threadpool_limits(limits=1, user_api="blas"):
        report = owner.run(model, context)
    spill_new_tensors(model, reference)
    if not isinstance(report, PassReport):
        raise InternalError("PASS-REPORT", f"pass `{owner.name}` returned no report")
    for key in owner.invalidates:
        if key not in owner.provides:
            artifacts.drop(key)
    for key in owner.provides:
        if key not in artifacts:
            raise InternalError(
                "ARTIFACT-NOT-PROVIDED",
                f"pass `{owner.name}` declares that it provides `{key}`, and did not",
            )
    return report


def _result(step: Step, fingerprint: str | None) -> StepResult:
    return StepResult(
        number=step.number,
        name=step.owner.name,
        spec=str(step.owner),
        report=step.report,
        seconds=step.seconds,
        cpu_seconds=step.cpu_seconds,
        size=model_nbytes(step.model),
        max_error=step.max_error,
        fingerprint=fingerprint,
    )


def _verify_samples(holdout: CalibrationData | None, data: CalibrationData | None) -> list[Sample]:
    source = holdout if holdout is not None else data
    return [] if source is None else list(islice(source, VERIFY_SAMPLES))


def _open_dump(
    folder: str | os.PathLike[str] | None,
    resume: bool,
    passes: Sequence[Pass],
    identity: Mapping[str, Any],
) -> Dump | None:
    if folder is None:
        if resume:
            raise SpecError(
                "SPEC-RESUME", "a run can resume only from a dump folder", "name it with --dump-dir"
            )
        return None
    return Dump.open(Path(folder), identity, passes, resume=resume)


def _restore(dump: Dump, state: _State) -> list[StepResult]:
    """The results of the complete steps; model and artifacts as the last of them left them."""
    steps = dump.complete_steps()
    if not steps:
        return []
    state.model = dump.load_model(steps[-1], state.reference)
    dump.load_artifacts(steps, state.artifacts)
    return [
        StepResult(
            number=s.number,
            name=s.name,
            spec=s.spec,
            report=s.report(),
            seconds=s.seconds,
            cpu_seconds=s.cpu_seconds,
            size=s.size,
            max_error=s.max_error,
            fingerprint=s.fingerprint,
            resumed=True,
        )
        for s in steps
    ]


def provenance_of(
    passes: Sequence[Pass], reference: ir.Model, settings: Settings
) -> dict[str, Any]:
    """What the output says about where it comes from: no times, no paths, no machine."""
    from onnxq import __version__

    facts: dict[str, Any] = {
        "version": __version__,
        "pipeline": spell(passes),
        "input": io.fingerprint(reference),
        "target": settings.target.name,
        "seed": settings.seed,
    }
    if settings.data is not None:
        facts["calibration"] = settings.data.digest()
    earlier = io.get_provenance(reference)
    if earlier:
        facts["earlier"] = earlier
    return facts
