"""Reads ``ops.def``, loads operator definitions when asked, and puts operators into models."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onnxq.errors import InternalError, PreconditionError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir

DOMAIN = "com.onnxq"

# Model-local functions came with IR version 8.
_MIN_IR_VERSION = 8

_ROW = re.compile(r"^ONNXQ_KERNEL\((\w+),\s*(\d+),\s*(\w+),\s*(\w+)\)$", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """One row of ``ops.def``: a compiled kernel that exists.

    Args:
        op: operator name.
        since_version: version of the domain that gave the operator its present meaning.
        provider: ``CPU`` or ``CUDA``.
        dtype: ONNX name of the activations' element type, for example ``float32``.
    """

    op: str
    since_version: int
    provider: str
    dtype: str


@dataclass(frozen=True)
class Attribute:
    """An attribute of an operator; a node must write every one of them.

    The default that a function declares never reaches a compiled kernel, so there are none.
    """

    name: str
    type: Literal["INT", "FLOAT", "STRING", "INTS", "FLOATS"]
    doc: str


@dataclass(frozen=True)
class Operator:
    """What an operator means, in each of its forms.

    Args:
        name: operator name in domain ``com.onnxq``.
        doc: Markdown: what it computes, with shapes, and what it does at the edges.
        inputs: name and description with shape of each input.
        outputs: name and description with shape of each output.
        min_opset: oldest default-domain opset in which the body can be written.
        build_function: makes the body; called once, and only when a model needs it.
        reference: the same in numpy; arrays in, a tuple of arrays out; keyword attributes.
        attributes: what the node must carry.
        typed_by: the input whose element type the rows of ops.def name; empty for the first.
    """

    name: str
    doc: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    min_opset: int
    build_function: Callable[[], onnx.FunctionProto]
    reference: Callable[..., tuple[np.ndarray[Any, Any], ...]]
    attributes: Sequence[Attribute] = field(default=())
    typed_by: str = ""

    @functools.cached_property
    def function(self) -> onnx.FunctionProto:
        """The body as a function in domain ``com.onnxq``; copy it before changing it."""
        return self.build_function()

    @property
    def since_version(self) -> int:
        """Version of the domain that gave the operator its present meaning."""
        return next(kernel.since_version for kernel in kernels() if kernel.op == self.name)


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """Every row of ``ops.def``, in its order."""
    text = (Path(__file__).parent / "ops.def").read_text(encoding="utf-8")
    rows = tuple(
        Kernel(op, int(since), provider, dtype) for op, since, provider, dtype in _ROW.findall(text)
    )
    for op in {row.op for row in rows}:
        if len({row.since_version for row in rows if row.op == op}) != 1:
            raise InternalError("INTERNAL-OPS-DEF", f"ops.def gives {op} more than one version")
    return rows


def names() -> tuple[str, ...]:
    """The operators that exist, in the order of ``ops.def``."""
    return tuple(dict.fromkeys(kernel.op for kernel in kernels()))


def domain_version() -> int:
    """The version of domain ``com.onnxq`` that models written now import."""
    return max(kernel.since_version for kernel in kernels())


@functools.cache
def get(op_name: str) -> Operator:
    """The definition of an operator; its module is imported at the first call.

    Raises:
        UnsupportedError: ``UNSUPPORTED-OPERATOR``, there is no operator of that name.
    """
    if op_name not in names():
        raise UnsupportedError(
            "UNSUPPORTED-OPERATOR",
            f"{DOMAIN} has no operator {op_name!r}",
            f"the operators are: {', '.join(names())}",
        )
    module = importlib.import_module(f"onnxq.custom_ops.defs.{_module_name(op_name)}")
    operator = module.OPERATOR
    assert isinstance(operator, Operator)
    return operator


def attach(model: ir.Model, op_name: str) -> None:
    """Make a model able to hold an operator: add its body and the import of its domain.

    The body is written in the model's own default-domain opset, so that inlining it never mixes
    opsets. Doing it twice changes nothing.

    Raises:
        UnsupportedError: ``UNSUPPORTED-OPERATOR``, there is no operator of that name.
        PreconditionError: ``PRECONDITION-OPSET``, the model's opset is too old for the body.
    """
    import onnx_ir as ir

    operator = get(op_name)
    opset = model.opset_imports.get("", 0)
    if opset < operator.min_opset:
        raise PreconditionError(
            "PRECONDITION-OPSET",
            f"{DOMAIN}:{op_name} needs opset {operator.min_opset} or newer, the model has {opset}",
            "raise the opset first, for example with the pass canonicalize",
        )
    model.ir_version = max(model.ir_version, _MIN_IR_VERSION)
    model.opset_imports[DOMAIN] = domain_version()
    function = ir.serde.deserialize_function(operator.function)
    if function.identifier() in model.functions:
        return
    function.opset_imports[""] = opset
    # A body may use our other operators; what it uses stands before it.
    for node in function:
        if node.domain == DOMAIN:
            attach(model, node.op_type)
    model.functions[function.identifier()] = function


def make_node(
    op_name: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int | float | str | Sequence[int] | Sequence[float]] | None = None,
    *,
    name: str | None = None,
) -> ir.Node:
    """A node of one of our operators, with every attribute written on it.

    Raises:
        UnsupportedError: ``UNSUPPORTED-OPERATOR``, there is no operator of that name;
            ``UNSUPPORTED-OPERATOR-DTYPE``, no kernel takes the type of the first
            (or `typed_by`) input: with the library
            registered ONNX Runtime would refuse the model, instead of running the body.
        InternalError: ``INTERNAL-OPERATOR-NODE``, the inputs or attributes are not the operator's.
    """
    import onnx_ir as ir

    operator = get(op_name)
    given = dict(attributes or {})
    expected = {attribute.name for attribute in operator.attributes}
    if set(given) != expected or len(inputs) != len(operator.inputs):
        raise InternalError(
            "INTERNAL-OPERATOR-NODE",
            f"{DOMAIN}:{op_name} takes {len(operator.inputs)} inputs and the attributes "
            f"{sorted(expected)}, got {len(inputs)} and {sorted(given)}",
        )
    dtypes = {kernel.dtype for kernel in kernels() if kernel.op == op_name}
    typed = list(operator.inputs).index(operator.typed_by) if operator.typed_by else 0
    decisive = inputs[typed] if inputs else None
    dtype = None if decisive is None else decisive.dtype
    if dtype is not None and _dtype_name(dtype) not in dtypes:
        raise UnsupportedError(
            "UNSUPPORTED-OPERATOR-DTYPE",
            f"{DOMAIN}:{op_name} has no kernel for {_dtype_name(dtype)} "
            f"{operator.typed_by or 'activations'}",
            f"it takes {', '.join(sorted(dtypes))}; cast the input",
        )
    return ir.node(
        op_name,
        inputs,
        given,
        domain=DOMAIN,
        num_outputs=len(operator.outputs),
        name=name,
    )


def _dtype_name(dtype: ir.DataType) -> str:
    """``FLOAT`` -> ``float32``: as numpy and ops.def call it."""
    return "float32" if dtype.name == "FLOAT" else dtype.name.lower()


def _module_name(op_name: str) -> str:
    """``DynamicQuantizePerToken`` -> ``dynamic_quantize_per_token``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", op_name).lower()
