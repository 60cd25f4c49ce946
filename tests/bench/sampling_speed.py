"""Texts of a local model: aif's decoding against `generate` of transformers.

    python tests/bench/sampling_speed.py [--prompts 32] [--samples 4] [--tokens 32] [--rounds 3]

The first prompts of prompts/everyday.jsonl, each sampled several times, 64 rows at once by both, at
temperature 0.7 with no top-p or top-k; interleaved rounds. aif runs a prompt once for all its
samples, draws a token by hundreds of numbers instead of one for each in the vocabulary, and lets
rows that have ended leave the batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path

import torch

from aif.data.readers import read_questions
from aif.llm.sampler import ROWS, Draw, generate
from aif.models.load import ends_of, load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEMPERATURE = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tokenizer, _ = load_tokenizer(options.model)
    tokenizer.padding_side = "left"
    model = load_model(options.model, "auto", "auto")
    ends = ends_of(model, tokenizer)
    asked = islice(read_questions(str(ROOT / "prompts/everyday.jsonl")), options.prompts)
    texts = [
        tokenizer.apply_chat_template(
            question.prompt.messages, add_generation_prompt=True, tokenize=False
        )
        for question in asked
        for _ in range(options.samples)
    ]
    # Prompts of like lengths together, as aif puts them.
    texts.sort(key=lambda text: (len(tokenizer(text)["input_ids"]), text))
    ways = {
        "aif": lambda: ours(model, tokenizer, texts, options.tokens, ends),
        "transformers": lambda: theirs(model, tokenizer, texts, options.tokens),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            tokens = way()
            if turn:  # the first warms up
                rates[name].append(tokens / (time.perf_counter() - began))
    for name, found in rates.items():
        print(
            f"{name:14}{statistics.median(found):7.0f} tokens/s ({min(found):.0f} to "
            f"{max(found):.0f})"
        )
    ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
    print(f"aif is faster by {ratio:.2f}")


def ours(model, tokenizer, texts: list[str], tokens: int, ends: set[int]) -> int:
    """New tokens that aif writes."""
    draws = [
        Draw(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), tokens, TEMPERATURE, n)
        for n, text in enumerate(texts)
    ]
    made = generate(model, draws, ends, tokenizer.pad_token_id, tokenizer.decode)
    return sum(len(drawn.ids) for _, drawn in made)


@torch.inference_mode()
def theirs(model, tokenizer, texts: list[str], tokens: int) -> int:
    """New tokens that transformers writes, without the padding of rows that have ended."""
    found = 0
    for start in range(0, len(texts), ROWS):
        inputs = tokenizer(
            texts[start : start + ROWS], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        out_BT = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=True, temperature=TEMPERATURE, top_k=0,
            top_p=1.0, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        new_BT = out_BT[:, inputs["input_ids"].shape[1] :]
        found += int((new_BT != tokenizer.pad_token_id).sum())
    return found


if __name__ == "__main__":
    main()
