"""From a model file to a checked, smaller model file: what ``onnxq.run`` and the command line do.

load, calibrate on all samples but a few, run the passes, write to a staging folder, load the
written file in onnxruntime, compare it with the original on the samples held back, and only then
replace the output. The recipe that was run is written beside it.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from onnxq.errors import DataError
from onnxq.graph import io
from onnxq.graph.atomic import reported, temporary_for
from onnxq.passes.contract import Pass, Progress, no_progress
from onnxq.passes.lower.block_scaled import with_plain_products
from onnxq.passes.targets import parse_target
from onnxq.pipeline import recipes
from onnxq.pipeline.compare import Comparison, compare_models
from onnxq.pipeline.executors import open_executor
from onnxq.pipeline.plan import prepare
from onnxq.pipeline.runner import Pipeline, RunResult
from onnxq.pipeline.stage import staging
from onnxq.pipeline.summary import RunSummary
from onnxq.pipeline.task import TaskSpec, measure_task
from onnxq.pipeline.validate import validate
from onnxq.pipeline.verdict import idle_passes, poor_outputs, problem_of

if TYPE_CHECKING:
    from onnxq.calibration.data import CalibrationData
    from onnxq.pipeline.hooks import Hook
    from onnxq.pipeline.registry import Registry

RECIPE_SUFFIX: Final = ".recipe.toml"
"""What is added to the output's name for the recipe that made it."""

HOLDOUT: Final = 8
"""Samples that are held back for the comparison by default."""


@dataclass(frozen=True)
class DryPass:
    """What a pass would look at in the model as it came in."""

    number: int
    spec: str
    candidates: Sequence[str]


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
    plan = prepare(
        model,
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
        passes_run = plan.pipeline.passes
        plan.warnings += idle_passes(result.reports, passes_run, is_recipe=plan.is_recipe)
    with staging(output) as folder:
        staged = io.save(result.model, folder / output.name, source=plan.source)
        runnable = _runnable(staged.path, folder)
        io.check_loads(runnable)
        comparison = None
        if plan.split.compare is not None:
            comparison = compare_models(
                plan.source,
                runnable,
                plan.split.compare,
                threads=plan.threads,
                seconds=speed_seconds if runnable == staged.path else 0.0,
                progress=tell,
            )
            comparison = replace(comparison, candidate_bytes=staged.bytes)
        problem = None if comparison is None else problem_of(comparison, min_cosine)
        measured = None
        if spec is not None and (problem is None or keep_bad):
            measured = measure_task(spec, plan.source, runnable, tokenizer, plan.threads)
            problem = problem or measured.problem(max_drop)
        if problem is not None:
            problem.hint += "; the output was kept" if keep_bad else "; nothing was written"
            if not keep_bad:
                raise problem
        # Saved again rather than moved: the data file must be in place before the graph is, and
        # the staged one holds the very bytes that were checked.
        saved = io.save(io.load(staged.path), output, source=plan.source)
    if runnable != staged.path:
        plan.warnings.append(
            "the output was not run as it is, for onnxruntime has no CPU kernel for its FP4 and "
            "FP8 products: it was checked with the weights that it holds, decoded, in float "
            "products, and not timed"
        )
    recipe = _write_recipe(output, result, comparison, saved.bytes)
    if comparison is not None:
        plan.warnings += poor_outputs(comparison)
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


def _runnable(staged: Path, folder: Path) -> Path:
    """``staged``, or a copy in ``folder`` without the products that only CUDA has."""
    model = io.load(staged)
    if not with_plain_products(model):
        return staged
    return io.save(model, folder / "plain.onnx").path


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
