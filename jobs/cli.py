"""What all commands share: their names, how their result is printed, and what their exit codes mean.

0    done
1    the work failed
2    bad configuration or input
130  interrupted; the same command goes on from there
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar, get_origin

from mdm_core.errors import ConfigError, MdmError

if TYPE_CHECKING:
    from pipelines.run_config import Config

ConfigT = TypeVar("ConfigT", bound="Config")

_INTERRUPTED = "interrupted; the same command goes on from here"

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

COMMANDS: dict[str, dict[str, str]] = {
    "Start here": {
        "quickstart": "Run the whole pipeline on real captioned pictures, on this machine alone.",
    },
    "Data": {
        "refresh": "Bring a table of pictures up to date with a list of links.",
        "forget": "Take links out of a table for good: their rows, their bytes, and their way back in.",
        "stats": "Show what a table holds: outcomes, reasons, sizes.",
        "embed": "Encode the captions of a table, beside its pictures.",
    },
    "Model": {
        "train": "Train a Matryoshka Diffusion Model, stage by stage.",
        "ema": "Average the weights of a training over any length, after the fact.",
        "evaluate": "Score a checkpoint against the pictures of a table.",
        "sample": "Make pictures from captions.",
        "benchmark": "Time a training step or the making of pictures, and say what it costs.",
    },
    "Configuration": {
        "check": "Validate configuration files.",
    },
}
"""One line for every command, in groups, in the order of the pipeline."""


class Report(Protocol):
    """What a pipeline returns."""

    def as_dict(self) -> dict[str, Any]:
        """The result as plain values."""


def run_job(
    command: str,
    argv: Sequence[str] | None,
    config_class: type[ConfigT],
    work: Callable[[ConfigT], Report | dict[str, Any]],
    *,
    positional: str | None = None,
    show_config: bool = True,
    summary: str | None = None,
) -> int:
    """Runs a command and returns its exit code.

    Nothing but the result goes to stdout: as YAML, or with `--json` as one JSON object on the last line.

    Args:
        command: The command's name.
        argv: The words after it; those of this process when None.
        config_class: The command's configuration.
        work: The pipeline.
        positional: A field of the configuration whose value may stand ahead of the flags, without a name.
        show_config: Whether the configuration in full is printed first.
        summary: What the command does, for its help page; its line in COMMANDS when None.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    def whole() -> dict[str, Any]:
        # pydantic and tyro take a third of a second that `mdm --help` need not wait for.
        from pipelines.run_config import dump_config, load_config

        flags = _named([word for word in words if word != "--json"], positional, config_class)
        config = load_config(config_class, flags, prog=f"mdm {command}", description=summary or _summary(command))
        if show_config:
            print(f"# mdm {command}, the configuration in full:\n{dump_config(config)}", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(sys.stderr):
            try:
                report = work(config)
            finally:
                # Here, and not at exit: when Ray ends it tells what it held back, on stdout.
                if cluster := sys.modules.get("pipelines.cluster"):
                    cluster.disconnect()
        result = report if isinstance(report, dict) else report.as_dict()
        return dict(json.loads(json.dumps(result, default=_plain)))

    return guarded(f"mdm {command}", whole, as_json="--json" in words)


def guarded(prog: str, whole: Callable[[], dict[str, Any]], *, as_json: bool) -> int:
    """Calls `whole`, prints its result or its error, and returns the exit code for it."""
    try:
        with _terminated_like_ctrl_c():
            result, code = whole(), DONE
    except ConfigError as error:
        result, code = _failure(prog, _message(error)), BAD_INPUT
    except MdmError as error:
        result, code = _failure(prog, _message(error)), FAILED
    except KeyboardInterrupt:
        result, code = _failure(prog, _INTERRUPTED), INTERRUPTED
    except SystemExit as stop:
        # Ray puts its own handler in the place of ours, which leaves with the signal's number.
        if stop.code != signal.SIGTERM:
            raise
        result, code = _failure(prog, _INTERRUPTED), INTERRUPTED
    except Exception as error:
        # A fault of this project: the traceback says where.
        traceback.print_exc()
        result, code = {"error": f"{type(error).__name__}: {error}"}, FAILED
    _print_result(result, code, as_json=as_json)
    return code


def say(text: str, *, to: TextIO | None = None) -> None:
    """Prints a text, on stdout if `to` is None; a reader that has gone away, as in `mdm … | head`, is no fault."""
    stream = to or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _named(words: list[str], positional: str | None, config_class: type["Config"]) -> list[str]:
    """The words with those ahead of the first flag named as the value of `positional`."""
    ahead = 0
    while ahead < len(words) and not words[ahead].startswith("-"):
        ahead += 1
    if positional is None or ahead == 0:
        return words
    takes_many = get_origin(config_class.model_fields[positional].annotation) is tuple
    value = [json.dumps(words[:ahead])] if takes_many else words[:ahead]
    return [f"--{positional}", *value, *words[ahead:]]


def _summary(command: str) -> str:
    return next(group[command] for group in COMMANDS.values() if command in group)


def _failure(prog: str, message: str) -> dict[str, Any]:
    lines = message.splitlines()
    if len(lines) > 1:
        lines = [f"{len(lines)} problems", *(f"  {line}" for line in lines)]
    print(f"{prog}:", "\n".join(lines), file=sys.stderr, flush=True)
    return {"error": message}


def _message(error: MdmError) -> str:
    # Raised in a Ray task, the error comes back wrapped, its text a traceback; the cause has the message.
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, MdmError) else error)


def _plain(value: Any) -> Any:
    """What JSON can hold of a value that it does not know: numpy's numbers as Python's, all else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _print_result(result: dict[str, Any], code: int, *, as_json: bool) -> None:
    if as_json:
        say(json.dumps(result if code == DONE else {**result, "exit_code": code}))
    elif code == DONE:
        from pipelines.strict_yaml import dump_document

        say(dump_document(result).rstrip("\n"))


@contextlib.contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Lets SIGTERM, which a scheduler sends ahead of SIGKILL, end the work as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        # Only the main thread may set it.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
