"""A random Llama of two layers with the bundled model's tokenizer, and runs that train it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aif.config.settings import Settings
from aif.config.toml import checked
from aif.progress import Progress
from aif.run import Run
from aif.store.records import Comparison, HumanChoice, Label, Prompt, Response, Revision
from tests.conftest import write_jsonl

WIDTH = 16


def tiny_model(kind: str = "LlamaForCausalLM", **changes: Any):
    """A fresh one, always the same; dropout is on, so that training draws random numbers."""
    import torch
    import transformers

    config = {
        "vocab_size": 49152,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.1,
    }
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.LlamaConfig(**config | changes))


def save_tiny(folder: Path, **changes: Any) -> Path:
    """`tiny_model` as a folder, with the bundled model's tokenizer."""
    from aif.models.load import load_tokenizer

    tiny_model(**changes).save_pretrained(folder)
    load_tokenizer("smollm2-135m")[0].save_pretrained(folder)
    return folder


def demonstrations(path: Path, n: int = 40) -> Path:
    """Short questions and answers, with some rule to learn."""
    rows = [
        {
            "prompt": f"question {i} " + "and " * (i % 7),
            "response": f"answer {i} " + "so " * (i % 9),
        }
        for i in range(n)
    ]
    return write_jsonl(path, rows)


def tiny_run(path: Path, model: Path, data: dict[str, float], **sft: Any) -> Run:
    """A run that fine-tunes `model` in float32 on the CPU, unless `sft` says otherwise."""
    table = {"batch_size": 4, "dtype": "float32", "device": "cpu", "learning_rate": 1e-2}
    tables = {"sft": {"model": str(model), "data": data} | table | sft}
    return Run(path, checked(Settings, tables, "test"))


def preferred(n: int = 40) -> list[tuple[Comparison, float]]:
    """Comparisons of short answers to `n` prompts, with soft labels: the good answer wins."""
    found = []
    for i in range(n):
        prompt = [{"role": "user", "content": f"question {i} " + "and " * (i % 7)}]
        good, bad = f"good answer {i} " + "so " * (i % 5), f"bad answer {i} " + "so " * (i % 3)
        sure = (0.95, 0.8, 0.65)[i % 3]
        found.append((Comparison.of(prompt, good, bad), sure))
        if i % 2:
            found[-1] = Comparison.of(prompt, bad, good), 1 - sure
        if i % 4 == 0:
            found.append((Comparison.of(prompt, good, f"some answer {i}"), sure))
    return found


def write_labels(run: Run, told: Iterable[tuple[Comparison, float | None]]) -> None:
    """The run's comparisons and labels; one principle says what the label says, one the reverse."""
    run.path.mkdir(exist_ok=True)
    told = list(told)
    run.write("comparisons.jsonl", [comparison for comparison, _ in told])
    labels = [
        Label.null(comparison.id, "unparsed")
        if p is None
        else Label(comparison.id, p, None, 4, 1.0, {"kind": p, "grim": 1 - p})
        for comparison, p in told
    ]
    run.write("labels.jsonl", labels)


REWARD = {"batch_size": 8, "epochs": 4.0, "eval_fraction": 0.25, "learning_rate": 1e-2}
REWARD |= {"dtype": "float32", "device": "cpu"}


def reward_run(path: Path, policy: Path, told: Any = None, **reward: Any) -> Run:
    """A labelled run of `policy`, to train a reward model on the CPU in float32."""
    tables = {"policy": {"model": str(policy)}, "reward": REWARD | reward}
    run = Run(path, checked(Settings, tables, "test"))
    write_labels(run, preferred() if told is None else told)
    return run


def write_texts(run: Run, n: int = 12) -> None:
    """What people chose, and responses and revisions of the policy, a few of them faults."""
    told = preferred()
    run.write("human.jsonl", [HumanChoice(c.id, float(p > 0.5)) for c, p in told])
    prompts = [Prompt.of([{"role": "user", "content": f"question {i}"}]) for i in range(n)]
    texts = [("good" if i % 2 else "bad") + f" answer {i}" for i in range(n)]
    run.write("prompts.jsonl", prompts)
    responses = [
        Response(f"r{i}", p.id, "tiny", 0, text, "stop", None, {})
        for i, (p, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    fault = Response("f", prompts[0].id, "tiny", 1, None, None, "empty", {})
    run.write("responses.jsonl", [*responses, fault])
    revisions = [
        Revision(f"v{i}", f"r{i}", p.id, 1, "kind", "tiny", "c", f"good answer {i}", None, {})
        for i, p in enumerate(prompts[1:], 1)
    ]
    fault = Revision("w", "r0", prompts[0].id, 1, "kind", "tiny", "c", None, "empty", {})
    run.write("revisions.jsonl", [*revisions, fault])


@contextmanager
def quick() -> Iterator[None]:
    """Each tokenizer is read once. No test may change one."""
    from transformers import AutoTokenizer

    from aif.models import load

    read, tokenizers = load._loaded, {}

    def loaded(auto: Any, name: str, **options: Any) -> Any:
        if auto is not AutoTokenizer:
            return read(auto, name, **options)
        if name not in tokenizers:
            tokenizers[name] = read(auto, name, **options)
        return tokenizers[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_loaded", loaded)
        yield


class Said(Progress):
    """Keeps what it is told, and may stop the training at a step."""

    def __init__(self, stop_at: int | None = None, number: int = signal.SIGINT):
        super().__init__(quiet=True)
        self.lines, self._stop_at, self._number = [], stop_at, number

    def say(self, line: str) -> None:
        self.lines.append(line)

    def update(self, done: int, faults: int = 0, note: str = "") -> None:
        if done == self._stop_at:
            os.kill(os.getpid(), self._number)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
