"""Compare policies: all answer the same prompts, and the judge decides who wins.

    prompts -> evaluation/POLICY/ (respond) -> evaluation/matches/ (label) -> evaluate.json

Every policy has its own run below RUN/evaluation, and the matches have one. Their journals keep the
answers: a second evaluation asks only what is new, and a killed evaluation goes on.
evaluation.jsonl has a row for every policy and prompt:

{"policy": "ppo", "prompt_id": "...", "response": "...", "fault": null, "words": 31,
 "refusal": false, "score": 1.2, "gold": 0.7, "kl": 4.1}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice
from typing import Any

from aif.config.settings import PolicySettings, RespondSettings
from aif.data.readers import Question, read_pairs, read_questions
from aif.dependencies import require
from aif.errors import InputError, shown
from aif.evaluation.policies import NAMES, REFERENCE, Policy, chosen, start_of
from aif.evaluation.responses import PolicyResponse, comparison, response_stats
from aif.judge.judge import Judge
from aif.judge.live import LiveJudge
from aif.judge.panel import judge_of
from aif.llm import open_llm
from aif.llm.dispatch import Faults
from aif.progress import Progress
from aif.run import Run
from aif.stages.label import STAGE as LABELS
from aif.stages.label import label
from aif.stages.respond import respond
from aif.stats.best_of import best_of_n_kl
from aif.stats.intervals import Bootstrap
from aif.stats.odds import outcome
from aif.stats.winrate import Game, match, ratings
from aif.store import jsonl
from aif.store.checkpoint import sealed
from aif.store.records import Comparison, HumanChoice, Label, Prompt, Response

STAGE = "evaluate"
FOLDER = "evaluation"
ROWS = "evaluation.jsonl"
NOTHING = {"mean": None, "low": None, "high": None}
Pair = tuple[str, str]  # names of two policies


def evaluate(run: Run, progress: Progress) -> dict[str, Any]:
    """Evaluate the policies of `run.settings.evaluate`; returns the content of evaluate.json and
    the judge's failed calls, for `check_faults`.

    Raises Interrupted or JudgeStopped if it ended early; the same command goes on.
    """
    require("evaluate", "scipy", "sklearn", "sacrebleu")
    settings = run.settings.evaluate
    with open_llm(run.settings.judge) as llm:  # a bad judge fails before the policies sample
        _ = llm.control_tokens
    judge = judge_of(run.settings)
    policies, against = chosen(run)
    _check(run, policies)
    faults, bootstrap = Faults(), Bootstrap(settings.seed, settings.resamples)
    with run.writing():
        questions = _questions(run)
        run.keep_settings()
        people = _people(run, bootstrap, faults, progress)
        samples = {policy.name: _sample(run, policy, questions, progress) for policy in policies}
        _score(run, [row for own in samples.values() for group in own for row in group], progress)
        rows = {name: [_best(group) for group in own] for name, own in samples.items()}
        pairs = _pairs(list(rows), against.name, settings.all_pairs)
        games = _play(run, judge, rows, pairs, faults, progress)
        _measure_kl(run, policies, rows, progress)
        run.write(ROWS, (row.row() for own in rows.values() for row in own))
        state = {
            "run": str(run.path),
            "judge": judge.model.model,
            "constitution": judge.constitution.name,
            "constitution_digest": judge.constitution.digest(),
            "protocol": judge.protocol,
            "prompts": len(questions),
            "against": against.name,
            "seed": settings.seed,
            **_results(run, policies, rows, questions, games, bootstrap),
            "human": people,
        }
        run.write_state(STAGE, state)
    return state | faults.summary()


def _policy_settings(run: Run, policy: Policy) -> PolicySettings:
    """The settings to sample from a policy: those of the run's own policy with its model."""
    return run.settings.policy.of_model(policy.model)


def _check(run: Run, policies: Sequence[Policy]) -> None:
    """Raise InputError for a bad model before any policy samples."""
    for policy in policies:
        if policy.name == REFERENCE:
            continue
        try:
            with open_llm(_policy_settings(run, policy)) as llm:
                _ = llm.control_tokens  # opens a model in this process
        except InputError as error:
            if not policy.is_local or policy.name != policy.model:
                raise
            raise InputError(
                "evaluate", "policies", got=f"{shown(policy.name)}, neither a name nor a model",
                expected=f"{NAMES} ({error})",
            ) from error  # fmt: skip


def _questions(run: Run) -> list[Question]:
    """The distinct prompts of `evaluate.prompts`, or else the prompts that `aif ppo` held out."""
    settings = run.settings.evaluate
    source = read_questions(settings.prompts) if settings.prompts else _held_out(run)
    questions = {row.prompt.id: row for row in islice(source, settings.limit)}
    if not questions:
        raise InputError(
            settings.prompts or run.path, "", got="no prompts at all", expected="at least one"
        )
    folder = run.file(FOLDER)
    folder.mkdir(exist_ok=True)
    prompts = [row.prompt for row in questions.values()]
    jsonl.write(folder / "prompts.jsonl", ({"id": p.source, "prompt": p.messages} for p in prompts))
    return list(questions.values())


