"""Inputs for the contract test: for each operator, what its kernels must agree on.

An operator without an entry in ``CASES`` fails the test: an untested kernel cannot exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from onnxq import custom_ops
from onnxq.custom_ops.block_format import block_attributes
from onnxq.custom_ops.defs.dynamic_quantize_per_token import quantize_groups
from onnxq.custom_ops.packed_weight import PackedWeight, ScaleType, pack_weight
from onnxq.formats import Granularity, parse_format
from onnxq.solvers.hadamard import hadamard_matrix
from tests.custom_ops import exact
from tests.custom_ops.integer_cases import INTEGER_CASES, Raw
from tests.custom_ops.integer_random import random_integer_case

Array = np.ndarray[Any, Any]
Inputs = dict[str, Array]

# Around the widths that kernels step by (8, 16, 32, 64), primes, one, none.
_ROW_LENGTHS = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 1021)


@dataclass(frozen=True, eq=False)
class Case:
    """One run of an operator.

    Attributes:
        name: what is special about it.
        inputs: fed at run time.
        constants: further inputs, which are initializers of the model.
        attributes: of the node.
        every_opset: run the body in every opset with it.
    """

    name: str
    inputs: Inputs
    constants: Inputs = field(default_factory=dict)
    attributes: Mapping[str, int | float] = field(default_factory=dict)
    every_opset: bool = False

    def reference(self, op_name: str) -> tuple[Array, ...]:
        """The operator's numpy reference on this case."""
        operator = custom_ops.get(op_name)
        arrays = {**self.inputs, **self.constants}
        taken = {name: arrays[name] for name in operator.inputs}
        with np.errstate(all="ignore"):
            return operator.reference(**taken, **self.attributes)


def model_of(op_name: str, case: Case, *, opset: int = 21) -> bytes:
    """A model of one node with the operator's body attached; shapes are left open."""
    operator = custom_ops.get(op_name)
    values: list[ir.Value | None] = []
    for name in operator.inputs:
        if name in case.constants:
            tensor = ir.tensor(case.constants[name], name=name)
            value = ir.Value(name=name, const_value=tensor, shape=tensor.shape)
            value.type = ir.TensorType(tensor.dtype)
        else:
            dtype = ir.DataType.from_numpy(case.inputs[name].dtype)
            value = ir.Value(name=name, type=ir.TensorType(dtype))
        values.append(value)
    node = custom_ops.make_node(op_name, values, dict(case.attributes))
    outputs = case.reference(op_name)
    for value, name, array in zip(node.outputs, operator.outputs, outputs, strict=True):
        value.name = name
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    fed = [value for value in values if value is not None and value.const_value is None]
    constants = [value for value in values if value is not None and value.const_value is not None]
    graph = ir.Graph(
        fed,
        node.outputs,
        nodes=[node],
        initializers=constants,
        opset_imports={"": opset},
        name="one",
    )
    model = ir.Model(graph, ir_version=10)
    custom_ops.attach(model, op_name)
    return onnx.ModelProto.SerializeToString(ir.to_proto(model))


def single_node_model(op_name: str, dtype: str, *, opset: int = 21) -> bytes:
    """The model of the operator's first case."""
    return model_of(op_name, next(CASES[op_name](dtype)), opset=opset)


