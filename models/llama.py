"""Llama-style decoders as ONNX graphs, with or without a key/value cache.

The function (Touvron et al. 2023, arXiv:2302.13971; grouped queries: Ainslie et al. 2023,
arXiv:2305.13245), with ids ``[N, S]``, past length P, T = P + S, hidden size D, H query heads and
H_kv key/value heads of width d = D/H:

    rms(x) = w * x / sqrt(mean(x^2) + eps)                                   [N, S, D]
    h  = x + W_o softmax(rope(q) rope(k)T / sqrt(d) + m) v                   [N, S, D]
    x' = h + W_down (silu(W_gate rms(h)) * (W_up rms(h)))                    [N, S, D]
    logits = W_head rms(x)                                                   [N, S, V] f32

RoPE (Su et al. 2021, arXiv:2104.09864) in the half-split form: dimensions ``i`` and ``i + d/2`` of
a head rotate together by ``position * theta^(-2i/d)``. The graph is spelled in elementary operators
as exporters do it: RMSNorm as Pow/ReduceMean/Add/Sqrt/Reciprocal/Mul, SiLU as Sigmoid/Mul, grouped
heads through Unsqueeze/Expand/Reshape, a tied output layer through Transpose of the embedding.

With a cache the inputs are those of Optimum's exports: ``input_ids [N, S]``, ``attention_mask
[N, T]``, ``position_ids [N, S]`` and ``past_key_values.{i}.{key,value} [N, H_kv, P, d]``; the
outputs ``logits`` and ``present.{i}.{key,value} [N, H_kv, T, d]``. Without one the only input is
``input_ids``, positions count from 0 and every token counts.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from onnxq.errors import DataError
from onnxq.models.builder import GraphBuilder
from onnxq.models.checkpoints import LlamaCheckpoint

DType = Literal["float32", "float16"]


def build_llama(
    checkpoint: LlamaCheckpoint, *, kv_cache: bool, dtype: DType, metadata: dict[str, str]
) -> onnx.ModelProto:
    """The decoder described in the module.

    Args:
        checkpoint: weights and sizes.
        kv_cache: with past and present keys and values.
        dtype: of weights, activations and cache. RMSNorm, RoPE angles and softmax stay in f32, and
            so do the logits.
        metadata: for ``metadata_props``.

    Raises:
        DataError: ``DATA-CHECKPOINT-INCOMPLETE`` when a tensor is missing or has the wrong shape.
    """
    return _Writer(checkpoint, kv_cache, dtype).model(metadata)


class _Writer:
    def __init__(self, checkpoint: LlamaCheckpoint, kv_cache: bool, dtype: DType) -> None:
        self.weights = checkpoint.weights
        self.config = checkpoint.config
        self.kv_cache = kv_cache
        self.dtype = np.dtype(dtype)
        self.onnx_dtype = helper.np_dtype_to_tensor_dtype(self.dtype)
        self.g = GraphBuilder("llama")

    def model(self, metadata: dict[str, str]) -> onnx.ModelProto:
        g, c = self.g, self.config
        g.add_input("input_ids", np.int64, ["batch", "sequence"])
        if self.kv_cache:
            self.add_cache_inputs()
        with g.scope("model"):
            with g.scope("embed_tokens"):
                table = self.weight("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
                x = g.op("Gather", table, "input_ids", axis=0)
            with g.scope("rotary_emb"):
                rotary = self.rotary_tables()
            mask = self.causal_mask()
            presents: list[str] = []
            for i in range(c.num_layers):
                with g.scope(f"layers.{i}"):
                    x = self.layer(x, i, mask, rotary, presents)
            with g.scope("norm"):
                x = self.rms_norm(x, "model.norm.weight")
        with g.scope("lm_head"):
            self.logits(x, table)
        g.add_output("logits", np.float32, ["batch", "sequence", c.vocab_size])
        for name in presents:
            sizes = ("batch", c.num_kv_heads, "total_sequence", c.head_dim)
            g.add_output(name, self.dtype, sizes)
        kind = "with" if self.kv_cache else "without"
        return g.build(doc=f"Llama decoder {kind} key/value cache", metadata=metadata)

    def add_cache_inputs(self) -> None:
        g, c = self.g, self.config
        g.add_input("attention_mask", np.int64, ["batch", "total_sequence"])
        g.add_input("position_ids", np.int64, ["batch", "sequence"])
        for i in range(c.num_layers):
            for part in ("key", "value"):
                sizes = ("batch", c.num_kv_heads, "past_sequence", c.head_dim)
                g.add_input(f"past_key_values.{i}.{part}", self.dtype, sizes)

    def weight(self, name: str, *shape: int, transpose: bool = False) -> str:
        """An initializer from the checkpoint, cast to the model's type, its shape checked."""
        value = self.weights.get(name)
        if value is None or value.shape != shape:
            found = "missing" if value is None else f"of shape {list(value.shape)}"
            raise DataError(
                "DATA-CHECKPOINT-INCOMPLETE",
                f"tensor {name} is {found}; the model needs {list(shape)}",
                "give a complete checkpoint of a Llama-style model",
            )
        return self.g.weight(name, (value.T if transpose else value).astype(self.dtype))

    def linear(self, x: str, name: str, outputs: int, inputs: int) -> str:
        """``x W^T`` with W ``[outputs, inputs]`` stored transposed."""
        with self.g.scope(name.split(".")[-2]):
            return self.g.op("MatMul", x, self.weight(name, outputs, inputs, transpose=True))

    def to(self, x: str, dtype: npt.DTypeLike) -> str:
        """``x`` cast to ``dtype``, which is a node only in a model that is not f32."""
        if self.dtype == np.float32:
            return x
        return self.g.op("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def rms_norm(self, x: str, name: str) -> str:
        g = self.g
        wide = self.to(x, np.float32)
        squares = g.op("Pow", wide, g.const(2.0, np.float32))
        mean = g.op("ReduceMean", squares, g.ints(-1), keepdims=1)
        shifted = g.op("Add", mean, g.const(self.config.norm_eps, np.float32))
        inverse = g.op("Reciprocal", g.op("Sqrt", shifted))
        normed = self.to(g.op("Mul", wide, inverse), self.dtype)
        return g.op("Mul", self.weight(name, self.config.hidden_size), normed)

    def layer(self, x: str, i: int, mask: str, rotary: tuple[str, str], presents: list[str]) -> str:
        g, c, prefix = self.g, self.config, f"model.layers.{i}"
        with g.scope("input_layernorm"):
            normed = self.rms_norm(x, f"{prefix}.input_layernorm.weight")
        with g.scope("self_attn"):
            attended = self.attention(normed, i, mask, rotary, presents)
        h = g.op("Add", x, attended)
        with g.scope("post_attention_layernorm"):
            normed = self.rms_norm(h, f"{prefix}.post_attention_layernorm.weight")
        with g.scope("mlp"):
            wide, narrow = c.intermediate_size, c.hidden_size
            gate = self.linear(normed, f"{prefix}.mlp.gate_proj.weight", wide, narrow)
            up = self.linear(normed, f"{prefix}.mlp.up_proj.weight", wide, narrow)
            with g.scope("act_fn"):
                silu = g.op("Mul", gate, g.op("Sigmoid", gate))
            product = g.op("Mul", silu, up)
            down = self.linear(product, f"{prefix}.mlp.down_proj.weight", narrow, wide)
        return g.op("Add", h, down)

    def attention(
        self, x: str, i: int, mask: str, rotary: tuple[str, str], presents: list[str]
    ) -> str:
        g, c, prefix = self.g, self.config, f"model.layers.{i}.self_attn"
        kv_width = c.num_kv_heads * c.head_dim
        query = self.heads(x, f"{prefix}.q_proj.weight", c.hidden_size, c.num_heads)
        key = self.heads(x, f"{prefix}.k_proj.weight", kv_width, c.num_kv_heads)
        value = self.heads(x, f"{prefix}.v_proj.weight", kv_width, c.num_kv_heads)
        query, key = self.rotate(query, rotary), self.rotate(key, rotary)
        if self.kv_cache:
            key = self.append_past(key, i, "key", presents)
            value = self.append_past(value, i, "value", presents)
        key, value = self.repeat_heads(key), self.repeat_heads(value)
        product = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = g.op("Mul", product, g.const(1 / math.sqrt(c.head_dim), self.dtype))
        masked = self.to(g.op("Add", scores, mask), np.float32)
        probabilities = self.to(g.op("Softmax", masked, axis=-1), self.dtype)
        context = g.op("Transpose", g.op("MatMul", probabilities, value), perm=[0, 2, 1, 3])
        merged = g.op("Reshape", context, g.ints(0, 0, c.hidden_size))
        return self.linear(merged, f"{prefix}.o_proj.weight", c.hidden_size, c.hidden_size)

    def heads(self, x: str, name: str, width: int, count: int) -> str:
        """Project and split: ``[N, S, D]`` to ``[N, count, S, d]``."""
        g = self.g
        flat = self.linear(x, name, width, self.config.hidden_size)
        split = g.op("Reshape", flat, g.ints(0, 0, count, self.config.head_dim))
        return g.op("Transpose", split, perm=[0, 2, 1, 3])

    def append_past(self, new: str, i: int, part: str, presents: list[str]) -> str:
        """The cache with this step's keys or values behind it, which is a graph output."""
        present = f"present.{i}.{part}"
        presents.append(present)
        past = f"past_key_values.{i}.{part}"
        return self.g.op("Concat", past, new, axis=2, output=present)

    def repeat_heads(self, x: str) -> str:
        """Each of the H_kv heads H/H_kv times: ``[N, H_kv, T, d]`` to ``[N, H, T, d]``."""
        g, c = self.g, self.config
        groups = c.num_heads // c.num_kv_heads
        if groups == 1:
            return x
        expanded = g.op("Expand", g.op("Unsqueeze", x, g.ints(2)), g.ints(1, 1, groups, 1, 1))
        return g.op("Reshape", expanded, g.ints(0, c.num_heads, -1, c.head_dim))

    def rotary_tables(self) -> tuple[str, str]:
        """Cosines and sines of the angles, each ``[N or 1, 1, S, d]``."""
        g, c = self.g, self.config
        exponents = np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim
        frequencies = (c.rope_theta**-exponents).astype(np.float32)
        positions = "position_ids" if self.kv_cache else self.count_up(self.length("input_ids"))
        columns = g.op("Unsqueeze", g.op("Cast", positions, to=onnx.TensorProto.FLOAT), g.ints(-1))
        angles = g.op("Mul", columns, g.weight("model.rotary_emb.inv_freq", frequencies))
        doubled = g.op("Concat", angles, angles, axis=-1)
        axes = g.ints(1) if self.kv_cache else g.ints(0, 1)
        cosines, sines = (
            self.to(g.op("Unsqueeze", g.op(function, doubled), axes), self.dtype)
            for function in ("Cos", "Sin")
        )
        return cosines, sines

    def rotate(self, x: str, rotary: tuple[str, str]) -> str:
        """``x cos + rotate_half(x) sin`` with ``rotate_half([a, b]) = [-b, a]``."""
        g = self.g
        cosines, sines = rotary
        half = self.config.head_dim // 2
        first = g.op("Slice", x, g.ints(0), g.ints(half), g.ints(-1))
        second = g.op("Slice", x, g.ints(half), g.ints(2 * half), g.ints(-1))
        turned = g.op("Concat", g.op("Neg", second), first, axis=-1)
        return g.op("Add", g.op("Mul", x, cosines), g.op("Mul", turned, sines))

    def length(self, value: str, axis: int = 1) -> str:
        """One dimension of ``value`` as a scalar."""
        g = self.g
        return g.op("Squeeze", g.op("Shape", value, start=axis, end=axis + 1), g.ints(0))

    def count_up(self, stop: str) -> str:
        """``[0, 1, ..., stop-1]``."""
        return self.g.op("Range", self.g.scalar(0), stop, self.g.scalar(1))

    def causal_mask(self) -> str:
        """0 where query i may see key j <= P + i that is not padding, ``finfo.min`` elsewhere.

        ``[1, 1, S, S]`` without and ``[N, 1, S, T]`` with a cache.
        """
        g = self.g
        rows: str = self.count_up(self.length("input_ids"))
        columns: str = rows
        if self.kv_cache:
            past = self.length("past_key_values.0.key", axis=2)
            rows = g.op("Add", rows, past)
            columns = self.count_up(self.length("attention_mask"))
        visible = g.op("LessOrEqual", columns, g.op("Unsqueeze", rows, g.ints(-1)))
        visible = g.op("Unsqueeze", visible, g.ints(0, 1))
        if self.kv_cache:
            tokens = g.op("Cast", "attention_mask", to=onnx.TensorProto.BOOL)
            visible = g.op("And", visible, g.op("Unsqueeze", tokens, g.ints(1, 2)))
        lowest: Any = np.finfo(self.dtype).min
        return g.op("Where", visible, g.const(0, self.dtype), g.const(lowest, self.dtype))

    def logits(self, x: str, table: str) -> None:
        """The output layer, f32; without weights of its own it reads the embedding's."""
        g, c = self.g, self.config
        if "lm_head.weight" in self.weights:
            head = self.weight("lm_head.weight", c.vocab_size, c.hidden_size, transpose=True)
        else:
            head = g.op("Transpose", table, perm=[1, 0])
        if self.dtype == np.float32:
            g.op("MatMul", x, head, output="logits")
        else:
            g.op("Cast", g.op("MatMul", x, head), to=onnx.TensorProto.FLOAT, output="logits")
