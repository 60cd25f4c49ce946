"""Reward model training: labels -> reward/, a transformers sequence classifier with one score.

    [reward]
    data = { labels = 1.0, "human.jsonl" = 0.5 }

The loss is Bradley-Terry on soft labels, Plackett-Luce, or cross-entropy of grades. Training starts
from the SFT model if there is one. The report card of the held-out prompts is reward-card.json; the
mean and standard deviation of the reference scores go into the model's configuration.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

from aif.config.settings import RewardSettings
from aif.models.load import load_reward_model, torch_dtype
from aif.progress import Progress
from aif.run import Run
from aif.stats.calibration import accuracy
from aif.train.distributed import ends_process_group
from aif.train.model import forward_is, inner, load_for_training, save, without_dropout
from aif.train.prefix_groups import PrefixLayout, SharedPrefix, prefix_digest
from aif.train.resume import check_start, digest_of, done_before, start_model, training_in
from aif.train.reward.audit_gate import check_audit
from aif.train.reward.card import report_card
from aif.train.reward.data import RewardData
from aif.train.reward.evaluate import held_out_comparisons, keep_card, reference, score_comparisons
from aif.train.reward.head import fit_head
from aif.train.reward.losses import objective_of
from aif.train.reward.model import (
    STAGE,
    Ensemble,
    RewardModel,
    layout_of,
    member_name,
    score_loss,
)
from aif.train.trainer import Trained, Training, train


@ends_process_group
def reward(run: Run, progress: Progress) -> dict[str, Any]:
    """Train `reward.members` reward models into reward/ (reward-2/, ...); returns the summary.

    Raises InputError for bad data or settings, AifError if `reward.require_audit` does not hold,
    Interrupted when a signal stops it.
    """
    settings = run.settings.reward
    objective_of(settings)
    check_audit(run)
    name = start_model(run, settings.model)
    for number in range(settings.members):
        check_start(STAGE, name, run.file(member_name(number)))
    with training_in(run):
        data = RewardData(run, name)
        run.keep_settings()
        members = [_member(data, number, progress) for number in range(settings.members)]
        curve = [_curve_point(data, share, progress) for share in settings.curve]
        if not run.leads:
            return members[0]
        return members[0] | {
            "run": str(run.path),
            "models": [str(run.file(member_name(n))) for n in range(settings.members)],
            "left_out": data.preferences.left_out,
            "card": keep_card(data, members, curve),
        }


def _member(data: RewardData, number: int, progress: Progress) -> dict[str, Any]:
    """Train the ensemble's nth model; returns its summary, the last one if it was done before."""
    run, stage = data.run, member_name(number)
    base = run.settings.reward
    settings = base.model_copy(update={"seed": base.seed + number})
    about = _about(settings, data, data.train)
    if last := done_before(run, stage, run.file(stage), about, progress):
        return last
    model, layout, trained = _trained(data, stage, settings, data.train, about, progress)
    if not run.leads:
        return about
    scores = reference(data, _reward_model(data, model, settings))
    save(
        run.file(stage), model, data.tokeniser.tokenizer, data.name, about,
        load=functools.partial(load_reward_model, new_head=settings.seed),
        finish=lambda model: model.config.update(
            {"aif_reward": {"mean": scores["mean"], "std": scores["std"] or 1.0,
                            "chat": data.chat}}
        ),
    )  # fmt: skip
    summary = about | {
        "from": data.name,
        "prompts": len(data.train),
        "pairs": _pairs(data.train),
        "eval_prompts": len(data.held_out),
        "eval_pairs": _pairs(data.held_out),
        "truncated": data.tokeniser.truncated,
        "dropped": data.tokeniser.dropped,
        "shares_prompts": layout.share,
        **trained.summary(),
        "reference": scores,
    }
    run.write_state(stage, summary)
    return summary


def _trained(
    data: RewardData, stage: str, settings: RewardSettings, rows: Sequence[SharedPrefix],
    about: dict[str, Any], progress: Progress,
) -> tuple[Any, PrefixLayout, Trained]:  # fmt: skip
    """A model trained on `rows`, the layout of its batches, and the results of the training."""

    def load(name: str, dtype: str, device: str) -> Any:
        model = load_reward_model(name, dtype, device, new_head=settings.seed)
        without_dropout(model)  # adapters, added later, keep theirs
        if settings.head == "fitted":
            progress.say(f"{stage}: fitting the head")
            products = torch_dtype(settings.dtype, model.device)
            layout = layout_of(model, settings, tokenizer, objective)
            fit_head(model, rows, layout, products, settings.seed)
        return model

    tokenizer, objective = data.tokeniser.tokenizer, objective_of(settings)
    model = load_for_training(data.name, settings, load)
    inner(model).config.pad_token_id = tokenizer.pad_token_id
    layout = layout_of(model, settings, tokenizer, objective)
    training = Training.of(
        data.run, stage, settings, model, layout, rows, data.held_out, about, progress
    )
    with forward_is(inner(model), score_loss(objective)):
        return model, layout, train(training)


def _reward_model(data: RewardData, model: Any, settings: RewardSettings) -> RewardModel:
    return RewardModel(inner(model), data.tokeniser.tokenizer, settings, data.chat)


def _about(
    settings: RewardSettings, data: RewardData, rows: Sequence[SharedPrefix]
) -> dict[str, Any]:
    tokens = prefix_digest(rows), prefix_digest(data.held_out)
    return {"digest": digest_of(STAGE, settings, data.name, *tokens)}


def _pairs(rows: Sequence[SharedPrefix]) -> int:
    return sum(len(row.p_first) for row in rows)


def _curve_point(data: RewardData, share: float, progress: Progress) -> dict[str, Any]:
    """Held-out accuracy of a model trained on a share of the prompts; a larger share holds the
    smaller ones."""
    run, settings = data.run, data.run.settings.reward
    order = list(data.train)
    random.Random(f"curve {settings.seed}").shuffle(order)
    rows = order[: max(1, round(share * len(order)))]
    stage = f"{STAGE}-curve-{share:g}"
    about = _about(settings, data, rows)
    if (last := run.state(stage)).get("digest") == about["digest"] and "accuracy" in last:
        return last
    model, _, _ = _trained(data, stage, settings, rows, about, progress)
    ensemble = Ensemble([_reward_model(data, model, settings)], settings.combine)
    card = report_card(score_comparisons(ensemble, held_out_comparisons(data)))
    point = about | {"pairs": _pairs(rows)}
    point |= card.get("ai") or card.get("human") or accuracy(())
    run.write_state(stage, point)
    return point
