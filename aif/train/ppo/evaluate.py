"""The watch for over-optimisation: held-out prompts, answered every so often and scored twice.

A policy that learns to please its reward goes on rising in it after it has begun to get worse
(Gao et al. 2023, 2210.10760). So beside the reward that is learned from stands a gold one that is
not, and both against the KL from the reference. The answers are in ppo-samples.jsonl:

{"step": 20, "prompt_id": "...", "prompt": [...], "response": "...", "score": 1.2, "gold": 0.7,
 "kl": 4.1, "tokens": 31, "ended": true}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aif.run import Run
from aif.store import jsonl
from aif.train.distributed import gather_rows
from aif.train.ppo.experience import read, tokens_of
from aif.train.ppo.loop import PPO, seed_of, texts_of
from aif.train.ppo.prompts import PolicyPrompt
from aif.train.ppo.rewards import Reward, checked

FILE = "ppo-samples.jsonl"


@dataclass
class Watch:
    """Looks at a PPO from outside: it draws with seeds of its own and changes nothing."""

    run: Run
    ppo: PPO
    prompts: Sequence[PolicyPrompt]
    gold: Reward | None

    def look(self) -> dict[str, float]:
        """Sample, score, keep the answers; returns the means under `eval/`."""
        accelerator = self.ppo.accelerator
        share = self.prompts[accelerator.process_index :: accelerator.num_processes]
        # Who has no share does another's, to take part in what all do together.
        rows = gather_rows(self._rows(share or self.prompts[:1])[: len(share)])
        if self.run.leads:
            self._keep(rows)
        told = {
            f"eval/{name}": means
            for name in ("scores", "gold", "kl", "response_length", "eos_rate")
            if (means := _mean(row[_COLUMN[name]] for row in rows)) is not None
        }
        self.ppo.position.log.append({"step": self.ppo.position.step, **told})
        return told

    def _rows(self, asked: Sequence[PolicyPrompt]) -> list[dict[str, Any]]:
        ppo = self.ppo
        # The same draws at every look, so that two looks differ by what was learned alone.
        seeds = [seed_of(ppo.settings.seed, "watch", prompt.id) for prompt in asked]
        rollouts = ppo.sample(asked, seeds)
        texts, messages = texts_of(rollouts, ppo.tokenizer), [prompt.messages for prompt in asked]
        scores = ppo.rewards(messages, texts)
        golds: list[float | None] = [None] * len(asked)
        if self.gold is not None:
            golds = checked("gold", self.gold(messages, texts), len(asked))
        rows = [tokens_of(p.ids_T, r) for p, r in zip(asked, rollouts, strict=True)]
        told = read(rows, ppo.learner.model, ppo.reference, ppo.layout, ppo.accelerator.device)
        kl_B = (told["logprobs"] - told["ref_logprobs"]).sum(1).tolist()
        return [
            {
                "step": ppo.position.step,
                "prompt_id": prompt.id,
                "prompt": prompt.messages,
                "response": text,
                "score": score,
                "gold": gold,
                "kl": kl,
                "tokens": len(rollout.ids),
                "ended": rollout.ended,
            }
            for prompt, rollout, text, score, gold, kl in zip(
                asked, rollouts, texts, scores, golds, kl_B, strict=True
            )
        ]

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        """After what earlier looks left; of a later step than this there is nothing true."""
        path, step = self.run.file(FILE), self.ppo.position.step
        earlier = [row for _, row in jsonl.read(path)] if path.exists() and step else []
        jsonl.write(path, [*(row for row in earlier if row["step"] < step), *rows])


_COLUMN = {
    "scores": "score", "gold": "gold", "kl": "kl", "response_length": "tokens", "eos_rate": "ended"
}  # fmt: skip


def looks(log: Sequence[dict[str, float]]) -> dict[int, dict[str, float]]:
    """What each look found, by its step."""
    return {int(entry["step"]): entry for entry in log if "eval/kl" in entry}


def best_step(log: Sequence[dict[str, float]]) -> int | None:
    """The step of the look with the highest gold, the first of several; None before any."""
    gold = {n: entry["eval/gold"] for n, entry in looks(log).items() if "eval/gold" in entry}
    return max(gold, key=gold.get) if gold else None


def falls(log: Sequence[dict[str, float]]) -> int:
    """How many looks there have been since the best one."""
    steps = [n for n, entry in looks(log).items() if "eval/gold" in entry]
    return len(steps) - 1 - steps.index(best_step(log)) if steps else 0


def _mean(values: Any) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None
