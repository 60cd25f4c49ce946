"""Evaluation during PPO: the policy answers held-out prompts at intervals; each is scored twice.

A policy's reward can still rise while its true quality falls (Gao et al. 2023, 2210.10760). So a
gold reward, which nothing learns from, is reported beside the score, with the KL from the
reference. The responses are in ppo-samples.jsonl:

{"step": 20, "prompt_id": "...", "prompt": [...], "response": "...", "score": 1.2, "gold": 0.7,
 "kl": 4.1, "tokens": 31, "ended": true}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aif.store import jsonl
from aif.train.distributed import gather_rows
from aif.train.ppo.experience import compute_logprobs, tokens_of
from aif.train.ppo.loop import PPO, seed_of, texts_of
from aif.train.ppo.prompts import PolicyPrompt
from aif.train.ppo.rewards import RewardFunction, checked

SAMPLES = "ppo-samples.jsonl"
COLUMNS = {  # metric -> column of the file
    "scores": "score", "gold": "gold", "kl": "kl", "response_length": "tokens", "eos_rate": "ended"
}  # fmt: skip
Log = Sequence[dict[str, float]]


@dataclass
class Evaluator:
    """Evaluates a PPO; it samples with its own seeds and changes nothing but the log."""

    ppo: PPO
    prompts: Sequence[PolicyPrompt]  # held out
    gold_reward: RewardFunction | None
    path: Path

    def evaluate(self) -> dict[str, float]:
        """Sample, score and keep the responses; returns the means as `eval/...`."""
        accelerator, state = self.ppo.accelerator, self.ppo.state
        share = self.prompts[accelerator.process_index :: accelerator.num_processes]
        # A process without a share samples another's, since all take part in the sampling.
        rows = gather_rows(self._rows(share or self.prompts[:1])[: len(share)])
        if accelerator.is_main_process:
            earlier = jsonl.read(self.path) if self.path.exists() and state.step else ()
            kept = [row for _, row in earlier if row["step"] < state.step]
            jsonl.write(self.path, [*kept, *rows])
        means = {}
        for metric, column in COLUMNS.items():
            values = [float(row[column]) for row in rows if row[column] is not None]
            if values:
                means[f"eval/{metric}"] = sum(values) / len(values)
        state.log.append({"step": state.step, **means})
        return means

    def _rows(self, prompts: Sequence[PolicyPrompt]) -> list[dict[str, Any]]:
        ppo = self.ppo
        # The same seeds at every evaluation: only the policy differs between two of them.
        seeds = [seed_of(ppo.settings.seed, "watch", prompt.id) for prompt in prompts]
        responses = ppo.sample(prompts, seeds)
        messages = [prompt.messages for prompt in prompts]
        texts = texts_of(responses, ppo.tokenizer)
        scores = ppo.score(messages, texts)
        gold_scores: list[float | None] = [None] * len(prompts)
        if self.gold_reward is not None:
            gold_scores = checked("gold", self.gold_reward(messages, texts), len(prompts))
        rows = [
            tokens_of(p.ids_T, response) for p, response in zip(prompts, responses, strict=True)
        ]
        outputs = compute_logprobs(
            rows, ppo.learner.model, ppo.reference, ppo.layout, ppo.accelerator.device
        )
        return [
            {
                "step": ppo.state.step,
                "prompt_id": prompt.id,
                "prompt": prompt.messages,
                "response": text,
                "score": score,
                "gold": gold,
                "kl": kl,
                "tokens": len(response.ids),
                "ended": response.ended,
            }
            for prompt, response, text, score, gold, kl in zip(
                prompts, responses, texts, scores, gold_scores, outputs.kl_B.tolist(), strict=True
            )
        ]


def evals(log: Log) -> dict[int, dict[str, float]]:
    """The metrics of each evaluation in the log, by its step."""
    return {int(entry["step"]): entry for entry in log if "eval/kl" in entry}


def best_step(log: Log) -> int | None:
    """The step with the highest gold reward, the first of equals; None without an evaluation."""
    gold = {n: entry["eval/gold"] for n, entry in evals(log).items() if "eval/gold" in entry}
    return max(gold, key=gold.get) if gold else None


def evals_since_best(log: Log) -> int:
    """The number of evaluations after the best one."""
    steps = [n for n, entry in evals(log).items() if "eval/gold" in entry]
    return len(steps) - 1 - steps.index(best_step(log)) if steps else 0
