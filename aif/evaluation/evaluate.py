"""Policies against each other: what each says to the same prompts, and whom the judge prefers.

    prompts -> evaluation/POLICY/ (respond) -> evaluation/matches/ (label) -> evaluate.json

No model is asked here: every policy is a run of its own below RUN/evaluation, and so are the
matches. What they were answered is in their journals, so that a second evaluation asks for what is
new, and one that was killed goes on. evaluation.jsonl has a row for every policy and prompt:

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
from aif.evaluation.responses import Measured, comparison, figures
from aif.judge.judge import Judge
from aif.judge.live import LiveJudge
from aif.judge.panel import constitution_path, judge_of
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
    """Do what `run.settings.evaluate` says; returns what is kept as evaluate.json, and which calls
    of the judge failed (`asking.check_faults` says whether those are too many).

    Raises Interrupted or JudgeStopped when it ended early; the same command goes on.
    """
    require("evaluate", "scipy", "sklearn", "sacrebleu")
    settings = run.settings.evaluate
    with open_llm(run.settings.judge) as llm:  # what is wrong with it is told before others work
        _ = llm.control_tokens
    judge = judge_of(run.settings, constitution_path(run.settings))
    policies, against = chosen(run)
    _check(run, policies)
    faults, bootstrap = Faults(), Bootstrap(settings.seed, settings.resamples)
    with run.writing():
        questions = read_asked(run)
        run.keep_settings()
        people = _people(run, bootstrap, faults, progress)
        drawn = {policy.name: _drawn(run, policy, questions, progress) for policy in policies}
        _score(run, [row for samples in drawn.values() for s in samples for row in s], progress)
        rows = {name: [_best(some) for some in samples] for name, samples in drawn.items()}
        paired = _paired(list(rows), against.name, settings.all_pairs)
        games = _judged(run, judge, rows, paired, faults, progress)
        _diverge(run, policies, rows, progress)
        jsonl.write(run.file(ROWS), (row.row() for found in rows.values() for row in found))
        state = {
            "run": str(run.path),
            "judge": judge.model.model,
            "constitution": judge.constitution.name,
            "constitution_digest": judge.constitution.digest(),
            "protocol": judge.protocol,
            "prompts": len(questions),
            "against": against.name,
            "seed": settings.seed,
            **_figures(run, policies, rows, questions, games, bootstrap),
            "human": people,
        }
        run.write_state(STAGE, state)
    return state | faults.summary()


def _asked_as(run: Run, policy: Policy) -> PolicySettings:
    """How the policy is sampled from: as the run's own is."""
    return run.settings.policy.of_model(policy.model)


def _check(run: Run, policies: Sequence[Policy]) -> None:
    """Raise InputError for a model that is none, before the others have been asked."""
    for policy in policies:
        if policy.name == REFERENCE:
            continue
        try:
            with open_llm(_asked_as(run, policy)) as llm:
                _ = llm.control_tokens  # of a model in this process, for which it is looked at
        except InputError as error:
            if not policy.is_local or policy.name != policy.model:
                raise
            raise InputError(
                "evaluate", "policies", got=f"{shown(policy.name)}, neither a name nor a model",
                expected=f"{NAMES} ({error})",
            ) from error  # fmt: skip


def read_asked(run: Run) -> list[Question]:
    """The distinct prompts: of `evaluate.prompts`, or those that `aif ppo` held out."""
    settings = run.settings.evaluate
    found = read_questions(settings.prompts) if settings.prompts else _held_out(run)
    questions = {row.prompt.id: row for row in islice(found, settings.limit)}
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
    first = min((row["step"] for row in rows), default=0)  # each look asks the same
    return (Question(Prompt.of(row["prompt"])) for row in rows if row["step"] == first)


def _sub_run(run: Run, name: str, **tables: Any) -> Run:
    """A run below this one, with its settings but for `tables`."""
    return Run(run.file(FOLDER) / name, run.settings.model_copy(update=tables), run.root)