def _per_token(dtype: str) -> Iterator[Case]:
    numpy_type = np.dtype(dtype)
    rng = np.random.default_rng(7)
    shapes = [(5, k) for k in _ROW_LENGTHS]
    shapes += [(0,), (1,), (0, 4), (0, 0), (2, 0, 3), (1, 1), (2, 3, 5, 31), (4099, 3), (1, 50021)]
    for shape in shapes:
        x = rng.normal(size=shape).astype(numpy_type)
        yield Case(f"normal {shape}", {"x": x}, every_opset=0 in shape)
    # More elements than one task takes, so that the thread pool cuts it.
    yield Case("large", {"x": (rng.standard_cauchy(size=(67, 1499)) * 1e-2).astype(numpy_type)})
    info = np.finfo(numpy_type)
    rows = np.zeros((12, 37), numpy_type)
    rows[0, 0] = np.nan
    rows[1, 36] = np.inf
    rows[2, 20] = -np.inf
    rows[3] = -0.0
    rows[4] = info.smallest_subnormal
    rows[5, ::2] = -info.smallest_normal
    rows[6] = info.max
    rows[7] = -info.max
    rows[7, 3] = info.max
    rows[8] = np.arange(37) - 18.5  # ties after the division by the scale
    rows[8, 0] = 127
    rows[9, 1:] = rng.normal(size=36)
    rows[9, 0] = info.max
    rows[10] = rng.normal(size=37)
    yield Case("edges", {"x": rows}, every_opset=True)
    tail = np.where(np.arange(65) == 64, np.nan, 1.0).astype(numpy_type)
    yield Case("nan in the tail", {"x": tail})
    bits = rng.integers(0, 1 << (8 * numpy_type.itemsize), size=(64, 129), dtype=np.uint64)
    unsigned = bits.astype(f"uint{8 * numpy_type.itemsize}")
    yield Case("any bit pattern", {"x": unsigned.view(numpy_type)})
    finite = np.where(np.isfinite(unsigned.view(numpy_type)), unsigned.view(numpy_type), 0)
    yield Case("any finite bit pattern", {"x": finite.astype(numpy_type)})


# Around panels of 32 and 64 columns, steps of 4, groups, chunks of 128 and 512, tiles of 4 and 6.
_PRODUCTS = (
    (1, 1, 1, 16), (3, 7, 5, 16), (2, 16, 31, 16), (4, 63, 32, 64), (5, 64, 33, 32),
    (6, 65, 64, 32), (7, 129, 65, 32), (8, 127, 97, 128), (9, 128, 1, 64), (13, 131, 63, 1000),
    (1, 513, 64, 32), (1, 516, 40, 1024), (9, 1030, 33, 1030), (17, 577, 96, 128),
)  # fmt: skip
_WEIGHTS = (
    "int4", "uint4", "int8", "uint8", "mxfp4", "nvfp4", "nf4", "fp8", "mxint8", "mxfp8e5m2",
    "int3", "uint3", "int2", "uint2", "int6", "mxfp6e2m3", "mxfp6e3m2", "ternary", "binary", "seq2",
    "mxfp8e4m3",
)  # fmt: skip


_SCALE_TYPES: dict[str, ScaleType] = {
    "fp8": "float32", "uint8": "float32", "int8": "bfloat16", "uint2": "bfloat16"
}  # fmt: skip


def quantized_weight(
    kind: str,
    n: int,
    k: int,
    group: int,
    *,
    int8_activations: int,
    rng: np.random.Generator,
    scale_type: ScaleType | None = None,
    ordered: bool = False,
) -> PackedWeight:
    """A random weight ``[N, K]`` in one of ``_WEIGHTS``, columns in a random order if wanted."""
    w = rng.normal(size=(n, k)).astype(np.float32)
    bias = rng.normal(size=n).astype(np.float32) if n % 2 else None
    fmt = parse_format({"fp8": "fp8e4m3"}.get(kind, kind))
    granularity = None if fmt.fixed_block else Granularity.block(1, group)
    params = fmt.params(w, granularity, axis=1)
    packed = pack_weight(
        fmt,
        fmt.encode(w, params),
        params,
        int8_activations=int8_activations,
        scale_type=scale_type or _SCALE_TYPES.get(kind, "float16"),
        bias=bias,
    )
    if ordered:
        packed.inputs["order"] = rng.permutation(k).astype(np.int32)
    return packed


def takes_int8(kind: str) -> bool:
    """Whether the format's levels are multiples of one number."""
    return kind not in ("nf4", "fp8", "mxfp8e5m2", "mxfp8e4m3", "mxfp6e3m2")


