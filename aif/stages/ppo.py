"""Reinforcement learning with the run's judge at hand: `train.ppo`, given a live one to ask."""

from __future__ import annotations

from typing import Any

from aif.judge.live import LiveJudge
from aif.progress import Progress
from aif.run import Run

JUDGE = "judge"


def ppo(run: Run, progress: Progress) -> dict[str, Any]:
    """Train the policy into ppo/ (see `train.ppo`); where `ppo.reward` or `ppo.gold` names the
    judge, its grades come from the run's journals or are asked as training goes."""
    from aif.train.ppo.train import ppo as train

    settings = run.settings.ppo
    if JUDGE not in settings.reward and settings.gold != JUDGE:
        return train(run, progress)
    with LiveJudge(run) as judge:
        summary = train(run, progress, {JUDGE: judge})
        return summary | {"judge_calls": judge.calls} | judge.faults.summary()
