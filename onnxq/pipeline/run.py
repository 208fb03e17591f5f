"""From a model file to a checked, smaller model file: what ``onnxq.run`` and the command line do.

load, calibrate on all samples but a few, run the passes, write to a staging folder, load the
written file in onnxruntime, compare it with the original on the samples held back, and only then
replace the output. The recipe that was run is written beside it.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from onnxq.errors import DataError, NoopError, QualityError, SpecError
from onnxq.graph import io
from onnxq.graph.atomic import check_target, reported, temporary_for
from onnxq.passes.contract import Pass, Progress, no_progress
from onnxq.passes.targets import parse_target
from onnxq.pipeline import recipes
from onnxq.pipeline.compare import Comparison, compare_models
from onnxq.pipeline.executors import open_executor
from onnxq.pipeline.overwrite import refuse_overwrite
from onnxq.pipeline.runner import Pipeline, RunResult, StepResult, check_seed
from onnxq.pipeline.samples import Split, split_holdout
from onnxq.pipeline.stage import staging
from onnxq.pipeline.task import TaskResult, TaskSpec, measure_task
from onnxq.pipeline.validate import validate

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxq.calibration.data import CalibrationData
    from onnxq.pipeline.hooks import Hook
    from onnxq.pipeline.registry import Registry

RECIPE_SUFFIX: Final = ".recipe.toml"
"""What is added to the output's name for the recipe that made it."""

POOR_COSINE: Final = 0.98
"""Mean cosine below which a result is written with a loud warning. ``min_cosine`` refuses it."""

HOLDOUT: Final = 8
"""Samples that are held back for the comparison by default."""


@dataclass
class RunSummary:
    """A finished run.

    Args:
        source: the input file.
        out: the output file.
        recipe: the recipe beside it.
        pipeline: the passes with their options, recipes expanded.
        target: name of the target.
        result: model, artifacts and one report a pass.
        comparison: of the written file with the input, or None without samples.
        samples: what was calibrated and compared on, in words.
        warnings: what the user should know, such as random data or unverified passes.
        task: what the task measured that was asked for.
        bytes_before, bytes_after: of the files, external data included.
        seconds, cpu_seconds: of the whole run, child processes included.
    """

    source: Path
    out: Path
    recipe: Path
    pipeline: str
    target: str
    seed: int
    threads: int
    result: RunResult
    comparison: Comparison | None
    samples: str
    warnings: list[str]
    bytes_before: int
    bytes_after: int
    task: TaskResult | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def steps(self) -> list[StepResult]:
        """One result a pass."""
        return self.result.reports

    @property
    def cosine(self) -> float | None:
        """Mean cosine of the worst output, or None without a comparison."""
        worst = None if self.comparison is None else self.comparison.worst
        return None if worst is None else worst.cosine_mean

    @property
    def is_poor(self) -> bool:
        """Whether an output is below ``POOR_COSINE``."""
        return self.comparison is not None and bool(_poor(self.comparison))

    def table(self) -> list[dict[str, Any]]:
        """One row a pass: number, pass, changed, skipped, reasons, seconds, size, max_error."""
        return [
            {
                "number": s.number,
                "pass": s.spec,
                "changed": len(s.report.changed),
                "skipped": len(s.report.skipped),
                "reasons": _counted(skip.reason for skip in s.report.skipped),
                "seconds": s.seconds,
                "size": s.size,
                "max_error": s.max_error,
            }
            for s in self.steps
        ]

    def to_json(self) -> dict[str, Any]:
        """The run as JSON-serialisable data."""
        return {
            "model": str(self.source),
            "output": str(self.out),
            "recipe": str(self.recipe),
            "pipeline": self.pipeline,
            "target": self.target,
            "seed": self.seed,
            "threads": self.threads,
            "samples": self.samples,
            "warnings": self.warnings,
            "is_poor": self.is_poor,
            "task": None if self.task is None else vars(self.task),
            "passes": [s.to_json() for s in self.steps],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "size_ratio": self.bytes_before / max(1, self.bytes_after),
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "provenance": self.result.provenance,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }


