"""``onnxq inspect``: what is inside a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from onnxq.cli.options import FILE, common

if TYPE_CHECKING:
    import onnx_ir as ir

_QUANTIZERS: Final = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_INTEGER: Final = ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "MatMulNBits")


@click.command("inspect", short_help="Show what is inside a model.")
@click.argument("model", type=FILE)
@click.option("-v", "--verbose", is_flag=True, help="Also list each match and each near miss.")
@click.option(
    "--integer-only", is_flag=True, help="Prove that MODEL computes in integers alone, or refuse."
)
@click.option(
    "--max-extent",
    type=click.IntRange(min=1),
    help="Largest extent of a dynamic axis, for --integer-only.",
)
@common
def command(model: Path, verbose: bool, integer_only: bool, max_extent: int | None) -> None:
    """Show operators, weights, structure, quantization and provenance of MODEL."""
    from onnxq.cli import console
    from onnxq.cli.state import current
    from onnxq.graph.io import load

    if max_extent is not None and not integer_only:
        raise click.UsageError("--max-extent goes with --integer-only")
    if integer_only:
        _prove(load(model), max_extent, verbose=verbose)
        return
    record = describe(load(model), model)
    if current().json:
        console.emit(record)
    else:
        _print(record, verbose=verbose)


def _prove(model: ir.Model, max_extent: int | None, *, verbose: bool) -> None:
    """Print what the proof found; what it refuses is an error."""
    from onnxq.cli import console
    from onnxq.cli.state import current
    from onnxq.custom_ops.integer_check import check_integer_only

    report = check_integer_only(model, max_extent=max_extent)
    if current().json:
        console.emit(report.to_json())
        return
    columns: list[Any] = [("operator", "left"), ("node", "left"), ("type", "left")]
    columns += [(name, "right") for name in ("scale", "least", "most", "sum", "bits")]
    worst = report.worst
    rows = [
        (
            row.op,
            row.node,
            row.dtype,
            "" if row.scale is None else f"{row.scale:.4g}",
            f"{row.lo:,}",
            f"{row.hi:,}",
            "" if row.accumulator is None else f"{row.accumulator:,}",
            "" if row.accumulator is None else str(row.accumulator.bit_length() + 1),
        )
        for row in (report.rows if verbose else [worst] if worst else [])
    ]
    console.print_table("Integer operators" if verbose else "Largest sum", columns, rows)
    click.echo(
        f"integer-only: {len(report.rows)} integer operators between {report.quantize} quantize "
        f"and {report.dequantize} dequantize nodes, no float between them; no sum can overflow"
    )


def describe(model: ir.Model, path: Path) -> dict[str, Any]:
    """The facts about ``model`` as JSON-serialisable data."""
    from onnxq.graph.io import get_provenance, size_on_disk

    operators = Counter(_label(node) for node in _nodes(model))
    weights: dict[str, dict[str, int]] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        row = weights.setdefault(
            dtype_name(tensor.dtype), {"tensors": 0, "elements": 0, "bytes": 0}
        )
        row["tensors"] += 1
        row["elements"] += int(tensor.size)
        row["bytes"] += int(tensor.nbytes)
    structure, matches, rejected = _structure(model)
    return {
        "path": path,
        "bytes": size_on_disk(path),
        "ir_version": model.ir_version,
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "opsets": dict(model.opset_imports),
        "inputs": [_value(v) for v in model.graph.inputs],
        "outputs": [_value(v) for v in model.graph.outputs],
        "nodes": sum(operators.values()),
        "operators": dict(operators.most_common()),
        "weights": dict(sorted(weights.items(), key=lambda item: -item[1]["bytes"])),
        "structure": structure,
        "matches": matches,
        "near_misses": rejected,
        "quantization": {
            name: operators[name]
            for name in operators
            if name.split("::")[-1] in (*_QUANTIZERS, *_INTEGER)
        },
        "own_operators": {n: c for n, c in operators.items() if n.startswith("com.onnxq::")},
        "functions": [f"{f.domain}::{f.name}" for f in model.functions.values()],
        "provenance": dict(get_provenance(model) or {}),
    }


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes, those of subgraphs and functions included."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def dtype_name(dtype: ir.DataType) -> str:
    """The number format as people write it: ``float32``, not ``FLOAT``."""
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def _label(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _value(value: ir.Value) -> dict[str, Any]:
    shape = (
        None if value.shape is None else [d if isinstance(d, int) else str(d) for d in value.shape]
    )
    return {
        "name": value.name,
        "dtype": "unknown" if value.dtype is None else dtype_name(value.dtype),
        "shape": shape,
    }


def _structure(
    model: ir.Model,
) -> tuple[dict[str, int], list[dict[str, str]], list[dict[str, str]]]:
    """Counts by kind, each match, and the near misses with their reasons."""
    from onnxq.graph.match import analyze_all

    counts: Counter[str] = Counter()
    matches: list[dict[str, str]] = []
    rejected: list[dict[str, str]] = []
    for found in analyze_all(model):
        groups: dict[str, Any] = {
            "linear": found.linears,
            "norm": found.norms,
            "activation": found.activations,
            "attention": found.attentions,
            "fused attention": found.fused_attentions,
            "embedding": found.embeddings,
            "residual add": found.residual_adds,
            "gated MLP": found.gated_mlps,
        }
        for what, items in groups.items():
            for item in items:
                kind = getattr(item, "kind", "")
                label = f"{what} ({kind})" if kind else what
                counts[label] += 1
                matches.append({"what": label, "name": str(getattr(item, "name", ""))})
        rejected += [{"what": r.what, "node": r.node, "reason": r.reason} for r in found.rejected]
    return dict(counts), matches, rejected


def _shape_text(shape: list[int | str] | None) -> str:
    return "[?]" if shape is None else "[" + ", ".join(str(d) for d in shape) + "]"


def _print(record: dict[str, Any], *, verbose: bool) -> None:
    from onnxq.cli import console

    opsets = ", ".join(f"{d or 'ai.onnx'} {v}" for d, v in record["opsets"].items())
    click.echo(
        f"{record['path']}  {console.size(record['bytes'])}  {record['nodes']} nodes\n"
        f"opset {opsets}; IR {record['ir_version']}"
        + (f"; by {record['producer']}" if record["producer"] else "")
    )
    for side in ("inputs", "outputs"):
        for value in record[side]:
            click.echo(
                f"{side[:-1]:7}{value['name']}  {value['dtype']} {_shape_text(value['shape'])}"
            )
    click.echo()
    console.print_table(
        "Weights",
        [("dtype", "left"), ("tensors", "right"), ("elements", "right"), ("size", "right")],
        [
            (name, str(w["tensors"]), f"{w['elements']:,}", console.size(w["bytes"]))
            for name, w in record["weights"].items()
        ],
    )
    _counts("Structure", record["structure"])
    _counts("Operators", record["operators"])
    _counts("Quantization", record["quantization"])
    if not record["quantization"]:
        click.echo("not quantized\n")
    if record["functions"]:
        click.echo("functions: " + ", ".join(record["functions"]) + "\n")
    for key, value in record["provenance"].items():
        click.echo(f"{key}: {value}")
    if verbose:
        for match in record["matches"]:
            click.echo(f"{match['what']}: {match['name']}")
    if record["near_misses"]:
        click.echo(f"{len(record['near_misses'])} near misses" + ("" if verbose else " (-v lists)"))
    for miss in record["near_misses"] if verbose else ():
        click.echo(f"no {miss['what']}: {miss['node']}: {miss['reason']}")


def _counts(title: str, counts: dict[str, int]) -> None:
    from onnxq.cli import console

    if counts:
        rows = [(name, str(count)) for name, count in counts.items()]
        console.print_table(title, [("what", "left"), ("count", "right")], rows)
