"""YAML 1.2 scalars, lines, and refusal of what would surprise."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kllm.config.dump import inline
from kllm.config.yamlfile import MAX_FILE_BYTES, parse_yaml, read_text, scalar
from kllm.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("5e3", 5000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("20M", "20M"),
        ("-.5", -0.5),
        ("+3", 3),
        (".inf", float("inf")),
        ("e5", "e5"),
        ("1e", "1e"),
    ],
)
def test_scalars(text, value):
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_quotes_make_text():
    assert parse_yaml("a: '5'\nb: \"no\"\nc: |\n  1e-5\n", "f").data == {"a": "5", "b": "no", "c": "1e-5\n"}


def test_lines():
    tree = parse_yaml("a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n", "f.yaml")
    assert tree.where(("b", 1, "d")) == "f.yaml:5"
    assert tree.where(("b", 1, "missing")) == "f.yaml:4"
    assert tree.where(("b", 0)) == "f.yaml:3"
    assert tree.where(("zzz",)) == "f.yaml:1"


def errors_of(text):
    return [str(e) for e in parse_yaml(text, "f").errors]


def test_duplicate_keys_name_both_lines_and_the_rest_is_still_read():
    tree = parse_yaml("a: 1\nb: 2\na: 3\nb: 4\n", "f")
    assert [str(e) for e in tree.errors] == [
        "f:3: key 'a' is given twice, first on line 1",
        "f:4: key 'b' is given twice, first on line 2",
    ]
    assert tree.data == {"a": 1, "b": 2}


def test_merge_keys_tags_and_complex_keys():
    assert "merge keys" in errors_of("a: &x {p: 1}\nb:\n  <<: *x\n")[0]
    assert "!!python/object" in errors_of("a: !!python/object:os.system x\n")[0]
    assert "!mine" in errors_of("a: !mine x\n")[0]
    assert "must be a word" in errors_of("? [1, 2]\n: 3\n")[0]


def test_aliases_work_but_bombs_and_loops_do_not():
    assert parse_yaml("a: &x [1, 2]\nb: *x\n", "f").data == {"a": [1, 2], "b": [1, 2]}
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    for i in range(1, 12):
        bomb += f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n"
    assert any("too large" in e for e in errors_of(bomb))
    assert any("contains itself" in e for e in errors_of("a: &x [1, *x]\n"))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\n\tb: 2\n", 2, "tab"),
        ("a:\n  b: 1\n c: 2\n", 3, "not valid YAML"),
        ("a: b: c\n", 1, "not valid YAML"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ("a: 1\n---\nb: 2\n", 2, "one document"),
        ("a: *missing\n", 1, "not valid YAML"),
        ("a: 1\nb: \x00\n", 2, "not a text file"),
    ],
)
def test_syntax_errors_say_the_line(text, line, words):
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "f.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"f.yaml:{line}:")


def test_deep_nesting_is_no_crash():
    for text in ("[" * 200 + "]" * 200, "[" * 3_000):
        try:
            assert errors_of(text)
        except UserError as error:
            assert "\n" not in str(error)


def test_files(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: x\n")
    assert read_text(path, "r") == "name: x\n"
    path.write_bytes(b"ok\n\xff\xfe")
    with pytest.raises(UserError, match=r"r:2: is not UTF-8"):
        read_text(path, "r")
    path.write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    with pytest.raises(UserError, match="larger"):
        read_text(path, "r")
    with pytest.raises(UserError, match="folder"):
        read_text(tmp_path, "r")
    with pytest.raises(UserError, match="no such file"):
        read_text(tmp_path / "none", "r")


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.text(max_size=12)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN)
@example({"\x85": "a\u2028b"})
@example("\ufeff x")
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_is_dumped_reads_back(value):
    """Every value that a recipe can hold survives dump and load, whatever it looks like."""
    tree = parse_yaml(f"k: {inline(value)}\n", "f")
    if not tree.errors:
        assert tree.data == {"k": value}
    else:
        assert all("merge keys" in str(e) for e in tree.errors)


@pytest.mark.parametrize(
    "word", ["1e-5", "5e3", "no", "true", "null", "~", "", "010", "0x1", "20M", "a: b", "#x", "- y"]
)
def test_ambiguous_words_stay_text(word):
    assert parse_yaml(f"k: {inline(word)}\n", "f").data == {"k": word}
