"""Replays every case of a folder laid out like `shared/reference`, and says how far each is from what is recorded.

    python -m tests.core.replay_reference DIR

prints one line a case (name, largest error, tolerance). Exit code 1 if any error is over its tolerance or a case
can't be replayed; 2 if the folder is not laid out like that.
"""

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.core.reference_diffusion import replay_case
from tests.core.reference_forward import CaseResult, build_case, forward_cases, replay_checkpoint, replay_forward_case


def replays(folder: Path) -> dict[str, Callable[[], CaseResult]]:
    """How to replay each case of the folder, by name."""
    found: dict[str, Callable[[], CaseResult]] = {}
    cases = forward_cases(folder)
    for name, case in cases.items():
        found[name] = partial(replay_forward_case, folder, name)
        if case.get("pth"):
            found[case["pth"]] = partial(replay_checkpoint, folder, name)
    diffusion = folder / "index_diffusion.json"
    if diffusion.exists():
        for name in json.loads(diffusion.read_text())["cases"]:
            found[name] = partial(replay_case, folder, name, lambda weights: build_case(folder, cases[weights]))
    return found


def main(argv: list[str]) -> int:
    """Replays a folder, and returns the exit code."""
    if len(argv) != 1 or not (Path(argv[0]) / "index_forward.json").is_file():
        print("usage: python -m tests.core.replay_reference DIR, a folder with index_forward.json", file=sys.stderr)
        return 2
    failed = 0
    for name, replay in replays(Path(argv[0])).items():
        try:
            result = replay()
        except Exception as error:
            traceback.print_exc()
            print(f"{name:<36} can't be replayed: {type(error).__name__}: {error}", flush=True)
            failed += 1
            continue
        bad = not result.error <= result.tolerance
        print(f"{name:<36} {result.error:.2e}  tolerance {result.tolerance:.0e}{'  FAILED' if bad else ''}", flush=True)
        failed += bad
    print(f"{failed} failed" if failed else "all within their tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
