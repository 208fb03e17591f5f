"""The SQNR table, against figures that were measured with other code before this was written."""

from __future__ import annotations

import pytest

from onnxq.formats.table import TABLE_FORMATS, SqnrRow, sqnr_table

TOLERANCE_DB = 0.05
PUBLISHED = {
    "mxint8": (41.66, 40.06, 39.98),
    "mxfp8e4m3": (30.64, 30.05, 30.08),
    "mxfp8e5m2": (25.35, 25.22, 25.25),
    "mxfp6e2m3": (30.94, 30.32, 30.33),
    "mxfp6e3m2": (25.35, 25.22, 25.25),
    "mxfp4": (18.79, 17.98, 17.99),
    "mxfp4-ceil": (18.76, 17.56, 17.56),
    "mxfp4-43": (18.58, 17.60, 17.56),
    "mxfp4-auto": (19.05, 18.24, 18.24),
    "nvfp4": (20.44, 20.66, 20.69),
    "nvfp4-46": (21.22, 21.19, 21.24),
    "int4g128": (18.60, 15.91, 15.28),
    "int4g32": (20.27, 18.34, 18.24),
    "int4g32full": (21.31, 19.43, 19.35),
    "int4g128asym": (19.95, 17.71, 17.49),
    "int4g32asym": (21.86, 20.50, 20.63),
    "nf4": (20.73, 19.68, 19.61),
    "int3g128asym": (13.33, 11.28, 10.93),
    "int2g64asym": (6.80, 5.97, 5.64),
    "mx9": (46.53, 45.52, 45.61),
    "mx6": (28.31, 27.33, 27.42),
    "mx4": (15.72, 14.93, 14.96),
}
COARSE_TOLERANCE_DB = 0.1  # these were published to one decimal
COARSE = {
    "int8": (38.9, 32.2, 26.2),
    "fp8e2m5": (42.4, 37.8, 32.2),
    "fp8e3m4": (37.6, 37.6, 37.5),
    "fp8e4m3": (31.5, 31.5, 31.5),
    "fp8e5m2": (25.6, 25.6, 25.6),
}


@pytest.fixture(scope="module")
def table() -> dict[str, SqnrRow]:
    return {row.format: row for row in sqnr_table((*PUBLISHED, *COARSE))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_row(table: dict[str, SqnrRow], name: str) -> None:
    row = table[name]
    ours = (row.normal, row.laplace, row.student_t5)
    assert ours == pytest.approx(PUBLISHED[name], abs=TOLERANCE_DB)


@pytest.mark.parametrize("name", COARSE)
def test_row_of_one_scale_per_tensor(table: dict[str, SqnrRow], name: str) -> None:
    row = table[name]
    ours = (row.normal, row.laplace, row.student_t5)
    assert ours == pytest.approx(COARSE[name], abs=COARSE_TOLERANCE_DB)


def test_every_row_of_the_command_has_a_figure() -> None:
    rows = sqnr_table(samples=1 << 12)
    assert [row.format for row in rows] == list(TABLE_FORMATS)
    assert all(row.normal > 2 and row.bits_per_element >= 1 for row in rows)
    assert rows[0].to_json().keys() == {
        "format", "bits_per_element", "normal", "laplace", "student_t5",
    }  # fmt: skip
