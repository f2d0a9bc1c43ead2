"""YAML as it is read: against PyYAML where the two must agree, and by hand where they must not."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mdm_core.errors import ConfigError
from pipelines.strict_yaml import dump_document, parse_document, parse_value

PLAIN_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(min_size=1), PLAIN_VALUES, min_size=1, max_size=5))
def test_what_is_written_is_read_back_here_and_by_yaml_1_1(data):
    text = dump_document(data)
    assert parse_document(text, name="file").data == data
    assert yaml.safe_load(text) == data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 0.00005),
        ("1e6", 1_000_000.0),
        ("1_000_000", 1_000_000),
        ("-3", -3),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("~", None),
        ("null", None),
        ("", None),
        ("TRUE", True),
        ("'5'", "5"),
        ("yes", "yes"),
        ("2:1", "2:1"),
        ("017", "017"),
        ("0x1f", "0x1f"),
        ("2024-01-01", "2024-01-01"),
        ("s3://bucket/table", "s3://bucket/table"),
        ("[a, 1, {b: 2}]", ["a", 1, {"b": 2}]),
    ],
)
def test_values(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml: the file is empty; wanted keys and values, as in `source: {uri: links.tsv}`"),
        ("# only a comment\n", "f.yaml: the file is empty; wanted keys and values, as in `source: {uri: links.tsv}`"),
        ("- a\n- b\n", "f.yaml: got a list; wanted keys and values, as in `source: {uri: links.tsv}`"),
        ("text", "f.yaml: got one value, 'text'; wanted keys and values, as in `source: {uri: links.tsv}`"),
        ("a: 1\nb: 2\na: 3\n", "f.yaml: line 3: a is set twice, first on line 1; keep one"),
        ("a:\n  b: 1\n  b: 1\n", "f.yaml: line 3: a.b is set twice, first on line 2; keep one"),
        (
            "a:\n  b: None\n",
            'f.yaml: line 2: a.b: None is text in YAML; write null for nothing, or "None" for the word',
        ),
        ("a:\n\tb: 1\n", "f.yaml: line 2: a tab where a value or key should begin; YAML is indented with spaces"),
        ("a: 1\n---\nb: 1\n", "f.yaml: line 2: a second document (`---`); wanted one configuration a file"),
        ("? [a, b]\n: 1\n", "f.yaml: line 1: a key must be text; got a list or a mapping"),
        ("a: &x [*x]\n", "f.yaml: an alias (`*name`) holds itself; wanted plain values"),
        (
            "a: !!python/name:os.system ''\n",
            "f.yaml: line 1: a: the tag tag:yaml.org,2002:python/name:os.system is not read; wanted a plain value",
        ),
    ],
)
def test_faults_of_the_text_are_named(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_document(text, name="f.yaml")
    assert str(caught.value) == message


def test_text_that_is_not_yaml_is_a_message_with_its_line():
    with pytest.raises(ConfigError, match=r"^f\.yaml: line 3: this is not YAML: .*; check quotes, brackets"):
        parse_document("a: 1\nb: [1, 2\nc: 3\n", name="f.yaml")


def test_deep_nesting_is_a_message():
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse_document("a: " + "[" * 5000, name="f.yaml")


def test_merge_keys_give_what_pyyaml_gives():
    text = "base: &b {x: 1, y: 2}\nmore: &m {y: 3, z: 4}\none: {<<: *b, y: 9}\ntwo: {<<: [*b, *m]}\n"
    assert parse_document(text, name="f").data == yaml.safe_load(text)


def test_every_key_knows_its_line():
    document = parse_document("a: 1\nb:\n  c:\n  - 1\n  - d: 2\n", name="f")
    lines = {path: line for path, line in document.lines.items() if path}
    assert lines == {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "c", 0): 4, ("b", "c", 1): 5, ("b", "c", 1, "d"): 5}
