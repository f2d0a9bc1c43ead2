"""The console script `mdm`: finds the command and runs it."""

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from jobs.cli import BAD_INPUT, COMMANDS, DONE, INTERRUPTED, say


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `mdm COMMAND …` and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        say(help_text(), to=sys.stdout if words else sys.stderr)
        return DONE if words else BAD_INPUT
    if words[0] == "--version":
        print(f"mdm {importlib.metadata.version('mdm')}")
        return DONE
    known = [name for group in COMMANDS.values() for name in group]
    command = words[0]
    if command not in known:
        near = difflib.get_close_matches(command, known, n=1)
        fix = f"did you mean `mdm {near[0]}`?" if near else "`mdm --help` lists them"
        print(f"mdm: {command!r} is not a command; {fix}", file=sys.stderr)
        return BAD_INPUT
    try:
        return int(importlib.import_module(f"jobs.{command}").main(words[1:]))
    except KeyboardInterrupt:
        # While its modules were being imported: nothing had begun.
        return INTERRUPTED


def help_text() -> str:
    """The page of `mdm --help`."""
    width = max(len(name) for group in COMMANDS.values() for name in group)
    groups = [
        "\n".join([f"{title}:", *(f"  {name:<{width}}  {summary}" for name, summary in group.items())])
        for title, group in COMMANDS.items()
    ]
    return "\n\n".join(["usage: mdm COMMAND [--config FILE] [--section.key VALUE …] [--json]", *groups, _FOOTER])


_FOOTER = """\
Examples:
  mdm quickstart --out out/quickstart
  mdm refresh --config refresh.yaml --fetch.concurrency 512
  mdm train --help

Exit codes: 0 done; 1 the work failed; 2 bad configuration or input; 130 interrupted, safe to run again."""


if __name__ == "__main__":
    sys.exit(main())
