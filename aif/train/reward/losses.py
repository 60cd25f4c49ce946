"""The losses of a reward model: how far its scores are from the labels.

An objective's `loss` takes the scores [N] of all responses of a batch and the `targets` of its
rows, and returns a sum; `count` says over how many items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from aif.config.settings import RewardSettings
from aif.errors import InputError, shown
from aif.train.prefix_groups import Objective, SharedPrefix

Targets = dict[str, torch.Tensor]


def bradley_terry(
    first_M: torch.Tensor,
    second_M: torch.Tensor,
    p_first_M: torch.Tensor,
    *,
    margin: float = 0.0,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """-[p log s(d) + (1 - p) log s(-d)] of each of M pairs, [M], for soft labels p.

    d = first score - second score - margin (2p - 1), a margin by the label (Llama 2, 2307.09288).
    `smoothing` replaces p by p (1 - 2 smoothing) + smoothing.
    """
    d_M = first_M - second_M - margin * (2 * p_first_M - 1)
    p_M = p_first_M * (1 - 2 * smoothing) + smoothing
    return -(p_M * F.logsigmoid(d_M) + (1 - p_M) * F.logsigmoid(-d_M))


def plackett_luce(scores_N: torch.Tensor, rivals_NN: torch.Tensor) -> torch.Tensor:
    """-log of the probability that each response comes first among itself and those it beats, [N].

    `rivals_NN[i]` is True at i and at each response that i beats. The sum over a ranking of K is
    Plackett-Luce's -log p; K = 2 is Bradley-Terry. Responses of equal rank are no rivals, so a tie
    adds nothing.
    """
    against_NN = scores_N.expand(len(scores_N), -1).masked_fill(~rivals_NN, -torch.inf)
    return against_NN.logsumexp(-1) - scores_N


@dataclass(frozen=True)
class Pairs:
    """Bradley-Terry on the comparisons of each row."""

    settings: RewardSettings

    def count(self, row: SharedPrefix) -> int:
        return len(row.p_first)

    def targets(self, rows: Sequence[SharedPrefix]) -> Targets:
        """The M comparisons: two places among the batch's responses, label and weight, [M] each."""
        starts = accumulate((row.responses for row in rows), initial=0)
        first, second, p_first = [], [], []
        for start, row in zip(starts, rows, strict=False):
            first += [start + n for n in row.first]
            second += [start + n for n in row.second]
            p_first += row.p_first
        p_first_M, weight_M = _target_and_weight(p_first, self.settings)
        return {
            "first": torch.tensor(first, dtype=torch.long),
            "second": torch.tensor(second, dtype=torch.long),
            "p_first": p_first_M,
            "weight": weight_M,
        }

    def loss(self, scores_N: torch.Tensor, targets: Targets) -> torch.Tensor:
        first, second = scores_N[targets["first"]], scores_N[targets["second"]]
        loss_M = bradley_terry(
            first, second, targets["p_first"],
            margin=self.settings.margin, smoothing=self.settings.label_smoothing,
        )  # fmt: skip
        # Bradley-Terry sees differences alone; this keeps scores near zero (Eisenstein et al. 2023,
        # 2312.09244).
        loss_M = loss_M + self.settings.centering * (first + second).square()
        return (loss_M * targets["weight"]).sum()


@dataclass(frozen=True)
class Ranking:
    """Plackett-Luce on the responses of each row, ranked by how often they win."""

    settings: RewardSettings

    def count(self, row: SharedPrefix) -> int:
        return int((self._rivals(row).sum(1) > 1).sum())

    def targets(self, rows: Sequence[SharedPrefix]) -> Targets:
        """Which responses each one beats, [N, N]."""
        return {"rivals": torch.block_diag(*(self._rivals(row) for row in rows)).bool()}

    def loss(self, scores_N: torch.Tensor, targets: Targets) -> torch.Tensor:
        loss = plackett_luce(scores_N, targets["rivals"]).sum()
        return loss + self.settings.centering * scores_N.square().sum()

    def _rivals(self, row: SharedPrefix) -> torch.Tensor:
        """[K, K], True at a response itself and at those that win a smaller share."""
        wins, played = torch.zeros(row.responses), torch.zeros(row.responses)
        for first, second, p in zip(row.first, row.second, row.p_first, strict=True):
            wins[first] += p
            wins[second] += 1 - p
            played[first] += 1
            played[second] += 1
        strength = wins / played.clamp(min=1)
        compared = (played > 0)[:, None] & (played > 0)
        return ((strength[:, None] > strength + 1e-6) & compared) | torch.eye(len(wins)).bool()


@dataclass(frozen=True)
class Grades:
    """Binary cross-entropy of each response's grade; a score is the log-odds of being good."""

    settings: RewardSettings

    def count(self, row: SharedPrefix) -> int:
        return row.responses

    def targets(self, rows: Sequence[SharedPrefix]) -> Targets:
        """Grade and weight of each response, [N] each."""
        grades = [grade for row in rows for grade in row.grades]
        grades_N, weight_N = _target_and_weight(grades, self.settings)
        smoothing = self.settings.label_smoothing
        return {"grades": grades_N * (1 - 2 * smoothing) + smoothing, "weight": weight_N}

    def loss(self, scores_N: torch.Tensor, targets: Targets) -> torch.Tensor:
        loss_N = F.binary_cross_entropy_with_logits(scores_N, targets["grades"], reduction="none")
        return (loss_N * targets["weight"]).sum()


OBJECTIVES: dict[str, type[Objective]] = {"pairs": Pairs, "ranking": Ranking, "grades": Grades}
UNUSED = {
    "pairs": (),
    "ranking": ("hard", "confidence_weights", "margin", "label_smoothing"),
    "grades": ("margin", "centering"),
}


def objective_of(settings: RewardSettings) -> Objective:
    """The objective of the settings. Raises InputError for an option that it does not use."""
    for key in UNUSED[settings.objective]:
        if value := getattr(settings, key):
            raise InputError(
                "reward", key, got=shown(value),
                expected=f'nothing; objective = "{settings.objective}" has no use for it',
            )  # fmt: skip
    return OBJECTIVES[settings.objective](settings)


def _target_and_weight(
    probabilities: list[float], settings: RewardSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is learned, how much it counts) of each label, in float32."""
    p = torch.tensor(probabilities, dtype=torch.float32)
    weight = (2 * p - 1).abs() if settings.confidence_weights else torch.ones_like(p)
    return (p > 0.5).float() if settings.hard else p, weight
