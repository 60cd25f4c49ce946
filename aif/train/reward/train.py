"""The reward model: labels -> reward/, a transformers sequence classifier with one score.

    [reward]
    data = { labels = 1.0, "human.jsonl" = 0.5 }

Bradley-Terry on soft labels (or Plackett-Luce, or binary grades), starting from the SFT policy
where there is one. What it does on prompts it did not learn from stands in reward-card.json. The
scores of the policy's responses give the mean and standard deviation that are kept in the model's
configuration, for PPO to normalise by.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from aif.config.settings import RewardSettings
from aif.errors import AifError
from aif.models.load import load_reward_model, load_tokenizer, torch_dtype
from aif.progress import Progress
from aif.run import Run
from aif.stats.calibration import accuracy, moments
from aif.store.records import Prompt, Response, Revision, content_id
from aif.train.batch import Steps
from aif.train.distributed import ends_process_group
from aif.train.examples import answers_of
from aif.train.metrics import Metrics
from aif.train.model import forward_is, inner, load_for_training, micro_batch, save, without_dropout
from aif.train.prefix_groups import PrefixLayout, SharedPrefix, prefix_digest
from aif.train.prefix_mask import shares
from aif.train.resume import check_start, digest_of, done_before, start_model, training_in
from aif.train.reward.audit_gate import check_audit
from aif.train.reward.card import report_card
from aif.train.reward.data import Preferences, PromptGroup, read_preferences, split
from aif.train.reward.head import fit_head
from aif.train.reward.labeled import LabeledComparison, labeled_comparisons, scored_pairs
from aif.train.reward.losses import objective_of
from aif.train.reward.model import (
    STAGE,
    Asked,
    Ensemble,
    RewardModel,
    load_ensemble,
    member_name,
    score_loss,
)
from aif.train.tokens import Tokeniser
from aif.train.trainer import Trained, Training, train

CARD = "reward-card"
POLICY = "policy"  # the kind of text that is the policy's own
SAMPLE = 512  # texts of a kind whose scores are looked at
TOGETHER = 4  # of them in a row: each costs attention to all others, and a row is never cut


class Prepared:
    """Everything in tokens, before any weight is read."""

    def __init__(self, run: Run, name: str):
        settings = run.settings.reward
        self.chat = run.settings.policy.form != "text"
        self.tokenizer, context = load_tokenizer(name)
        self.found: Preferences = read_preferences(run)
        self.train_groups, self.eval_groups = split(self.found.groups, settings)
        limit = min(settings.max_tokens, context)
        tokeniser = Tokeniser(self.tokenizer, limit, chat=self.chat)
        self.tokeniser = tokeniser
        self.train = list(trees(self.train_groups, tokeniser))
        self.held_out = list(trees(self.eval_groups, tokeniser))
        if not self.train:
            raise AifError(
                f"reward: none of {len(self.found.groups):,} prompts is left to learn from; "
                f"{tokeniser.dropped:,} do not fit into {limit:,} tokens (reward.max_tokens)"
            )


def trees(groups: Sequence[PromptGroup], tokeniser: Tokeniser) -> Iterator[SharedPrefix]:
    """The groups in tokens, but for those that do not fit."""
    dialogues = [answers_of(group.prompt, group.responses, group.source) for group in groups]
    for group, sequences in zip(groups, tokeniser.answers(dialogues), strict=True):
        if sequences is not None:
            yield SharedPrefix.of(
                sequences,
                first=[pair.first for pair in group.pairs],
                second=[pair.second for pair in group.pairs],
                p_first=[pair.p_first for pair in group.pairs],
                grades=group.grades,
            )


@ends_process_group
def reward(run: Run, progress: Progress) -> dict[str, Any]:
    """Train `reward.members` reward models into reward/ (reward-2/, ...); returns the summary.

    Raises InputError for bad data or settings, AifError where `reward.require_audit` does not hold,
    Interrupted when a signal stops it.
    """
    settings = run.settings.reward
    objective_of(settings)
    check_audit(run)
    name = start_model(run, settings.model)
    for number in range(settings.members):
        check_start(STAGE, name, run.file(member_name(number)))
    with training_in(run):
        prepared = Prepared(run, name)
        run.keep_settings()
        members = [_member(run, name, prepared, n, progress) for n in range(settings.members)]
        curve = [_curve_point(run, name, prepared, share, progress) for share in settings.curve]
        if not run.leads:
            return members[0]
        card = _card(run, prepared, members, curve)
        return members[0] | {
            "run": str(run.path),
            "models": [str(run.file(member_name(n))) for n in range(settings.members)],
            "left_out": prepared.found.left_out,
            "card": card,
        }


def _member(
    run: Run, name: str, prepared: Prepared, number: int, progress: Progress
) -> dict[str, Any]:
    """Train the ensemble's nth model; returns its summary, of an earlier time if it was done."""
    stage = member_name(number)
    base = run.settings.reward
    settings = base.model_copy(update={"seed": base.seed + number})
    about = {"digest": _digest(settings, name, prepared, prepared.train)}
    if last := done_before(run, stage, run.file(stage), about, progress):
        return last
    model, trained, steps = _trained(run, stage, settings, name, prepared, prepared.train, progress)
    if not run.leads:
        return about
    known = reference(run, prepared, RewardModel(
        inner(model), prepared.tokenizer, settings, prepared.chat
    ))  # fmt: skip
    save(
        run.file(stage), model, prepared.tokenizer, name, about,
        load=functools.partial(load_reward_model, new_head=settings.seed),
        finish=lambda model: model.config.update(
            {"aif_reward": {"mean": known["mean"], "std": known["std"] or 1.0,
                            "chat": prepared.chat}}
        ),
    )  # fmt: skip
    summary = about | {
        "from": name,
        "prompts": len(prepared.train),
        "pairs": sum(len(tree.p_first) for tree in prepared.train),
        "eval_prompts": len(prepared.held_out),
        "eval_pairs": sum(len(tree.p_first) for tree in prepared.held_out),
        "truncated": prepared.tokeniser.truncated,
        "dropped": prepared.tokeniser.dropped,
        "shares_prompts": steps.layout.share,
        "steps": trained.steps,
        "resumed_from": trained.resumed_from,
        "best_step": trained.best_step,
        "train_loss": trained.train_loss,
        "eval_loss_before": trained.eval_loss_before,
        "eval_loss": trained.eval_loss,
        "tokens_per_s": trained.tokens_per_s,
        "reference": known,
    }
    run.write_state(stage, summary)
    return summary


