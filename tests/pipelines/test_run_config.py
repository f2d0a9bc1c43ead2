"""Configuration: what is read is what was meant, and what is wrong is named."""

from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from mdm_core.errors import ConfigError
from pipelines.run_config import Config, dump_config, load_config, load_file


class Inner(Config):
    """A section."""

    retries: int = Field(default=2, ge=0, le=9)
    """How often."""
    wait_s: float = Field(default=1.5, gt=0)
    """How long."""
    per_host: int = 8
    """At once."""


class Item(Config):
    """One of many."""

    lr: float
    """Learning rate."""
    name: str = ""
    """Its name."""


class Whole(Config):
    """A configuration with every kind of field."""

    uri: str
    """Where."""
    inner: Inner = Inner()
    optional: Inner | None = None
    """A section that may be absent."""
    kind: Literal["tsv", "csv", "none"] = "tsv"
    """How it is written."""
    flag: bool = False
    """Whether."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """How many."""
    limit: int | None = None
    """At most."""
    words: tuple[str, ...] = ()
    """Several."""
    pair: tuple[int, int] = (1, 2)
    """From and to."""
    weights: dict[str, float] = Field(default={})
    """Named numbers."""
    items: tuple[Item, ...] = ()
    """Sections in a list."""


def load(*argv: str) -> Whole:
    return load_config(Whole, argv, prog="mdm whole", description="A test.")


def message(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str | bytes, name: str = "c.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


INNER = st.builds(
    Inner,
    retries=st.integers(0, 9),
    wait_s=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    per_host=st.integers(),
)
WHOLE = st.builds(
    Whole,
    uri=st.text(),
    inner=INNER,
    optional=st.none() | INNER,
    kind=st.sampled_from(["tsv", "csv", "none"]),
    flag=st.booleans(),
    workers=st.just("auto") | st.integers(min_value=1),
    limit=st.none() | st.integers(),
    words=st.lists(st.text(), max_size=3).map(tuple),
    pair=st.tuples(st.integers(), st.integers()),
    weights=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    items=st.lists(
        st.builds(Item, lr=st.floats(allow_nan=False, allow_infinity=False), name=st.text()), max_size=2
    ).map(tuple),
)


@given(WHOLE)
def test_any_configuration_is_written_and_read_back(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load("--config", str(path)) == config
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == config.model_dump(mode="json")


def test_flags_win_over_the_file_and_the_file_over_defaults(yaml_file):
    file = yaml_file("uri: from file\ninner: {retries: 5, wait_s: 5e-5}\n")
    config = load("--config", file, "--inner.retries", "7", "--inner.per-host=3", "--kind", "none")
    assert (config.uri, config.kind) == ("from file", "none")
    assert config.inner == Inner(retries=7, wait_s=0.00005, per_host=3)


def test_a_part_of_a_section_leaves_the_rest_as_its_field_sets_it(yaml_file):
    class Middle(Config):
        inner: Inner = Inner(retries=5, wait_s=3)

    class Outer(Config):
        middle: Middle = Middle(inner=Inner(per_host=1, retries=6))

    file = yaml_file("middle: {inner: {wait_s: 4}}")
    config = load_config(Outer, ["--config", file, "--middle.inner.per_host", "2"], prog="mdm x", description="")
    assert config.middle.inner == Inner(retries=6, wait_s=4, per_host=2)


def test_required_keys_may_come_from_flags_alone():
    assert load("--uri", "x") == Whole(uri="x")


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--uri", "007"], "uri", "007"),
        (["--uri", "a: b # c"], "uri", "a: b # c"),
        (["--flag", "true"], "flag", True),
        (["--workers", "auto"], "workers", "auto"),
        (["--workers", "3"], "workers", 3),
        (["--limit", "null"], "limit", None),
        (["--limit", "1_000"], "limit", 1000),
        (["--words", "[a, 'b c']"], "words", ("a", "b c")),
        (["--pair", "[3, 4]"], "pair", (3, 4)),
        (["--weights", "{a: 1, b: 5e-1}"], "weights", {"a": 1.0, "b": 0.5}),
        (["--optional.retries", "1"], "optional", Inner(retries=1)),
        (["--items", "[{lr: 1e-4}]"], "items", (Item(lr=0.0001),)),
    ],
)
def test_a_flag_is_written_as_in_the_file(flags, field, value):
    assert getattr(load("--uri", "x", *flags), field) == value


def test_items_of_the_file_have_flags_of_their_own(yaml_file):
    file = yaml_file("uri: x\nitems:\n- {lr: 0.1}\n- {lr: 0.2, name: second}\n")
    config = load("--config", file, "--items.1.lr", "5e-5")
    assert config.items == (Item(lr=0.1), Item(lr=0.00005, name="second"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("uri: x\ninner: {retrys: 1}\n", "line 2: inner.retrys: unknown key; did you mean inner.retries?"),
        ("uri: x\nretries: 1\n", "line 2: retries: unknown key; did you mean inner.retries?"),
        ("uri: x\ninner:\n  retries: 10\n", "line 3: inner.retries: got 10; wanted 9 or less; the default is 2"),
        ("uri: x\ninner:\n  retries: -1\n", "line 3: inner.retries: got -1; wanted 0 or more; the default is 2"),
        ("uri: x\ninner: {wait_s: 0}\n", "line 2: inner.wait_s: got 0; wanted more than 0; the default is 1.5"),
        ("uri: x\ninner: 3\n", "line 2: inner: got 3; wanted keys and values"),
        (
            "uri: x\nlimit: 1e3\n",
            "line 2: limit: got 1000.0; wanted a whole number, without point or exponent; the default is null",
        ),
        ("uri: x\nkind: tvs\n", "line 2: kind: got \"tvs\"; wanted 'tsv', 'csv' or 'none'; did you mean tsv?"),
        ("uri: x\nflag: yes\n", 'line 2: flag: got "yes"; wanted true or false; yes is text here; write true or false'),
        (
            "uri: x\nlimit: '5'\n",
            'line 2: limit: got "5"; wanted a whole number; '
            "'5' is quoted, so it is text; write it without the quotes",
        ),
        (
            "uri: x\ninner: {wait_s: 2:1}\n",
            'line 2: inner.wait_s: got "2:1"; wanted a number; 2:1 is text here, and a number to base 60 for some '
            "readers of YAML; write the number that is meant",
        ),
        (
            "uri: x\nlimit: 010\n",
            'line 2: limit: got "010"; wanted a whole number; 010 is text here, and an octal number for some readers '
            "of YAML; write it without leading zeros",
        ),
        (
            "uri: x\nworkers: some\n",
            'line 2: workers: got "some"; wanted a whole number or \'auto\'; the default is "auto"',
        ),
        ("uri: x\nwords: a\n", 'line 2: words: got "a"; wanted a list, as in [a, b]; the default is []'),
        ("uri: x\npair: [1]\n", "line 2: pair: got [1]; wanted more items; the default is [1, 2]"),
        ("uri: x\nitems: [{lr: fast}]\n", 'line 2: items.0.lr: got "fast"; wanted a number'),
        ("uri: x\nitems:\n- {name: y}\n", "line 3: items.0.lr: missing"),
        ("kind: csv\n", "uri: missing; set it in the file, or give --uri URI"),
        ("command: refresh\nuri: x\n", "line 1: command: the file is for `mdm refresh`; wanted one for `mdm whole`"),
    ],
)
def test_faults_in_a_file_are_named_with_their_line(yaml_file, text, problem):
    file = yaml_file(text)
    assert message("--config", file) == f"{file}: {problem}"


def test_all_faults_of_a_file_come_at_once_in_its_order(yaml_file):
    file = yaml_file("uri: 3\nkind: x\ninner:\n  retries: no\n  wait: 1\n")
    lines = message("--config", file).splitlines()
    assert [line.split(": ")[1:3] for line in lines] == [
        ["line 1", "uri"],
        ["line 2", "kind"],
        ["line 4", "inner.retries"],
        ["line 5", "inner.wait"],
    ]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--inner.retries", "-1"], "--inner.retries: got -1; wanted 0 or more; the default is 2"),
        (["--inner.retries"], "Missing value for argument '--inner.retries'. wanted one, as in `--key VALUE`"),
        (["--retries", "3"], "--retries: no such flag; did you mean --inner.retries?"),
        (["--inner.retrys", "3"], "--inner.retrys: no such flag; did you mean --inner.retries?"),
        (["stray"], "'stray' belongs to no flag; wanted `--section.key VALUE`, quoted if it has spaces"),
        (["--limit", "None"], 'None is text in YAML; write null for nothing, or "None" for the word'),
        (["--pair", "[1"], "--pair [1: line 1: this is not YAML"),
    ],
)
def test_faults_of_flags_are_named(flags, problem):
    assert problem in message("--uri", "x", *flags)


def test_files_that_cannot_be_read_are_named(yaml_file, tmp_path):
    yaml_file("uri: x\n", name="refresh.yaml")
    missing = str(tmp_path / "refesh.yaml")
    near = tmp_path / "refresh.yaml"
    assert message("--config", missing) == f"{missing}: there is no such file; did you mean {near}?"
    assert message("--config", str(tmp_path)).startswith(f"{tmp_path}: got a folder; wanted a YAML file")
    latin = yaml_file("uri: café\n".encode("latin-1"))
    assert message("--config", latin) == f"{latin}: byte 8 is not UTF-8; save the file as UTF-8"


def test_a_byte_order_mark_is_no_part_of_the_first_key(yaml_file):
    assert load("--config", yaml_file(b"\xef\xbb\xbfuri: x\r\nkind: csv\r\n")) == Whole(uri="x", kind="csv")


def test_a_file_alone_is_checked_like_a_command_line(yaml_file):
    assert load_file(Whole, yaml_file("command: whole\nuri: x\n"), command="whole") == Whole(uri="x")


def test_help_shows_every_field_with_its_docstring_and_default(yaml_file, capsys):
    file = yaml_file("uri: from the file\n")
    with pytest.raises(SystemExit) as stop:
        load("--config", file, "--help")
    assert stop.value.code == 0
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--uri TEXT Where. (file: from the file)" in page
    assert "--inner.retries INT How often. (default: 2)" in page
    assert "--workers INT|auto How many. (default: auto)" in page
    assert "--pair [INT, INT] From and to. (default: [1, 2])" in page
    assert "--limit INT|null At most. (default: null)" in page


class Polite(Config):
    """A section with a switch."""

    asks_first: bool = False
    """Whether."""


class Switched(Config):
    """A configuration with switches."""

    uri: str = "u"
    """Where."""
    section: Polite = Polite()
    quick: bool = False
    """Whether."""


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--quick"], (True, False)),
        (["--quick", "--uri", "v"], (True, False)),
        (["--section.asks-first", "--quick"], (True, True)),
        (["--section.asks_first", "--quick", "false"], (False, True)),
        (["--quick=true", "--section.asks-first", "true"], (True, True)),
        ([], (False, False)),
    ],
)
def test_what_is_true_or_false_needs_no_value(argv: list[str], wanted: tuple[bool, bool]) -> None:
    config = load_config(Switched, argv, prog="mdm x", description="")
    assert (config.quick, config.section.asks_first) == wanted


def test_other_flags_need_one() -> None:
    with pytest.raises(ConfigError, match="--uri"):
        load_config(Switched, ["--uri", "--quick"], prog="mdm x", description="")
