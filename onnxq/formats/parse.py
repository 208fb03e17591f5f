"""From names as users type them to formats.

``str(fmt)`` is a name, and ``parse_format(str(fmt)) == fmt``. Capitals and underscores do not
matter.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import replace

from onnxq.errors import SpecError
from onnxq.formats.base import Format
from onnxq.formats.bdr import BdrFormat
from onnxq.formats.codebook import NF4_BLOCK, KMeansFormat, Nf4Format
from onnxq.formats.integer import IntFormat
from onnxq.formats.logarithmic import LogFormat
from onnxq.formats.lowbit import BinaryFormat, Seq2Format, TernaryFormat
from onnxq.formats.minifloat import NAMED_FLOATS, MiniFloat
from onnxq.formats.mx import MX_BLOCK, MxFormat
from onnxq.formats.nvfp4 import NV_BLOCK, NvFp4Format

ALIASES = {
    "float32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "fp4e2m1": "fp4",
    "fp8e4m3fn": "fp8e4m3",
    "mxfp4e2m1": "mxfp4",
    "int1": "binary",
    "ternary-twn": "ternary",
    "ternary-bitnet": "ternary-absmean",
    "nvfp4-4/6": "nvfp4-46",
}

SCALE_RULE_NAMES = {"43": "4/3"}


def _integer(m: re.Match[str]) -> Format:
    return IntFormat(
        int(m["bits"]),
        not m["unsigned"],
        m["scheme"] or "",  # type: ignore[arg-type]
        int(m["block"] or 0),
        bool(m["narrow"]),
    )


def _float(m: re.Match[str]) -> Format:
    e, mantissa, signed = int(m["e"]), int(m["m"]), m["bits"] is not None
    if signed and int(m["bits"]) != 1 + e + mantissa:
        raise SpecError(
            "SPEC-FORMAT",
            f"{m[0]!r}: a sign, {e} exponent and {mantissa} mantissa bits are "
            f"{1 + e + mantissa} bits, not {m['bits']}",
            f"did you mean fp{1 + e + mantissa}e{e}m{mantissa}?",
        )
    kind = "none" if (m["kind"] or "fin") == "fin" else m["kind"]
    bias = int(m["bias"]) if m["bias"] else (1 << (e - 1)) - 1
    return MiniFloat(e, mantissa, bias, kind, signed, int(m["block"] or 0))  # type: ignore[arg-type]


def _named_float(m: re.Match[str]) -> Format:
    return replace(NAMED_FLOATS[m["name"]], block=int(m["block"] or 0))


def _mx(m: re.Match[str]) -> Format:
    rule = SCALE_RULE_NAMES.get(m["rule"] or "", m["rule"] or "floor")
    return MxFormat(m["element"], rule, int(m["block"] or MX_BLOCK))  # type: ignore[arg-type]


def _bdr(m: re.Match[str]) -> Format:
    return BdrFormat({"9": 7, "6": 4, "4": 2}[m["total"]])


def _bdr_general(m: re.Match[str]) -> Format:
    return BdrFormat(int(m["m"]), int(m["block"]), int(m["sub"]))


def _log(m: re.Match[str]) -> Format:
    return LogFormat(
        int(m["bits"] or 4),
        1 if m["base"] == "2" else 2,
        not m["unsigned"],
        "linear" if m["linear"] else "log",
        int(m["block"] or 0),
    )


MAX_BLOCK = 1 << 16
"""Largest block: about as long as the widest layers; padding up to it still fits into memory."""

_BLOCK = r"(?:-?g(?P<block>\d+))?"
_FLOAT_NAMES = "|".join(sorted(NAMED_FLOATS, key=len, reverse=True))
_RULES: list[tuple[str, Callable[[re.Match[str]], Format]]] = [
    (
        rf"(?P<unsigned>u?)int(?P<bits>\d+){_BLOCK}(?:-?(?P<scheme>sym|asym|full))?"
        r"(?:-?(?P<narrow>narrow))?",
        _integer,
    ),
    (rf"(?P<name>{_FLOAT_NAMES}){_BLOCK}", _named_float),
    (
        r"(?:fp(?P<bits>\d+)|u)e(?P<e>\d+)m(?P<m>\d+)(?P<kind>ieee|fnuz|fn|fin)?"
        rf"(?:b(?P<bias>-?\d+))?{_BLOCK}",
        _float,
    ),
    (
        rf"mx(?P<element>fp8e4m3|fp8e5m2|fp6e2m3|fp6e3m2|fp4|int8){_BLOCK}"
        r"(?:-(?P<rule>floor|ceil|even|43|4/3|auto))?",
        _mx,
    ),
    (r"mx(?P<total>[964])", _bdr),
    (r"bdr(?P<m>\d+)g(?P<block>\d+)s(?P<sub>\d+)", _bdr_general),
    (
        rf"nvfp4{_BLOCK}(?P<four>-46)?",
        lambda m: NvFp4Format(bool(m["four"]), int(m["block"] or NV_BLOCK)),
    ),
    (rf"nf4{_BLOCK}", lambda m: Nf4Format(int(m["block"] or NF4_BLOCK))),
    (
        rf"kmeans(?P<bits>\d+){_BLOCK}",
        lambda m: KMeansFormat(int(m["bits"]), int(m["block"] or 0)),
    ),
    (
        r"(?P<unsigned>u?)log(?P<base>2|sqrt2)(?:b(?P<bits>\d+))?"
        rf"{_BLOCK}(?P<linear>-linear)?",
        _log,
    ),
    (
        rf"ternary{_BLOCK}(?:-(?P<rule>absmean|elastic|ttq))?",
        lambda m: TernaryFormat(m["rule"] or "twn", int(m["block"] or 0)),  # type: ignore[arg-type]
    ),
    (rf"binary{_BLOCK}", lambda m: BinaryFormat(int(m["block"] or 0))),
    (rf"seq2{_BLOCK}", lambda m: Seq2Format(int(m["block"] or 0))),
]
_COMPILED = [(re.compile(pattern), build) for pattern, build in _RULES]


def format_names() -> list[str]:
    """Names to list and to suggest: one for every kind of format, without block affixes."""
    integers = [f"{u}int{bits}" for bits in (16, 8, 6, 5, 4, 3, 2) for u in ("", "u")]
    return [
        *integers,
        "uint1",
        *NAMED_FLOATS,
        *(f"mx{e}" for e in ("fp8e4m3", "fp8e5m2", "fp6e2m3", "fp6e3m2", "fp4", "int8")),
        *("mx9", "mx6", "mx4", "nvfp4", "nvfp4-46", "nf4", "kmeans4"),
        *("log2", "logsqrt2", "ulog2", "ulogsqrt2"),
        *("ternary", "ternary-absmean", "ternary-elastic", "ternary-ttq", "binary", "seq2"),
    ]


def parse_format(name: str) -> Format:
    """The format of that name: ``int4g32asym``, ``fp8e4m3``, ``mxfp4-ceil``, ``nvfp4-46``...

    Raises:
        SpecError: no format has this name; the hint names the nearest ones.
    """
    key = name.strip().lower().replace("_", "-")
    key = ALIASES.get(key, key)
    for pattern, build in _COMPILED:
        match = pattern.fullmatch(key)
        if match is not None:
            block = int(match.groupdict().get("block") or 0)
            if block > MAX_BLOCK:
                raise SpecError(
                    "SPEC-RANGE",
                    f"{name!r} has a block of {block} elements, more than {MAX_BLOCK}",
                    "use a smaller block, or none for one scale a channel",
                )
            return build(match)
    near = difflib.get_close_matches(key, format_names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`onnxq formats` lists all names"
    raise SpecError("SPEC-FORMAT", f"no number format is named {name!r}", hint)
