"""``set-format``: other formats, blocks and scales for the weights of chosen layers.

It follows ``assign`` and changes its plan for the sites that a glob matches.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import onnx_ir as ir

from onnxq.errors import SpecError, UnsupportedError
from onnxq.formats import IntFormat, parse_format
from onnxq.graph.match import Structure, analyze
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN
from onnxq.passes.plan import ANY_WEIGHT, QuantPlan, SitePlan, WeightPlan
from onnxq.passes.sites import site_names
from onnxq.passes.targets import Target, opset_of

EMBEDDING_BLOCK = 32


@dataclass(frozen=True)
class SetFormat(Pass):
    """Change how the weights of matching sites are stored.

    Args:
        layers: globs of site names, as ``assign`` lists them.
        format: the format, with a block if it has one: ``int8``, ``uint4g64``, ``nvfp4``. Unsigned
            integers and the affix ``asym`` get zero points. Empty: as planned.
        share: an embedding table reads the codes of the layer that is tied to it, instead of
            codes of its own.
    """

    name: ClassVar[str] = "set-format"
    summary: ClassVar[str] = "set the weight format, block and zero points of layers by glob"
    requires: ClassVar = (PLAN,)
    provides: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 0.0

    layers: tuple[str, ...] = ()
    format: str = ""
    share: bool = False

    def __post_init__(self) -> None:
        if not self.layers or not (self.format or self.share):
            raise SpecError(
                "SPEC-EMPTY",
                "`set-format` needs layers, and a format or share",
                'for example set-format{layers=["*/down_proj/*"] format=int8g32}',
            )
        if self.format:
            parse_format(self.format)

    def opset_needed(self, target: Target) -> int:
        """That of the form in which the target stores the format."""
        if not self.format:
            return 0
        fmt = parse_format(self.format)
        return opset_of(target.form_of(fmt, fmt.block), fmt)

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Replace the weight plans of matching sites."""
        report = PassReport()
        plan = ctx.artifacts.get(PLAN)
        structure = analyze(model)
        for glob in self.layers:
            if not any(fnmatchcase(name, glob) for name in plan.sites):
                report.skip(glob, "matches no planned layer")
        for site in list(plan.sites.values()):
            if site.weight is None or not any(fnmatchcase(site.site, g) for g in self.layers):
                continue
            if site.mode not in ANY_WEIGHT:
                report.skip(site.site, f"its activations are quantized ({site.mode})")
                continue
            weight = self._weight(site, site.weight, plan, structure, ctx.target)
            if weight == site.weight:
                report.skip(site.site, "as planned already")
                continue
            # Behind the layer whose codes it reads, in the order in which sites are lowered.
            plan.sites.pop(site.site)
            plan.add(dataclasses.replace(site, weight=weight, by=self.name))
            report.change(site.site, spell(weight))
        ctx.artifacts.put(PLAN, plan)
        return report

    def _weight(
        self,
        site: SitePlan,
        weight: WeightPlan,
        plan: QuantPlan,
        structure: Structure,
        target: Target,
    ) -> WeightPlan:
        if site.kind == "embedding":
            return self._embedding(site, weight, plan, structure, target)
        return planned(self.format, weight) if self.format else weight

    def _embedding(
        self,
        site: SitePlan,
        weight: WeightPlan,
        plan: QuantPlan,
        structure: Structure,
        target: Target,
    ) -> WeightPlan:
        if not target.has("GatherBlockQuantized"):
            raise UnsupportedError(
                "TARGET-EMBEDDING",
                f"target `{target.name}` has no GatherBlockQuantized for {site.site}",
                "leave its table as assign planned it: 8 bits, one scale a row",
            )
        if not self.share:
            fmt = parse_format(self.format)
            if not isinstance(fmt, IntFormat) or not fmt.symmetric or fmt.bits not in (2, 4, 8):
                raise UnsupportedError(
                    "TARGET-EMBEDDING",
                    f"{site.site}: embedding tables take int2, int4 and int8, not {self.format}",
                )
            found = planned(self.format, weight)
            return found if found.block else dataclasses.replace(found, block=EMBEDDING_BLOCK)
        tied = _tied(site, plan, structure)
        other = None if tied is None else plan.sites[tied].weight
        if tied is None or other is None or not _is_packed(other):
            raise UnsupportedError(
                "TARGET-EMBEDDING",
                f"{site.site} shares its table with no layer of symmetric codes in blocks",
                "give the tied layer a format such as int4g32, or leave share out",
            )
        return dataclasses.replace(other, same_as=tied)


def _is_packed(weight: WeightPlan) -> bool:
    """Symmetric integers in blocks, as tables and layers both read them."""
    fmt = parse_format(weight.format)
    return isinstance(fmt, IntFormat) and bool(weight.block) and weight.symmetric


def planned(name: str, before: WeightPlan) -> WeightPlan:
    """A weight plan for the format called ``name``; scales are chosen as ``before``."""
    fmt = parse_format(name)
    symmetric = fmt.symmetric if isinstance(fmt, IntFormat) else True
    plain = (
        str(dataclasses.replace(fmt, block=0, scheme="")) if isinstance(fmt, IntFormat) else name
    )
    return dataclasses.replace(
        before, format=plain, symmetric=symmetric, per_channel=True, block=fmt.block
    )


def spell(weight: WeightPlan) -> str:
    """A weight plan in words."""
    words = [weight.format]
    if weight.block:
        words.append(f"in blocks of {weight.block}")
    if not weight.symmetric:
        words.append("with zero points")
    if weight.same_as:
        words.append(f"from {weight.same_as}")
    return " ".join(words)


def _tied(site: SitePlan, plan: QuantPlan, structure: Structure) -> str | None:
    """The planned layer that multiplies by the rows of an embedding's table."""
    names = site_names(structure.graph)
    for embedding in structure.embeddings:
        if names[embedding.node] != site.site:
            continue
        for layer in structure.linears:
            same = layer.weight is embedding.table and layer.in_axis == 1
            if same and layer.name in plan.sites:
                return layer.name
    return None