def _trained(
    run: Run, stage: str, settings: RewardSettings, name: str, prepared: Prepared,
    rows: Sequence[SharedPrefix], progress: Progress,
) -> tuple[Any, Trained, Steps]:  # fmt: skip
    """A model trained on `rows`, with how it went; its forward is its own again."""

    def load(name: str, dtype: str, device: str) -> Any:
        found = load_reward_model(name, dtype, device, new_head=settings.seed)
        without_dropout(found)  # but for that of adapters, which come later
        if settings.head == "fitted":
            progress.say(f"{stage}: fitting the head")
            products = torch_dtype(settings.dtype, found.device)
            layout = _layout(found, settings, prepared)
            fit_head(found, rows, layout, products, settings.seed)
        return found

    model = load_for_training(name, settings, load)
    inner(model).config.pad_token_id = prepared.tokenizer.pad_token_id
    layout = _layout(model, settings, prepared)
    steps = Steps(
        rows, settings.data, layout, batch_size=settings.batch_size, epochs=settings.epochs,
        max_steps=settings.max_steps, seed=settings.seed,
    )  # fmt: skip
    held_out = layout.step(prepared.held_out) if prepared.held_out else None
    about = {"digest": _digest(settings, name, prepared, rows)}
    folder = run.file("checkpoints") / stage
    training = Training(
        stage, model, steps, held_out, settings, folder, about, Metrics(run, stage), progress
    )
    with forward_is(inner(model), score_loss(layout.objective)):
        trained = train(training)
    return model, trained, steps


def _layout(model: Any, settings: RewardSettings, prepared: Prepared) -> PrefixLayout:
    most, call = micro_batch(model, settings)
    share = shares(model, settings.share_prompt, STAGE)
    pad = prepared.tokenizer.pad_token_id
    return PrefixLayout(most, pad, share, objective_of(settings), call)


def _digest(
    settings: RewardSettings, name: str, prepared: Prepared, rows: Sequence[SharedPrefix]
) -> str:
    return digest_of(STAGE, settings, name, prefix_digest(rows), prefix_digest(prepared.held_out))


def reference(run: Run, prepared: Prepared, model: RewardModel) -> dict[str, Any]:
    """The moments of the scores that others are normalised by: `of` the policy's responses, or of
    those that were learned from where the run has none that fit."""
    if run.file(run.sampled).exists() and (own := _scores(model, policy_responses(run))):
        return {"of": POLICY} | moments(own)
    learned = [(group.prompt, group.responses) for group in prepared.train_groups]
    return {"of": "learned"} | moments(_scores(model, drawn(learned)) or _scores(model, learned))


def _scores(model: RewardModel | Ensemble, asked: list[Asked]) -> list[float]:
    """The scores of all responses that fit."""
    return [score for row in model.scores(asked) for score in row if score is not None]


