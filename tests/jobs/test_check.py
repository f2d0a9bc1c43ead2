"""`mdm check`, and the configurations that come with mdm."""

import json
import pathlib

import pytest

from jobs import check
from pipelines.run_config import dump_config, load_file

CONFIGS = pathlib.Path(check.__file__).parent / "configs"
EXAMPLES = sorted(CONFIGS.glob("*.yaml"))


def test_the_examples_are_valid(capsys):
    assert check.main(["--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"valid": len(EXAMPLES)}
    assert [line.partition(": ")[0] for line in err.splitlines()] == [str(file) for file in EXAMPLES]


@pytest.mark.parametrize("command", ["embed", "train", "evaluate"])
def test_the_examples_of_openmoji_are_what_quickstart_runs(command):
    from pipelines.quickstart.config import QuickstartConfig

    quickstart = getattr(QuickstartConfig(out="out/quickstart"), command)()
    example = load_file(type(quickstart), str(CONFIGS / f"openmoji-{command}.yaml"), command=command)
    assert dump_config(example) == dump_config(quickstart).replace(f"{pathlib.Path.cwd()}/", "")


def test_each_file_of_a_folder_has_a_line_and_one_bad_file_is_enough(capsys, tmp_path):
    good, bad, mute = tmp_path / "a.yaml", tmp_path / "b.yml", tmp_path / "c.yaml"
    good.write_text("command: stats\ntable: t\n")
    bad.write_text("command: stats\ntabel: t\n")
    mute.write_text("table: t\n")
    (tmp_path / "notes.txt").write_text("not read")
    assert check.main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"{good}: ok, for mdm stats",
        f"{bad}: not valid",
        f"{mute}: not valid",
        "mdm check: 3 problems",
        f"  {bad}: table: missing; set it in the file, or give --table TABLE",
        f"  {bad}: line 2: tabel: unknown key; did you mean table?",
        f"  {mute}: the file does not say what it is for; wanted one of quickstart, refresh, forget, stats, embed, "
        "train, ema, evaluate, sample, check, benchmark train, benchmark sample, benchmark data, benchmark resume, "
        "as in `command: refresh`",
    ]


def test_a_misspelt_command_is_named(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("command: refersh\n")
    assert check.main([str(tmp_path / "a.yaml")]) == 2
    assert "command: got 'refersh'; wanted one of quickstart, refresh," in capsys.readouterr().err


def test_a_folder_without_configurations_is_refused(capsys, tmp_path):
    assert check.main([str(tmp_path)]) == 2
    message = f"mdm check: {tmp_path}: the folder has no .yaml file; name a file or another folder\n"
    assert capsys.readouterr().err == message


def test_a_missing_file_is_refused(capsys, tmp_path):
    assert check.main([str(tmp_path / "a.yaml")]) == 2
    assert f"{tmp_path / 'a.yaml'}: there is no such file; check the path" in capsys.readouterr().err


def test_a_benchmark_has_its_file_too(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("command: benchmark train\npreset: mdm-256\nbatch: 2\n")
    assert check.main([str(tmp_path / "a.yaml")]) == 0
    assert "ok, for mdm benchmark train" in capsys.readouterr().err
    (tmp_path / "a.yaml").write_text("command: benchmark sample\nsteps: 0\n")
    assert check.main([str(tmp_path / "a.yaml")]) == 2
    assert "steps" in capsys.readouterr().err
