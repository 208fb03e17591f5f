"""What the runtime that the model is for can do: the facts that the deciding passes ask about.

Facts are from measurements (docs/targets.md has the table, benchmarks/targets.py makes it) and from
the runtimes' operator lists; docs/targets.md says what was not run. What a target does not list is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from onnxq.errors import SpecError, UnsupportedError
from onnxq.formats import NAMED_FLOATS, Format, IntFormat, MiniFloat, MxFormat, NvFp4Format

Form = Literal["MatMulNBits", "DequantizeLinear", "blocked", "function", "block-scaled"]
"""How a weight-only layer stores its codes: onnxruntime's packed product, the standard's
DequantizeLinear by tensor or channel, the same in blocks (opset 21), a model-local function, or
onnxruntime's products of FP4 and FP8 weights, which run on CUDA."""

EmbeddingForm = Literal["rows", "dequantize", "codes"]
"""How an embedding table in 8 bits is read: rows of codes times rows of scales; a Gather behind
DequantizeLinear by rows; or a Gather of codes under one scale, with Q/DQ on both sides."""

ALL_FORMS: Final[tuple[Form, ...]] = ("MatMulNBits", "DequantizeLinear", "blocked", "function")

NBITS: Final = (2, 4, 8)
NBITS_BLOCKS: Final = (16, 32, 64, 128, 256)
"""Blocks that onnxruntime's CPU kernel of MatMulNBits (1.31) takes."""

DEFAULT_BLOCK: Final = 32


@dataclass(frozen=True)
class Target:
    """A runtime's abilities.

    Args:
        name: as the user types it.
        doc: one line for the docs.
        activations: integer formats of activations, the default first; empty: all, uint8 first.
        weights: integer formats of the weights of layers with quantized activations, the default
            first; empty: all, int8 first.
        forms: how weights under float activations may be stored.
        bits: widths of the integers that its DequantizeLinear takes as weights.
        blocks: sizes of blocks, the default first; empty: any, 32 by default.
        whole_blocks: a block must divide the layer's input width.
        contrib: operators of ``com.microsoft`` that it has; None: all.
        contrib_qdq: it reads ``com.microsoft`` Q/DQ, which take 4 and 16 bits below opset 21.
        dynamic_quant: it runs ``DynamicQuantizeLinear`` + ``MatMulInteger``.
        per_channel_matmul: MatMul and Gemm weights may have one scale a column.
        embedding: how tables in 8 bits are read.
        static_shapes: all inputs must have fixed dimensions.
        float8: it takes tensors of 8-bit floats.
        float16_products: its packed products are made for float16 activations: `pack` casts
            around them.
        float8_products: it multiplies FP8 activations by FP8 weights: `pack` keeps both in one
            operator.
        needs: an operator that the model must have, as ``domain::type``.
    """

    name: str
    doc: str
    activations: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    forms: tuple[Form, ...] = ALL_FORMS
    bits: tuple[int, ...] = (2, 4, 8, 16)
    blocks: tuple[int, ...] = ()
    whole_blocks: bool = False
    contrib: frozenset[str] | None = None
    contrib_qdq: bool = False
    dynamic_quant: bool = True
    per_channel_matmul: bool = True
    embedding: EmbeddingForm = "rows"
    static_shapes: bool = False
    float8: bool = True
    float16_products: bool = False
    float8_products: bool = False
    needs: str = ""

    @property
    def activation(self) -> str:
        """The format of activations when none is asked for."""
        return self.activations[0] if self.activations else "uint8"

    @property
    def weight(self) -> str:
        """The format of weights under quantized activations when none is asked for."""
        return self.weights[0] if self.weights else "int8"

    def has(self, contrib_op: str) -> bool:
        """Whether it runs ``com.microsoft::contrib_op``."""
        return self.contrib is None or contrib_op in self.contrib

    def check_static(self, weights: str, activations: str) -> None:
        """Refuse formats of a static layer that the runtime was not seen to run.

        Raises:
            UnsupportedError: ``TARGET-WEIGHTS``, ``TARGET-ACTIVATIONS``.
        """
        for what, name, known in (
            ("weights", weights, self.weights),
            ("activations", activations, self.activations),
        ):
            if known and name not in known:
                raise UnsupportedError(
                    f"TARGET-{what.upper()}",
                    f"target `{self.name}` takes {what} in {' or '.join(known)}, not {name}",
                    f"leave {what} out to get {known[0]}, or choose another target",
                )

    def form_of(self, fmt: Format, block: int, *, real_zero: bool = False) -> Form:
        """How a weight-only layer in ``fmt`` is stored.

        Args:
            fmt: the weight's format.
            block: elements that share a scale; 0: one scale a channel.
            real_zero: zero points are no integers, which DequantizeLinear does not take.

        Raises:
            UnsupportedError: ``TARGET-WEIGHTS``, ``TARGET-BLOCK``.
        """
        fitting: list[Form] = ["function"]
        if isinstance(fmt, IntFormat):
            if fmt.bits in (4, 8, 16) and fmt.bits in self.bits and not real_zero:
                fitting.insert(0, "blocked" if block else "DequantizeLinear")
            # That zero points may be real numbers is onnxruntime's own reading of its operator.
            packs = block in NBITS_BLOCKS and fmt.bits in NBITS
            if packs and (self.contrib is None or not real_zero):
                fitting.insert(0, "MatMulNBits")
        elif _is_block_scaled(fmt):
            fitting.insert(0, "block-scaled")
        for form in fitting:
            if form in self.forms:
                self._check_block(fmt, block)
                return form
        blocks = f" in blocks of {block}" if block else ""
        raise UnsupportedError(
            "TARGET-WEIGHTS",
            f"target `{self.name}` has no way to store {fmt} weights{blocks} under float "
            "activations",
            f"it takes {self._words()}",
        )

    def _check_block(self, fmt: Format, block: int) -> None:
        small = isinstance(fmt, IntFormat) and fmt.bits < 8
        if self.blocks and (block or small) and block not in self.blocks:
            raise UnsupportedError(
                "TARGET-BLOCK",
                f"target `{self.name}` takes {fmt} weights in blocks of "
                f"{' or '.join(map(str, sorted(self.blocks)))}, not of {block}",
                f"leave block out to get {self.blocks[0]}",
            )

    def _words(self) -> str:
        """What it takes under float activations."""
        words = []
        widths = "/".join(f"int{bits}" for bits in self.bits)
        if "MatMulNBits" in self.forms:
            words.append("int2/int4/int8 in blocks (MatMulNBits)")
        if "DequantizeLinear" in self.forms:
            words.append(f"{widths} without blocks")
        if "blocked" in self.forms:
            words.append(f"{widths} in blocks")
        return ", ".join(words) if words else "none: use mode=static"

    def blocks_for(self, fmt: Format, width: int) -> int | None:
        """The block of a layer with ``width`` inputs when none is asked for; None: none fits.

        Integers of 4 bits and less get blocks; other formats have their own or none.
        """
        if not isinstance(fmt, IntFormat) or fmt.block or fmt.bits > 4:
            return int(fmt.block)
        for block in self.blocks or (DEFAULT_BLOCK,):
            if not self.whole_blocks or width % block == 0:
                return block
        return None


