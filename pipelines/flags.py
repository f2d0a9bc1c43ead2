"""The dotted flags of a command: one for every field of its configuration, `--section.key VALUE`.

tyro parses them and writes the help page. A value is written as in a YAML file, and is only text here: what
it may be is said by the configuration class, once, for files and flags alike. What is true or false may stand without a
value, and is true then.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from tyro.constructors import PrimitiveConstructorSpec

from mdm_core.errors import ConfigError
from pipelines.config_fields import item_class, members, section_class
from pipelines.strict_yaml import Path, Value, dotted, parse_value

_NOT_GIVEN = object()


def parse_flags(
    model: type[BaseModel], argv: Sequence[str], file_data: Mapping[str, Value], *, prog: str, description: str
) -> dict[Path, Value]:
    """The values that a command line gives, by the paths of their fields; `--help` prints the page and exits.

    Args:
        model: The configuration class; every field of it and of its sections is a flag.
        argv: The words after the command's name.
        file_data: What the YAML file says, shown as defaults by the help page. A list of sections has as many flags as
            the file has sections.
        prog: The command, as in `mdm refresh`.
        description: What the command does, for the help page.

    Raises:
        ConfigError: A flag is not known, stands without a value, or its value is not YAML.
    """
    paths: dict[str, Path] = {}
    kinds: dict[Path, Any] = {}
    mirror = _mirror(model, file_data, (), paths, kinds)
    options = [
        ("config", _option("FILE", "The configuration, one YAML file; flags win over it."), _default(_NOT_GIVEN)),
        ("json", _switch("Print the result as one JSON object, the last line on stdout."), _default(False)),
    ]
    whole = dataclasses.make_dataclass(prog.split()[-1], [*options, *_fields_of(mirror)])
    switches = {dotted(path) for path, kind in kinds.items() if kind is bool}
    parsed, unknown = _run_tyro(whole, _with_values(argv, switches), prog=prog, description=description)
    if unknown:
        raise ConfigError(_unknown_message(unknown, [f"--{name}" for name in (*paths, "config", "json")]))
    given: dict[Path, Value] = {}
    problems = []
    for path, text in _texts(parsed, paths.values()):
        try:
            given[path] = _value_of(text, kinds[path])
        except ConfigError as error:
            problems.append(f"--{dotted(path)} {text}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return given


def _with_values(argv: Sequence[str], switches: set[str]) -> list[str]:
    """The words with `true` behind each flag that is true or false and stands without a value."""
    words = []
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        words.append(word)
        if word.startswith("--") and word[2:].replace("-", "_") in switches and following.startswith("--"):
            words.append("true")
    return words


def config_file_of(argv: Sequence[str]) -> str | None:
    """The value of `--config`, read ahead of the rest, because the file decides on defaults and flags."""
    for i, word in enumerate(argv):
        if word.startswith("--config="):
            return word.removeprefix("--config=")
        if word == "--config" and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            return argv[i + 1]
    return None


def _mirror(
    model: type[BaseModel], data: Mapping[str, Value], at: Path, paths: dict[str, Path], kinds: dict[Path, Any]
) -> type:
    """A dataclass of text fields with the flags, helps and defaults of `model`."""
    fields: list[tuple[str, Any, Any]] = []
    for name, info in model.model_fields.items():
        path = (*at, name)
        value = data.get(name, _NOT_GIVEN)
        section, item = section_class(info.annotation), item_class(info.annotation)
        if section is not None:
            nested = _mirror(section, value if isinstance(value, dict) else _shown(info), path, paths, kinds)
            fields.append((name, _group(nested, info, section), dataclasses.field(default_factory=nested)))
        elif item is not None and isinstance(value, list) and value:
            numbered = [
                (str(i), _mirror(item, each if isinstance(each, dict) else {}, (*path, i), paths, kinds))
                for i, each in enumerate(value)
            ]
            nested = _numbered(name, numbered)
            fields.append((name, _group(nested, info, item), dataclasses.field(default_factory=nested)))
        else:
            paths[dotted(path)] = path
            kinds[path] = info.annotation
            fields.append((name, _leaf(info, value), _default(_NOT_GIVEN)))
    return dataclasses.make_dataclass(model.__name__, fields)


def _numbered(name: str, items: list[tuple[str, type]]) -> type:
    # A field can't be called "0" in a class statement; make_dataclass wants identifiers, so tyro is told the name.
    fields = [
        (f"item_{i}", Annotated[nested, tyro.conf.arg(name=i)], dataclasses.field(default_factory=nested))
        for i, nested in items
    ]
    return dataclasses.make_dataclass(name, fields)


def _leaf(info: FieldInfo, value: object) -> Any:
    if value is not _NOT_GIVEN:
        hint = f"(file: {_as_text(value)})"
    elif info.is_required():
        hint = "(required)"
    else:
        hint = f"(default: {_as_text(info.get_default(call_default_factory=True, validated_data={}))})"
    return _option(_metavar(info.annotation), info.description or "", hint)


def _option(metavar: str, text: str, hint: str = "") -> Any:
    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=lambda value: [""],
    )
    return Annotated[Any, spec, tyro.conf.arg(help=text, help_behavior_hint=hint)]


def _switch(text: str) -> Any:
    return Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help=text, help_behavior_hint="")]


def _default(value: object) -> Any:
    return dataclasses.field(default=value)


def _group(nested: type, info: FieldInfo, section: type[BaseModel]) -> Any:
    text = info.description or (section.__doc__ or "").strip().partition("\n")[0]
    return Annotated[nested, tyro.conf.arg(help=text)]


def _fields_of(mirror: type) -> list[tuple[str, Any, Any]]:
    return [(field.name, field.type, field) for field in dataclasses.fields(mirror)]


def _shown(info: FieldInfo) -> Mapping[str, Value]:
    """A section's own defaults, where they differ from those of its class."""
    default = info.get_default(call_default_factory=True, validated_data={}) if not info.is_required() else None
    return default.model_dump(mode="json", exclude_unset=True) if isinstance(default, BaseModel) else {}


