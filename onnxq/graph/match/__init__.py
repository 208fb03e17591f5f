"""Typed matches: what the graph's regions are, whatever exporter spelled them.

``analyze`` finds linear layers, norms, activations, attention, embeddings, residual adds and
gated MLPs, and says for each near miss why it is none. Matches refer to the live graph: after a
rewrite, analyze again.
"""

from onnxq.graph.match.linears import Linear, find_linears, match_linear
from onnxq.graph.match.norms import Norm, find_norms
from onnxq.graph.match.structure import Rejected, Structure, analyze, analyze_all
from onnxq.graph.match.values import (
    const_array,
    const_tensor,
    consumers,
    is_const,
    is_op,
    last_dim,
    producer,
    rank,
    sole_consumer,
    static_shape,
)

__all__ = [
    "Linear",
    "Norm",
    "Rejected",
    "Structure",
    "analyze",
    "analyze_all",
    "const_array",
    "const_tensor",
    "consumers",
    "find_linears",
    "find_norms",
    "is_const",
    "is_op",
    "last_dim",
    "match_linear",
    "producer",
    "rank",
    "sole_consumer",
    "static_shape",
]