def _held_out(run: Run) -> Iterator[Question]:
    path = run.file("ppo-samples.jsonl")
    if not path.exists():
        raise InputError(
            "evaluate", "prompts", got="nothing, and no prompts that `aif ppo` held out",
            expected="--prompts FILE",
        )  # fmt: skip
    rows = [row for _, row in jsonl.read(path)]
    first = min((row["step"] for row in rows), default=0)  # each evaluation has the same
    return (Question(Prompt.of(row["prompt"])) for row in rows if row["step"] == first)


def _sample(
    run: Run, policy: Policy, questions: Sequence[Question], progress: Progress
) -> list[list[PolicyResponse]]:
    """A policy's responses to each prompt: one, or n for best-of-n."""
    if policy.name == REFERENCE:
        return [[PolicyResponse(policy.name, q.prompt, q.response, None)] for q in questions]
    settings = run.settings
    folder = re.sub("[^A-Za-z0-9_.-]", "-", policy.name)[-64:].lstrip("_.-")
    sub = run.child(
        f"{FOLDER}/{folder}",
        policy=_policy_settings(run, policy),
        respond=RespondSettings(
            prompts=str(run.file(FOLDER) / "prompts.jsonl"),
            samples=policy.best_of,
            # Other seeds than for best-of-1: the best of n must not play against one of the same n.
            seed=settings.evaluate.seed + policy.best_of - 1,
        ),
    )
    model = "" if policy.name == policy.model else f" ({policy.model})"
    progress.say(f"{policy.name}{model}")
    respond(sub, progress)
    responses: dict[str, list[PolicyResponse]] = {q.prompt.id: [] for q in questions}
    prompts = {q.prompt.id: q.prompt for q in questions}
    by_itself = settings.policy.form != "text"  # a text may also end where the user would go on
    for row in sub.read("responses.jsonl", Response):
        text = None if row.fault else row.text
        ended = by_itself and row.finish == "stop"
        responses[row.prompt_id].append(
            PolicyResponse(policy.name, prompts[row.prompt_id], text, row.fault, ended)
        )
    return list(responses.values())


def _score(run: Run, rows: Sequence[PolicyResponse], progress: Progress) -> None:
    """Score every response with the reward model, if the run has one."""
    rows = [row for row in rows if row.response is not None]
    if sealed(run.file("reward")) is None or not rows:
        return
    from aif.train.ppo.rewards import ModelReward
    from aif.train.reward.model import load_ensemble

    progress.say(f"scoring {len(rows):,} responses by {run.path}/reward")
    reward = ModelReward(load_ensemble(run), normalise=True)
    scores = reward([row.prompt.messages for row in rows], [row.response for row in rows])
    for row, score in zip(rows, scores, strict=True):
        row.score = score


def _best(samples: Sequence[PolicyResponse]) -> PolicyResponse:
    """The only sample, or the sample with the highest score."""
    if len(samples) == 1:
        return samples[0]
    scored = [row for row in samples if row.score is not None]
    if scored:
        return max(scored, key=lambda row: row.score)
    fault = next((row.fault for row in samples if row.fault), "too_long")
    return PolicyResponse(samples[0].policy, samples[0].prompt, None, fault)


def _pairs(names: Sequence[str], against: str, all_pairs: bool) -> list[Pair]:
    """The matches: each other policy against `against`; with `all_pairs` each against each."""
    others = [name for name in names if name != against]
    pairs = [(name, against) for name in others]
    return pairs + list(combinations(others, 2)) if all_pairs else pairs


def _play(
    run: Run,
    judge: Judge,
    rows: Mapping[str, Sequence[PolicyResponse]],
    pairs: Sequence[Pair],
    faults: Faults,
    progress: Progress,
) -> dict[Pair, list[Game]]:
    """Let the judge compare every pair, prompt by prompt. A judge that grades responses one by one
    also grades each. Counts `faults`."""
    comparisons = {
        (first, second): [comparison(*two) for two in zip(rows[first], rows[second], strict=True)]
        for first, second in pairs
    }
    present = [c for own in comparisons.values() for c in own if c]
    path = run.file(FOLDER) / "matches.jsonl"
    jsonl.write(
        path,
        ({"prompt": c.prompt, "response_a": c.first, "response_b": c.second} for c in present),
    )
    label_settings = run.settings.label.model_copy(update={"pairs": str(path), "limit": None})
    sub = run.child(f"{FOLDER}/matches", label=label_settings)
    labels = _labels(sub, faults, progress) if present else {}
    if not judge.compares:
        every = [row for own in rows.values() for row in own if row.response is not None]
        _grade(sub, every, faults)
    return {pair: [_game(judge, c, labels) for c in own] for pair, own in comparisons.items()}


def _grade(run: Run, rows: Sequence[PolicyResponse], faults: Faults) -> None:
    """Give every response its grade. Most grades are in the journal from the labelling; the others
    (of texts that both policies wrote, or without a partner) are asked now."""
    with run.writing(), LiveJudge(run, LABELS) as judge:
        grades = judge([row.prompt.messages for row in rows], [row.response for row in rows])
        faults.include({"verdicts": judge.calls} | judge.faults.summary())
    for row, grade in zip(rows, grades, strict=True):
        row.grade = grade