def _quant_mat_mul(dtype: str) -> Iterator[Case]:
    rng = np.random.default_rng(11)
    for number, (m, k, n, group) in enumerate(_PRODUCTS):
        for offset in range(2):
            kind = _WEIGHTS[(2 * number + offset) % len(_WEIGHTS)]
            for int8 in (0, 1, 2):
                if int8 and not takes_int8(kind):
                    continue
                ordered = bool((number + int8) % 2)
                packed = quantized_weight(
                    kind, n, k, group, int8_activations=int8, rng=rng, ordered=ordered
                )
                x = rng.normal(size=(m, k)).astype(dtype)
                yield Case(
                    f"{kind} [{m}, {k}] x {n}, groups of {group}, int8 {int8}, ordered {ordered}",
                    {"x": x},
                    packed.inputs,
                    packed.attributes,
                    every_opset=number == 3,
                )
    for kind in ("int3", "uint2", "mxfp6e2m3", "mxfp6e3m2", "ternary", "binary"):
        for int8 in (False, True)[: 1 + takes_int8(kind)]:
            for m, k, n in ((1, 67, 33), (2, 131, 65), (10, 513, 97)):
                packed = quantized_weight(kind, n, k, 32, int8_activations=int8, rng=rng)
                x = rng.normal(size=(m, k)).astype(dtype)
                name = f"{kind} [{m}, {k}] x {n}, int8 {int8}"
                yield Case(name, {"x": x}, packed.inputs, packed.attributes)
    for number, (m, k, n, group) in enumerate(_PRODUCTS):
        kind = ("int4", "uint4")[number % 2]
        packed = quantized_weight(
            kind, n, k, group, int8_activations=True, rng=rng, scale_type="int16"
        )
        x = rng.normal(size=(m, k)).astype(dtype)
        name = f"{kind}, integer scales [{m}, {k}] x {n}, groups of {group}"
        yield Case(name, {"x": x}, packed.inputs, packed.attributes, every_opset=number == 3)
    for int8 in (0, 1, 2):
        packed = quantized_weight(
            "uint4", 70, 200, 32, int8_activations=int8, rng=rng, ordered=int8 != 1
        )
        x = rng.normal(size=(2, 3, 200)).astype(dtype)
        everything = {"x": x, **packed.inputs}
        yield Case(f"no constants, int8 {int8}", everything, {}, packed.attributes)
        for shape in ((200,), (0, 200), (2, 0, 200)):
            x = rng.normal(size=shape).astype(dtype)
            yield Case(f"{shape}, int8 {int8}", {"x": x}, packed.inputs, packed.attributes)
        x = rng.normal(size=(11, 200)).astype(dtype)
        x[2, 3], x[5, 0], x[7] = np.nan, np.inf, 0
        x[8] *= 1e-4
        yield Case(f"edges, int8 {int8}", {"x": x}, packed.inputs, packed.attributes)
    packed = quantized_weight("int4", 300, 288, 32, int8_activations=True, rng=rng)
    x = rng.normal(size=(150, 288)).astype(dtype)
    yield Case("large", {"x": x}, packed.inputs, packed.attributes)


def _quant_mat_mul_int8(dtype: str) -> Iterator[Case]:
    rng = np.random.default_rng(23)

    def case(
        name: str,
        kind: str,
        shape: tuple[int, ...],
        n: int,
        group: int,
        int8: int,
        *,
        every_opset: bool = False,
        scale_type: ScaleType | None = None,
    ) -> Case:
        k = shape[-1]
        packed = quantized_weight(
            kind, n, k, group, int8_activations=int8, rng=rng, scale_type=scale_type
        )
        constants = {name: array for name, array in packed.inputs.items() if name != "order"}
        x = rng.normal(size=shape).astype(np.float32)
        q, scale = quantize_groups(x, int(packed.attributes["group"]) if int8 == 2 else k)
        inputs = {"q": q.astype(dtype), "q_scale": scale}
        return Case(name, inputs, constants, packed.attributes, every_opset)

    for number, (m, k, n, group) in enumerate(_PRODUCTS):
        for int8 in (1, 2):
            kind = ("int8", "uint8", "int4", "mxint8", "nvfp4", "int3", "binary")[number % 7]
            name = f"{kind} [{m}, {k}] x {n}, groups of {group}, int8 {int8}"
            yield case(name, kind, (m, k), n, group, int8, every_opset=number == 3)
    for shape in ((200,), (0, 200), (2, 0, 200), (2, 3, 200)):
        for int8 in (1, 2):
            yield case(f"{shape}, int8 {int8}", "uint4", shape, 70, 32, int8)
    yield case("integer scales", "int4", (9, 200), 70, 32, 1, scale_type="int16")
    for int8 in (1, 2):
        edges = case(f"edges, int8 {int8}", "int4", (5, 96), 40, 32, int8)
        edges.inputs["q_scale"][1, -1], edges.inputs["q_scale"][3] = np.nan, 0
        yield edges
    yield case("large", "int4", (150, 288), 300, 32, 2)


