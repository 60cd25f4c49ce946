"""A world small enough to be solved: sixteen words, a random Llama, a reward that counts a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aif.config.settings import Settings
from aif.config.toml import checked
from aif.run import Run
from tests.conftest import read_jsonl, write_jsonl
from tests.support.tiny import tiny_model

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklm"]
LENGTH = 8
ANEW = "ppo: data, settings or model have changed since the last time: anew"
REWARDS = '''
def share(prompts, texts):
    """How much of the longest possible response is the word a."""
    return [text.split().count("a") / 8 for text in texts]

def unshare(prompts, texts):
    return [-value for value in share(prompts, texts)]

def picky(prompts, texts):
    return [None if "b" in text else value
            for text, value in zip(texts, share(prompts, texts))]

def never(prompts, texts):
    return [None for text in texts]

def one(prompts, texts):
    return [1.0]

def broken(prompts, texts):
    return [float("nan") for text in texts]
'''


def toy_tokenizer(words: list[str] = WORDS) -> Any:
    """A word a token, no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def save_toy(folder: Path, kind: str = "LlamaForCausalLM", **changes: Any) -> Path:
    """A random model of the sixteen words, with its tokenizer."""
    config = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    tiny_model(kind, **config | changes).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def toy_run(path: Path, model: Path, reward: str | dict = "share", **ppo: Any) -> Run:
    """PPO of `model` in float32 on the CPU, by a function of REWARDS or by `ppo.reward`."""
    path.mkdir(exist_ok=True)
    (path / "rewards.py").write_text(REWARDS)
    pairs = ["a b", "c d", "e f", "g h", "i j", "k l", "m a", "b c"]
    prompts = write_jsonl(path / "toy-prompts.jsonl", [{"prompt": pair} for pair in pairs])
    table = {
        "prompts": str(prompts),
        "reward": reward if isinstance(reward, dict) else {f"{path}/rewards.py:{reward}": 1.0},
        "batch_size": 32,
        "max_steps": 30,
        "learning_rate": 5e-3,
        "dtype": "float32",
        "device": "cpu",
        "kl_coef": 0.0,
        "missing_eos_penalty": 0.0,
        "eval_fraction": 0.0,
    }
    policy = {"model": str(model), "max_tokens": LENGTH}
    return Run(path, checked(Settings, {"policy": policy, "ppo": table | ppo}, "test"))


def of_step(run: Run, name: str) -> list[float]:
    """The values of a metric, step by step."""
    return [row["value"] for row in read_jsonl(run.path / "metrics.jsonl") if row["name"] == name]
