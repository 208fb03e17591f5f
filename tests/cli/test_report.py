"""The page: valid, self-contained, complete, written in one step."""

from __future__ import annotations

import dataclasses
import math
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxq.cli.report import drawings, page, write
from onnxq.cli.report.precision import cells
from onnxq.cli.view import CellView, HistogramView, RunView
from onnxq.errors import DataError
from onnxq.passes.contract import Curve

_VOID = {"meta", "br", "link", "img", "hr", "input"}


class _Checker(HTMLParser):
    """Every element closed in order, no asset from elsewhere; collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        assert not {"src", "href", "srcset"} & {name for name, _ in attrs}
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _checked(view: RunView) -> _Checker:
    checker = _Checker()
    checker.feed(page(view))
    checker.close()
    assert checker.open == []
    return checker


def test_page_is_well_formed_and_self_contained(run_view: RunView) -> None:
    seen = _checked(run_view).seen
    assert "script" not in seen
    assert "http" not in page(run_view)
    assert "@import" not in page(run_view)
    assert "url(" not in page(run_view)


def test_page_holds_every_part(run_view: RunView) -> None:
    checker = _checked(run_view)
    text = " ".join(checker.text)
    for wanted in (
        "minilm <w8a8>.onnx",
        "0.99731",
        "22.6",
        "1.82",
        "3.88x smaller",
        "8.06",
        "12 x scales folded into the norm",
        "left alone: residual add",
        "pooler & <head>",
        "random calibration data",
        "encoder.layer.5/Add_5",
        run_view.command,
        "onnxq.seed",
    ):
        assert wanted in text
    # one bar a layer, one cell an operator, one drawing a histogram
    assert checker.seen["figure"] == 1 + len(run_view.histograms) + 2


def test_page_of_an_empty_run_has_no_empty_parts(run_view: RunView) -> None:
    bare = dataclasses.replace(
        run_view,
        errors=[],
        speed=None,
        layers=[],
        histograms=[],
        cells=[],
        weights_after={},
        weight_bits=None,
    )
    checker = _checked(bare)
    assert "svg" not in checker.seen
    assert "Layers" not in checker.text


def test_unbounded_numbers_do_not_break_the_page(run_view: RunView) -> None:
    layers = [dataclasses.replace(e, sqnr_db=math.inf) for e in run_view.layers[:3]]
    errors = [dataclasses.replace(run_view.errors[0], sqnr_db=math.inf)]
    text = page(dataclasses.replace(run_view, layers=layers, errors=errors))
    assert ">inf<" not in text
    assert 'width="inf' not in text


def test_histogram_keeps_every_element_when_binned_anew() -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal(10_000)
    counts, edges = np.histogram(values, bins=4096, range=(-8.0, 8.0))
    view = HistogramView("v", edges.tolist(), counts.tolist(), -1.0, 1.0, "uint8")
    bars, lo, hi = drawings.rebin(view, 72)
    assert sum(bars) == pytest.approx(10_000, abs=1e-6)
    assert lo <= values.min()
    assert hi >= values.max()
    # numpy counts what lies outside of the range; bins that straddle the edge are the difference
    outside = np.mean((values < -1) | (values > 1))
    assert view.clipped == pytest.approx(outside, abs=2 * counts.max() / 10_000)


def test_strip_draws_a_border_where_precision_changes() -> None:
    row = [
        CellView("layer.0/a", "MatMul", "float", "int8", "weights"),
        CellView("layer.0/b", "MatMul", "uint8", "int8", "static"),
        CellView("layer.0/c", "MatMul", "uint8", "int8", "static"),
        CellView("layer.1/d", "Softmax", "float", "", "float"),
    ]
    drawn = drawings.strip(row).split("<svg")[1:]
    assert ['class="edge"' in cell for cell in drawn] == [False, True, False, True]
    assert drawings.changes(row) == 2


def test_blocks_follow_the_layers(run_view: RunView) -> None:
    names = [name for name, _ in drawings.blocks(run_view.cells)]
    assert names == ["embeddings", *(f"encoder.layer.{i}" for i in range(6))]


def test_write_is_atomic(
    run_view: RunView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space"):
            write(run_view, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    write(run_view, path)
    assert path.read_text().startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_missing_folder_is_refused_before_the_work(run_view: RunView, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        write(run_view, tmp_path / "none" / "r.html")
    assert caught.value.code == "DATA-REPORT-UNWRITABLE"


def test_a_clamp_inside_of_integer_arithmetic_is_no_border() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 4] x) => (float[1, 4] y, float[1, 4] z)
        <float s = {0.5}, uint8 o = {128}, int8[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
         13, 14, 15, 16}, int8 n = {0}> {
            q = QuantizeLinear(x, s, o)
            d = DequantizeLinear(q, s, o)
            wd = DequantizeLinear(w, s, n)
            m = MatMul(d, wd)
            r = Relu(m)
            rq = QuantizeLinear(r, s, o)
            y = DequantizeLinear(rq, s, o)
            m2 = MatMul(y, wd)
            z = Relu(m2)
        }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    found = [(c.op, c.activation, c.mode) for c in cells(model, {})]
    assert found == [
        ("MatMul", "uint8", "static"),
        ("Relu", "uint8", "static"),
        ("MatMul", "uint8", "static"),
        ("Relu", "float", "float"),
    ]


def test_a_curve_is_drawn_in_its_scale() -> None:
    """Points rise from left to right; the chosen one is ringed, the limit level with its value."""
    points = ((97.0, 1.0, "2 in float"), (98.0, 2.0, "1 in float"), (100.0, 4.0, "0 in float"))
    view = Curve("Trade", "share, %", "drop, %", points, (98.0, 2.0), limit=2.0)
    root = ElementTree.fromstring(drawings.curve(view))
    line = next(e for e in root.iter() if e.get("class") == "curve").get("points", "")
    spots = [tuple(map(float, pair.split(","))) for pair in line.split()]
    (x0, y0), (x1, y1), (x2, y2) = spots
    assert (x2 - x1) / (x1 - x0) == pytest.approx(2, rel=1e-2)
    assert (y1 - y2) / (y0 - y1) == pytest.approx(2, rel=1e-2)
    ring = next(e for e in root.iter() if e.get("class") == "ring")
    assert (float(ring.get("cx", 0)), float(ring.get("cy", 0))) == pytest.approx((x1, y1))
    limit = next(e for e in root.iter() if e.get("class") == "limit")
    assert float(limit.get("y1", 0)) == pytest.approx(y1)


def test_curves_of_a_pass_are_on_the_page(run_view: RunView) -> None:
    view = Curve("Trade <off>", "x", "y", ((0.0, 1.0, "a"), (1.0, 2.0, "b")), (1.0, 2.0))
    passes = [dataclasses.replace(run_view.passes[0], curves=[view])]
    text = page(dataclasses.replace(run_view, passes=passes))
    assert "<h3>Trade &lt;off&gt;</h3>" in text
    assert 'class="ring"' in text
