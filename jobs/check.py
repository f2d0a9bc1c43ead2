"""`mdm check`: validates configuration files.

Each file says which command it is for in its first key, as in `command: refresh`.
"""

import importlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jobs.benchmark import BENCHMARKS, config_class
from jobs.cli import COMMANDS, run_job
from mdm_core.errors import ConfigError
from pipelines.run_config import Config, load_file, read_document


class CheckConfig(Config):
    """What to check."""

    paths: tuple[str, ...] = (str(pathlib.Path(__file__).parent / "configs"),)
    """Files, and folders whose .yaml and .yml files are checked; the examples that come with mdm if empty."""


CONFIG = CheckConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; `mdm check FILE …` is short for `--paths [FILE, …]`."""
    return run_job("check", argv, CONFIG, _run, positional="paths", show_config=False)


def _run(config: CheckConfig) -> dict[str, Any]:
    files = [file for path in config.paths for file in _files_in(path)]
    problems = []
    for file in files:
        try:
            command = _check_file(file)
        except ConfigError as error:
            problems.append(str(error))
            print(f"{file}: not valid")
        else:
            print(f"{file}: ok, for mdm {command}")
    if problems:
        raise ConfigError("\n".join(problems))
    return {"valid": len(files)}


def _files_in(path: str) -> list[str]:
    folder = pathlib.Path(path)
    if not folder.is_dir():
        return [path]
    files = sorted(str(file) for file in folder.rglob("*") if file.suffix in (".yaml", ".yml"))
    if not files:
        raise ConfigError(f"{path}: the folder has no .yaml file; name a file or another folder")
    return files


def _check_file(file: str) -> str:
    """The command that a file is for; raises ConfigError if the file is not valid."""
    commands = [name for group in COMMANDS.values() for name in group if name != "benchmark"]
    commands += [f"benchmark {name}" for name in BENCHMARKS]
    command = read_document(file).data.get("command")
    if command not in commands:
        said = "the file does not say what it is for" if command is None else f"command: got {command!r}"
        raise ConfigError(f"{file}: {said}; wanted one of {', '.join(commands)}, as in `command: refresh`")
    load_file(_config_class(str(command)), file, command=str(command))
    return str(command)


def _config_class(command: str) -> type[Config]:
    name, _, benchmark = command.partition(" ")
    config: type[Config] = config_class(benchmark) if benchmark else importlib.import_module(f"jobs.{name}").CONFIG
    return config


if __name__ == "__main__":
    sys.exit(main())
