"""A random Llama of two layers with the bundled model's tokenizer, and runs that train it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import write_jsonl

from aif.config import checked
from aif.run import Run
from aif.settings import Settings

WIDTH = 16


def tiny_model(**changes: Any):
    """A fresh one, always the same; dropout is on, so that training draws random numbers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
    return LlamaForCausalLM(LlamaConfig(**config | changes))


def save_tiny(folder: Path, **changes: Any) -> Path:
    """`tiny_model` as a folder, with the bundled model's tokenizer."""
    from aif.pretrained import load_tokenizer

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
