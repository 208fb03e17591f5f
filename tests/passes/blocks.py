"""Transformer blocks as small graphs, in spellings that exporters use.

Sizes: N = 2 sentences, S = 5 tokens, D = 16 channels, H = 2 heads (kv: 1 or 2) of 8 channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from . import helpers as h

N, S, D, HEAD, HIDDEN = 2, 5, 16, 8, 24

MASKS = {
    "-inf": -np.inf,
    "-1e9": -1e9,
    "-1e4": -1e4,
    "finfo.min": float(np.finfo(np.float32).min),
}


@dataclass(frozen=True)
class Block:
    """What an attention block looks like.

    Args:
        heads: key and value heads; 2 is all, 1 is grouped-query attention.
        mask: what masked scores get, or None without a mask.
        guard: ``Where(IsNaN(p), 0, p)`` behind the softmax.
        rope: rotary embedding on q and k.
        gated: SiLU-gated MLP (else two layers with GELU).
        bias: the linear layers have biases.
        gemm: the projections are Gemm on flattened tokens.
    """

    heads: int = 2
    mask: float | None = None
    guard: bool = False
    rope: bool = False
    gated: bool = False
    bias: bool = True
    gemm: bool = False


def block(kind: Block = Block(), *, outliers: bool = False, extra_output: str = "") -> ir.Model:
    """Pre-norm attention and MLP with residual adds: ``x [N, S, D] -> y [N, S, D]``."""
    lines = [*_norm("x", "n1"), *_attention(kind), "r1 = Add(x, o)", *_norm("r1", "n2")]
    lines += _gated_mlp() if kind.gated else _mlp(kind)
    lines.append("y = Add(r1, down)")
    more = f", float[A, B, C] {extra_output}" if extra_output else ""
    body = "\n".join(lines)
    return h.model_of(
        f"""g (float[N, {S}, {D}] x, int64[N, {S}] attention_mask)
            => (float[N, {S}, {D}] y{more}) {{ {body} }}""",
        _weights(kind, outliers),
        opset=17,
    )


def samples(count: int = 4) -> list[h.Feeds]:
    """Activations, and masks of which the second sentence is padded."""
    rng = np.random.default_rng(7)
    mask = np.ones((N, S), np.int64)
    mask[1, 3:] = 0
    return [
        {"x": rng.standard_normal((N, S, D)).astype(np.float32), "attention_mask": mask}
        for _ in range(count)
    ]


def _norm(x: str, name: str) -> list[str]:
    return [f"{name} = LayerNormalization <axis = -1> ({x}, {name}_gamma, {name}_beta)"]


def _linear(kind: Block, x: str, name: str, out: str) -> list[str]:
    if kind.gemm:
        return [
            f"{name}_flat = Reshape({x}, to_rows)",
            f"{name}_rows = Gemm <transB = 1> ({name}_flat, {name}_wt, {name}_b)",
            f"{out} = Reshape({name}_rows, to_sentences)",
        ]
    if not kind.bias:
        return [f"{out} = MatMul({x}, {name}_w)"]
    return [f"{name}_product = MatMul({x}, {name}_w)", f"{out} = Add({name}_product, {name}_b)"]


def _attention(kind: Block) -> list[str]:
    lines: list[str] = []
    for name, width in (("q", "all_heads"), ("k", "kv_heads"), ("v", "kv_heads")):
        lines += _linear(kind, "n1", name, f"{name}_layer")
        lines.append(f"{name}_split = Reshape({name}_layer, {width})")
        lines.append(f"{name}_4d = Transpose <perm = [0, 2, 1, 3]> ({name}_split)")
    if kind.rope:
        lines += [*_rope("q"), *_rope("k")]
    q, k = ("q_rot", "k_rot") if kind.rope else ("q_4d", "k_4d")
    v = "v_4d"
    if kind.heads == 1:
        lines.append(f"k_all = Expand({k}, repeated)")
        lines.append("v_all = Expand(v_4d, repeated)")
        k, v = "k_all", "v_all"
    lines += [
        f"k_t = Transpose <perm = [0, 1, 3, 2]> ({k})",
        "k_scaled = Mul(k_t, scale)",
        f"scores = MatMul({q}, k_scaled)",
    ]
    lines += _masked(kind)
    lines.append("p = Softmax <axis = -1> (masked)")
    probs = "p"
    if kind.guard:
        lines += ["is_nan = IsNaN(p)", "guarded = Where(is_nan, zero, p)"]
        probs = "guarded"
    lines += [
        f"context = MatMul({probs}, {v})",
        "context_t = Transpose <perm = [0, 2, 1, 3]> (context)",
        "joined = Reshape(context_t, to_tokens)",
        *_linear(kind, "joined", "o", "o"),
    ]
    return lines


def _masked(kind: Block) -> list[str]:
    if kind.mask is None:
        return ["masked = Identity(scores)"]
    return [
        "mask_4d = Unsqueeze(attention_mask, mask_axes)",
        "keep = Cast <to = 9> (mask_4d)",
        "bias = Where(keep, zero, low)",
        "masked = Add(scores, bias)",
    ]


def _rope(name: str) -> list[str]:
    return [
        f"{name}_1, {name}_2 = Split <axis = -1> ({name}_4d, halves)",
        f"{name}_neg = Neg({name}_2)",
        f"{name}_turned = Concat <axis = -1> ({name}_neg, {name}_1)",
        f"{name}_cos = Mul({name}_4d, cos)",
        f"{name}_sin = Mul({name}_turned, sin)",
        f"{name}_rot = Add({name}_cos, {name}_sin)",
    ]


def _mlp(kind: Block) -> list[str]:
    return [
        *_linear(Block(bias=kind.bias), "n2", "up", "up_layer"),
        "up_erf_in = Div(up_layer, root2)",
        "up_erf = Erf(up_erf_in)",
        "up_one = Add(up_erf, one)",
        "up_product2 = Mul(up_layer, up_one)",
        "act = Mul(up_product2, half)",
        *_linear(Block(bias=kind.bias), "act", "down", "down"),
    ]


def _gated_mlp() -> list[str]:
    return [
        "gate = MatMul(n2, gate_w)",
        "gate_s = Sigmoid(gate)",
        "silu = Mul(gate, gate_s)",
        "up_layer = MatMul(n2, up_w)",
        "gated = Mul(silu, up_layer)",
        "down = MatMul(gated, down_w)",
    ]


def _weights(kind: Block, outliers: bool) -> dict[str, h.Array]:
    kv = HEAD * kind.heads
    rng = np.random.default_rng(0)
    shapes = {"q": (D, D), "k": (D, kv), "v": (D, kv), "o": (D, D)}
    shapes |= {"gate": (D, HIDDEN), "up": (D, HIDDEN), "down": (HIDDEN, D)}
    found: dict[str, h.Array] = {}
    for name, shape in shapes.items():
        weight = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        found[f"{name}_w"] = weight
        found[f"{name}_wt"] = np.ascontiguousarray(weight.T)
        found[f"{name}_b"] = rng.standard_normal(shape[1]).astype(np.float32)
    for name in ("n1", "n2"):
        gamma = rng.uniform(0.5, 1.5, D).astype(np.float32)
        if outliers:
            gamma[3] *= 60
        found[f"{name}_gamma"] = gamma
        found[f"{name}_beta"] = (0.1 * rng.standard_normal(D)).astype(np.float32)
    angle = np.arange(S)[:, None] / 10 ** (np.arange(HEAD) % (HEAD // 2))
    found |= {
        "cos": np.cos(angle).astype(np.float32),
        "sin": np.sin(angle).astype(np.float32),
        "halves": np.array([HEAD // 2] * 2),
        "all_heads": np.array([0, 0, 2, HEAD]),
        "kv_heads": np.array([0, 0, kind.heads, HEAD]),
        "repeated": np.array([1, 2, 1, 1]),
        "to_tokens": np.array([0, 0, D]),
        "to_sentences": np.array([-1, S, D]),
        "to_rows": np.array([-1, D]),
        "mask_axes": np.array([1, 2]),
        "scale": np.float32(HEAD**-0.5),
        "zero": np.float32(0),
        "one": np.float32(1),
        "half": np.float32(0.5),
        "root2": np.float32(np.sqrt(2)),
        "low": np.float32(0 if kind.mask is None else kind.mask),
    }
    return {name: np.asarray(array) for name, array in found.items()}
