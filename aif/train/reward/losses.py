"""Losses of scores: how far a reward model is from what is known of the responses.

Each takes the scores [N] of all responses of a batch and what `targets` made of its trees, and
returns the sum over what it is taken of, whose number is `count`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from aif.config.settings import RewardSettings
from aif.errors import InputError, shown
from aif.train.prefix_groups import Objective, SharedPrefix

Targets = dict[str, torch.Tensor]


def bradley_terry(
    scores_first: torch.Tensor,
    scores_second: torch.Tensor,
    p_first: torch.Tensor,
    *,
    margin: float = 0.0,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """-[p log s(d) + (1 - p) log s(-d)] of each pair, for soft labels p; d is the first score less
    the second, less `margin` in the direction and measure of the label (Llama 2, 2307.09288).

    `smoothing` takes a label p for p (1 - 2 smoothing) + smoothing.
    """
    d = scores_first - scores_second - margin * (2 * p_first - 1)
    p = p_first * (1 - 2 * smoothing) + smoothing
    return -(p * F.logsigmoid(d) + (1 - p) * F.logsigmoid(-d))


def plackett_luce(scores_N: torch.Tensor, rivals_NN: torch.Tensor) -> torch.Tensor:
    """-log of the probability that each response comes first among itself and those it beats.

    `rivals_NN[i]` is True at i itself and at each response that i is better than; the sum over a
    ranking of K is Plackett-Luce's -log p. Responses of equal rank are no rivals, so that a tie
    says nothing; K = 2 is Bradley-Terry.
    """
    against_NN = scores_N.expand(len(scores_N), -1).masked_fill(~rivals_NN, -torch.inf)
    return against_NN.logsumexp(-1) - scores_N


@dataclass(frozen=True)
class Pairs:
    """Bradley-Terry on the comparisons of each tree."""

    settings: RewardSettings

    def count(self, tree: SharedPrefix) -> int:
        return len(tree.p_first)

    def targets(self, trees: Sequence[SharedPrefix]) -> Targets:
        starts = _starts(trees)
        first, second, p = [], [], []
        for start, tree in zip(starts, trees, strict=True):
            first += [start + n for n in tree.first]
            second += [start + n for n in tree.second]
            p += tree.p_first
        p_first = torch.tensor(p, dtype=torch.float32)
        weight = (2 * p_first - 1).abs() if self.settings.confidence_weights else None
        return {
            "first": torch.tensor(first, dtype=torch.long),
            "second": torch.tensor(second, dtype=torch.long),
            "p_first": (p_first > 0.5).float() if self.settings.hard else p_first,
            "weight": torch.ones_like(p_first) if weight is None else weight,
        }

    def loss(self, scores_N: torch.Tensor, targets: Targets) -> torch.Tensor:
        first, second = scores_N[targets["first"]], scores_N[targets["second"]]
        found = bradley_terry(
            first, second, targets["p_first"],
            margin=self.settings.margin, smoothing=self.settings.label_smoothing,
        )  # fmt: skip
        # Bradley-Terry sees differences only; this keeps scores near zero (Eisenstein et al.
        # 2023, 2312.09244).
        found = found + self.settings.centering * (first + second).square()
        return (found * targets["weight"]).sum()


@dataclass(frozen=True)
class Ranking:
    """Plackett-Luce on the responses of each tree, ranked by how often they win."""

    settings: RewardSettings

    def count(self, tree: SharedPrefix) -> int:
        return int((self._rivals(tree).sum(1) > 1).sum())

    def targets(self, trees: Sequence[SharedPrefix]) -> Targets:
        return {"rivals": torch.block_diag(*(self._rivals(tree) for tree in trees)).bool()}

    def loss(self, scores_N: torch.Tensor, targets: Targets) -> torch.Tensor:
        found = plackett_luce(scores_N, targets["rivals"]).sum()
        return found + self.settings.centering * scores_N.square().sum()

    def _rivals(self, tree: SharedPrefix) -> torch.Tensor:
        """[K, K]: itself, and whatever has won less of its comparisons."""
        wins, played = torch.zeros(tree.responses), torch.zeros(tree.responses)
        for first, second, p in zip(tree.first, tree.second, tree.p_first, strict=True):
            wins[first] += p
            wins[second] += 1 - p
            played[first] += 1
            played[second] += 1
        strength = wins / played.clamp(min=1)
        compared = (played > 0)[:, None] & (played > 0)
        return ((strength[:, None] > strength + 1e-6) & compared) | torch.eye(len(wins)).bool()


@dataclass(frozen=True)
class Grades:
    """Binary cross-entropy of each response's grade: its score is the log-odds of being good."""

    settings: RewardSettings

    def count(self, tree: SharedPrefix) -> int:
        return tree.responses

    def targets(self, trees: Sequence[SharedPrefix]) -> Targets:
        grades_N = torch.tensor([grade for tree in trees for grade in tree.grades])
        smoothing = self.settings.label_smoothing
        hard_N = (grades_N > 0.5).float() if self.settings.hard else grades_N
        weight_N = (2 * grades_N - 1).abs() if self.settings.confidence_weights else None
        return {
            "grades": hard_N * (1 - 2 * smoothing) + smoothing,
            "weight": torch.ones_like(grades_N) if weight_N is None else weight_N,
        }

    def loss(self, scores_N: torch.Tensor, targets: Targets) -> torch.Tensor:
        found = F.binary_cross_entropy_with_logits(scores_N, targets["grades"], reduction="none")
        return (found * targets["weight"]).sum()


OBJECTIVES: dict[str, type[Objective]] = {"pairs": Pairs, "ranking": Ranking, "grades": Grades}
UNUSED = {
    "pairs": (),
    "ranking": ("hard", "confidence_weights", "margin", "label_smoothing"),
    "grades": ("margin", "centering"),
}


def objective_of(settings: RewardSettings) -> Objective:
    """The objective that is named. Raises InputError for an option that it would pass over."""
    for key in UNUSED[settings.objective]:
        if value := getattr(settings, key):
            raise InputError(
                "reward", key, got=shown(value),
                expected=f'nothing; objective = "{settings.objective}" has no use for it',
            )  # fmt: skip
    return OBJECTIVES[settings.objective](settings)


def _starts(trees: Sequence[SharedPrefix]) -> list[int]:
    starts = [0]
    for tree in trees:
        starts.append(starts[-1] + tree.responses)
    return starts[:-1]