def _drawn(
    run: Run, policy: Policy, questions: Sequence[Question], progress: Progress
) -> list[list[Measured]]:
    """A policy's responses to each prompt: one, or those that the best is taken of."""
    if policy.name == REFERENCE:
        return [[Measured(policy.name, q.prompt, q.response, None)] for q in questions]
    settings = run.settings
    sub = _sub_run(
        run,
        re.sub("[^A-Za-z0-9_.-]", "-", policy.name)[-64:].lstrip("_.-"),
        policy=_asked_as(run, policy),
        respond=RespondSettings(
            prompts=str(run.file(FOLDER) / "prompts.jsonl"),
            samples=policy.best_of,
            # Draws of its own: the best of n must not be held against one of these n.
            seed=settings.evaluate.seed + policy.best_of - 1,
        ),
    )
    named = "" if policy.name == policy.model else f" ({policy.model})"
    progress.say(f"{policy.name}{named}")
    respond(sub, progress)
    found: dict[str, list[Measured]] = {q.prompt.id: [] for q in questions}
    prompts = {q.prompt.id: q.prompt for q in questions}
    by_itself = settings.policy.form != "text"  # a text may also end where the user would go on
    for row in sub.read("responses.jsonl", Response):
        text = None if row.fault else row.text
        ended = by_itself and row.finish == "stop"
        found[row.prompt_id].append(
            Measured(policy.name, prompts[row.prompt_id], text, row.fault, ended)
        )
    return list(found.values())


def _score(run: Run, rows: Sequence[Measured], progress: Progress) -> None:
    """The reward model's score of every response, where the run has a reward model."""
    told = [row for row in rows if row.response is not None]
    if sealed(run.file("reward")) is None or not told:
        return
    from aif.train.ppo.rewards import ModelReward
    from aif.train.reward.model import load_ensemble

    progress.say(f"scoring {len(told):,} responses by {run.path}/reward")
    scored = ModelReward(load_ensemble(run), normalise=True)
    scores = scored([row.prompt.messages for row in told], [row.response for row in told])
    for row, score in zip(told, scores, strict=True):
        row.score = score


def _best(samples: Sequence[Measured]) -> Measured:
    """The only one, or the one with the highest score."""
    if len(samples) == 1:
        return samples[0]
    scored = [row for row in samples if row.score is not None]
    if scored:
        return max(scored, key=lambda row: row.score)
    fault = next((row.fault for row in samples if row.fault), "too_long")
    return Measured(samples[0].policy, samples[0].prompt, None, fault)


def _paired(names: Sequence[str], against: str, every: bool) -> list[Pair]:
    """Who meets whom: each the one that all are held against, and each other where `every`."""
    others = [name for name in names if name != against]
    found = [(name, against) for name in others]
    return found + list(combinations(others, 2)) if every else found


def _judged(
    run: Run,
    judge: Judge,
    rows: Mapping[str, Sequence[Measured]],
    paired: Sequence[Pair],
    faults: Faults,
    progress: Progress,
) -> dict[Pair, list[Game]]:
    """What the judge says of every pair, prompt by prompt; where it grades responses one by one,
    each is given its grade. Counts `faults`."""
    met = {
        pair: [comparison(a, b) for a, b in zip(rows[pair[0]], rows[pair[1]], strict=True)]
        for pair in paired
    }
    asked = [c for found in met.values() for c in found if c]
    shown = run.file(FOLDER) / "matches.jsonl"
    jsonl.write(
        shown,
        ({"prompt": c.prompt, "response_a": c.first, "response_b": c.second} for c in asked),
    )
    sub = _sub_run(
        run,
        "matches",
        label=run.settings.label.model_copy(update={"pairs": str(shown), "limit": None}),
    )
    labels = _labels(sub, faults, progress) if asked else {}
    if not judge.compares:
        told = [row for found in rows.values() for row in found if row.response is not None]
        # Most grades are there from the labelling, in whose journal the rest goes: those of texts
        # that both policies wrote, or that had none to be held against.
        with sub.writing(), LiveJudge(sub, LABELS) as graded:
            grades = graded([row.prompt.messages for row in told], [row.response for row in told])
            _count(faults, {"verdicts": graded.calls} | graded.faults.summary())
        for row, grade in zip(told, grades, strict=True):
            row.gold = grade
    return {pair: [_game(judge, c, labels) for c in found] for pair, found in met.items()}


def _labels(run: Run, faults: Faults, progress: Progress) -> dict[str, Label]:
    """Have the judge label a run; the labels by their comparison. Counts `faults`."""
    _count(faults, label(run, progress))
    return {row.comparison_id: row for row in run.read("labels.jsonl", Label)}


