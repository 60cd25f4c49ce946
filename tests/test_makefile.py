"""What `make` would do on machines of several kinds."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"


def commands(tmp_path, *variables: str, system: str = "Linux", nvidia: bool = False) -> str:
    """The commands that set up .venv, on a machine of that system."""
    programs = {"uname": f"echo {system}"} | ({"nvidia-smi": "true"} if nvidia else {})
    for name, body in programs.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = ["make", "-n", "-W", "pyproject.toml", ".venv/ready", *variables]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="this machine has an NVIDIA driver")
def test_linux_without_a_gpu_takes_the_cpu_build_of_torch(tmp_path):
    line = next(line for line in commands(tmp_path).splitlines() if '"torch' in line)
    assert INDEX in line
    assert "--retries 1" in line  # where that index cannot be reached, set-up goes on
    assert line.endswith('"torch==2.13.0"')


def test_with_a_gpu_torch_is_the_plain_one(tmp_path):
    output = commands(tmp_path, nvidia=True)
    assert '"torch>=2.11"' in output
    assert "--extra-index-url" not in output


def test_macos_takes_the_plain_wheel(tmp_path):
    output = commands(tmp_path, system="Darwin")
    assert '"torch>=2.11"' in output
    assert "--extra-index-url" not in output


def test_the_index_is_a_variable(tmp_path):
    assert "--extra-index-url" not in commands(tmp_path, "TORCH_INDEX=")
    assert "--extra-index-url http://mirror" in commands(tmp_path, "TORCH_INDEX=http://mirror")


FULL = "run runs/demo --within 20"
AIF = """#!/bin/sh
echo "$@" >> calls
case "$*" in
  "run runs/demo --within 20") exit {code};;
  *) exit 0;;
esac
"""


@pytest.mark.parametrize(
    ("code", "begun", "calls", "exit_code"),
    [
        (0, False, [FULL, "status runs/demo"], 0),
        (5, False, [FULL, "run runs/demo-small", "status runs/demo-small"], 0),
        (0, True, ["run runs/demo-small", "status runs/demo-small"], 0),
        (3, False, [FULL], 2),
    ],
    ids=["fast", "slow", "the small one was begun", "failed"],
)  # fmt: skip
def test_the_demo_is_small_on_a_slow_machine(tmp_path, code, begun, calls, exit_code):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    program = tmp_path / ".venv" / "bin" / "aif"
    program.parent.mkdir(parents=True)
    program.write_text(AIF.format(code=code))
    program.chmod(0o755)
    (tmp_path / ".venv" / "ready").touch()
    if begun:
        (tmp_path / "runs" / "demo-small" / "journal").mkdir(parents=True)
    done = subprocess.run(["make", "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == exit_code, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == calls
    assert ("small demo" in done.stdout) == (calls[-1] == "status runs/demo-small")