def _dynamic_quant_mat_mul(dtype: str) -> Iterator[Case]:
    rng = np.random.default_rng(19)

    def case(name: str, kind: str, shape: tuple[int, ...], n: int, named: list[int],
             threshold: float, *, every_opset: bool = False) -> Case:  # fmt: skip
        packed = quantized_weight(kind, n, shape[-1], 32, int8_activations=True, rng=rng)
        del packed.inputs["order"]
        x = rng.normal(size=shape)
        x[..., rng.integers(shape[-1], size=3)] *= 11
        constants = {**packed.inputs, "outliers": np.array(named, np.int64)}
        attributes = {**packed.attributes, "threshold": threshold}
        return Case(name, {"x": x.astype(dtype)}, constants, attributes, every_opset)

    for number, (m, k, n, _) in enumerate(_PRODUCTS):
        kind = ("int8", "uint8", "int4", "mxint8", "nvfp4", "int3", "binary")[number % 7]
        yield case(f"{kind} [{m}, {k}] x {n}, none", kind, (m, k), n, [], 0.0, every_opset=m == 4)
        named = [int(i) for i in rng.integers(k, size=number)]
        found = number % 2
        yield case(f"{kind} [{m}, {k}] x {n}", kind, (m, k), n, named, 4.0 * found)
    for shape in ((200,), (0, 200), (2, 0, 200), (2, 3, 200)):
        yield case(f"{shape}", "int8", shape, 70, [7, 199], 6.0)
    yield case("all columns", "uint8", (9, 130), 33, list(range(130)), 6.0)
    for threshold in (0.0, 6.0):
        edges = case(f"edges {threshold}", "int8", (9, 96), 40, [5], threshold)
        x = edges.inputs["x"]
        x[2, 3], x[5, 0], x[7], x[1, 5], x[4, 9] = np.nan, np.inf, 0, np.nan, 6
        yield edges
    yield case("large", "int8", (150, 288), 300, [3, 77], 6.0)