def _count(faults: Faults, summary: Mapping[str, Any]) -> None:
    faults.calls += summary["verdicts"]
    faults.kinds.update(summary["faults"])
    faults.details |= summary["fault_details"]


def _game(judge: Judge, met: Comparison | None, labels: Mapping[str, Label]) -> Game:
    if met is None:
        return Game(None)
    if met.first == met.second:  # nobody has to judge that
        return Game(0.5, {principle.id: 0.5 for principle in judge.principles_for(met)})
    found = labels[met.id]
    more_words = len(met.first.split()) - len(met.second.split())
    return Game(found.p_first, found.by_principle, more_words)


def _diverge(
    run: Run, policies: Sequence[Policy], rows: Mapping[str, Sequence[Measured]], progress: Progress
) -> None:
    """log p / p_ref of what each policy drew, p_ref being what PPO started from; of models in this
    process, whose probabilities can be read, and not of greedy ones, which have none."""
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
    told = [[row for row in rows[policy.name] if row.response is not None] for policy in local]
    progress.say(f"reading {sum(map(len, told)):,} responses for their KL from {reference}")

    def example(row: Measured) -> Example:
        dialogue = [*row.prompt.messages, {"role": "assistant", "content": row.response}]
        return Example("", "", "", dialogue, ended=row.ended)

    drawn = [
        (policy.model, [example(row) for row in some])
        for policy, some in zip(local, told, strict=True)
    ]
    for some, ratios in zip(told, log_ratios(drawn, reference, run.settings), strict=True):
        for row, ratio in zip(some, ratios, strict=True):
            row.kl = ratio


def _people(
    run: Run, bootstrap: Bootstrap, faults: Faults, progress: Progress
) -> dict[str, Any] | None:
    """How often the judge, and the reward model, prefer what people have chosen."""
    source = run.settings.evaluate.human
    if source is None:
        return None
    if not any(pair.human for pair in read_pairs(source)):
        raise InputError(source, "", got="no choices", expected="chosen and rejected, or scores")
    sub = _sub_run(run, "human", label=run.settings.label.model_copy(update={"pairs": source}))
    labels = _labels(sub, faults, progress)
    choices = {row.comparison_id: row.p_first for row in sub.read("human.jsonl", HumanChoice)}
    asked = [row for row in sub.read("comparisons.jsonl", Comparison) if row.id in choices]
    found = {"file": source, "pairs": len(asked)}
    judged = [_agrees(labels[row.id].p_first, choices[row.id]) for row in asked]
    scored = None
    if sealed(run.file("reward")) is not None:
        from aif.stats.odds import probability
        from aif.train.reward.evaluate import score_comparisons
        from aif.train.reward.labeled import LabeledComparison
        from aif.train.reward.model import load_ensemble

        scores = score_comparisons(load_ensemble(run), [LabeledComparison(row) for row in asked])
        scored = bootstrap.rate(
            [_agrees(probability(s.delta), choices[s.comparison_id]) for s in scores]
        )
    return found | {"judge": bootstrap.rate(judged), "reward": scored}


def _agrees(p_first: float | None, human: float) -> float | None:
    """1.0 where both prefer the same response, 0.5 where the first of them is even."""
    return None if p_first is None else abs(outcome(p_first) + human - 1)


def _figures(
    run: Run,
    policies: Sequence[Policy],
    rows: Mapping[str, Sequence[Measured]],
    questions: Sequence[Question],
    games: Mapping[Pair, Sequence[Game]],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """What evaluate.json has of each policy and of each match."""
    settings = run.settings.evaluate
    margin = settings.tie_margin
    strengths = ratings(
        {
            pair: [outcome(game.p_first, margin) for game in played]
            for pair, played in games.items()
        },
        bootstrap,
    )
    told = []
    for policy in policies:
        found = figures(rows[policy.name], questions, bootstrap, settings.seed)
        if policy.best_of > 1 and found["responses"]:
            bound = best_of_n_kl(policy.best_of)
            found["kl"] = {"mean": bound, "low": bound, "high": bound, "n": found["responses"]}
            found["kl"]["bound"] = True
        about = {"name": policy.name, "model": policy.model}
        told.append(about | found | {"rating": strengths.get(policy.name, NOTHING)})
    matches = [
        {"first": first, "second": second} | match(played, margin, bootstrap)
        for (first, second), played in games.items()
    ]
    return {"policies": told, "matches": matches}