def _run_tyro(whole: type, argv: Sequence[str], *, prog: str, description: str) -> tuple[Any, list[str]]:
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                whole, prog=prog, description=description, args=argv, use_underscores=True, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # tyro draws its message into a box with a title; what is said stands on the second line.
        said = [line.strip("│ ") for line in captured.getvalue().splitlines()[1:]]
        message = said[0].replace(" Expected 1 values.", " wanted one, as in `--key VALUE`") if said else "bad flags"
        raise ConfigError(f"{message}; `{prog} --help` lists the flags") from None


def _unknown_message(unknown: Sequence[str], known: Sequence[str]) -> str:
    lines = []
    for word in unknown:
        flag = word.partition("=")[0]
        if flag.startswith("-"):
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
            last = flag.rpartition(".")[2].lstrip("-")
            near = near or [name for name in known if name.rpartition(".")[2].lstrip("-") == last]
            fix = f"did you mean {near[0]}?" if near else "`--help` lists the flags"
            lines.append(f"{flag}: no such flag; {fix}")
        elif not lines:
            lines.append(f"{word!r} belongs to no flag; wanted `--section.key VALUE`, quoted if it has spaces")
    return "\n".join(lines)


def _texts(parsed: Any, paths: Any) -> list[tuple[Path, str]]:
    found = []
    for path in paths:
        node = parsed
        for part in path:
            node = getattr(node, f"item_{part}" if isinstance(part, int) else part)
        if node is not _NOT_GIVEN:
            found.append((path, node))
    return found


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(value, str) for value in get_args(kind))
    return kind is str


def _value_of(text: str, annotation: object) -> Value:
    """What a flag's text means: itself where only text is wanted, else what YAML makes of it."""
    kinds = [kind for kind in members(annotation) if kind is not type(None)]
    optional = len(kinds) < len(members(annotation))
    if all(_is_text(kind) for kind in kinds) and not (optional and text in ("null", "~", "None")):
        return text
    return parse_value(text)


def _metavar(annotation: object) -> str:
    names: list[str] = []
    for kind in members(annotation):
        origin = get_origin(kind)
        if origin is Literal:
            names += [str(value) for value in get_args(kind)]
        elif origin in (tuple, list, set, frozenset, Sequence):
            inner = [_metavar(item) for item in get_args(kind) if item is not Ellipsis]
            names.append(
                f"[{', '.join(inner)}{', …' if get_args(kind)[-1] is Ellipsis or origin is not tuple else ''}]"
            )
        elif origin in (dict, Mapping):
            names.append("{KEY: VALUE, …}")
        else:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                kind = dict
            known = {
                dict: "{KEY: VALUE, …}",
                type(None): "null",
                bool: "true|false",
                int: "INT",
                float: "FLOAT",
                str: "TEXT",
            }
            names.append(known.get(kind) or getattr(kind, "__name__", str(kind)).upper())
    return "|".join(dict.fromkeys(names))


def _as_text(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_as_text(item) for item in value)}]"
    return str(value) if value != "" else '""'
