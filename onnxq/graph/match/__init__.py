"""Typed matches: what the graph's regions are, whatever exporter spelled them.

``analyze`` finds linear layers, norms, activations, attention, embeddings, residual adds and
gated MLPs, and says for each near miss why it is none. Matches refer to the live graph: after a
rewrite, analyze again.
"""

from onnxq.graph.match.activations import Activation, ActivationKind
from onnxq.graph.match.attention import Attention, FusedAttention
from onnxq.graph.match.blocks import Embedding, GatedMlp, ResidualAdd
from onnxq.graph.match.heads import ValueToOutput
from onnxq.graph.match.linears import Linear, LinearKind, find_linears, match_linear
from onnxq.graph.match.norms import Norm, NormKind, find_norms
from onnxq.graph.match.structure import Rejected, Structure, analyze, analyze_all
from onnxq.graph.match.values import (
    behind,
    const_array,
    const_ints,
    const_scalar,
    const_shape,
    const_tensor,
    consumers,
    is_const,
    is_op,
    is_pass_through,
    last_dim,
    node_label,
    producer,
    rank,
    shape_entries,
    sole_consumer,
    static_shape,
    value_dtype,
)

__all__ = [
    "Activation",
    "ActivationKind",
    "Attention",
    "Embedding",
    "FusedAttention",
    "GatedMlp",
    "Linear",
    "LinearKind",
    "Norm",
    "NormKind",
    "Rejected",
    "ResidualAdd",
    "Structure",
    "ValueToOutput",
    "analyze",
    "analyze_all",
    "behind",
    "const_array",
    "const_ints",
    "const_scalar",
    "const_shape",
    "const_tensor",
    "consumers",
    "find_linears",
    "find_norms",
    "is_const",
    "is_op",
    "is_pass_through",
    "last_dim",
    "match_linear",
    "node_label",
    "producer",
    "rank",
    "shape_entries",
    "sole_consumer",
    "static_shape",
    "value_dtype",
]