def float8_weight(n: int, k: int, block: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Codes of E4M3 ``[n, k]`` without NaN, and scales as DynamicFloat8MatMul takes them."""
    codes = rng.integers(0, 127, size=(n, k), dtype=np.uint8)
    codes |= rng.integers(0, 2, size=(n, k), dtype=np.uint8) << 7
    shape = (-(-n // block), -(-k // (4 * block)) * 4) if block else (n, 1)
    scales = rng.lognormal(-6, 1, size=shape).astype(np.float32)
    if block:
        scales[:, k // block :] = 0
    return codes.view(ml_dtypes.float8_e4m3fn), scales


def _dynamic_float8_mat_mul(dtype: str) -> Iterator[Case]:
    rng = np.random.default_rng(23)
    shapes: tuple[tuple[tuple[int, ...], int, int], ...] = (
        ((5, 64), 33, 0), ((3, 130), 32, 0), ((2, 3, 48), 16, 0), ((0, 64), 16, 0), ((96,), 16, 0),
        ((5, 256), 144, 128), ((2, 3, 640), 130, 128), ((40, 128), 384, 128), ((0, 128), 1, 128),
    )  # fmt: skip
    for number, (shape, n, block) in enumerate(shapes):
        weight, scales = float8_weight(n, shape[-1], block, rng)
        bias = rng.normal(size=n if number % 2 else 1).astype(np.float32)
        constants = {"weight": weight, "scales": scales, "bias": bias * (number != 2)}
        x = (rng.normal(size=shape) * rng.lognormal(size=shape)).astype(dtype)
        if x.shape[0] == 5:
            x[1, 3], x[2, 0], x[4] = np.nan, np.inf, 0
        yield Case(f"{shape} x {n}, {block}", {"x": x}, constants, {"block": block}, number == 2)


# K, block, order of the core: around vectors of 8 and 16, each kind of core, some blocks.
_HADAMARDS = (
    (1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 8, 1), (16, 16, 1), (32, 32, 1), (64, 16, 1), (96, 32, 1),
    (12, 12, 12), (24, 24, 12), (60, 20, 20), (112, 56, 28), (144, 144, 36), (1536, 1536, 12),
    (2048, 2048, 1), (4096, 128, 1),
)  # fmt: skip


def _hadamard(dtype: str) -> Iterator[Case]:
    rng = np.random.default_rng(13)

    def case(name: str, x: Array, block: int, c: int, *, every_opset: bool = False) -> Case:
        constants = {"core": hadamard_matrix(c).astype(np.float32)}
        attributes = {"block": block, "scale": 1 / math.sqrt(block)}
        return Case(name, {"x": x.astype(dtype)}, constants, attributes, every_opset)

    for k, block, c in _HADAMARDS:
        x = rng.normal(size=(3, k))
        yield case(f"{k} in blocks of {block}, core {c}", x, block, c, every_opset=k == 112)
    for shape in ((0, 64), (2, 0, 64), (64,), (2, 3, 64), (4, 0)):
        yield case(f"{shape}", rng.normal(size=shape), 32, 1)
    x = rng.normal(size=(7, 96))
    x[1, 40], x[2, 0], x[3, 95], x[4], x[5] = np.nan, np.inf, -np.inf, 0, np.finfo(dtype).max
    x[6] = np.finfo(dtype).smallest_subnormal
    yield case("edges", x, 32, 1)
    yield case("edges with a core", np.where(x == 0, -0.0, x), 48, 12)
    yield case("large", rng.normal(size=(67, 1536)), 768, 12)


def _hadamard_quantize(dtype: str) -> Iterator[Case]:
    for number, case in enumerate(_hadamard(dtype)):
        k = case.inputs["x"].shape[-1]
        for group in {1 << 20, (32, 16, 20, 128)[number % 4]} if k else {32}:
            name = f"{case.name}, groups of {group}"
            if case.name == "large" and group > k:
                name = case.name
            attributes = {**case.attributes, "group": group}
            yield Case(name, case.inputs, case.constants, attributes, case.every_opset)


# Formats of activations, and the group where they have no block of their own (0: the row).
BLOCK_FORMATS = (
    ("mxfp8e4m3", 0), ("mxfp8e5m2", 0), ("mxfp6e2m3", 0), ("mxfp6e3m2", 0), ("mxfp4", 0),
    ("mxfp4-ceil", 0), ("mxint8", 0), ("nvfp4", 0), ("int8", 0), ("int8", 64), ("int4", 32),
    ("fp8e4m3", 0), ("mxfp8e4m3-ceil", 0),
)  # fmt: skip


def _quantize_block(dtype: str) -> Iterator[Case]:
    rng = np.random.default_rng(17)
    for name, group in BLOCK_FORMATS:
        attributes = block_attributes(parse_format(name), group=group)
        x = (rng.normal(size=(5, 3, 97)) * rng.lognormal(0, 2, size=(5, 1, 97))).astype(dtype)
        yield Case(f"{name} {group}", {"x": x}, attributes=attributes, every_opset=name == "mxfp4")
    mx, nv, token, row = (
        block_attributes(parse_format(name), factor=factor, clip=clip)
        for name, factor, clip in (
            ("mxfp4", 0, 1.0), ("nvfp4", 0.013, 1.0), ("nvfp4", 0, 1.0), ("int4", 0, 0.8)
        )
    )  # fmt: skip
    for attributes in (mx, nv, token, row):
        for shape in (
            (0,),
            (1,),
            (0, 4),
            (0, 97),
            (2, 0),
            (3, 31),
            (3, 32),
            (3, 33),
            (2, 15),
            (2, 17),
        ):
            x = rng.normal(size=shape).astype(dtype)
            yield Case(f"{shape}", {"x": x}, attributes=attributes, every_opset=0 in shape)
        edges = np.zeros((11, 37), dtype)
        edges[0, 0], edges[1, 36], edges[2, 20] = np.nan, np.inf, -np.inf
        edges[3] = -0.0
        edges[4] = np.finfo(dtype).smallest_subnormal
        edges[5, ::2] = -np.finfo(dtype).smallest_normal
        edges[6] = np.finfo(dtype).max
        edges[7] = (np.arange(37) - 18) / 8  # ties of E2M1
        edges[8] = np.ldexp(1.0, np.arange(37) - 22)
        edges[9] = np.nextafter(edges[8], np.array(0, dtype))
        edges[10] = np.nextafter(edges[8], np.array(np.inf, dtype))
        yield Case("edges", {"x": edges}, attributes=attributes, every_opset=True)
        unsigned = rng.integers(0, 1 << (8 * edges.itemsize), size=(64, 67), dtype=np.uint64)
        bits = unsigned.astype(f"uint{8 * edges.itemsize}").view(dtype)
        yield Case("any bit pattern", {"x": bits}, attributes=attributes)
        finite = np.where(np.isfinite(bits), bits, 0).astype(dtype)
        yield Case("any finite bit pattern", {"x": finite}, attributes=attributes)
    yield Case("large", {"x": rng.normal(size=(67, 1499)).astype(dtype)}, attributes=mx)


def _of_integers(make: Callable[[str], Iterator[Raw]]) -> Callable[[str], Iterator[Case]]:
    """The cases of an integer-only operator."""
    return lambda dtype: (Case(*raw) for raw in make(dtype))


CASES: dict[str, Callable[[str], Iterator[Case]]] = {
    **{name: _of_integers(make) for name, make in INTEGER_CASES.items()},
    "DynamicFloat8MatMul": _dynamic_float8_mat_mul,
    "DynamicQuantMatMul": _dynamic_quant_mat_mul,
    "DynamicQuantizePerToken": _per_token,
    "Hadamard": _hadamard,
    "HadamardQuantize": _hadamard_quantize,
    "QuantMatMul": _quant_mat_mul,
    "QuantMatMulInt8": _quant_mat_mul_int8,
    "QuantizeBlock": _quantize_block,
}


def same_bits(left: Array, right: Array) -> bool:
    """Equal in type, shape and every bit, NaN and the sign of zero included."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()
    )


