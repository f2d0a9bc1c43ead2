"""The Dockerfile: no engine builds it here, so it is linted and compared with what it copies and pins."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")


def test_hadolint_passes():
    hadolint = shutil.which("hadolint", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("hadolint")
    assert hadolint is not None
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_each_target_is_not_run_by_root(target):
    stage = re.search(rf"^FROM base AS {target}$(.*?)(?=^FROM |\Z)", TEXT, flags=re.M | re.S)
    assert stage is not None
    assert re.findall(r"^USER (.*)$", stage[1], flags=re.M) == ["1000:1000"]


def test_every_install_takes_the_pinned_versions_and_real_extras():
    installs = re.findall(r"pip install ((?:.*\\\n)*.*)", TEXT)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(installs) == 2
    for install in installs:
        assert "--constraint constraints.txt" in install
        extras = re.findall(r'"\.\[(.*)\]"', install)
        assert [set(names.split(",")) for names in extras] == [set(project["optional-dependencies"]) - {"dev"}]


def test_python_is_the_one_that_the_versions_are_pinned_for():
    python = re.search(r"^ARG PYTHON_IMAGE=python:(\d+\.\d+)\.\d+-", TEXT, flags=re.M)
    assert python is not None
    assert f"Python {python[1]}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[0]


def test_all_that_is_copied_exists_and_reaches_the_builder():
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*)$", TEXT, flags=re.M) for name in line.split()[:-1]]
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    assert set(copied) == allowed
