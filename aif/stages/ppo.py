"""PPO with the run's judge as its reward: `train.ppo` gets the live judge as a callable."""

from __future__ import annotations

from typing import Any

from aif.judge.live import LiveJudge
from aif.progress import Progress
from aif.run import Run

JUDGE = "judge"


def ppo(run: Run, progress: Progress) -> dict[str, Any]:
    """Train the policy into ppo/; returns the summary of `train.ppo`.

    If `ppo.reward` or `ppo.gold` names the judge, its grades come from the run's journals, or it is
    asked during training.
    """
    from aif.train.ppo.train import ppo as train

    settings = run.settings.ppo
    if JUDGE not in settings.reward and settings.gold != JUDGE:
        return train(run, progress)
    with LiveJudge(run) as judge:
        summary = train(run, progress, {JUDGE: judge})
        return summary | {"judge_calls": judge.calls} | judge.faults.summary()
