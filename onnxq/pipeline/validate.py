"""Check a pipeline before anything runs: every key that a pass reads must be there and fresh."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from onnxq.errors import DataError, OnnxqError, PipelineError

if TYPE_CHECKING:
    from onnxq.passes.contract import Pass
    from onnxq.pipeline.registry import Registry


def validate(
    passes: Sequence[Pass],
    *,
    has_data: bool = True,
    available: Iterable[str] = (),
    registry: Registry | None = None,
) -> None:
    """Walk the pipeline once, on declarations alone.

    Args:
        passes: in the order in which they will run.
        has_data: the run has calibration samples.
        available: names of keys that are there before the first pass.
        registry: where to look for a pass that would help; by default all installed passes.

    Raises:
        PipelineError: a key is missing, stale, or forbids a pass.
        DataError: a pass needs calibration samples and there are none.
    """
    fresh: dict[str, int] = dict.fromkeys(available, 0)
    stale: dict[str, int] = {}
    for number, p in enumerate(passes, start=1):
        for key in p.needs():
            if key.name not in fresh:
                raise _unmet(passes, number, key.name, stale.get(key.name), registry)
        for key in p.forbids:
            if key.name in fresh:
                raise _forbidden(passes, number, key.name, fresh[key.name])
        if p.wants_data() and not has_data:
            raise DataError(
                "DATA-NEEDED",
                f"pass {number} `{p.name}` needs calibration data and the run has none",
                "give data with --calib (calib= in Python); `random` serves to try things out",
            )
        for key in p.invalidates:
            if fresh.pop(key.name, None) is not None:
                stale[key.name] = number
        for key in p.provides:
            fresh[key.name] = number
            stale.pop(key.name, None)


def _unmet(
    passes: Sequence[Pass],
    number: int,
    key: str,
    invalidated_by: int | None,
    registry: Registry | None,
) -> PipelineError:
    """Pass ``number`` needs ``key``, which is not there or no longer true."""
    who = f"pass {number} `{passes[number - 1].name}` needs `{key}`"
    if invalidated_by is not None:
        provider = next(p.name for p in reversed(passes[:invalidated_by]) if _has(p.provides, key))
        culprit = passes[invalidated_by - 1].name
        return PipelineError(
            "PIPELINE-STALE",
            f"{who}, which pass {invalidated_by} `{culprit}` invalidated",
            f"put another `{provider}` after pass {invalidated_by} `{culprit}`",
            pass_number=number,
            key=key,
        )
    later = next((n for n, p in enumerate(passes, 1) if n > number and _has(p.provides, key)), None)
    if later is not None:
        hint = f"pass {later} `{passes[later - 1].name}` provides it; put it before pass {number}"
    else:
        providers = _providers(key, registry)
        named = " or ".join(f"`{p}`" for p in providers)
        hint = (
            f"{named} provides it; put it before pass {number}"
            if providers
            else "no installed pass provides it"
        )
    return PipelineError(
        "PIPELINE-MISSING",
        f"{who}, and no pass before it provides that",
        hint,
        pass_number=number,
        key=key,
    )


def _forbidden(passes: Sequence[Pass], number: int, key: str, provider: int) -> PipelineError:
    """Pass ``number`` may not run once ``key`` is there."""
    name = passes[number - 1].name
    source = f" (from pass {provider} `{passes[provider - 1].name}`)" if provider else ""
    hint = (
        f"put `{name}` before pass {provider} `{passes[provider - 1].name}`"
        if provider
        else f"leave `{name}` out"
    )
    return PipelineError(
        "PIPELINE-FORBIDDEN",
        f"pass {number} `{name}` cannot run when `{key}`{source} is there",
        hint,
        pass_number=number,
        key=key,
    )


def _has(keys: Iterable[object], name: str) -> bool:
    return any(str(k) == name for k in keys)


def _providers(key: str, registry: Registry | None) -> list[str]:
    """Names of installed passes that provide ``key`` and do not need it themselves."""
    from onnxq.pipeline.registry import default_registry

    found: list[str] = []
    table = registry or default_registry()
    for name in table.names():
        try:
            cls = table.get(name)
        except OnnxqError:
            continue  # a broken third-party pass cannot help, and is not what this error is about
        if _has(cls.provides, key) and not _has(cls.requires, key):
            found.append(name)
    return found