def _labels(run: Run, faults: Faults, progress: Progress) -> dict[str, Label]:
    """Let the judge label a run; returns the labels by comparison id. Counts `faults`."""
    faults.include(label(run, progress))
    return run.labels()


def _game(judge: Judge, row: Comparison | None, labels: Mapping[str, Label]) -> Game:
    if row is None:
        return Game(None)
    if row.first == row.second:  # this needs no judge
        return Game(0.5, {principle.id: 0.5 for principle in judge.principles_for(row)})
    more_words = len(row.first.split()) - len(row.second.split())
    return Game(labels[row.id].p_first, labels[row.id].by_principle, more_words)


def _measure_kl(
    run: Run,
    policies: Sequence[Policy],
    rows: Mapping[str, Sequence[PolicyResponse]],
    progress: Progress,
) -> None:
    """Set log p / p_ref of each policy's responses; p_ref is the model that PPO started from. Only
    for models in this process, whose probabilities can be read, and not at temperature 0."""
    reference = start_of(run)
    local = [policy for policy in policies if policy.is_local and policy.best_of == 1]
    if not local or ":" in reference or run.settings.policy.temperature == 0:
        return
    from aif.models.load import load_tokenizer
    from aif.train.examples import Example
    from aif.train.ppo.kl import log_ratios

    try:
        load_tokenizer(reference)
    except InputError as error:
        progress.say(f"no KL is measured from {reference}: {error}")
        return
    groups = [[row for row in rows[policy.name] if row.response is not None] for policy in local]
    progress.say(f"reading {sum(map(len, groups)):,} responses for their KL from {reference}")

    def example(row: PolicyResponse) -> Example:
        dialogue = [*row.prompt.messages, {"role": "assistant", "content": row.response}]
        return Example("", "", "", dialogue, ended=row.ended)

    samples = [
        (policy.model, [example(row) for row in group])
        for policy, group in zip(local, groups, strict=True)
    ]
    for group, ratios in zip(groups, log_ratios(samples, reference, run.settings), strict=True):
        for row, ratio in zip(group, ratios, strict=True):
            row.kl = ratio


def _people(
    run: Run, bootstrap: Bootstrap, faults: Faults, progress: Progress
) -> dict[str, Any] | None:
    """How often the judge and the reward model prefer the response that people chose."""
    source = run.settings.evaluate.human
    if source is None:
        return None
    if not any(pair.human for pair in read_pairs(source)):
        raise InputError(source, "", got="no choices", expected="chosen and rejected, or scores")
    label_settings = run.settings.label.model_copy(update={"pairs": source})
    sub = run.child(f"{FOLDER}/human", label=label_settings)
    labels = _labels(sub, faults, progress)
    choices = {row.comparison_id: row.p_first for row in sub.read("human.jsonl", HumanChoice)}
    rows = [row for row in sub.read("comparisons.jsonl", Comparison) if row.id in choices]
    judge = [_agrees(labels[row.id].p_first, choices[row.id]) for row in rows]
    reward = None
    if sealed(run.file("reward")) is not None:
        from aif.stats.odds import probability
        from aif.train.reward.evaluate import score_comparisons
        from aif.train.reward.labeled import LabeledComparison
        from aif.train.reward.model import load_ensemble

        scores = score_comparisons(load_ensemble(run), [LabeledComparison(row) for row in rows])
        reward = bootstrap.rate(
            [_agrees(probability(s.delta), choices[s.comparison_id]) for s in scores]
        )
    agreement = {"judge": bootstrap.rate(judge), "reward": reward}
    return {"file": source, "pairs": len(rows)} | agreement


def _agrees(p_first: float | None, human: float) -> float | None:
    """1.0 if both prefer the same response, 0.5 if the model's preference is a tie."""
    return None if p_first is None else abs(outcome(p_first) + human - 1)


def _results(
    run: Run,
    policies: Sequence[Policy],
    rows: Mapping[str, Sequence[PolicyResponse]],
    questions: Sequence[Question],
    games: Mapping[Pair, Sequence[Game]],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """The statistics of each policy and of each match."""
    settings = run.settings.evaluate
    margin = settings.tie_margin
    strengths = ratings(
        {
            pair: [outcome(game.p_first, margin) for game in played]
            for pair, played in games.items()
        },
        bootstrap,
    )
    results = []
    for policy in policies:
        stats = response_stats(rows[policy.name], questions, bootstrap, settings.seed)
        if policy.best_of > 1 and stats["responses"]:
            bound = best_of_n_kl(policy.best_of)
            ends = {"mean": bound, "low": bound, "high": bound}
            stats["kl"] = ends | {"n": stats["responses"], "bound": True}
        identified = {"name": policy.name, "model": policy.model}
        results.append(identified | stats | {"rating": strengths.get(policy.name, NOTHING)})
    matches = [
        {"first": first, "second": second} | match(played, margin, bootstrap)
        for (first, second), played in games.items()
    ]
    return {"policies": results, "matches": matches}
