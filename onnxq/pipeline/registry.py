"""Which passes there are, by name, without importing any of them.

Each built-in pass has one line in :data:`BUILTIN`; a test compares the table with the files. Other
packages add passes through the entry-point group ``onnxq.passes`` (name = the pass's name, value =
``module:Class``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from onnxq.errors import InternalError, SpecError
from onnxq.pipeline.suggest import did_you_mean

if TYPE_CHECKING:
    from onnxq.passes.contract import Pass

ENTRY_POINT_GROUP: Final = "onnxq.passes"


@dataclass(frozen=True)
class Entry:
    """Where a pass lives.

    Args:
        name: as a pipeline text spells it.
        where: ``module:Class``.
        group: the folder under ``passes/``, or the distribution that brings the pass.
    """

    name: str
    where: str
    group: str


def _builtin(group: str, **classes: str) -> dict[str, Entry]:
    """Entries of one folder; file and keyword are the pass's name in snake case."""
    return {
        name: Entry(name, f"onnxq.passes.{group}.{stem}:{cls}", group)
        for stem, cls in classes.items()
        for name in (stem.replace("_", "-"),)
    }


BUILTIN: Final[Mapping[str, Entry]] = {
    **_builtin("prepare", canonicalize="Canonicalize"),
    **_builtin(
        "transform",
        simplify_attention="SimplifyAttention",
        smooth_quant="SmoothQuant",
        fold_norm="FoldNorm",
        rotate="Rotate",
        learn_rotation="LearnRotation",
        online_hadamard="OnlineHadamard",
        smooth_rot="SmoothRot",
        clip_activation="ClipActivation",
        prefix_tokens="PrefixTokens",
        low_rank_split="LowRankSplit",
        reassemble_channels="ReassembleChannels",
        awq_scale="AwqScale",
        shift_scale="ShiftScale",
        equalize="Equalize",
    ),
    **_builtin(
        "decide",
        calibrate="Calibrate",
        assign="Assign",
        partial="Partial",
        sanity="Sanity",
        sensitivity="Sensitivity",
        set_format="SetFormat",
        assign_format="AssignFormat",
        peg="Peg",
        mixed_precision="MixedPrecision",
        outlier_split="OutlierSplit",
    ),
    **_builtin(
        "weights",
        sequential="Sequential",
        gptq="Gptq",
        gpfq="Gpfq",
        opt_rtn="OptRtn",
        hqq="Hqq",
        correct_bias="CorrectBias",
        kmeans="KMeans",
        low_rank_compensate="LowRankCompensate",
        magr="MagR",
    ),
    **_builtin(
        "lower", integer_only="IntegerOnly", pack="Pack", qdq="Qdq", quantize_kv="QuantizeKv"
    ),
}


class Registry:
    """Pass classes by name; a class is imported when it is first asked for."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)
        self._classes: dict[str, type[Pass]] = {}

    @classmethod
    def of(cls, *classes: type[Pass]) -> Registry:
        """A registry of classes that are already at hand (tests, notebooks)."""
        registry = cls(
            {c.name: Entry(c.name, f"{c.__module__}:{c.__name__}", "given") for c in classes}
        )
        registry._classes = {c.name: c for c in classes}
        return registry

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All names, in the order of the table."""
        return list(self._entries)

    def entry(self, name: str) -> Entry:
        """The entry called ``name``.

        Raises:
            SpecError: there is none.
        """
        if name not in self._entries:
            raise SpecError(
                "SPEC-PASS-UNKNOWN",
                f"there is no pass `{name}`",
                did_you_mean(name, self._entries) or "`onnxq passes` lists them",
            )
        return self._entries[name]

    def get(self, name: str) -> type[Pass]:
        """The class of the pass called ``name``.

        Raises:
            SpecError: there is no such pass, or the package that brings it cannot be imported.
        """
        found = self._classes.get(name)
        if found is None:
            found = self._classes[name] = _import(self.entry(name))
        return found


def _import(entry: Entry) -> type[Pass]:
    """The class that ``entry`` points to; its name must be the entry's."""
    from onnxq.passes.contract import Pass

    module, _, attribute = entry.where.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if entry.name in BUILTIN:
            raise InternalError(
                "PASS-IMPORT", f"pass `{entry.name}` ({entry.where}) cannot be imported: {error}"
            ) from error
        raise SpecError(
            "SPEC-PASS-IMPORT",
            f"pass `{entry.name}` of {entry.group} ({entry.where}) cannot be imported: {error}",
            f"reinstall or remove {entry.group}",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass) and found.name == entry.name):
        raise InternalError(
            "PASS-ENTRY", f"{entry.where} is not a Pass with the name `{entry.name}`"
        )
    return found


def _third_party() -> dict[str, Entry]:
    """Passes that other installed packages bring.

    Raises:
        SpecError: one takes the name of a built-in pass, or two share a name.
    """
    found: dict[str, Entry] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        package = point.dist.name if point.dist is not None else point.module
        taken = BUILTIN.get(point.name) or found.get(point.name)
        if taken is not None:
            raise SpecError(
                "SPEC-PASS-CLASH",
                f"package {package} brings a pass `{point.name}`, a name that {taken.where} has",
                f"remove {package}, or rename its pass",
            )
        found[point.name] = Entry(point.name, point.value, package)
    return found


@functools.cache
def default_registry() -> Registry:
    """The built-in passes and those of installed packages."""
    return Registry({**BUILTIN, **_third_party()})