def same_numbers(left: Array, right: Array) -> bool:
    """The same, but any NaN equals any other: arithmetic does not say which it gives."""
    nan = np.isnan(left)
    if left.shape != right.shape or not np.array_equal(nan, np.isnan(right)):
        return False
    return same_bits(np.where(nan, 1, left), np.where(nan, 1, right))


def agrees(op_name: str, case: Case, got: Sequence[Array], *, kernel: bool) -> bool:
    """Whether results are as the operator's contract says: to the bit, or within its budget."""
    expected = case.reference(op_name)
    if op_name == "DynamicQuantizePerToken" or op_name in INTEGER_CASES:
        return all(map(same_bits, got, expected))
    if op_name == "QuantizeBlock":
        return same_numbers(got[0], expected[0])
    if op_name == "HadamardQuantize":
        if kernel:
            return same_bits(got[0], expected[0]) and same_numbers(got[1], expected[1])
        return exact.is_quantized_rotation(got, {**case.inputs, **case.constants}, case.attributes)
    if got[0].dtype != expected[0].dtype or got[0].shape != expected[0].shape:
        return False
    if kernel:
        return same_numbers(got[0], expected[0])
    expect, budget = _EXACT[op_name]({**case.inputs, **case.constants}, case.attributes)
    with np.errstate(all="ignore"):
        close = np.abs(got[0].astype(np.float64) - expect) <= budget
    return bool((close | ~np.isfinite(budget) | ~np.isfinite(got[0])).all())


