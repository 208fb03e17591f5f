"""``sanity``: look at the result as a user would, before anybody else has to.

On samples that no pass calibrated on, the model is run beside the one that came in. Scales must be
finite and positive, outputs finite, and nothing that was alive may have become all zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.calibration.data import CalibrationData
from onnxq.errors import QualityError, SpecError
from onnxq.graph.match import const_array
from onnxq.graph.match.values import node_label, op_domain
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.runtime.difference import OutputDiff, Tally
from onnxq.runtime.workspace import Workspace, run_samples

_SCALE_INPUTS = {
    ("", "QuantizeLinear"): 1,
    ("", "DequantizeLinear"): 1,
    ("com.microsoft", "QuantizeLinear"): 1,
    ("com.microsoft", "DequantizeLinear"): 1,
    ("com.microsoft", "MatMulNBits"): 2,
}
"""Where the scale stands among an operator's inputs, by domain and type."""

_BISECT = "run with --bisect to see which pass broke it"

_FLAGS: dict[str, tuple[str, str]] = {
    "all-zero": ("QUALITY-ALL-ZERO", "has become all zero"),
    "non-finite": ("QUALITY-NOT-FINITE", "has NaN or Inf where the original has numbers"),
    "shape": ("QUALITY-SHAPE", "has another shape than the original's"),
}


@dataclass(frozen=True)
class Sanity(Pass):
    """Check scales, and outputs against the model that came in.

    Args:
        min_cosine: least mean cosine of any output with the original's; below it the run fails.
        samples: how many held-back samples are compared.
    """

    name: ClassVar[str] = "sanity"
    summary: ClassVar[str] = "check scales, and outputs against the original on held-back samples"
    tolerance: ClassVar[float | None] = 0.0
    may_match_nothing: ClassVar[bool] = True

    min_cosine: float = 0.5
    samples: int = 8

    def __post_init__(self) -> None:
        if not -1.0 <= self.min_cosine <= 1.0:
            raise SpecError("SPEC-RANGE", f"min-cosine={self.min_cosine} is not a cosine")
        if self.samples < 1:
            raise SpecError("SPEC-RANGE", f"samples={self.samples} leaves nothing to compare on")

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Raise if the result is broken; report how close it is otherwise."""
        report = PassReport()
        report.note(f"{_check_scales(model)} scale tensors are finite and positive")
        if ctx.holdout is None or len(ctx.holdout) == 0:
            report.skip("outputs", "no held-back samples to compare on")
            return report
        for found in self._compare(model, ctx, ctx.holdout):
            self._judge(found)
            report.change(
                found.name, "compared with the original", f"cosine {found.cosine_mean:.5f}"
            )
        return report

    def _compare(
        self, model: ir.Model, ctx: Context, holdout: CalibrationData
    ) -> Iterator[OutputDiff]:
        """How far each float output is from the original's.

        One model is open at a time, and the first one's outputs wait on disk: two models and the
        outputs of a decoder at once would set the peak memory of the whole run.
        """
        samples = list(islice(holdout, self.samples))
        names = [str(value.name) for value in ctx.reference.graph.outputs]
        kept_names = {str(value.name) for value in model.graph.outputs}
        # A cache that is kept in codes is no output to compare.
        tallies = {name: Tally() for name in names if name in kept_names}
        with Workspace() as workspace, TemporaryDirectory(prefix="onnxq-") as folder:
            session = workspace.session(ctx.reference, threads=ctx.threads)
            for number, outputs in enumerate(run_samples(session, samples)):
                ctx.progress(self.name, number, 2 * len(samples))
                _keep(Path(folder), number, outputs)
            del session
            session = workspace.session(model, threads=ctx.threads)
            for number, outputs in enumerate(run_samples(session, samples)):
                ctx.progress(self.name, len(samples) + number, 2 * len(samples))
                for name, kept in _kept(Path(folder), number, names):
                    if name in tallies:
                        tallies[name].add(kept, outputs[name])
        return (tally.output(name) for name, tally in tallies.items() if tally.cosines)

    def _judge(self, found: OutputDiff) -> None:
        """Raise if an output is broken."""
        for flag in found.flags:
            code, what = _FLAGS[flag]
            raise QualityError(
                code,
                f"output `{found.name}` {what}",
                _BISECT,
            )
        if found.cosine_mean < self.min_cosine:
            raise QualityError(
                "QUALITY-SANITY",
                f"output `{found.name}` has cosine {found.cosine_mean:.4f} with the original, "
                f"below {self.min_cosine:g}",
                _BISECT,
                output=found.name,
                cosine=found.cosine_mean,
            )


def _check_scales(model: ir.Model) -> int:
    """Check every constant scale; how many there are."""
    count = 0
    for node in model.graph.all_nodes():
        index = _SCALE_INPUTS.get((op_domain(node), node.op_type))
        scale = None if index is None else const_array(node.inputs[index], model.ir_version)
        if scale is None:
            continue
        count += 1
        wide = scale.astype(np.float64)
        # MatMulNBits takes signed scales, and 0 for a block of zeros; elsewhere both are errors.
        positive = node.op_type == "MatMulNBits" or bool((wide > 0).all())
        if not np.isfinite(wide).all() or not positive:
            raise QualityError(
                "QUALITY-SCALE",
                f"{node.op_type} `{node_label(node)}` has a scale that is not finite and positive",
                "this is a bug in the pass that wrote it; please report it",
                node=node_label(node),
            )
    return count


def _keep(folder: Path, sample: int, outputs: Mapping[str, object]) -> None:
    """Write the float outputs of one sample; sequences, labels and texts are not compared."""
    for index, value in enumerate(outputs.values()):
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size > 0:
            np.save(folder / f"{sample}.{index}.npy", value)


def _kept(
    folder: Path, sample: int, names: Sequence[str]
) -> Iterator[tuple[str, npt.NDArray[np.floating]]]:
    """What :func:`_keep` wrote, mapped into memory, in the order of ``names``."""
    for index, name in enumerate(names):
        path = folder / f"{sample}.{index}.npy"
        if path.exists():
            yield name, np.load(path, mmap_mode="r")
