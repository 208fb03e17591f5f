"""BERT encoders as ONNX graphs, in three exporters' spellings.

The function (Devlin et al. 2019, arXiv:1810.04805, post-LayerNorm), with ids ``[N, S]``, hidden
size D, H heads of width d = D/H:

    x0 = LN(E_word[ids] + E_type[types] + E_pos[0..S-1])                          [N, S, D]
    a  = softmax(q kT / sqrt(d) + m) v,  m = 0 where attended, finfo.min elsewhere [N, H, S, d]
    y  = LN(x + W_o a + b_o);  x' = LN(y + W_2 gelu(W_1 y + b_1) + b_2)            [N, S, D]

Spellings, all the same function:

``plain``
    LayerNormalization and Gelu operators, MatMul with ``[in, out]`` weights, Reshape with constant
    shapes; what a person would write.
``torchscript``
    As ``torch.onnx.export`` before dynamo: LayerNorm and GELU in elementary operators, shapes
    computed with Shape/Gather/Unsqueeze/Concat, Constant nodes, mask Unsqueeze/Cast/Sub/Mul.
``dynamo``
    As torch 2.x ``dynamo=True``: weights ``[out, in]`` read through Transpose, mask as
    And/Where, q and k each multiplied with the root of the scale, k transposed as a 3-d tensor,
    softmax followed by an IsNaN/Where guard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from onnxq.errors import DataError
from onnxq.models.builder import GraphBuilder

Array = npt.NDArray[Any]
Spelling = Literal["plain", "torchscript", "dynamo"]
SPELLINGS: tuple[Spelling, ...] = ("plain", "torchscript", "dynamo")

MASK_MIN = float(np.finfo(np.float32).min)
"""What exporters add to the score of a masked key."""


@dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT encoder; sizes as in the checkpoint's ``config.json``."""

    hidden_size: int = 384
    intermediate_size: int = 1536
    num_heads: int = 12
    num_layers: int = 6
    norm_eps: float = 1e-12

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads


def build_bert(
    weights: Mapping[str, Array],
    config: BertConfig,
    spelling: Spelling,
    metadata: dict[str, str],
) -> onnx.ModelProto:
    """The encoder without pooler: three int64 ``[N, S]`` inputs, ``last_hidden_state [N, S, D]``.

    Args:
        weights: Hugging Face names without the ``bert.`` prefix; linear weights ``[out, in]`` f32.
        config: the shape of the model.
        spelling: see the module.
        metadata: for ``metadata_props``.

    Raises:
        DataError: ``DATA-CHECKPOINT-INCOMPLETE`` when a tensor is missing or has the wrong shape.
    """
    writers = {"plain": _Plain, "torchscript": _TorchScript, "dynamo": _Dynamo}
    return writers[spelling](weights, config).model(metadata)


_POSITIONS = "embeddings.position_embeddings.weight"


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    sizes = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(want in (None, size) for size, want in sizes)