_EXACT: dict[str, Callable[[Inputs, Mapping[str, Any]], tuple[Array, Array]]] = {
    "DynamicFloat8MatMul": exact.dynamic_float8_mat_mul,
    "DynamicQuantMatMul": exact.dynamic_quant_mat_mul,
    "Hadamard": exact.hadamard,
    "QuantMatMul": exact.quant_mat_mul,
    "QuantMatMulInt8": exact.quant_mat_mul_int8,
}


def random_case(op_name: str, dtype: str, rng: np.random.Generator) -> Case:
    """A case of random extents, types and values."""
    if op_name in INTEGER_CASES:
        return Case(*random_integer_case(op_name, dtype, rng))
    if op_name == "DynamicQuantizePerToken":
        return Case("random", {"x": random_input(dtype, rng)})
    if op_name in ("Hadamard", "HadamardQuantize"):
        c = int(rng.choice([1, 12, 20, 28]))
        block = c << int(rng.integers(0, 7))
        shape = (int(rng.integers(0, 5)), block * int(rng.integers(0, 4)))
        x = (rng.normal(size=shape) * math.pow(10.0, rng.uniform(-4, 3))).astype(dtype)
        core = {"core": hadamard_matrix(c).astype(np.float32)}
        attributes = {"block": block, "scale": 0.5}
        if op_name == "HadamardQuantize":
            attributes["group"] = int(rng.choice([1, 4, 32, 100, 1 << 40]))
        return Case(f"{shape} {block} {c}", {"x": x}, core, attributes)
    if op_name == "QuantizeBlock":
        name, group = BLOCK_FORMATS[rng.integers(len(BLOCK_FORMATS))]
        x = random_input(dtype, rng)
        return Case(name, {"x": x}, attributes=block_attributes(parse_format(name), group=group))
    m, k, n = (int(rng.integers(low, high)) for low, high in ((0, 20), (1, 700), (1, 140)))
    kind = str(rng.choice(_WEIGHTS))
    group = int(rng.choice([16, 20, 32, 64, 128, 512, 1024]))
    outliers, quantized = op_name == "DynamicQuantMatMul", op_name == "QuantMatMulInt8"
    if outliers or quantized:
        kind = str(rng.choice([kind for kind in _WEIGHTS if takes_int8(kind)]))
    int8 = 1 if outliers else int(rng.integers(quantized, 3)) * takes_int8(kind)
    ordered = not outliers and not quantized and bool(rng.integers(2))
    packed = quantized_weight(kind, n, k, group, int8_activations=int8, rng=rng, ordered=ordered)
    x = rng.normal(size=(m, k)) * math.pow(10.0, rng.uniform(-5, 2))
    constants, attributes = dict(packed.inputs), dict(packed.attributes)
    name = f"{kind} {m} {k} {n} {group} {int8} {ordered}"
    if outliers or quantized:
        del constants["order"]
    if quantized:
        size = int(attributes["group"]) if int8 == 2 else k
        q, scale = quantize_groups(x.astype(np.float32), size)
        return Case(name, {"q": q, "q_scale": scale}, constants, attributes)
    x = x.astype(dtype)
    if outliers:
        constants["outliers"] = rng.integers(k, size=rng.integers(0, 9))
        attributes["threshold"] = float(rng.choice([0.0, np.abs(x).max(initial=1) / 2]))
    return Case(name, {"x": x}, constants, attributes)


def random_input(dtype: str, rng: np.random.Generator) -> Array:
    """An array of random rank, extents and magnitude, now and then with a NaN in it."""
    shape = tuple(int(n) for n in rng.integers(0, 70, size=rng.integers(1, 4)))
    x = rng.normal(size=shape) * math.pow(10.0, rng.uniform(-9, 4))
    if x.size and rng.random() < 0.2:
        x.flat[rng.integers(x.size)] = rng.choice([np.nan, np.inf, -np.inf])
    with np.errstate(over="ignore"):
        return x.astype(dtype)