def _is_block_scaled(fmt: Format) -> bool:
    """Whether E2M1 or E4M3 codes with scales, as onnxruntime's CUDA products take them."""
    if isinstance(fmt, MxFormat):
        return fmt.element in ("fp4", "fp8e4m3")
    eight = isinstance(fmt, MiniFloat) and replace(fmt, block=0) == NAMED_FLOATS["fp8e4m3"]
    return isinstance(fmt, NvFp4Format) or eight


def opset_of(form: Form, fmt: Format) -> int:
    """Lowest opset in which a weight-only form can be written."""
    if form == "MatMulNBits":
        return 0
    if form in ("function", "block-scaled"):
        return 19
    eight = isinstance(fmt, IntFormat) and fmt.bits == 8
    return 13 if form == "DequantizeLinear" and eight else 21


_EIGHT: Final = ("uint8", "int8")

TARGETS: Final[dict[str, Target]] = {
    t.name: t
    for t in (
        Target("cpu", "onnxruntime on x86-64 and Arm CPUs"),
        Target(
            "cuda",
            "onnxruntime's CUDA provider: as cpu, and products of FP4 and FP8 weights",
            forms=(*ALL_FORMS, "block-scaled"),
            float16_products=True,
            float8_products=True,
        ),
        Target("web-wasm", "onnxruntime-web, WebAssembly provider"),
        Target("web-webgpu", "onnxruntime-web, WebGPU provider: int4 first", float8=False),
        Target(
            "genai",
            "onnxruntime-genai: MatMulNBits in a decoder that has GroupQueryAttention already",
            forms=("MatMulNBits",),
            needs="com.microsoft::GroupQueryAttention",
        ),
        Target(
            "openvino",
            "OpenVINO: 8-bit activations, int8 weights, int4 as MatMulNBits or in blocks",
            activations=_EIGHT,
            weights=("int8",),
            forms=("MatMulNBits", "DequantizeLinear", "blocked"),
            bits=(4, 8),
            contrib=frozenset({"MatMulNBits"}),
            float8=False,
        ),
        Target(
            "tensorrt",
            "TensorRT through ONNX: symmetric int8 with zero point 0, int4 in blocks of 64 or 128",
            activations=("int8",),
            weights=("int8",),
            forms=("DequantizeLinear", "blocked"),
            bits=(4, 8),
            blocks=(128, 64),
            whole_blocks=True,
            contrib=frozenset(),
            dynamic_quant=False,
            embedding="dequantize",
        ),
        Target(
            "qnn",
            "Qualcomm QNN HTP: uint8 weights, uint8 or uint16 activations, fixed shapes",
            activations=("uint8", "uint16"),
            weights=("uint8", "int8", "int4"),
            forms=(),
            bits=(8,),
            contrib=frozenset({"QuantizeLinear", "DequantizeLinear"}),
            contrib_qdq=True,
            dynamic_quant=False,
            per_channel_matmul=False,
            embedding="codes",
            static_shapes=True,
            float8=False,
        ),
        Target(
            "iree",
            "IREE: 8-bit Q/DQ",
            activations=_EIGHT,
            weights=_EIGHT,
            forms=("DequantizeLinear",),
            bits=(8,),
            contrib=frozenset(),
            float8=False,
        ),
        Target(
            "tract",
            "tract: 8-bit Q/DQ",
            activations=_EIGHT,
            weights=_EIGHT,
            forms=("DequantizeLinear",),
            bits=(8,),
            contrib=frozenset(),
            float8=False,
        ),
    )
}


def parse_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        SpecError: no such target; the hint lists those there are.
    """
    try:
        return TARGETS[name]
    except KeyError:
        raise SpecError(
            "SPEC-TARGET", f"there is no target `{name}`", f"one of: {', '.join(TARGETS)}"
        ) from None
