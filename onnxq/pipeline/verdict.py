"""Whether a result may be written: passes that matched nothing, broken outputs, poor ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from onnxq.errors import NoopError, QualityError
from onnxq.passes.contract import Pass
from onnxq.pipeline.compare import Comparison
from onnxq.pipeline.runner import StepResult

POOR_COSINE: Final = 0.98
"""Mean cosine below which a result is written with a loud warning. ``min_cosine`` refuses it."""


def poor_outputs(comparison: Comparison) -> list[str]:
    """A warning for each output that is farther from the original's than ``POOR_COSINE``."""
    return [
        f"POOR RESULT: output `{o.name}` has cosine {o.cosine_mean:.4f} with fp32 "
        f"({o.sqnr_db:.1f} dB), below {POOR_COSINE:g}; measure it on your task before you use it, "
        "or let a run like this one fail with --min-cosine"
        for o in comparison.outputs
        if not o.cosine_mean >= POOR_COSINE
    ]


def counted(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs, the most frequent first."""
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def idle_passes(
    reports: Sequence[StepResult], passes: Sequence[Pass], *, is_recipe: bool
) -> list[str]:
    """Refuse passes that were asked for by name and matched nothing.

    In a recipe, passes for other kinds of models may idle, as long as one that quantizes does not.

    Returns:
        A warning for each that idled in a recipe.

    Raises:
        NoopError: ``NOOP``.
    """
    steps = list(zip(reports, passes, strict=True))
    idle = [s for s, owner in steps if not s.report.changed and not owner.may_match_nothing]
    if not idle:
        return []
    quantized = any(s.report.changed for s, owner in steps if owner.tolerance is None)
    if is_recipe and quantized:
        return [
            f"pass {s.number} `{s.name}` of the recipe matched nothing{_because(s)}" for s in idle
        ]
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
    reasons = list(counted(s.reason for s in step.report.skipped))
    if not reasons:
        return ""
    count = len(step.report.skipped)
    return f": {count} candidates, mostly `{reasons[0]}`" if count > 1 else f": `{reasons[0]}`"


_FLAGS: Final = {
    "non-finite": ("QUALITY-NOT-FINITE", "has NaN or Inf where the original has numbers"),
    "all-zero": ("QUALITY-ALL-ZERO", "has become all zero"),
    "shape": ("QUALITY-SHAPE", "has another shape than the original's"),
}


def problem_of(comparison: Comparison, min_cosine: float | None) -> QualityError | None:
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