def _counted(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs, the most frequent first."""
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class DryPass:
    """What a pass would look at in the model as it came in."""

    number: int
    spec: str
    candidates: Sequence[str]


@dataclass
class _Plan:
    """Everything that is known before the first pass runs."""

    source: Path
    pipeline: Pipeline
    target: str
    seed: int
    threads: int
    model: ir.Model
    split: Split
    is_recipe: bool
    warnings: list[str] = field(default_factory=list)


def run(
    model: str | os.PathLike[str],
    passes: str | Sequence[Pass] = "w8a8",
    *,
    out: str | os.PathLike[str],
    calib: CalibrationData | Any = None,
    tokenizer: str | os.PathLike[str] | None = None,
    images: str | None = None,
    samples: int | None = None,
    max_length: int | None = None,
    target: str | None = None,
    seed: int | None = None,
    holdout: int = HOLDOUT,
    threads: int | None = None,
    jobs: int = 1,
    cluster: str | None = None,
    min_cosine: float | None = None,
    task: str | None = None,
    task_data: str | os.PathLike[str] | None = None,
    task_limit: int | None = None,
    max_drop: float | None = None,
    keep_bad: bool = False,
    allow_noop: bool = False,
    verify: bool = True,
    speed_seconds: float = 1.0,
    dump_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    registry: Registry | None = None,
    progress: Progress | None = None,
) -> RunSummary:
    """Quantize the model file ``model`` and write the checked result to ``out``.

    Args:
        model: the input; it is never written to.
        passes: a recipe's name, pipeline text, ``@recipe.toml``, or passes.
        out: the output; replaced in one step at the very end, or left as it was.
        calib: calibration samples: a path, ``random``, ``module:function``, arrays by input name,
            or opened data.
        tokenizer: ``tokenizer.json`` for text samples.
        images: how to prepare images.
        samples: use at most this many.
        max_length: tokens that a text is cut to.
        target: runtime that the output is for; by default the recipe's, else ``cpu``.
        seed: the only source of randomness; by default the recipe's, else 0.
        holdout: samples that are not calibrated on, for the comparison.
        threads: for onnxruntime; by default all CPUs that this process may use.
        jobs: processes that passes may give independent work to.
        cluster: address of a dask scheduler that takes it instead, as ``tcp://host:8786``.
        min_cosine: least mean cosine of every output with the original's.
        task: measure original and result on this task (``sts``, ``perplexity``, ...).
        task_data: the task's file or folder.
        task_limit: use only the first so many of its examples.
        max_drop: most that the task's metric may lose: points, or percent more perplexity.
        keep_bad: write the output even if it is below ``min_cosine``, beyond ``max_drop`` or
            broken; the error is raised all the same.
        allow_noop: accept passes that match nothing.
        verify: check passes that declare a tolerance.
        speed_seconds: time for the measurement of speed; 0 leaves it out.
        dump_dir: folder for the state after each pass.
        resume: go on behind the last complete pass in ``dump_dir``.
        hooks: called around every pass.
        registry: where names of passes are looked up.
        progress: called as the run proceeds.

    Raises:
        SpecError, PipelineError: the pipeline cannot be understood or cannot work.
        DataError: a file or the samples are bad, or ``out`` cannot be written.
        NoopError: ``NOOP``: a pass matched nothing.
        QualityError: ``QUALITY-COSINE``, ``QUALITY-ALL-ZERO``, ``QUALITY-NOT-FINITE``,
            ``QUALITY-SHAPE``, ``QUALITY-DROP``.
        EquivalenceError: a pass broke its promise.
    """
    began, cpu = time.perf_counter(), _cpu_seconds()
    tell = progress or no_progress
    output = Path(out)
    spec = TaskSpec.of(task, task_data, task_limit, max_drop)
    data_options = {
        "tokenizer": tokenizer,
        "images": images,
        "samples": samples,
        "max_length": max_length,
        "seed": seed,
    }
    plan = _prepare(
        _source(model),
        passes,
        output,
        calib,
        data_options,
        target,
        seed,
        holdout,
        threads,
        registry,
    )
    if min_cosine is not None and plan.split.compare is None:
        raise DataError(
            "DATA-NEEDED",
            "a least cosine was asked for, and there are no samples to measure it on",
            "give data with --calib (calib= in Python)",
        )
    with open_executor(jobs, cluster) as executor:
        result = plan.pipeline.run(
            plan.model,
            data=plan.split.calibration,
            holdout=plan.split.compare,
            target=plan.target,
            seed=plan.seed,
            threads=plan.threads,
            hooks=hooks,
            verify=verify,
            dump_dir=dump_dir,
            resume=resume,
            progress=tell,
            executor=executor,
        )
    if not allow_noop:
        _check_noops(plan, result)
    with staging(output) as folder:
        staged = io.save(result.model, folder / output.name, source=plan.source)
        io.check_loads(staged.path)
        comparison = None
        if plan.split.compare is not None:
            comparison = compare_models(
                plan.source,
                staged.path,
                plan.split.compare,
                threads=plan.threads,
                seconds=speed_seconds,
                progress=tell,
            )
        problem = None if comparison is None else _problem(comparison, min_cosine)
        measured = None
        if spec is not None and (problem is None or keep_bad):
            measured = measure_task(spec, plan.source, staged.path, tokenizer, plan.threads)
            problem = problem or measured.problem(max_drop)
        if problem is not None:
            problem.hint += "; the output was kept" if keep_bad else "; nothing was written"
            if not keep_bad:
                raise problem
        # Saved again rather than moved: the data file must be in place before the graph is, and
        # the staged one holds the very bytes that were checked.
        saved = io.save(io.load(staged.path), output, source=plan.source)
    recipe = _write_recipe(output, result, comparison, saved.bytes)
    if comparison is not None:
        plan.warnings.extend(_poor(comparison))
    if problem is not None:
        raise problem
    return RunSummary(
        source=plan.source,
        out=output,
        recipe=recipe,
        pipeline=str(plan.pipeline),
        target=plan.target,
        seed=plan.seed,
        threads=plan.threads,
        result=result,
        comparison=comparison,
        samples=plan.split.words,
        warnings=plan.warnings,
        task=measured,
        bytes_before=io.size_on_disk(plan.source),
        bytes_after=saved.bytes,
        seconds=time.perf_counter() - began,
        cpu_seconds=_cpu_seconds() - cpu,
    )


def _poor(comparison: Comparison) -> list[str]:
    """A warning for each output that is farther from the original's than ``POOR_COSINE``."""
    return [
        f"POOR RESULT: output `{o.name}` has cosine {o.cosine_mean:.4f} with fp32 "
        f"({o.sqnr_db:.1f} dB), below {POOR_COSINE:g}; measure it on your task before you use it, "
        "or let a run like this one fail with --min-cosine"
        for o in comparison.outputs
        if not o.cosine_mean >= POOR_COSINE
    ]


def dry_run(
    model: str | os.PathLike[str],
    passes: str | Sequence[Pass] = "w8a8",
    *,
    target: str | None = None,
    registry: Registry | None = None,
) -> tuple[str, list[DryPass]]:
    """The resolved pipeline, and what each pass would look at in the model as it is now.

    Later passes see what earlier ones leave; sites that only an earlier pass makes are not listed.

    Raises:
        SpecError, PipelineError: the pipeline cannot be understood or cannot work.
        DataError: the model cannot be read.
    """
    pipeline = Pipeline(passes, registry=registry)
    validate(pipeline.passes, registry=registry)
    if target is not None:
        parse_target(target)
    loaded = io.load(model)
    found = [
        DryPass(number, str(p), p.candidates(loaded))
        for number, p in enumerate(pipeline.passes, start=1)
    ]
    return str(pipeline), found


def _source(model: str | os.PathLike[str]) -> Path:
    """The file that a run reads; it is hashed, loaded and timed from there."""
    if isinstance(model, str | os.PathLike):
        return Path(model)
    raise SpecError(
        "SPEC-MODEL",
        f"a run reads a model's file, and a {type(model).__name__} was given",
        "give its path, or use onnxq.Pipeline(...).run(model), which works in memory",
    )


def _prepare(
    source: Path,
    passes: str | Sequence[Pass],
    output: Path,
    calib: Any,
    data_options: Mapping[str, Any],
    target: str | None,
    seed: int | None,
    holdout: int,
    threads: int | None,
    registry: Registry | None,
) -> _Plan:
    """Find every mistake in the arguments that can be found before work begins."""
    pipeline = Pipeline(passes, registry=registry)
    recipe = recipes.named(passes) if isinstance(passes, str) else None
    chosen = target or (recipe.target if recipe is not None else None) or "cpu"
    parse_target(chosen)
    if seed is None:
        seed = recipe.seed if recipe is not None and recipe.seed is not None else 0
    check_seed(seed)
    validate(pipeline.passes, has_data=calib is not None, registry=registry)
    check_target(output)
    refuse_overwrite(output, "the output", source, calib, data_options.get("tokenizer"))
    loaded = io.load(source)
    io.check_loads(source)
    data = None if calib is None else _open(calib, loaded, data_options)
    warnings: list[str] = []
    split = split_holdout(data, holdout, loaded, seed, warnings)
    if split.calibration is not None and _is_all_zero(split.calibration):
        warnings.append(
            "every calibration sample is ZERO in all inputs: no range that is found means anything"
        )
    cpus = threads or len(os.sched_getaffinity(0))
    is_recipe = recipe is not None
    return _Plan(source, pipeline, chosen, seed, cpus, loaded, split, is_recipe, warnings)


def _is_all_zero(data: CalibrationData) -> bool:
    """Whether no sample has an element other than zero; as a rule one sample is read."""
    return not any(
        np.any(array) for feeds in data for array in feeds.values() if array.dtype.kind in "fiub"
    )


def _open(calib: Any, model: ir.Model, options: Mapping[str, Any]) -> CalibrationData:
    """Calibration samples from whatever names or holds them."""
    from onnxq.calibration.data import CalibrationData, open_data

    if isinstance(calib, CalibrationData):
        return calib
    return open_data(calib, model, **{k: v for k, v in options.items() if v is not None})


def _check_noops(plan: _Plan, result: RunResult) -> None:
    """Refuse passes that were asked for by name and matched nothing.

    In a recipe, passes for other kinds of models may idle, which becomes a warning, as long as one
    that quantizes does not.
    """
    steps = list(zip(result.reports, plan.pipeline.passes, strict=True))
    idle = [s for s, owner in steps if not s.report.changed and not owner.may_match_nothing]
    if not idle:
        return
    quantized = any(s.report.changed for s, owner in steps if owner.tolerance is None)
    if plan.is_recipe and quantized:
        plan.warnings.extend(
            f"pass {s.number} `{s.name}` of the recipe matched nothing{_because(s)}" for s in idle
        )
        return
    quantizing = [s for s, owner in steps if s in idle and owner.tolerance is None]
    first = next(iter(quantizing), idle[0])
    others = f", and so did {len(idle) - 1} more" if len(idle) > 1 else ""
    raise NoopError(
        "NOOP",
        f"pass {first.number} `{first.name}` matched nothing in this model{others}"
        f"{next(filter(None, map(_because, (first, *idle))), '')}",
        "leave the pass out, or accept this with --allow-noop; nothing was written",
        passes=[s.name for s in idle],
    )


def _because(step: StepResult) -> str:
    """The most frequent reason for a skip, if there is one."""
    reasons = list(_counted(s.reason for s in step.report.skipped))
    return f": {len(step.report.skipped)} candidates, mostly `{reasons[0]}`" if reasons else ""


_FLAGS: Final = {
    "non-finite": ("QUALITY-NOT-FINITE", "has NaN or Inf where the original has numbers"),
    "all-zero": ("QUALITY-ALL-ZERO", "has become all zero"),
    "shape": ("QUALITY-SHAPE", "has another shape than the original's"),
}


def _problem(comparison: Comparison, min_cosine: float | None) -> QualityError | None:
    """What is wrong with the result, if anything."""
    for output in comparison.flagged:
        code, what = _FLAGS[output.flags[0]]
        return QualityError(
            code,
            f"output `{output.name}` {what}",
            "find the pass with --bisect",
            output=output.name,
        )
    if min_cosine is None:
        return None
    for output in comparison.outputs:
        if output.is_float and not output.cosine_mean >= min_cosine:
            return QualityError(
                "QUALITY-COSINE",
                f"output `{output.name}` has cosine {output.cosine_mean:.5f} with the original, "
                f"below {min_cosine:g}",
                "leave sensitive layers in float, or lower --min-cosine",
                output=output.name,
                cosine=output.cosine_mean,
                min_cosine=min_cosine,
            )
    return None


def _write_recipe(
    output: Path, result: RunResult, comparison: Comparison | None, size: int
) -> Path:
    """Write what was run beside the output; equal runs write equal bytes."""
    measured: dict[str, Any] = {"bytes": size}
    worst = None if comparison is None else comparison.worst
    if worst is not None:
        measured["cosine"] = worst.cosine_mean
        measured["sqnr_db"] = worst.sqnr_db
    facts = result.provenance
    table: dict[str, Any] = {
        "summary": f"the run that wrote {output.name}",
        "passes": facts["pipeline"],
        "target": facts["target"],
        "seed": facts["seed"],
        "version": facts["version"],
        "input": {k: facts[k] for k in ("input", "calibration") if k in facts},
        "result": measured,
    }
    path = output.with_name(output.name + RECIPE_SUFFIX)
    with reported(path), temporary_for(path) as temporary:
        temporary.file.write(recipes.to_toml(table).encode())
        temporary.put_in_place()
    return path


def _cpu_seconds() -> float:
    """User and system time of this process and its finished children."""
    own, children = (
        resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
