"""Everything of a run that can be known, and every mistake that can be found, before it works."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxq.errors import SpecError
from onnxq.graph import io
from onnxq.graph.atomic import check_target
from onnxq.passes.contract import Pass
from onnxq.passes.targets import parse_target
from onnxq.pipeline import recipes
from onnxq.pipeline.overwrite import refuse_overwrite
from onnxq.pipeline.runner import Pipeline, check_seed
from onnxq.pipeline.samples import Split, split_holdout
from onnxq.pipeline.validate import validate

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxq.calibration.data import CalibrationData
    from onnxq.pipeline.registry import Registry


@dataclass
class Plan:
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


def prepare(
    model: str | os.PathLike[str],
    passes: str | Sequence[Pass],
    output: Path,
    calib: Any,
    data_options: Mapping[str, Any],
    target: str | None,
    seed: int | None,
    holdout: int,
    threads: int | None,
    registry: Registry | None,
) -> Plan:
    """Find every mistake in the arguments that can be found before work begins.

    Args: see :func:`onnxq.pipeline.run.run`; ``data_options`` are those of ``open_data``.

    Raises:
        SpecError, PipelineError: the pipeline or an option cannot be understood or cannot work.
        DataError: a file or the samples are bad, or ``output`` cannot be written.
    """
    source = _source(model)
    pipeline = Pipeline(passes, registry=registry)
    recipe = recipes.named(passes) if isinstance(passes, str) else None
    chosen = target or (recipe.target if recipe is not None else None) or "cpu"
    parse_target(chosen)
    if seed is None:
        seed = recipe.seed if recipe is not None and recipe.seed is not None else 0
    check_seed(seed)
    cpus = _threads(threads)
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
    is_recipe = recipe is not None
    return Plan(source, pipeline, chosen, seed, cpus, loaded, split, is_recipe, warnings)


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


def _source(model: str | os.PathLike[str]) -> Path:
    """The file that a run reads; it is hashed, loaded and timed from there."""
    if isinstance(model, str | os.PathLike):
        return Path(model)
    raise SpecError(
        "SPEC-MODEL",
        f"a run reads a model's file, and a {type(model).__name__} was given",
        "give its path, or use onnxq.Pipeline(...).run(model), which works in memory",
    )


def _threads(threads: int | None) -> int:
    """How many threads onnxruntime gets; by default all CPUs that this process may use."""
    if threads is None:
        return len(os.sched_getaffinity(0))
    if threads < 1:
        raise SpecError(
            "SPEC-THREADS", f"a run needs at least one thread, not {threads}", "leave threads out"
        )
    return threads