def policy_responses(run: Run) -> list[Asked]:
    """A sample of the policy's own responses."""
    prompts = {row.id: row.messages for row in run.read("prompts.jsonl", Prompt)}
    rows = run.read(run.sampled, Response)
    return by_prompt(drawn([(prompts[row.prompt_id], [row.text]) for row in rows if row.text]))


def revised(run: Run) -> list[Asked]:
    """A sample of the run's good revisions."""
    prompts = {row.id: row.messages for row in run.read("prompts.jsonl", Prompt)}
    rows = run.read("revisions.jsonl", Revision)
    found = [(prompts[row.prompt_id], [row.revision]) for row in rows if row.revision]
    return by_prompt(drawn(found))


def drawn(rows: list[Asked]) -> list[Asked]:
    """SAMPLE of the rows, always the same."""
    return random.Random(0).sample(rows, SAMPLE) if len(rows) > SAMPLE else rows


def by_prompt(rows: list[Asked]) -> list[Asked]:
    """The same with the responses to a prompt together, up to TOGETHER in a row, which a model runs
    the prompt once for."""
    found: dict[str, Asked] = {}
    for prompt, texts in rows:
        _, held = found.setdefault(content_id("prompt", prompt), (prompt, []))
        held += texts
    return [
        (prompt, texts[start : start + TOGETHER])
        for prompt, texts in found.values()
        for start in range(0, len(texts), TOGETHER)
    ]


def _curve_point(
    run: Run, name: str, prepared: Prepared, share: float, progress: Progress
) -> dict[str, Any]:
    """Held-out accuracy of a model trained on a share of the prompts, the larger shares holding
    the smaller ones."""
    settings = run.settings.reward
    order = list(prepared.train)
    random.Random(f"curve {settings.seed}").shuffle(order)
    rows = order[: max(1, round(share * len(order)))]
    stage = f"{STAGE}-curve-{share:g}"
    digest = _digest(settings, name, prepared, rows)
    if (last := run.state(stage)).get("digest") == digest and "accuracy" in last:
        return last
    model, _, _ = _trained(run, stage, settings, name, prepared, rows, progress)
    ensemble = Ensemble(
        [RewardModel(inner(model), prepared.tokenizer, settings, prepared.chat)], settings.combine
    )
    card = report_card(scored_pairs(ensemble, held_out_pairs(run, prepared)))
    found = card.get("ai") or card.get("human") or accuracy(())
    point = {"digest": digest, "pairs": sum(len(tree.p_first) for tree in rows), **found}
    run.write_state(stage, point)
    return point


def _card(
    run: Run, prepared: Prepared, members: list[dict[str, Any]], curve: list[dict[str, Any]]
) -> dict[str, Any]:
    """The report card of what was held out, kept as reward-card.json."""
    known = held_out_pairs(run, prepared)
    texts = {"held out": drawn([(g.prompt, g.responses) for g in prepared.eval_groups])}
    if run.file(run.sampled).exists():
        texts[POLICY] = policy_responses(run)
    if run.file("revisions.jsonl").exists():
        texts["revised"] = revised(run)
    of = content_id(
        [member["digest"] for member in members], run.settings.reward.combine, curve, texts,
        [(row.comparison.id, row.p_first, dict(row.by_principle), row.p_human) for row in known],
    )  # fmt: skip
    last = run.state(CARD)
    if last.get("of") == of:
        return last
    ensemble = load_ensemble(run)
    card = {"of": of} | report_card(scored_pairs(ensemble, known))
    card["scores"] = _moments_by_kind(ensemble, texts, members)
    kind = "ai" if "ai" in card else "human"
    if curve and kind in card:
        full = {"pairs": members[0]["pairs"], **card[kind]}
        points = sorted([*curve, full], key=lambda point: point["pairs"])
        card["curve"] = [{k: p[k] for k in ("pairs", "accuracy", "interval")} for p in points]
    run.write_state(CARD, card)
    return card


def _moments_by_kind(
    ensemble: Ensemble, texts: dict[str, list[Asked]], members: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the scores of each kind of text are like, where there are any."""
    found = {}
    first = members[0]["reference"]
    if len(members) == 1 and first.get("of") == POLICY:  # it has scored them before
        found[POLICY] = {key: value for key, value in first.items() if key != "of"}
    for kind, asked in texts.items():
        if kind not in found and (values := _scores(ensemble, asked)):
            found[kind] = moments(values)
    return found


def held_out_pairs(run: Run, prepared: Prepared) -> list[LabeledComparison]:
    """The comparisons that were not learned from, with all that is known of them."""
    return list(labeled_comparisons(run, prepared.eval_groups))
