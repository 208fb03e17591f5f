"""The text of a pipeline: what it accepts, what it prints, where its errors point."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.errors import DataError, SpecError
from onnxq.pipeline import recipes
from onnxq.pipeline.grammar import parse, spell
from onnxq.pipeline.registry import default_registry
from tests.pipeline.tiny import REGISTRY, Observe, Options, Rescale, Round


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of an option's type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, args))
    if args:
        return st.one_of(*map(values, args))
    plain = {
        int: st.integers(),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        str: st.text(),
        type(None): st.none(),
    }
    return plain[hint]


def option_sets(cls: type) -> st.SearchStrategy[dict[str, Any]]:
    hints = typing.get_type_hints(cls)
    return st.fixed_dictionaries(
        {}, optional={f.name: values(hints[f.name]) for f in dataclasses.fields(cls)}
    )


@given(option_sets(Options))
@settings(max_examples=400, deadline=None)
def test_a_pass_prints_as_text_that_parses_back_to_it(options):
    made = Options(**options)
    assert parse(str(made), REGISTRY) == (made,)
    assert parse(spell([made, made]), REGISTRY) == (made, made)


@pytest.mark.parametrize("name", default_registry().names())
def test_every_registered_pass_prints_as_text_that_parses_back_to_it(name):
    cls = default_registry().get(name)

    @given(option_sets(cls))
    @settings(max_examples=60, deadline=None)
    def check(options):
        try:
            made = cls(**options)
        except SpecError:
            return  # the pass refuses these values itself
        assert parse(str(made)) == (made,)

    check()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("observe", Observe()),
        (" observe ", Observe()),
        ("rescale{}", Rescale()),
        ("rescale{factor=3}", Rescale(3.0)),
        ("rescale{ factor = 1e-3 , forget=true }", Rescale(0.001, True)),
        ("round{sites=[w1,w2]}", Round(sites=("w1", "w2"))),
        ("round{sites=[w1 w2] bits=4}", Round(4, ("w1", "w2"))),
        ("round{sites=[]}", Round(sites=())),
        ("round{sites=w1}", Round(sites=("w1",))),
        ('round{sites=["*/attn[0-9]/*",\'it"s\']}', Round(sites=("*/attn[0-9]/*", 'it"s'))),
        ('round{ruin="none"}', Round(ruin="none")),
        ("round{ruin=none}", Round(ruin=None)),
        (
            "options{number-choice=4 maybe_text='a\\\\b'}",
            Options(number_choice=4, maybe_text="a\\b"),
        ),
        ("options{nested=[[1,2],[],[3]]}", Options(nested=((1, 2), (), (3,)))),
        ("options{auto=0.5}", Options(auto=0.5)),
        ("options{mixed=12}", Options(mixed=12)),
        ('options{mixed="12"}', Options(mixed="12")),
    ],
)
def test_texts(text, expected):
    assert parse(text, REGISTRY) == (expected,)


def test_passes_are_separated_by_commas_and_newlines_do_not_matter():
    assert parse("observe,\n  round{bits=4},\nobserve", REGISTRY) == (
        Observe(),
        Round(4),
        Observe(),
    )


@pytest.mark.parametrize(
    ("text", "code", "marked", "hint"),
    [
        ("obsreve,round", "SPEC-PASS-UNKNOWN", "obsreve", "did you mean `observe`?"),
        ("w8a9", "SPEC-PASS-UNKNOWN", "w8a9", "did you mean `w8a8`"),
        ("observe,round{bit=4}", "SPEC-OPTION-UNKNOWN", "bit", "did you mean `bits`?"),
        ("round{bits=4 bits=5}", "SPEC-OPTION-TWICE", "bits=5", "keep one"),
        ("round{bits=four}", "SPEC-OPTION-TYPE", "four", "write bits=8"),
        ("round{bits=4.0}", "SPEC-OPTION-TYPE", "4.0", "write bits=8"),
        ('round{bits="4"}', "SPEC-OPTION-TYPE", '"4"', "write bits=8"),
        ("round{bits=[4]}", "SPEC-OPTION-TYPE", "[4]", "write bits=8"),
        ("rescale{forget=1}", "SPEC-OPTION-TYPE", "1", "write forget=true"),
        ("options{choice=tow}", "SPEC-OPTION-VALUE", "tow", "did you mean `two`"),
        ("options{auto=auot}", "SPEC-OPTION-TYPE", "auot", "did you mean `auto`?"),
        ("options{pair=[1]}", "SPEC-OPTION-TYPE", "[1]", "write pair=[a whole number,a number]"),
        ("rescale{forget=true factor=-1}", "SPEC-RANGE", "factor=-1", "above 0"),
        ("needy", "SPEC-OPTION-MISSING", "needy", "amount=VALUE"),
        ("round{bits}", "SPEC-SYNTAX", "bits", "write bits=VALUE"),
        ("round{bits=}", "SPEC-SYNTAX", "}", "quote"),
        ("round{bits=4", "SPEC-SYNTAX", "{bits=4", "close the options"),
        ("round{sites=[w1}", "SPEC-SYNTAX", "[", "close the list"),
        ('round{sites="w1}', "SPEC-SYNTAX", '"', "close the text"),
        ("observe round", "SPEC-SYNTAX", "r", "separated by commas"),
        ("observe,", "SPEC-SYNTAX", "", "drop the comma"),
        ("observe,,round", "SPEC-SYNTAX", ",", "quote"),
        ("   ", "SPEC-EMPTY", "   ", "onnxq passes"),
        ("w8a8{a=1}", "SPEC-RECIPE-OPTIONS", "w8a8{a=1}", "canonicalize"),
    ],
)
def test_errors_point_at_their_place_and_say_what_to_do(text, code, marked, hint):
    with pytest.raises(SpecError) as caught:
        parse(text, REGISTRY)
    error = caught.value
    assert error.code == code
    assert text[error.span.start : error.span.stop] == marked
    assert hint in error.hint
    assert "^" in str(error)


@given(st.text(alphabet="abw18,{}[]=\"'@ -_\\\n", max_size=30))
@settings(max_examples=400, deadline=None)
def test_any_text_parses_or_is_refused_with_a_code(text):
    try:
        parse(text, REGISTRY)
    except (SpecError, DataError) as error:
        assert error.code  # noqa: PT017  (either outcome is fine)


def test_a_recipe_expands_among_other_passes():
    whole = parse("w8a8")
    assert spell(parse("canonicalize,w8a8")) == "canonicalize," + spell(whole)


def test_a_recipe_file_expands_and_its_errors_name_it(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('summary = "x"\npasses = "observe, round{bits=4}"\n')
    assert parse(f"@{file}", REGISTRY) == (Observe(), Round(4))
    assert parse(f'@"{file}",observe', REGISTRY) == (Observe(), Round(4), Observe())
    file.write_text('passes = "observe, round{bit=4}"\n')
    with pytest.raises(SpecError, match="in recipe mine: `round` has no option `bit`") as caught:
        parse(f"@{file}", REGISTRY)
    assert caught.value.span.text == "observe, round{bit=4}"


def test_a_recipe_that_contains_itself_is_refused(tmp_path):
    file = tmp_path / "loop.toml"
    file.write_text(f"passes = '@\"{file}\"'\n")
    with pytest.raises(SpecError) as caught:
        parse(f"@{file}", REGISTRY)
    assert caught.value.code == "SPEC-RECIPE-CYCLE"


def test_pass_tables_of_a_recipe_are_the_same_as_its_text(tmp_path):
    file = tmp_path / "tables.toml"
    file.write_text(
        '[[pass]]\nname = "round"\nbits = 4\nsites = ["w 1", "none"]\nruin = "7"\n'
        '[[pass]]\nname = "rescale"\nfactor = 3\nforget = true\n'
    )
    assert parse(f"@{file}", REGISTRY) == (Round(4, ("w 1", "none"), "7"), Rescale(3.0, True))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("passes = 1", "SPEC-RECIPE-TYPE"),
        ("summary = 'x'", "SPEC-RECIPE-PASSES"),
        ("passes = 'a'\n[[pass]]\nname='b'", "SPEC-RECIPE-PASSES"),
        ("pases = 'observe'", "SPEC-RECIPE-KEY"),
        ("[[pass]]\nbits=4", "SPEC-RECIPE-PASSES"),
        ("[[pass]]\nname='round'\n[pass.bits]\na=1", "SPEC-RECIPE-TYPE"),
        ("passes = ", "DATA-RECIPE-TOML"),
        (b"\xff\xfe", "DATA-RECIPE-TOML"),
        (None, "DATA-RECIPE-FILE"),
    ],
)
def test_bad_recipe_files_are_refused(tmp_path, content, code):
    file = tmp_path / "bad.toml"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.write_text(content)
    with pytest.raises((SpecError, DataError)) as caught:
        parse(f"@{file}", REGISTRY)
    assert caught.value.code == code


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5),
        st.one_of(
            st.text(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), st.booleans()
        ),
        max_size=4,
    )
)
@settings(max_examples=200, deadline=None)
def test_toml_that_we_write_reads_back(table):
    import tomllib

    written = recipes.to_toml({"seed": 3, "list": ["a", "b"], "result": table})
    assert tomllib.loads(written) == {"seed": 3, "list": ["a", "b"], "result": table}


def test_shipped_recipes_parse_and_are_described():
    assert {"w8a8", "w8a8-dynamic", "w4"} <= set(recipes.names())
    for recipe in recipes.recipes():
        assert recipe.summary
        assert recipe.doc.strip()
        assert parse(recipe.name)
        assert recipes.named(recipe.name) == recipe
    assert recipes.named("canonicalize") is None
