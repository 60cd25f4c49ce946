"""Scores of responses: a reward model's forward pass, and trained models.

A score is one number for a response to a prompt. It is read at the response's last token (its EOS,
or where it was cut off). The place of that token is known; there is no search for padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch

from aif.config.settings import RewardSettings
from aif.errors import AifError
from aif.models.load import load_reward_model, load_tokenizer, torch_dtype
from aif.run import Run
from aif.store import checkpoint
from aif.store.records import Message
from aif.train.examples import answers_of
from aif.train.model import micro_batch
from aif.train.prefix_groups import Objective, PrefixLayout, SharedPrefix
from aif.train.prefix_mask import body_inputs, shares
from aif.train.tokens import Tokeniser

STAGE = "reward"
PromptResponses = tuple[list[Message], Sequence[str]]  # a prompt and responses to it


def scores_of(model: Any, **batch: Any) -> torch.Tensor:
    """The scores [N] of a batch's responses (see `prefix_groups.PrefixBatch`), in float32."""
    hidden_ND = hidden_of(model, **batch)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        # The head in float32: scores in bfloat16 near 4 would be 0.03 apart.
        return model.score(hidden_ND).squeeze(-1)


def hidden_of(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    branch: torch.Tensor | None,
    ends_N: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """The body's state at the end of each of a batch's responses, [N, D], in float32.

    Other arguments of a wrapper (peft: a mask and labels, all None) are ignored.
    """
    inputs = body_inputs(input_ids, position_ids, branch)
    hidden_BTD = model.base_model(**inputs).last_hidden_state
    return hidden_BTD.flatten(0, 1)[ends_N].float()


def score_loss(objective: Objective) -> Callable[..., torch.Tensor]:
    """The loss of a reward model for `model.forward_is`: the objective's, of a batch's scores."""

    def loss(model: Any, targets: dict[str, torch.Tensor], **batch: Any) -> torch.Tensor:
        return objective.loss(scores_of(model, **batch), targets)

    return loss


def layout_of(
    model: Any, settings: RewardSettings, tokenizer: Any, objective: Objective | None = None
) -> PrefixLayout:
    """How groups lie in memory for `model`; without an objective they are scored, not learned."""
    most, call = micro_batch(model, settings)
    share = shares(model, settings.share_prompt, STAGE)
    return PrefixLayout(most, tokenizer.pad_token_id, share, objective, call)


def of_each_row(
    forward: Callable[..., torch.Tensor],
    model: Any,
    rows: Sequence[SharedPrefix],
    layout: PrefixLayout,
    dtype: torch.dtype,
) -> Iterator[tuple[SharedPrefix, torch.Tensor]]:
    """Each row, in the layout's order, with `forward` of its K responses, [K, ...], on the CPU.

    `forward` is `scores_of` or `hidden_of`; without gradients, matrix products in `dtype`.
    """
    mixed = dtype != torch.float32
    for group in layout.groups(rows):
        batch = layout.batch(group).inputs(model.device)
        with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=mixed):
            values_N = forward(model, **batch).cpu()
        yield from zip(group, values_N.split([row.responses for row in group]), strict=True)


class RewardModel:
    """A reward model in evaluation mode.

    `mean` and `std` are of its reference scores; `normalised` uses them.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: RewardSettings, chat: bool):
        self.model = model.eval()
        about = getattr(model.config, "aif_reward", None) or {}
        self.mean, self.std = about.get("mean", 0.0), about.get("std", 1.0)
        config = model.config.get_text_config()
        limit = min(settings.max_tokens, config.max_position_embeddings)
        self._tokeniser = Tokeniser(tokenizer, limit, chat=about.get("chat", chat))
        self._layout = layout_of(model, settings, tokenizer)
        self._dtype = torch_dtype(settings.dtype, model.device)

    @classmethod
    def load(cls, folder: Path, settings: RewardSettings, chat: bool = True) -> RewardModel:
        """The model that `aif reward` left in `folder`, or any sequence classifier with one score.

        Raises AifError if the folder is damaged, InputError if it is no reward model.
        """
        why = checkpoint.fault(folder) if checkpoint.sealed(folder) is not None else None
        if why:
            raise AifError(f"{folder}: {why}; `aif reward` makes it again")
        model = load_reward_model(str(folder), "float32", settings.device)
        return cls(model, load_tokenizer(str(folder))[0], settings, chat)

    def scores(self, groups: Sequence[PromptResponses]) -> list[list[float | None]]:
        """The score of every response of each (prompt, responses).

        All scores of a group are None if no token of one response fits into `reward.max_tokens`.
        Raises AifError for a score that is not finite.
        """
        scores: list[list[float | None]] = [[None] * len(texts) for _, texts in groups]
        answered = [n for n, (_, texts) in enumerate(groups) if texts]
        dialogues = [answers_of(*groups[n]) for n in answered]
        place = {
            SharedPrefix.of(rows): n
            for n, rows in zip(answered, self._tokeniser.answers(dialogues), strict=True)
            if rows is not None
        }
        for row, scores_K in of_each_row(
            scores_of, self.model, list(place), self._layout, self._dtype
        ):
            if not scores_K.isfinite().all():
                raise AifError("reward: a score is not a finite number")
            scores[place[row]] = scores_K.tolist()
        return scores

    def normalised(self, score: float) -> float:
        """The score with mean 0 and standard deviation 1 on the reference responses."""
        return (score - self.mean) / self.std


class Ensemble:
    """One or several reward models with one score."""

    def __init__(self, members: Sequence[RewardModel], combine: str):
        self.members, self.combine = members, combine

    def scores(self, groups: Sequence[PromptResponses]) -> list[list[float | None]]:
        """A single member's scores as they are; the normalised scores of several, combined."""
        by_member = [member.scores(groups) for member in self.members]
        if len(by_member) == 1:
            return by_member[0]
        return [
            [self._one(scores) for scores in zip(*rows, strict=True)]
            for rows in zip(*by_member, strict=True)
        ]

    def _one(self, scores: Sequence[float | None]) -> float | None:
        if None in scores:
            return None
        pairs = zip(self.members, scores, strict=True)
        return combined([member.normalised(score) for member, score in pairs], self.combine)


def member_name(number: int) -> str:
    """The stage and folder name of the ensemble's nth model, from 0."""
    return STAGE if number == 0 else f"{STAGE}-{number + 1}"


def member_folders(run: Run) -> list[Path]:
    """The folders of the run's reward models. Raises AifError if one is not complete."""
    folders = [run.file(member_name(n)) for n in range(run.settings.reward.members)]
    for folder in folders:
        if checkpoint.sealed(folder) is None:
            raise AifError(f"{folder}: not there or not complete; `aif reward {run.path}` first")
    return folders


def load_ensemble(run: Run) -> Ensemble:
    """The run's reward models. Raises AifError if one is not complete."""
    settings = run.settings.reward
    chat = run.settings.policy.form != "text"
    members = [RewardModel.load(folder, settings, chat) for folder in member_folders(run)]
    return Ensemble(members, settings.combine)


def combined(scores: Sequence[float], how: str) -> float:
    """The mean of an ensemble's scores, the least, or the mean less a standard deviation (Coste et
    al. 2023, 2310.02743)."""
    if how == "min":
        return min(scores)
    return fmean(scores) - (pstdev(scores) if how == "lower" else 0.0)
