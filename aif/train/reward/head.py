"""A reward model's head, fitted before the whole model is trained.

A random head sends random gradients into a body whose features already hold most of what is to be
learned. A fitted head starts training as a linear probe and changes less of the body (Kumar et al.
2022, 2202.10054). The fit takes one forward pass and a convex problem in as many numbers as the
model is wide; cross-validation over prompts chooses the penalty.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aif.train.prefix_groups import Objective, PrefixLayout, SharedPrefix
from aif.train.reward.losses import Targets
from aif.train.reward.model import hidden_of, of_each_row

SAMPLE = 4096  # prompts of the fit, at most
CHUNK = 64  # prompts whose loss is computed at once
FOLDS = 5
PENALTIES = [10 ** (n / 2) for n in range(2, 11)]  # 10 to 100,000


@dataclass(frozen=True)
class Chunk:
    """The N responses of some prompts."""

    features_ND: torch.Tensor  # the body's state at each response's end
    targets: Targets  # of the objective


def fit_head(
    model: Any, rows: Sequence[SharedPrefix], layout: PrefixLayout, dtype: torch.dtype, seed: int
) -> None:
    """Set `model.score` to the penalised optimum of the layout's objective over `rows`, each once.

    Matrix products are in `dtype`; `seed` decides which prompts are held out together.
    """
    draw = random.Random(f"head {seed}")
    sample = draw.sample(list(rows), min(SAMPLE, len(rows)))
    features = list(of_each_row(hidden_of, model, sample, layout, dtype))
    draw.shuffle(features)
    # A penalty is fair if all features have one scale; a constant feature stays as it is.
    scale_D = torch.cat([features_KD for _, features_KD in features]).std(0, correction=0)
    scale_D[scale_D == 0] = 1.0
    scaled = [(row, features_KD / scale_D) for row, features_KD in features]
    penalty = _penalty(scaled, layout.objective)
    weight_D = _fitted(_chunks(scaled, layout.objective), penalty, layout.objective)
    with torch.no_grad():
        model.score.weight.copy_(weight_D / scale_D)


def _chunks(
    features: Sequence[tuple[SharedPrefix, torch.Tensor]], objective: Objective
) -> list[Chunk]:
    parts = (features[start : start + CHUNK] for start in range(0, len(features), CHUNK))
    return [
        Chunk(
            torch.cat([features_KD for _, features_KD in part]),
            objective.targets([row for row, _ in part]),
        )
        for part in parts
    ]


def _penalty(features: Sequence[tuple[SharedPrefix, torch.Tensor]], objective: Objective) -> float:
    """The penalty whose fits have the least loss on prompts that they have not seen; the largest
    if there are too few prompts to tell."""
    if len(features) < 2 * FOLDS:
        return PENALTIES[-1]
    folds = [(
        _chunks([row for n, row in enumerate(features) if n % FOLDS != fold], objective),
        _chunks(features[fold::FOLDS], objective),
    ) for fold in range(FOLDS)]  # fmt: skip

    def held_out(penalty: float) -> float:
        return sum(
            float(_loss(unseen, _fitted(seen, penalty, objective), objective))
            for seen, unseen in folds
        )

    return min(PENALTIES, key=held_out)


def _fitted(chunks: Sequence[Chunk], penalty: float, objective: Objective) -> torch.Tensor:
    """The weight [D] that minimises the loss plus half the penalty times its square."""
    weight_D = torch.zeros(chunks[0].features_ND.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_D], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _loss(chunks, weight_D, objective) + penalty / 2 * weight_D.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight_D.detach()


def _loss(chunks: Sequence[Chunk], weight_D: torch.Tensor, objective: Objective) -> torch.Tensor:
    return sum(objective.loss(chunk.features_ND @ weight_D, chunk.targets) for chunk in chunks)
