"""``sensitivity``: quantize each planned layer alone and see what it does to the outputs.

One lowered copy and one run a layer, so the cost is linear in layers (Wu et al., arXiv 2004.09602,
section 5.1). The model and the plan stay as they are; ``partial`` uses the result. With a
``cache`` file each finding is written as soon as it is made, and a run that was stopped goes on
where it stopped, with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import onnx_ir as ir

from onnxq.errors import DataError, SpecError
from onnxq.graph.identity import fingerprint
from onnxq.passes.contract import Context, Key, Pass, PassReport
from onnxq.passes.decide.measure import Feeds, Metric, Score
from onnxq.passes.decide.measure_sites import Work, measure_sites
from onnxq.passes.keys import PLAN, ROUNDED
from onnxq.passes.plan import QuantPlan


@dataclass(frozen=True)
class Sensitivities:
    """What each site does to the outputs when it alone is quantized.

    Args:
        metric: what was measured besides the SQNR.
        scores: by site.
    """

    metric: Metric
    scores: dict[str, Score]

    def worst_first(self) -> list[str]:
        """Sites by falling damage; equal ones in the order of the plan."""
        return sorted(self.scores, key=lambda site: -self.scores[site].badness(self.metric))

    def to_storage(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """As JSON."""
        return {"metric": self.metric, "scores": {k: asdict(v) for k, v in self.scores.items()}}, {}

    @classmethod
    def from_storage(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Sensitivities:
        """The inverse of :meth:`to_storage`."""
        return cls(header["metric"], {k: Score(**v) for k, v in header["scores"].items()})


SENSITIVITY: Final = Key("sensitivity", Sensitivities, "damage of each planned site alone")


@dataclass(frozen=True)
class Sensitivity(Pass):
    """Measure every planned layer alone.

    Args:
        metric: ``sqnr`` of the outputs, ``kl`` of the softmax of logits, or ``perplexity`` of
            next tokens.
        samples: calibration samples to run; every layer costs one run of each.
        cache: file of findings so far; empty for none.
    """

    name: ClassVar[str] = "sensitivity"
    summary: ClassVar[str] = "measure what each planned layer alone does to the outputs"
    requires: ClassVar = (PLAN,)
    uses: ClassVar = (ROUNDED,)
    provides: ClassVar = (SENSITIVITY,)
    tolerance: ClassVar[float | None] = 0.0
    needs_data: ClassVar[bool] = True

    metric: Metric = "sqnr"
    samples: int = 2
    cache: str = ""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise SpecError("SPEC-RANGE", f"samples={self.samples} is below 1")

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Measure, worst layer first in the report."""
        report = PassReport()
        plan = ctx.artifacts.get(PLAN)
        sites = [site.site for site in plan.sites.values() if site.kind != "op"]
        for planned in plan.sites.values():
            if planned.kind == "op":
                report.skip(planned.site, "has no weight; it follows its neighbours")
        if not sites:
            report.skip("the plan", "has no layer to measure")
        samples = take_samples(ctx, self.samples)
        identity = _identity(model, plan, samples, self.metric)
        cache = _Cache(self.cache, identity)
        scores = dict(cache.read())
        resumed = sum(site in scores for site in sites)
        missing = [site for site in sites if site not in scores]
        rounded = ctx.artifacts.get(ROUNDED) if ROUNDED in ctx.artifacts else None
        if missing:
            work = Work(model, plan, samples, self.metric, rounded, ctx.target, ctx.threads)
            for site, score in measure_sites(work, missing, ctx):
                cache.add(site, score)
                scores[site] = score
                ctx.progress("sensitivity", len(scores), len(sites))
        found = Sensitivities(self.metric, {site: scores[site] for site in sites})
        ctx.artifacts.put(SENSITIVITY, found)
        for site in found.worst_first():
            report.change(site, "measured", found.scores[site].describe(self.metric))
        report.note(f"{len(samples)} samples, {resumed} of {len(sites)} layers from the cache")
        return report


def take_samples(ctx: Context, count: int) -> list[Feeds]:
    """The first samples that were not calibrated on, else calibration samples."""
    data = ctx.holdout if ctx.holdout is not None else ctx.data
    return [dict(feeds) for feeds in islice(data or (), count)]


def _identity(model: ir.Model, plan: QuantPlan, samples: list[Feeds], metric: Metric) -> str:
    """Digest of everything that the findings depend on."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(fingerprint(model).encode())
    digest.update(json.dumps(plan.to_storage()[0], sort_keys=True).encode())
    digest.update(metric.encode())
    for feeds in samples:
        for name in sorted(feeds):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(feeds[name]).tobytes())
    return digest.hexdigest()


class _Cache:
    """A text file: the identity on the first line, then one finding a line.

    Args:
        path: empty for no cache.
        identity: of the run; a file of another run is refused.
    """

    def __init__(self, path: str, identity: str) -> None:
        self._path = Path(path) if path else None
        self._identity = identity

    def read(self) -> Iterator[tuple[str, Score]]:
        """The findings so far; starts the file if there is none.

        Raises:
            DataError: ``DATA-CACHE``: the file belongs to another model, plan or samples.
        """
        if self._path is None:
            return
        lines = self._path.read_text().split("\n") if self._path.exists() else []
        if not lines or not lines[0]:
            self._path.write_text(json.dumps({"sensitivity": self._identity}) + "\n")
            return
        if lines[0] != json.dumps({"sensitivity": self._identity}):
            raise DataError(
                "DATA-CACHE",
                f"{self._path} holds findings on another model, plan or samples",
                "give another file, or remove this one",
            )
        whole = lines[1:-1]  # what follows the last newline was cut off by a kill
        if lines[-1]:
            self._path.write_text("\n".join([lines[0], *whole]) + "\n")
        for line in whole:
            site, score = json.loads(line)
            yield site, Score(**score)

    def add(self, site: str, score: Score) -> None:
        """Write one finding."""
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps([site, asdict(score)]) + "\n")