class _Plain:
    """The plain spelling; the others override what they spell differently."""

    constants = "initializer"

    def __init__(self, weights: Mapping[str, Array], config: BertConfig) -> None:
        self.weights = weights
        self.config = config
        self.g = GraphBuilder("bert", constants=self.constants)

    # The walk through the model, the same for all spellings.

    def model(self, metadata: dict[str, str]) -> onnx.ModelProto:
        g = self.g
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            g.add_input(name, np.int64, ["batch", "sequence"])
        with g.scope("embeddings"):
            x = self.embeddings()
        mask = self.mask()
        for i in range(self.config.num_layers):
            with g.scope("encoder", f"layer.{i}"):
                output = "last_hidden_state" if i == self.config.num_layers - 1 else None
                x = self.layer(x, mask, f"encoder.layer.{i}", output)
        g.add_output(x, np.float32, ["batch", "sequence", self.config.hidden_size])
        return g.build(
            doc=f"BERT encoder, {type(self).__name__[1:].lower()} spelling", metadata=metadata
        )

    def layer(self, x: str, mask: str, prefix: str, output: str | None) -> str:
        g = self.g
        size, inner = self.config.hidden_size, self.config.intermediate_size
        with g.scope("attention"):
            attended = self.attention(x, mask, f"{prefix}.attention.self")
            with g.scope("output"):
                dense = self.linear(
                    attended, f"{prefix}.attention.output.dense", "dense", size, size
                )
                added = g.op("Add", dense, x)
                y = self.layer_norm(added, f"{prefix}.attention.output.LayerNorm")
        with g.scope("intermediate"):
            hidden = self.gelu(self.linear(y, f"{prefix}.intermediate.dense", "dense", inner, size))
        with g.scope("output"):
            dense = self.linear(hidden, f"{prefix}.output.dense", "dense", size, inner)
            added = g.op("Add", dense, y)
            return self.layer_norm(added, f"{prefix}.output.LayerNorm", output)

    def attention(self, x: str, mask: str, prefix: str) -> str:
        g, size = self.g, self.config.hidden_size
        query, key, value = (
            self.linear(x, f"{prefix}.{part}", part, size, size)
            for part in ("query", "key", "value")
        )
        scores = self.scores(query, key)
        probabilities = self.softmax(g.op("Add", scores, mask))
        context = g.op("MatMul", probabilities, self.split_heads(value, [0, 2, 1, 3]))
        merged = g.op("Transpose", context, perm=[0, 2, 1, 3])
        return self.merge_heads(merged)

    def embeddings(self) -> str:
        g = self.g
        words = self.lookup("word_embeddings", "input_ids")
        types = self.lookup("token_type_embeddings", "token_type_ids")
        positions = self.lookup("position_embeddings", self.positions())
        added = g.op("Add", g.op("Add", words, types), positions)
        return self.layer_norm(added, "embeddings.LayerNorm")

    def lookup(self, part: str, ids: str) -> str:
        name = f"embeddings.{part}.weight"
        table = self.g.weight(name, self.tensor(name, None, self.config.hidden_size))
        with self.g.scope(part):
            return self.g.op("Gather", table, ids, axis=0)

    def tensor(self, name: str, *shape: int | None) -> Array:
        """A checkpoint tensor of this shape; ``None`` stands for any size."""
        value = self.weights.get(name)
        if value is None or not _fits(value.shape, shape):
            found = "missing" if value is None else f"of shape {list(value.shape)}"
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise DataError(
                "DATA-CHECKPOINT-INCOMPLETE",
                f"tensor {name} is {found}; the model needs [{wanted}]",
                "give the checkpoint that this builder is for",
            )
        return np.asarray(value, dtype=np.float32)

    def position_ids(self) -> Array:
        """``[1, P]``: all positions that the table knows."""
        table = self.tensor(_POSITIONS, None, self.config.hidden_size)
        return np.arange(table.shape[0], dtype=np.int64)[None]

    # What the spellings differ in.

    def positions(self) -> str:
        """Position ids ``[1, S]``."""
        g = self.g
        ids = g.weight("embeddings.position_ids", self.position_ids())
        length = g.op("Shape", "input_ids", start=1, end=2)
        return g.op("Slice", ids, g.ints(0), length, g.ints(1))

    def mask(self) -> str:
        """Additive mask ``[N, 1, 1, S]``: 0 where attended, ``finfo.min`` elsewhere."""
        g = self.g
        mask = g.op("Unsqueeze", "attention_mask", g.ints(1, 2))
        mask = g.op("Cast", mask, to=onnx.TensorProto.FLOAT)
        return g.op(
            "Mul", g.op("Sub", g.const(1.0, np.float32), mask), g.const(MASK_MIN, np.float32)
        )

    def linear(self, x: str, prefix: str, scope: str, outputs: int, inputs: int) -> str:
        """``x W^T + b`` with W ``[outputs, inputs]``."""
        g = self.g
        weight = self.tensor(f"{prefix}.weight", outputs, inputs)
        bias = g.weight(f"{prefix}.bias", self.tensor(f"{prefix}.bias", outputs))
        with g.scope(scope):
            product = g.op("MatMul", x, self.linear_weight(f"{prefix}.weight", weight))
            return self.add_bias(product, bias)

    def linear_weight(self, name: str, weight: Array) -> str:
        """The right operand ``[in, out]`` of a linear layer's MatMul."""
        return self.g.weight(name, weight.T)

    def add_bias(self, product: str, bias: str) -> str:
        return self.g.op("Add", product, bias)

    def layer_norm(self, x: str, prefix: str, output: str | None = None) -> str:
        with self.g.scope("LayerNorm"):
            scale, bias = self.norm_parameters(prefix)
            return self.g.op(
                "LayerNormalization",
                x,
                scale,
                bias,
                output=output,
                axis=-1,
                epsilon=self.config.norm_eps,
            )

    def norm_parameters(self, prefix: str) -> tuple[str, str]:
        names = (f"{prefix}.weight", f"{prefix}.bias")
        scale, bias = (
            self.g.weight(name, self.tensor(name, self.config.hidden_size)) for name in names
        )
        return scale, bias

    def gelu(self, x: str) -> str:
        return self.g.op("Gelu", x)

    def split_heads(self, value: str, perm: list[int]) -> str:
        """``[N, S, D]`` to ``[N, S, H, d]``, then transposed by ``perm``."""
        g = self.g
        shape = g.ints(0, 0, self.config.num_heads, self.config.head_dim)
        return g.op("Transpose", g.op("Reshape", value, shape), perm=perm)

    def merge_heads(self, context: str) -> str:
        """``[N, S, H, d]`` to ``[N, S, D]``."""
        return self.g.op("Reshape", context, self.g.ints(0, 0, self.config.hidden_size))

    def scores(self, query: str, key: str) -> str:
        """``q kT / sqrt(d)`` as ``[N, H, S, S]``."""
        g = self.g
        heads = self.split_heads(query, [0, 2, 1, 3])
        product = g.op("MatMul", heads, self.split_heads(key, [0, 2, 3, 1]))
        return g.op("Div", product, g.const(math.sqrt(self.config.head_dim), np.float32))

    def softmax(self, scores: str) -> str:
        return self.g.op("Softmax", scores, axis=-1)


