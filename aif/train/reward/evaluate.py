"""The evaluation of trained reward models: the reference scores and the report card.

reward-card.json is about the prompts that the models did not learn from. The reference scores are
the scores of the policy's responses; PPO normalises by their mean and standard deviation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from aif.run import Run
from aif.stats.calibration import moments
from aif.store.records import Prompt, Response, Revision, content_id
from aif.train.reward.card import ScoredPair, report_card
from aif.train.reward.data import RewardData
from aif.train.reward.labeled import LabeledComparison
from aif.train.reward.model import Ensemble, PromptResponses, RewardModel, load_ensemble

CARD = "reward-card"
POLICY = "policy"  # the name for the policy's own responses
SAMPLE = 512  # texts of a kind that are scored at most
TOGETHER = 4  # responses per row: each costs attention to all others, and a row is never cut


def score_comparisons(ensemble: Ensemble, rows: Sequence[LabeledComparison]) -> list[ScoredPair]:
    """Each comparison with its scores; all responses to a prompt are run together. Comparisons that
    do not fit into the model are left out."""
    groups: dict[str, tuple[list, dict[str, None]]] = {}
    for row in rows:
        _, texts = groups.setdefault(row.comparison.prompt_id, (row.comparison.prompt, {}))
        texts |= {row.comparison.first: None, row.comparison.second: None}
    scores = ensemble.scores([(prompt, list(texts)) for prompt, texts in groups.values()])
    score_of = {
        (prompt_id, text): score
        for (prompt_id, (_, texts)), row in zip(groups.items(), scores, strict=True)
        for text, score in zip(texts, row, strict=True)
    }
    pairs = []
    for row in rows:
        id, prompt_id = row.comparison.id, row.comparison.prompt_id
        texts = row.comparison.first, row.comparison.second
        first, second = (score_of[prompt_id, text] for text in texts)
        if first is not None and second is not None:
            words = (len(text.split()) for text in texts)
            pairs.append(
                ScoredPair(
                    id, prompt_id, first, second, *words,
                    row.p_first, row.by_principle, row.p_human,
                )
            )  # fmt: skip
    return pairs


def held_out_comparisons(data: RewardData) -> list[LabeledComparison]:
    """The comparisons that the models did not learn from."""
    return [row for group in data.eval_groups for row in group.compared()]


def reference(data: RewardData, model: RewardModel) -> dict[str, Any]:
    """The moments of the reference scores: of the policy's responses, or of the responses learned
    from if the run has none that fit."""
    run = data.run
    if run.file(run.sampled).exists() and (scores := _scores(model, policy_responses(run))):
        return {"of": POLICY} | moments(scores)
    learned = [(group.prompt, group.responses) for group in data.train_groups]
    return {"of": "learned"} | moments(_scores(model, drawn(learned)) or _scores(model, learned))


def _scores(model: RewardModel | Ensemble, groups: list[PromptResponses]) -> list[float]:
    """The scores of all responses that fit."""
    return [score for row in model.scores(groups) for score in row if score is not None]


def policy_responses(run: Run) -> list[PromptResponses]:
    """A sample of the policy's own responses."""
    rows = run.read(run.sampled, Response)
    return _sample(run, ((row.prompt_id, row.text) for row in rows))


def revised(run: Run) -> list[PromptResponses]:
    """A sample of the run's good revisions."""
    rows = run.read("revisions.jsonl", Revision)
    return _sample(run, ((row.prompt_id, row.revision) for row in rows))


def _sample(run: Run, texts: Any) -> list[PromptResponses]:
    """A sample of (prompt id, text), without empty texts."""
    prompts = {row.id: row.messages for row in run.read("prompts.jsonl", Prompt)}
    return by_prompt(drawn([(prompts[id], [text]) for id, text in texts if text]))


def drawn(rows: list[PromptResponses]) -> list[PromptResponses]:
    """SAMPLE of the rows, always the same."""
    return random.Random(0).sample(rows, SAMPLE) if len(rows) > SAMPLE else rows


def by_prompt(rows: list[PromptResponses]) -> list[PromptResponses]:
    """The rows with the responses to a prompt together, up to TOGETHER in a row, for which a model
    runs the prompt once."""
    groups: dict[str, PromptResponses] = {}
    for prompt, texts in rows:
        _, responses = groups.setdefault(content_id("prompt", prompt), (prompt, []))
        responses += texts
    return [
        (prompt, texts[start : start + TOGETHER])
        for prompt, texts in groups.values()
        for start in range(0, len(texts), TOGETHER)
    ]


def keep_card(
    data: RewardData, members: list[dict[str, Any]], curve: list[dict[str, Any]]
) -> dict[str, Any]:
    """The report card, kept as reward-card.json; made again only if its models or texts changed.

    `members` are the summaries of the trained models, `curve` the points of the learning curve.
    """
    run, rows = data.run, held_out_comparisons(data)
    texts = {"held out": drawn([(g.prompt, g.responses) for g in data.eval_groups])}
    if run.file(run.sampled).exists():
        texts[POLICY] = policy_responses(run)
    if run.file("revisions.jsonl").exists():
        texts["revised"] = revised(run)
    of = content_id(
        [member["digest"] for member in members], run.settings.reward.combine, curve, texts,
        [(row.comparison.id, row.p_first, dict(row.by_principle), row.p_human) for row in rows],
    )  # fmt: skip
    last = run.state(CARD)
    if last.get("of") == of:
        return last
    ensemble = load_ensemble(run)
    card = {"of": of} | report_card(score_comparisons(ensemble, rows))
    card["scores"] = _moments_by_kind(ensemble, texts, members)
    labeler = "ai" if "ai" in card else "human"
    if curve and labeler in card:
        full = {"pairs": members[0]["pairs"], **card[labeler]}
        points = sorted([*curve, full], key=lambda point: point["pairs"])
        card["curve"] = [{k: p[k] for k in ("pairs", "accuracy", "interval")} for p in points]
    run.write_state(CARD, card)
    return card


def _moments_by_kind(
    ensemble: Ensemble, texts: dict[str, list[PromptResponses]], members: list[dict[str, Any]]
) -> dict[str, Any]:
    """The moments of the scores of each kind of text that has any."""
    by_kind = {}
    first = members[0]["reference"]
    if len(members) == 1 and first.get("of") == POLICY:  # these are scored already
        by_kind[POLICY] = {key: value for key, value in first.items() if key != "of"}
    for kind, groups in texts.items():
        if kind not in by_kind and (scores := _scores(ensemble, groups)):
            by_kind[kind] = moments(scores)
    return by_kind
