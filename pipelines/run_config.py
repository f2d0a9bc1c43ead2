"""What every command's configuration is built from, and how it is read: defaults < YAML file < flags.

    config = load_config(RefreshConfig, argv, prog="mdm refresh", description="Brings a table up to date.")

The environment is not asked: it carries credentials and addresses only.
"""

import copy
import difflib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from mdm_core.errors import ConfigError
from pipelines.config_fields import item_class, section_class
from pipelines.strict_yaml import Document, Path, Value, dotted, dump_document, parse_document, trap

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """A frozen section of configuration; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _must_be_png(uri: str) -> str:
    if not uri.lower().endswith(".png"):
        raise ValueError(f"{uri} must end in .png, as what is drawn is a PNG")
    return uri


PngUri: TypeAlias = Annotated[str, AfterValidator(_must_be_png)]


def load_config(cls: type[ConfigT], argv: Sequence[str], *, prog: str, description: str) -> ConfigT:
    """The configuration that a command line asks for.

    Args:
        cls: The command's configuration class.
        argv: The words after the command's name: `--config FILE` and `--section.key VALUE`.
        prog: The command, as in `mdm refresh`. A file that says `command:` must say the same.
        description: What the command does, for `--help`.

    Raises:
        ConfigError: Whatever is wrong with the file or the flags, all of it in one message.
        SystemExit: `--help` was asked for and has been printed.
    """
    # Imported here so that reading files alone, as `mdm check` does, need not wait for the flags.
    from pipelines.flags import config_file_of, parse_flags

    file = config_file_of(argv)
    document = read_document(file) if file is not None else Document({})
    _check_command(document, file or "", prog.partition(" ")[2])
    flags = parse_flags(cls, argv, document.data, prog=prog, description=description)
    data = _merged(document.data, flags)
    return _validated(cls, data, document=document, file=file, given=flags)


def load_file(cls: type[ConfigT], file: str, *, command: str) -> ConfigT:
    """The configuration that a file holds on its own; raises ConfigError as `load_config` does."""
    document = read_document(file)
    _check_command(document, file, command)
    return _validated(cls, document.data, document=document, file=file, given={})


def read_document(file: str) -> Document:
    """A YAML file's keys and values; raises ConfigError if it can't be read."""
    path = pathlib.Path(file)
    if path.is_dir():
        raise ConfigError(f"{file}: got a folder; wanted a YAML file, as in --config {path / 'refresh.yaml'}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _names_in(path.parent), n=1)
        fix = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise ConfigError(f"{file}: there is no such file; {fix}") from None
    except OSError as error:
        raise ConfigError(f"{file}: the file can't be read ({error.strerror}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    return parse_document(text, name=file)


def dump_config(config: Config) -> str:
    """The configuration as YAML, defaults included; read again, it gives the same configuration."""
    return dump_document(config.model_dump(mode="json"))


def _check_command(document: Document, file: str, command: str) -> None:
    said = document.data.pop("command", command)
    if said != command:
        line = document.lines.get(("command",), 1)
        raise ConfigError(f"{file}: line {line}: command: the file is for `mdm {said}`; wanted one for `mdm {command}`")


def _merged(data: Mapping[str, Value], flags: Mapping[Path, Value]) -> dict[str, Value]:
    merged: Any = copy.deepcopy(dict(data))
    for path, value in flags.items():
        node = merged
        for part in path[:-1]:
            if isinstance(node, dict) and not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
        node[path[-1]] = value
    return dict(merged)


def _validated(
    cls: type[ConfigT], data: Mapping[str, Value], *, document: Document, file: str | None, given: Mapping[Path, Value]
) -> ConfigT:
    data = _with_sections(cls, data)
    try:
        # By way of JSON, pydantic's strict mode takes a list for a tuple, but no text for a number.
        return cls.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems = _problems(cls, error.errors(include_url=False), data)
    said = []
    for path, problem in problems:
        line, where = 0, ""
        if path not in given and file is not None:
            line = next((document.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in document.lines), 0)
            where = f"{file}: line {line}: " if line else f"{file}: "
        flag = "--" if path in given else ""
        said.append((line, f"{where}{flag}{dotted(path)}{problem}"))
    raise ConfigError("\n".join(text for _, text in sorted(said, key=lambda each: each[0])))


def _with_sections(cls: type[BaseModel], data: Mapping[str, Value]) -> dict[str, Value]:
    """The data with what pydantic would lose: defaults that a field sets in its section, where only a part is given.

    Required sections are there at least empty, so that what is missing is named key by key.
    """
    filled = dict(data)
    for name, info in cls.model_fields.items():
        section = section_class(info.annotation)
        if section is None:
            continue
        value = filled.get(name, {} if info.is_required() else None)
        if isinstance(value, dict):
            default = info.default
            below = default.model_dump(mode="json", exclude_unset=True) if isinstance(default, BaseModel) else {}
            filled[name] = _with_sections(section, _laid_over(below, value))
    return filled


def _laid_over(below: Mapping[str, Value], above: Mapping[str, Value]) -> dict[str, Value]:
    both = dict(below)
    for key, value in above.items():
        under = both.get(key)
        both[key] = _laid_over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return both


def _problems(cls: type[Config], errors: Sequence[ErrorDetails], data: Mapping[str, Value]) -> list[tuple[Path, str]]:
    """One problem a path: a union reports every member that did not fit."""
    grouped: dict[Path, list[ErrorDetails]] = {}
    for error in errors:
        grouped.setdefault(_path_in(data, error["loc"]), []).append(error)
    return [
        (path, _describe(cls, path, group))
        for path, group in grouped.items()
        # A list whose items are wrong counts as too short as well.
        if group[0]["type"] != "too_short" or not any(other[: len(path)] == path != other for other in grouped)
    ]


def _path_in(data: object, loc: Path) -> Path:
    """The part of pydantic's location that is keys and positions, without the names of union members."""
    path: list[str | int] = []
    node: Any = data
    for i, part in enumerate(loc):
        if (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            node = node[part]  # type: ignore[index]
            path.append(part)
        elif isinstance(node, dict) and i == len(loc) - 1:
            path.append(part)
    return tuple(path)


def _describe(cls: type[Config], path: Path, errors: list[ErrorDetails]) -> str:
    kind, got = errors[0]["type"], errors[0]["input"]
    model, info = _field_at(cls, path)
    if kind == "extra_forbidden":
        return f": unknown key; {_suggestion(cls, model, path)}"
    if kind == "missing" and isinstance(got, list):
        return f": got {_shown(got)}; wanted more items{_default_of(info)}"
    if kind == "missing":
        if any(isinstance(part, int) for part in path):
            return ": missing"
        metavar = str(path[-1]).upper()
        return f": missing; set it in the file, or give --{dotted(path)} {metavar}"
    if kind == "value_error":
        return f"{': ' if path else ''}{errors[0]['msg'].removeprefix('Value error, ')}"
    wanted = " or ".join(dict.fromkeys(_wanted(error) for error in errors))
    fix = trap(got) or _closest(got, errors)
    return f": got {_shown(got)}; wanted {wanted}{'; ' + fix if fix else _default_of(info)}"


def _default_of(info: FieldInfo | None) -> str:
    if info is None or info.is_required() or info.default is PydanticUndefined or isinstance(info.default, BaseModel):
        return ""
    return f"; the default is {_shown(info.default)}"


def _wanted(error: ErrorDetails) -> str:
    known = {
        "int_type": "a whole number",
        "int_parsing": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text",
        "tuple_type": "a list, as in [a, b]",
        "list_type": "a list, as in [a, b]",
        "dict_type": "keys and values",
        "none_required": "null",
        "model_type": "keys and values",
        "finite_number": "a finite number",
    }
    said = error["msg"].removeprefix("Input should be ").removeprefix("Value should ")
    words = known.get(error["type"], said)
    context = error.get("ctx", {})
    if "ge" in context or "gt" in context:
        words = f"{_number(context['ge'])} or more" if "ge" in context else f"more than {_number(context['gt'])}"
    if "le" in context or "lt" in context:
        words = f"{_number(context['le'])} or less" if "le" in context else f"less than {_number(context['lt'])}"
    if error["type"] == "int_type" and isinstance(error["input"], float):
        words = "a whole number, without point or exponent"
    if error["type"] == "too_short":
        words = f"{context['min_length']} or more items"
    if error["type"] == "string_too_short":
        words = "some text" if context.get("min_length") == 1 else words
    return words


def _closest(got: object, errors: Sequence[ErrorDetails]) -> str:
    """The allowed word that a misspelt one is nearest to."""
    if not isinstance(got, str):
        return ""
    allowed = [word.strip(" '") for error in errors for word in _split_words(error)]
    near = difflib.get_close_matches(got, allowed, n=1)
    return f"did you mean {near[0]}?" if near else ""


def _split_words(error: ErrorDetails) -> list[str]:
    if error["type"] != "literal_error":
        return []
    return str(error["ctx"]["expected"]).replace(" or ", ", ").split(", ")


def _field_at(cls: type[Config], path: Path) -> tuple[type[BaseModel] | None, FieldInfo | None]:
    """The section that a path leads into, and the field at its end where there is one."""
    model: type[BaseModel] | None = cls
    info = None
    for i, part in enumerate(path):
        if isinstance(part, int):
            model = None if info is None else item_class(info.annotation)
            continue
        if model is None or part not in model.model_fields:
            return (model, None) if i == len(path) - 1 else (None, None)
        info = model.model_fields[part]
        owner, model = model, section_class(info.annotation)
        if i == len(path) - 1:
            return owner, info
    return model, None


def _suggestion(cls: type[Config], model: type[BaseModel] | None, path: Path) -> str:
    """The key that was probably meant: one near it in the same section, or the same word in another."""
    prefix, key = path[:-1], str(path[-1])
    here = list(model.model_fields) if model is not None else []
    near = difflib.get_close_matches(key, here, n=1)
    if near:
        return f"did you mean {dotted((*prefix, near[0]))}?"
    elsewhere: dict[str, str] = {}
    for known in _all_paths(cls, ()):
        elsewhere.setdefault(str(known[-1]), dotted(known))
        elsewhere.setdefault(dotted(known), dotted(known))
    for word in (key, dotted(path)):
        matches = difflib.get_close_matches(word, elsewhere, n=1, cutoff=0.8)
        if matches:
            return f"did you mean {elsewhere[matches[0]]}?"
    return f"known here: {', '.join(here)}" if here else "remove it"


def _all_paths(model: type[BaseModel], at: Path) -> list[Path]:
    paths: list[Path] = []
    for name, info in model.model_fields.items():
        section = section_class(info.annotation)
        paths += _all_paths(section, (*at, name)) if section is not None else [(*at, name)]
    return paths


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else str(value)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _names_in(folder: pathlib.Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
