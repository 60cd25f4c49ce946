"""The commands of the documents, run as they stand on a tiny model.

    @pytest.fixture(scope="module")
    def shell(tmp_path_factory, tiny_cache):         # tiny_cache: tests/conftest.py
        return Shell(checkout(tmp_path_factory.mktemp("documents")), tiny_cache)

    def test_...(shell):
        assert "12 labels" in shell("aif label --out runs/first ...")  # stdout, then stderr

`smollm2-135m` is then a random model with the bundled model's tokenizer, which says a few words and
ends. A command takes about a second and needs no smaller settings, except fewer prompts or steps
where there are hundreds. Texts and grades are noise: count rows and calls, do not look at scores.

A plain `aif ...` line runs in this process. Everything else (`cp`, `sed`, a line with a pipe, `&&`,
`*` or `$`) goes to a shell that has `aif` on its PATH. A line that fails, fails the test.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aif.config.settings import BUNDLED
from tests.conftest import ROOT, aif_here
from tests.support.tiny import tiny_model

WORDS = " a kind friend will happily help you today and that is a good warm word to say now"
SHELL_ONLY = re.compile(r"[|;&<>`$*]")


def tiny_bundled(cache: Path) -> Path:
    """Make `cache` a cache folder (XDG_CACHE_HOME) whose bundled model is a tiny random one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr("aif.models.load._convert", _tiny)
        from aif.models.load import bundled_folder

        bundled_folder()
    return cache


def _tiny(gguf: Path, folder: Path) -> None:
    """Save a random Llama that says a few words and ends after about ten."""
    from aif.models.load import load_tokenizer

    # The tokenizer is that of the user's own cache: converting it takes seconds.
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME")
        tokenizer = load_tokenizer(BUNDLED)[0]
    model = tiny_model(
        attention_dropout=0.0, max_position_embeddings=8192, tie_word_embeddings=False
    )
    # A constant channel makes a column of the head a bias for each token. The first channel is
    # constant for every token, the second for the words alone: only a word is followed by the end.
    words = tokenizer(WORDS)["input_ids"]
    embeddings, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embeddings[:, 0], embeddings[:, 1], embeddings[words, 1] = 0.1, 0.0, 0.1
    head[:, :2] = 0.0
    head[words, 0] = 4.0
    head[tokenizer.eos_token_id, 1] = 4.2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def checkout(folder: Path) -> Path:
    """Fill `folder` with what the documents' commands read of a checkout."""
    for name in ("constitutions", "prompts"):
        shutil.copytree(ROOT / name, folder / name)
    for path in (ROOT / "runs").glob("*/run.toml"):
        (folder / "runs" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, folder / "runs" / path.parent.name)
    return folder


class Shell:
    """Runs lines in a folder, with the models of a cache folder."""

    def __init__(self, folder: Path, cache: Path):
        self.folder = folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {"PATH": path, "XDG_CACHE_HOME": str(cache)}

    def __call__(self, line: str) -> str:
        """Run one line; return its stdout, then its stderr. It must succeed."""
        words = shlex.split(line)
        if words[0] == "aif" and not SHELL_ONLY.search(line):
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.folder)
                done = aif_here(*words[1:], env=self.environment)
        else:
            done = subprocess.run(
                line, shell=True, cwd=self.folder, env=os.environ | self.environment,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        return done.stdout + done.stderr
