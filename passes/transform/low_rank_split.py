"""``low-rank-split``: take the largest directions of a weight off before the rest is rounded.

A few singular directions hold most of the range of many weights. In a thin branch of their own they
stay in float, and the residual that is left to be rounded is smaller and flatter (SVDQuant,
arXiv 2411.05007)::

    x W = (x A) B + x (W - A B)        A [K, r], B [r, N]: truncated SVD of W [K, N]

The branch is a node ``com.onnxq.low_rank::Branch`` with a body of two products, so that no later
pass takes it for layers to be rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import onnx.parser
import onnx_ir as ir

from onnxq.errors import SpecError
from onnxq.graph.edit import Names, add_initializer, insert_after
from onnxq.graph.match import Linear, analyze, value_dtype
from onnxq.passes.contract import Context, Pass, PassReport
from onnxq.passes.keys import PLAN, STATISTICS
from onnxq.passes.transform.folding import put_weight, weight64
from onnxq.solvers.low_rank import low_rank_split

Array = npt.NDArray[Any]

DOMAIN: Final = "com.onnxq.low_rank"
OP: Final = "Branch"
_BODY: Final = f"""<opset_import: ["" : 13], domain: "{DOMAIN}">
{OP} (x, down, up) => (y) {{
  thin = MatMul (x, down)
  y = MatMul (thin, up)
}}"""


@dataclass(frozen=True)
class LowRankSplit(Pass):
    """Split weights into a thin float branch and a residual to be rounded.

    Args:
        rank: r, width of the branch.
        layers: globs of the layers to split; all by default.
    """

    name: ClassVar[str] = "low-rank-split"
    summary: ClassVar[str] = "take the largest directions of weights into a thin float branch"
    invalidates: ClassVar = (STATISTICS,)
    forbids: ClassVar = (PLAN,)
    tolerance: ClassVar[float | None] = 1e-4

    rank: int = 32
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SpecError("SPEC-RANGE", f"rank={self.rank} is below 1")

    def candidates(self, model: ir.Model) -> list[str]:
        """Matrix products with a constant weight."""
        return [linear.name for linear in analyze(model).linears if self._wants(linear)]

    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Split every layer for which the branch is thin."""
        report = PassReport()
        names = Names(model.graph)
        chosen = [linear for linear in analyze(model).linears if self._wants(linear)]
        if not chosen:
            report.skip("the model", "no matrix product with a constant weight is asked for")
        for done, linear in enumerate(chosen):
            ctx.progress(self.name, done, len(chosen))
            reason = self._reason_against(linear)
            if reason is not None:
                report.skip(linear.name, reason)
            elif ctx.budget.take(linear.name):
                report.change(
                    linear.name, f"rank {self.rank}", _split(model, linear, self.rank, names)
                )
        ctx.progress(self.name, len(chosen), len(chosen))
        return report

    def _wants(self, linear: Linear) -> bool:
        named = not self.layers or any(fnmatchcase(linear.name, glob) for glob in self.layers)
        return named and linear.kind != "conv"

    def _reason_against(self, linear: Linear) -> str | None:
        k, n = linear.in_features, linear.out_features
        if 2 * self.rank > min(k, n):
            return f"a branch of rank {self.rank} is not thin beside {k} x {n}"
        if linear.alpha != 1.0 or linear.beta != 1.0:
            return "Gemm with alpha or beta other than 1"
        if linear.is_weight_shared:
            return "its weight has other readers, which would keep it whole"
        return None


def _split(model: ir.Model, linear: Linear, rank: int, names: Names) -> str:
    """Rewrite one layer; by how much its weight shrank."""
    weight = weight64(linear)
    left, right, _ = low_rank_split(weight, rank)
    dtype = (value_dtype(linear.weight) or ir.DataType.FLOAT).numpy()
    # What the branch holds in its own type, exactly, is what the residual lacks.
    left, right = left.astype(dtype), right.astype(dtype)
    residual = weight - left.astype(np.float64) @ right.astype(np.float64)
    put_weight(linear, residual)
    add_branch(model, linear, left, right, names)
    share = np.linalg.norm(residual) / max(float(np.linalg.norm(weight)), 1e-300)
    return f"the residual has {100 * share:.0f} % of the weight's norm"


def add_branch(model: ir.Model, linear: Linear, down: Array, up: Array, names: Names) -> None:
    """Add ``x down up`` to the product of a layer, in front of its bias.

    Args:
        model: gets the branch's body too.
        linear: a MatMul or Gemm layer.
        down: ``[K, r]``.
        up: ``[r, N]``.
        names: of the graph.
    """
    base = linear.name
    factors = [
        add_initializer(model.graph, names.fresh(f"{base}_low_rank_{what}"), array)
        for what, array in (("down", down), ("up", up))
    ]
    product = linear.node.outputs[0]
    readers = list(product.uses())
    branch = ir.Node(
        DOMAIN, OP, [linear.x, *factors], num_outputs=1, name=names.fresh(f"{base}_low_rank")
    )
    branch.outputs[0].name = names.fresh(f"{base}_low_rank_output")
    total = ir.node("Add", [product, branch.outputs[0]], name=names.fresh(f"{base}_low_rank_Add"))
    out = total.outputs[0]
    out.type, out.shape = product.type, product.shape
    insert_after(linear.node, [branch, total])
    if product.is_graph_output():
        outputs = model.graph.outputs
        outputs[list(outputs).index(product)] = out
        # Plans speak of a node without a name by its output's, which changes.
        linear.node.name = linear.name
        name, product.name = product.name, names.fresh(f"{product.name}_residual")
        out.name = name
    else:
        out.name = names.fresh(f"{product.name}_whole")
    for usage in readers:
        usage.node.replace_input_with(usage.idx, out)
    _attach(model)


def _attach(model: ir.Model) -> None:
    model.opset_imports[DOMAIN] = 1
    model.ir_version = max(model.ir_version, 8)
    function = ir.serde.deserialize_function(onnx.parser.parse_function(_BODY))
    if function.identifier() not in model.functions:
        function.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function
