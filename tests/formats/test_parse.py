"""Names: what users type, what prints, what is suggested."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.errors import SpecError
from onnxq.formats import (
    BdrFormat,
    BinaryFormat,
    Format,
    Granularity,
    IntFormat,
    KMeansFormat,
    LogFormat,
    MiniFloat,
    MxFormat,
    Nf4Format,
    NvFp4Format,
    Seq2Format,
    TernaryFormat,
    format_names,
    parse_format,
)
from onnxq.formats.lowbit import TERNARY_RULES
from onnxq.formats.mx import MX_ELEMENTS, SCALE_RULES

blocks = st.sampled_from([0, 1, 16, 32, 100, 128])
sizes = st.sampled_from([16, 32, 64])
integers = st.builds(
    IntFormat, st.integers(2, 16), st.booleans(), st.sampled_from(["sym", "asym", "full"]), blocks
)
narrow = st.builds(
    IntFormat, st.integers(2, 16), st.booleans(), st.just("sym"), blocks, st.just(True)
)
floats = st.builds(
    MiniFloat,
    st.integers(1, 8),
    st.integers(1, 23),
    st.integers(-3, 127),
    st.sampled_from(["ieee", "fn", "fnuz", "none"]),
    st.just(True),
    blocks,
)
unsigned = st.builds(
    MiniFloat, st.integers(1, 8), st.integers(1, 7), st.just(3), st.just("none"), st.just(False)
)
others = st.one_of(
    st.builds(MxFormat, st.sampled_from(MX_ELEMENTS), st.sampled_from(SCALE_RULES), sizes),
    st.builds(BdrFormat, st.integers(1, 7), sizes, st.sampled_from([1, 2, 4])),
    st.builds(NvFp4Format, st.booleans(), sizes),
    st.builds(Nf4Format, sizes),
    st.builds(KMeansFormat, st.integers(1, 8), blocks),
    st.builds(
        LogFormat,
        st.integers(2, 8),
        st.sampled_from([1, 2]),
        st.booleans(),
        st.sampled_from(["log", "linear"]),
        blocks,
    ),
    st.builds(TernaryFormat, st.sampled_from(TERNARY_RULES), blocks),
    st.builds(BinaryFormat, blocks),
    st.builds(Seq2Format, blocks),
)


@given(st.one_of(integers, narrow, floats, unsigned, others))
def test_every_format_prints_as_a_name_that_parses_back(fmt: Format) -> None:
    assert parse_format(str(fmt)) == fmt


@pytest.mark.parametrize("name", format_names())
def test_listed_names_are_canonical(name: str) -> None:
    fmt = parse_format(name)
    assert str(fmt) == name
    assert parse_format(name.upper()) == fmt
    assert hash(fmt) == hash(parse_format(name))
    if fmt.bits <= 16:
        assert fmt.levels().max() <= fmt.max


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        ("int4", IntFormat(4)),
        ("uint8", IntFormat(8, False)),
        ("int4g32", IntFormat(4, block=32)),
        ("int4_g128_asym", IntFormat(4, True, "asym", 128)),
        ("int4g32full", IntFormat(4, True, "full", 32)),
        ("int8narrow", IntFormat(8, narrow=True)),
        ("int1", BinaryFormat()),
        ("mxfp4-4/3", MxFormat("fp4", "4/3")),
        ("nvfp4-46", NvFp4Format(True)),
        ("mx6", BdrFormat(4)),
        ("fp4e2m1", parse_format("fp4")),
        ("fp8e4m3g128", MiniFloat(4, 3, 7, "fn", block=128)),
        (" BF16 ", parse_format("bfloat16")),
    ],
)
def test_spellings(name: str, fmt: Format) -> None:
    assert parse_format(name) == fmt


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("itn4", "int4"), ("mxpf4", "mxfp4"), ("fp8e4m", "fp8e4m3"), ("nvfp5", "nvfp4"),
     ("fp9e4m3", "fp8e4m3"), ("ternery", "ternary")],
)  # fmt: skip
def test_a_wrong_name_suggests_the_right_one(wrong: str, right: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_format(wrong)
    assert error.value.code == "SPEC-FORMAT"
    assert right in error.value.hint


@pytest.mark.parametrize("wrong", ["", "zzz", "int4g0x", "int99", "uint4narrow", "mxfp4-up"])
def test_other_wrong_names(wrong: str) -> None:
    with pytest.raises(SpecError):
        parse_format(wrong)


@pytest.mark.parametrize("text", ["tensor", "token", "channel(0)", "channel(-1)", "block(1,32)"])
def test_granularity_round_trip(text: str) -> None:
    assert str(Granularity.parse(text)) == text


@pytest.mark.parametrize("text", ["row", "block(1)", "block(1,0)", "channel"])
def test_granularity_errors(text: str) -> None:
    with pytest.raises(SpecError, match="SPEC-GRANULARITY"):
        Granularity.parse(text)
