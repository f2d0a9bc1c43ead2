"""YAML as people mean it: the traps of YAML 1.1 are errors with a name, and every value knows its line.

The numbers are those of YAML 1.2 (`5e-5` is one, `2:1` and `017` are not), with `_` between digits.
"""

import re
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

from mdm_core.errors import ConfigError

Value: TypeAlias = bool | int | float | str | list["Value"] | dict[str, "Value"] | None
Path: TypeAlias = tuple[str | int, ...]

_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)$")
_FLOAT = re.compile(
    r"[-+]?(?:(?:(?:0|[1-9][0-9]*(?:_[0-9]+)*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)
_STR_TAG = "tag:yaml.org,2002:str"


@dataclass
class Document:
    """What a YAML text holds."""

    data: dict[str, Value]
    lines: dict[Path, int] = field(default_factory=dict)
    """The line, from 1, on which each key or list item stands."""


def parse_document(text: str, *, name: str) -> Document:
    """Reads a text that must be one mapping.

    Args:
        text: The YAML.
        name: The file, for messages.

    Raises:
        ConfigError: The text is not YAML, not a mapping, says a key twice or has `None` in it.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {_syntax_problem(error)}") from error
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply; wanted sections in sections, a few levels") from None
    if node is None:
        raise ConfigError(f"{name}: the file is empty; wanted keys and values, as in `source: {{uri: links.tsv}}`")
    if not isinstance(node, yaml.MappingNode):
        what = "a list" if isinstance(node, yaml.SequenceNode) else f"one value, {_shortened(str(node.value))!r}"
        raise ConfigError(f"{name}: got {what}; wanted keys and values, as in `source: {{uri: links.tsv}}`")
    lines: dict[Path, int] = {}
    problems: list[str] = []
    try:
        data = _mapping(node, (), lines, problems)
    except RecursionError:
        raise ConfigError(f"{name}: an alias (`*name`) holds itself; wanted plain values") from None
    if problems:
        raise ConfigError("\n".join(f"{name}: {problem}" for problem in problems))
    return Document(data, lines)


def parse_value(text: str) -> Value:
    """Reads one value as a file would have it after `key:`.

    Raises:
        ConfigError: The text is not one YAML value.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_problem(error)) from error
    problems: list[str] = []
    value = None if node is None else _value(node, (), {}, problems)
    if problems:
        raise ConfigError("; ".join(problem.partition(": ")[2] for problem in problems))
    return value


def dump_document(data: dict[str, Any]) -> str:
    """Writes a text that `parse_document` reads back as the same values, and YAML 1.1 readers too."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _value(node: yaml.Node, path: Path, lines: dict[Path, int], problems: list[str]) -> Value:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, lines, problems)
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if not node.tag.startswith(("tag:yaml.org,2002:", "!")) or node.tag.startswith("tag:yaml.org,2002:python"):
        problems.append(f"line {line}: {dotted(path)}: the tag {node.tag} is not read; wanted a plain value")
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, i), lines, problems) for i, item in enumerate(node.value)]
    text = str(node.value)
    if getattr(node, "style", None) in ("'", '"', "|", ">") or node.tag == "!":
        return text
    if text == "None":
        problems.append(
            f"line {line}: {dotted(path) or 'the value'}: None is text in YAML; write null for nothing, "
            'or "None" for the word'
        )
    return _scalar(text)


def _scalar(text: str) -> Value:
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _mapping(node: yaml.MappingNode, path: Path, lines: dict[Path, int], problems: list[str]) -> dict[str, Value]:
    lines.setdefault(path, node.start_mark.line + 1)
    result: dict[str, Value] = {}
    merged: dict[str, Value] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"line {line}: a key must be text; got a list or a mapping")
            continue
        key = str(key_node.value)
        if key == "<<" and key_node.style is None:
            bases = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for base in bases:
                if isinstance(base, yaml.MappingNode):
                    # An earlier base wins over a later one.
                    merged = _mapping(base, path, lines, problems) | merged
                else:
                    problems.append(f"line {line}: `<<` merges mappings; got something else")
            continue
        here = (*path, key)
        if key in result:
            problems.append(f"line {line}: {dotted(here)} is set twice, first on line {lines[here]}; keep one")
            continue
        lines[here] = line
        result[key] = _value(value_node, here, lines, problems)
    return merged | result


def dotted(path: Path) -> str:
    """The path as people write it: `stages.0.lr`."""
    return ".".join(str(part) for part in path)


def trap(value: object) -> str:
    """What to say of a text where something else was wanted, if YAML is to blame; else nothing."""
    if not isinstance(value, str):
        return ""
    if re.fullmatch(r"(?i)yes|no|on|off|y|n", value):
        return f"{value} is text here; write true or false"
    if re.fullmatch(r"[-+]?[0-9]+(?::[0-9]+)+(?:\.[0-9]*)?", value):
        return f"{value} is text here, and a number to base 60 for some readers of YAML; write the number that is meant"
    if re.fullmatch(r"[-+]?0[0-9_]+", value):
        return f"{value} is text here, and an octal number for some readers of YAML; write it without leading zeros"
    if value.lower() in ("none", "nil", "nan", "inf", "-inf"):
        meant = {"none": "null", "nil": "null"}.get(
            value.lower(), value.lower().replace("nan", ".nan").replace("inf", ".inf")
        )
        return f"{value} is text here; write {meant}"
    if value.strip() and not isinstance(_scalar(value.strip()), str):
        return f"{value!r} is quoted, so it is text; write it without the quotes"
    return ""


def _syntax_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    problem = str(getattr(error, "problem", None) or error)
    if "\\t" in problem:
        return f"{where}a tab where a value or key should begin; YAML is indented with spaces"
    if "could not determine a constructor" in problem:
        return f"{where}{problem}; wanted plain values"
    if "but found another document" in problem:
        return f"{where}a second document (`---`); wanted one configuration a file"
    return f"{where}this is not YAML: {' '.join(problem.split())}; check quotes, brackets and indentation there"


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this module or YAML 1.1 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    misread = (
        text == "None"
        or not text.isprintable()
        or not isinstance(_scalar(text), str)
        or _RESOLVER.resolve(yaml.ScalarNode, text, (True, False)) != _STR_TAG
    )
    return dumper.represent_scalar(_STR_TAG, text, style='"' if misread else None)


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence(
        "tag:yaml.org,2002:seq", items, flow_style=not any(isinstance(item, dict | list) for item in items)
    )


_RESOLVER = yaml.SafeLoader("")
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
