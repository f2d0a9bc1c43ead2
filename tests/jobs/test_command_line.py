"""The command line: what is printed where, and what the exit codes mean."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from pydantic import Field

from jobs import cli
from jobs.__main__ import help_text, main
from mdm_core.errors import ConfigError, WorkError
from pipelines.run_config import Config

COMMANDS = [name for group in cli.COMMANDS.values() for name in group]
ROOT = pathlib.Path(__file__).parents[2]


class JobConfig(Config):
    """A configuration for a job of these tests."""

    table: str = Field(min_length=1)
    """The table."""
    rows: int = Field(default=3, ge=1)
    """Rows."""


def run(*argv: str, work: Any = lambda config: {"rows": config.rows}, positional: str | None = None) -> int:
    return cli.run_job("stats", argv, JobConfig, work, positional=positional)


def mdm(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jobs", *argv], cwd=ROOT, text=True, capture_output=True, **options)


def raising(error: BaseException) -> Any:
    def work(config: JobConfig) -> dict[str, Any]:
        raise error

    return work


def test_the_help_page_names_every_command_once_with_its_line():
    page = help_text()
    for group in cli.COMMANDS.values():
        for command, summary in group.items():
            assert sum(line.split()[:1] == [command] for line in page.splitlines()) == 1
            assert f"{summary}\n" in page
    assert max(len(line) for line in page.splitlines()) <= 120


def test_help_comes_without_the_heavy_imports():
    code = "import sys; from jobs.__main__ import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    page, loaded = done.stdout.rsplit("\n", 2)[:2]
    assert page == help_text()
    assert {"ray", "torch", "mlflow", "pyarrow", "pydantic", "tyro"}.isdisjoint(loaded.split())


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["refersh"], 2, "mdm: 'refersh' is not a command; did you mean `mdm refresh`?\n"),
        (["xyz"], 2, "mdm: 'xyz' is not a command; `mdm --help` lists them\n"),
    ],
)
def test_an_unknown_command_is_refused(capsys, argv, code, message):
    assert main(argv) == code
    assert capsys.readouterr() == ("", message)


def test_no_command_shows_the_help_page_as_an_error(capsys):
    assert main([]) == 2
    assert capsys.readouterr() == ("", help_text() + "\n")


def test_the_result_goes_to_stdout_and_all_else_to_stderr(capsys):
    def work(config: JobConfig) -> dict[str, Any]:
        print("said on the way")
        return {"rows": config.rows, "reasons": {"404": 2}}

    assert run("--table", "t", work=work) == 0
    out, err = capsys.readouterr()
    assert out == 'rows: 3\nreasons:\n  "404": 2\n'
    assert err == "# mdm stats, the configuration in full:\ntable: t\nrows: 3\n\nsaid on the way\n"


def test_json_is_the_last_line_on_stdout(capsys):
    assert run("--json", "--table", "t", "--rows", "7") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": 7}


def test_a_report_is_printed_by_its_own_account(capsys):
    class Report:
        def as_dict(self) -> dict[str, Any]:
            return {"counted": np.int64(5), "where": ROOT}

    for flags, printed in (
        (["--json"], json.dumps({"counted": 5, "where": str(ROOT)})),
        ([], f"counted: 5\nwhere: {ROOT}"),
    ):
        assert run("--table", "t", *flags, work=lambda config: Report()) == 0
        assert capsys.readouterr().out == f"{printed}\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("no table at t; make one"), 2, "no table at t; make one"),
        (WorkError("the disk is full"), 1, "the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
        (SystemExit(int(signal.SIGTERM)), 130, "interrupted; the same command goes on from here"),
    ],
)
def test_errors_have_one_message_and_a_code(capsys, error, code, message):
    assert run("--table", "t", "--json", work=raising(error)) == code
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == f"mdm stats: {message}"
    assert "Traceback" not in err
    assert json.loads(out) == {"error": message, "exit_code": code}


def test_several_problems_are_one_message(capsys):
    assert run("--rows", "0", "--table", "") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "mdm stats: 2 problems\n"
        '  --table: got ""; wanted some text\n'
        "  --rows: got 0; wanted 1 or more; the default is 3\n"
    )


def test_a_fault_of_ours_keeps_its_traceback(capsys):
    assert run("--table", "t", "--json", work=raising(ZeroDivisionError("by zero"))) == 1
    out, err = capsys.readouterr()
    assert "Traceback" in err
    assert json.loads(out) == {"error": "ZeroDivisionError: by zero", "exit_code": 1}


def test_an_error_from_a_ray_task_is_told_in_its_own_words(capsys, ray_cluster):
    import ray

    @ray.remote(max_retries=0)
    def fail() -> None:
        raise WorkError("shard 3 can't be written")

    assert run("--table", "t", work=lambda config: ray.get(fail.remote())) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "mdm stats: shard 3 can't be written"


@pytest.mark.parametrize("argv", [["t", "--rows", "2"], ["--rows", "2", "--table", "t"], ["--json", "t", "--rows=2"]])
def test_what_stands_first_needs_no_name(capsys, argv):
    assert run(*argv, positional="table") == 0
    assert "2" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_work_with_130_and_one_line(number):
    code = (
        "import time; from tests.jobs.test_command_line import run\n"
        "raise SystemExit(run('--table', 't', work=lambda config: (print('working', flush=True), time.sleep(60))))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE)
    assert process.stderr is not None
    while process.stderr.readline() != "working\n":
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "mdm stats: interrupted; the same command goes on from here\n")


def test_a_reader_that_leaves_early_is_no_fault():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "--help"], cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_as_a_module_of_its_own(command):
    module = __import__(f"jobs.{command}", fromlist=["main"])
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0


def test_the_process_exits_with_the_code():
    done = mdm("refresh", "--source.uri", "links.tsv", "--fetch.retries", "-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "mdm refresh: 2 problems\n"
        "  table.uri: missing; set it in the file, or give --table.uri URI\n"
        "  --fetch.retries: got -1; wanted 0 or more; the default is 2\n"
    )


def test_every_command_is_documented_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, found, section = readme.partition("\n## Commands\n")
    assert found, "README.md has no section ## Commands"
    section = section.partition("\n## ")[0]
    headings = [line.removeprefix("### mdm ") for line in section.splitlines() if line.startswith("### mdm ")]
    assert headings == COMMANDS