class _TorchScript(_Plain):
    constants = "node"

    def positions(self) -> str:
        g = self.g
        ids = g.weight("embeddings.position_ids", self.position_ids())
        length = g.op("Unsqueeze", self.size("input_ids", 1), g.ints(0))
        return g.op("Slice", ids, g.ints(0), length, g.ints(1), g.ints(1))

    def mask(self) -> str:
        g = self.g
        mask = g.op("Unsqueeze", g.op("Unsqueeze", "attention_mask", g.ints(1)), g.ints(2))
        mask = g.op("Cast", mask, to=onnx.TensorProto.FLOAT)
        inverted = g.op("Sub", g.const(1.0, np.float32), mask)
        return g.op("Mul", inverted, g.const(MASK_MIN, np.float32))

    def add_bias(self, product: str, bias: str) -> str:
        return self.g.op("Add", bias, product)

    def layer_norm(self, x: str, prefix: str, output: str | None = None) -> str:
        g = self.g
        with g.scope("LayerNorm"):
            scale, bias = self.norm_parameters(prefix)
            centred = g.op("Sub", x, g.op("ReduceMean", x, g.ints(-1)))
            squared = g.op("Pow", centred, g.const(2.0, np.float32))
            variance = g.op("ReduceMean", squared, g.ints(-1))
            shifted = g.op("Add", variance, g.const(self.config.norm_eps, np.float32))
            normed = g.op("Div", centred, g.op("Sqrt", shifted))
            return g.op("Add", g.op("Mul", normed, scale), bias, output=output)

    def gelu(self, x: str) -> str:
        g = self.g
        with g.scope("intermediate_act_fn"):
            erf = g.op("Erf", g.op("Div", x, g.const(math.sqrt(2.0), np.float32)))
            product = g.op("Mul", x, g.op("Add", erf, g.const(1.0, np.float32)))
            return g.op("Mul", product, g.const(0.5, np.float32))

    def size(self, x: str, axis: int) -> str:
        """One dimension of ``x`` as a scalar."""
        return self.g.op("Gather", self.g.op("Shape", x), self.g.scalar(axis), axis=0)

    def runtime_shape(self, x: str, *rest: int) -> str:
        """``[N, S, *rest]`` with N and S read from ``x`` at run time."""
        g = self.g
        sizes = [g.op("Unsqueeze", self.size(x, axis), g.ints(0)) for axis in (0, 1)]
        return g.op("Concat", *sizes, *(g.ints(n) for n in rest), axis=0)

    def split_heads(self, value: str, perm: list[int]) -> str:
        g = self.g
        shape = self.runtime_shape(value, self.config.num_heads, self.config.head_dim)
        return g.op("Transpose", g.op("Reshape", value, shape), perm=perm)

    def merge_heads(self, context: str) -> str:
        shape = self.runtime_shape(context, self.config.hidden_size)
        return self.g.op("Reshape", context, shape)


