"""A training in a process of its own, to be stopped at a step."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

SCRIPT = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from aif.errors import Interrupted
from aif.progress import Progress

class Printed(Progress):
    def update(self, done, faults=0, note=""):
        print(done, flush=True)

def named(spec):
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)

stage, make_run = map(named, sys.argv[2:4])
folder, model, arguments, settings = map(json.loads, sys.argv[4:])
try:
    stage(make_run(Path(folder), Path(model), *arguments, **settings), Printed(quiet=True))
except Interrupted as error:
    sys.exit(error.exit_code)
"""


def train_until(
    step: int, number: signal.Signals, stage: str, make_run: str, run: Path, model: Path,
    *arguments: Any, **settings: Any,
) -> int:  # fmt: skip
    """Train `make_run(run, model, *arguments, **settings)`, send the signal after the step, and
    return the exit code; `stage` and `make_run` are MODULE:FUNCTION."""
    values = map(json.dumps, (str(run), str(model), arguments, settings))
    command = [sys.executable, "-c", SCRIPT, str(ROOT), stage, make_run, *values]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) == step:
            process.send_signal(number)
            break
    process.communicate()
    return process.returncode
