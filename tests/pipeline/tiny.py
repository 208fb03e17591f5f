"""A tiny model and tiny passes: the pipeline's tests need no real ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnx_ir as ir

from onnxq.errors import SpecError
from onnxq.passes.contract import Context, Key, Pass, PassReport
from onnxq.pipeline.registry import Registry

MODEL = """<ir_version: 10, opset_import: ["" : 21]>
tiny (float[N, 4] x) => (float[N, 3] y)
<float[4, 8] w1, float[8] b1, float[8, 3] w2>
{
  m = MatMul(x, w1)
  a = Add(m, b1)
  h = Relu(a)
  y = MatMul(h, w2)
}"""


def tiny_model() -> ir.Model:
    """A two-layer perceptron with fixed random weights."""
    proto = onnx.parser.parse_model(MODEL)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (4, 8)), ("b1", (8,)), ("w2", (8, 3))):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    del proto.graph.value_info[:]
    return ir.from_proto(proto)


def samples(count: int = 12, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Batches of two rows."""
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((2, 4)).astype(np.float32)} for _ in range(count)]


def weight(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def set_weight(model: ir.Model, name: str, array: np.ndarray) -> None:
    model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)


@dataclass
class Mean:
    """An artifact with a number and an array."""

    count: int
    mean: np.ndarray

    def to_storage(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"count": self.count}, {"mean": self.mean}

    @classmethod
    def from_storage(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Mean:
        return cls(header["count"], arrays["mean"])


MEAN = Key("mean", Mean, "mean of the inputs")


@dataclass(frozen=True)
class Observe(Pass):
    name: ClassVar[str] = "observe"
    summary: ClassVar[str] = "average the samples"
    provides: ClassVar = (MEAN,)
    tolerance: ClassVar[float | None] = 0.0
    needs_data: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        report = PassReport()
        rows = [s["x"].mean(0) for s in ctx.data]
        ctx.artifacts.put(MEAN, Mean(len(rows), np.mean(rows, axis=0)))
        report.change("x", "averaged", f"{len(rows)} samples")
        return report


@dataclass(frozen=True)
class Rescale(Pass):
    """Moves a factor from w2 into w1 and b1, which Relu lets through."""

    name: ClassVar[str] = "rescale"
    summary: ClassVar[str] = "move a factor through the Relu"
    invalidates: ClassVar = (MEAN,)
    tolerance: ClassVar[float | None] = 1e-5

    factor: float = 2.0
    forget: bool = False

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise SpecError("SPEC-RANGE", f"factor={self.factor} is not positive", "use above 0")

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        report = PassReport()
        for name in ("w1", "b1"):
            set_weight(model, name, weight(model, name) * self.factor)
            report.change(name, "scaled")
        if self.forget:
            report.skip("w2", "forgotten")
        else:
            set_weight(model, "w2", weight(model, "w2") / self.factor)
            report.change("w2", "scaled")
        return report


@dataclass(frozen=True)
class Round(Pass):
    """Rounds weights site by site, asking the budget; ``ruin`` zeroes one of them."""

    name: ClassVar[str] = "round"
    summary: ClassVar[str] = "round weights to a grid"
    requires: ClassVar = (MEAN,)
    invalidates: ClassVar = (MEAN,)

    bits: int = 8
    sites: tuple[str, ...] = ("w1", "b1", "w2")
    ruin: str | None = None

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        report = PassReport()
        ctx.artifacts.get(MEAN)
        for name in self.sites:
            if name not in model.graph.initializers:
                report.skip(name, "no such weight")
            elif not ctx.budget.take(name):
                report.skip(name, "the budget is spent")
            else:
                w = weight(model, name)
                step = np.abs(w).max() / 2 ** (self.bits - 1)
                set_weight(model, name, np.round(w / step) * step * (name != self.ruin))
                report.change(name, f"rounded to {self.bits} bits")
        return report


@dataclass(frozen=True)
class Corrupt(Pass):
    name: ClassVar[str] = "corrupt"
    summary: ClassVar[str] = "leave an invalid graph"

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        node = next(n for n in model.graph if n.op_type == "Relu")
        node.replace_input_with(0, ir.Value(name="nowhere"))
        return PassReport()


@dataclass(frozen=True)
class Lazy(Pass):
    """Declares an artifact that it never provides."""

    name: ClassVar[str] = "lazy"
    summary: ClassVar[str] = "break a declaration"
    provides: ClassVar = (MEAN,)

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        return PassReport()


@dataclass(frozen=True)
class Nosy(Pass):
    """Reads an artifact that it does not declare."""

    name: ClassVar[str] = "nosy"
    summary: ClassVar[str] = "read what is not declared"

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        ctx.artifacts.get(MEAN)
        return PassReport()


@dataclass(frozen=True)
class Early(Pass):
    name: ClassVar[str] = "early"
    summary: ClassVar[str] = "run only before the mean is known"
    forbids: ClassVar = (MEAN,)
    tolerance: ClassVar[float | None] = 0.0
    may_match_nothing: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        return PassReport()


@dataclass(frozen=True)
class Options(Pass):
    """One option of every type that the grammar knows."""

    name: ClassVar[str] = "options"
    summary: ClassVar[str] = "have options"

    whole: int = 1
    real: float = 0.5
    flag: bool = False
    text: str = "abc"
    choice: Literal["one", "two", "none"] = "one"
    number_choice: Literal[4, 8] = 8
    maybe: float | None = None
    maybe_text: str | None = None
    auto: float | Literal["auto"] = "auto"
    mixed: int | str = 0
    globs: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    nested: tuple[tuple[int, ...], ...] = ()

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        return PassReport()


@dataclass(frozen=True)
class Needy(Pass):
    name: ClassVar[str] = "needy"
    summary: ClassVar[str] = "have an option without a default"

    amount: int = dataclasses.field()

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        return PassReport()


REGISTRY = Registry.of(Observe, Rescale, Round, Corrupt, Lazy, Nosy, Early, Options, Needy)