class _Dynamo(_Plain):
    def positions(self) -> str:
        g = self.g
        ids = g.op(
            "Range",
            g.scalar(0),
            g.op("Squeeze", self.sizes("input_ids", 1), g.ints(0)),
            g.scalar(1),
        )
        return g.op("Unsqueeze", ids, g.ints(0))

    def mask(self) -> str:
        """``[N, 1, S, S]``: the padding mask, And-ed with an all-true attention pattern."""
        g = self.g
        length = self.sizes("attention_mask", 1)
        keys = g.op("Cast", "attention_mask", to=onnx.TensorProto.BOOL)
        keys = g.op("Unsqueeze", keys, g.ints(1, 2))
        pattern = g.op("Concat", g.ints(1), g.ints(1), length, g.ints(1), axis=0)
        everywhere = g.op("Expand", g.const(True, np.bool_), pattern)
        allowed = g.op("And", everywhere, keys)
        return g.op("Where", allowed, g.const(0.0, np.float32), g.const(MASK_MIN, np.float32))

    def linear_weight(self, name: str, weight: Array) -> str:
        return self.g.op("Transpose", self.g.weight(name, weight), perm=[1, 0])

    def sizes(self, x: str, axis: int) -> str:
        """One dimension of ``x`` as ``[1]``."""
        return self.g.op("Shape", x, start=axis, end=axis + 1)

    def split_heads(self, value: str, perm: list[int]) -> str:
        g = self.g
        heads = (self.config.num_heads, self.config.head_dim)
        shape = g.op("Concat", self.sizes(value, 0), self.sizes(value, 1), g.ints(*heads), axis=0)
        return g.op("Transpose", g.op("Reshape", value, shape), perm=perm)

    def merge_heads(self, context: str) -> str:
        g = self.g
        sizes = (self.sizes(context, 0), self.sizes(context, 1), g.ints(self.config.hidden_size))
        return g.op("Reshape", context, g.op("Concat", *sizes, axis=0))

    def scores(self, query: str, key: str) -> str:
        g = self.g
        root = g.const(self.config.head_dim**-0.25, np.float32)
        query = self.split_heads(query, [0, 2, 1, 3])
        key = self.split_heads(key, [0, 2, 1, 3])
        flat_shape = g.op("Concat", g.ints(-1), self.sizes(key, 2), self.sizes(key, 3), axis=0)
        flat = g.op("Transpose", g.op("Reshape", key, flat_shape), perm=[0, 2, 1])
        batch_and_heads = g.op("Shape", key, start=0, end=2)
        shape = g.op("Concat", batch_and_heads, self.sizes(key, 3), self.sizes(key, 2), axis=0)
        transposed = g.op("Reshape", flat, shape)
        return g.op("MatMul", g.op("Mul", query, root), g.op("Mul", transposed, root))

    def softmax(self, scores: str) -> str:
        g = self.g
        probabilities = g.op("Softmax", scores, axis=-1)
        invalid = g.op("IsNaN", probabilities)
        return g.op("Where", invalid, g.const(0.0, np.float32), probabilities)
