"""Reading YAML: YAML 1.2 values, a line for every path, and nothing clever. No model is needed."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from study import reader
from study.reader import read_document, read_yaml
from trainables.errors import UserError


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-5", 1e-5),
        ("1e400x", "1e400x"),
        (".5", 0.5),
        ("3.10", 3.1),
        ("12", 12),
        ("-7", -7),
        ("0777", 777),
        ("0o17", 15),
        ("0x1F", 31),
        ("12:30", "12:30"),
        ("12:30:45", "12:30:45"),
        ("1_000", "1_000"),
        ("on", "on"),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("'12'", "12"),
        ('"true"', "true"),
        ("=", "="),
    ],
)
def test_values_are_those_of_yaml_1_2(text, value):
    data, _ = read_yaml(f"key: {text}", "study.yaml")
    assert data == {"key": value}
    assert type(data["key"]) is type(value)


def test_every_path_has_its_line():
    text = "a: 1\nb:\n  c: [x, y]\n  d:\n    - 1\n    - e: 2\n"
    _, lines = read_yaml(text, "study.yaml")
    assert lines == {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "c", 0): 3,
        ("b", "c", 1): 3,
        ("b", "d"): 4,
        ("b", "d", 0): 5,
        ("b", "d", 1): 6,
        ("b", "d", 1, "e"): 6,
    }
    assert lines.of(("b", "d", 1, "missing", "deeper")) == 6
    assert lines.of(("nothing",)) == 1


@pytest.mark.parametrize(
    "text, line, words",
    [
        ("a: 1\nb: 2\na: 3", 3, "a: given twice, first on line 1"),
        ("a:\n  b: 1\n  b: 2", 3, "a.b: given twice, first on line 2"),
        ("a: &x 1\nb: 2", 1, "an anchor (&x)"),
        ("a: &x [1]\nb: *x", 2, "an alias (*x)"),
        ("a: &x [*x]", 1, "an alias (*x)"),
        ("a: [1, *x]", 1, "a.1: an alias (*x)"),
        ("a: 1\n<<: {b: 2}", 2, "a merge key (<<)"),
        ("a: !!python/object:os.system 1", 1, "a tag (tag:yaml.org,2002:python/object:os.system)"),
        ("a: !!str 1", 1, "a tag"),
        ("? [1, 2]\n: 3", 1, "as a key; expected a word"),
        ("a: 1\n---\nb: 2", 2, "a second document"),
        ("a: 1\nb: 1e400", 2, "b: given '1e400'; expected a finite number"),
        ("a: .inf", 1, "expected a finite number"),
        ("a: .nan", 1, "expected a finite number"),
        ("a: 99999999999999999999", 1, "64 bits"),
        ("a: " + "9" * 9000, 1, "64 bits"),
        ("- 1\n- 2", 1, "expected `key: value` lines"),
        ("", 1, "given nothing"),
        ("a: 1\nb: [1,", 2, "not YAML"),
        ("a: 1\n\tb: 2", 2, "not YAML"),
        ("a: 1\nb: \x00", 2, "printable"),
        ('a: "\\ud800"', 1, "half a character"),
        ("[" * 21 + "]" * 21, 1, "nested deeper than 20 levels"),
    ],
)
def test_what_is_refused_is_named_with_its_line(text, line, words):
    with pytest.raises(UserError) as error:
        read_yaml(text, "study.yaml")
    assert f"study.yaml:{line}: " in str(error.value)
    assert words in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as error:
        read_yaml("a: &x 1\nb: !t 2\na: 3\nc: .inf", "s.yaml")
    assert len(str(error.value).splitlines()) == 4


def test_nesting_of_twenty_levels_and_ten_thousand_values_are_allowed():
    read_yaml("a: " + "[" * 19 + "]" * 19, "s.yaml")
    read_yaml("a: [" + "1," * 9_990 + "]", "s.yaml")
    with pytest.raises(UserError, match="more than 10,000 values"):
        read_yaml("a: [" + "1," * 10_001 + "]", "s.yaml")


def test_a_file_over_256_kib_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(reader.yaml, "parse", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(UserError, match="expected at most 262,144"):
        read_yaml("a: " + "é" * (128 * 1024), "s.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x]\n" + "".join(f"b{i}: &b{i} [*a,*a,*a]\n" for i in range(300)),
        "[" * 200_000,
        "{" * 200_000,
        "a: [" + "{x: 1}," * 37_000,
        "- " * 100_000,
        "? " * 100_000,
        "a: " + "x " * 130_000,
    ],
)
def test_hostile_text_is_refused_within_a_second(text):
    start = time.process_time()
    read_document(text)
    assert time.process_time() - start < 1.0


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet=st.sampled_from("ab01 .:-[]{}&*!<>|'\"\n\t#?,%@`~é\x00\ufeff"), max_size=80)
)
def test_any_text_gives_data_or_a_user_error(text):
    try:
        data, lines = read_yaml(text, "s.yaml")
    except UserError as error:
        assert str(error).startswith("s.yaml:")
    else:
        assert isinstance(data, dict)
        assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())


_TEXT = st.text(st.characters(max_codepoint=0xD7FF), max_size=6)
_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(_TEXT, _PLAIN, max_size=4))
def test_json_is_read_back_as_it_was_written(data):
    assert read_yaml(json.dumps(data), "s.yaml")[0] == data
