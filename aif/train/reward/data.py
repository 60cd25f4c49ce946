"""The data of reward models: AI labels, people's choices, grades of single responses.

    [reward.data]
    labels = 1.0                 # the run's comparisons with the labels of `aif label`
    "human.jsonl" = 0.5          # pairs as `aif label --pairs` reads them, with a choice

A prompt with all its responses and comparisons is one group, which is split, shuffled, weighted and
run through the model as a whole (InstructGPT: Ouyang et al. 2022, 2203.02155, section 3.5).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from aif.config.settings import RewardSettings
from aif.constitution import file as constitutions
from aif.data.readers import read_pairs, read_rated
from aif.errors import InputError, shown
from aif.run import Run
from aif.stats.odds import log_odds, probability
from aif.store.records import Comparison, HumanChoice, Message, Verdict, content_id, other
from aif.train.examples import answers_of, split
from aif.train.prefix_groups import SharedPrefix
from aif.train.reward.labeled import LabeledComparison, PromptGroup
from aif.train.tokens import Tokeniser, check_any, tokeniser_of


@dataclass(frozen=True, slots=True)
class Preferences:
    """All groups, and how many rows were left out, by reason."""

    groups: list[PromptGroup]
    left_out: dict[str, int]


class RewardData:
    """The data of a run's reward models in tokens, to train on and held out; reads no weights."""

    def __init__(self, run: Run, name: str):
        """`name` is the model to start from. Raises what `read_preferences` raises, and AifError if
        no prompt fits into `reward.max_tokens`."""
        self.run, self.name = run, name
        self.chat = run.settings.policy.form != "text"
        self.tokeniser = tokeniser_of(run, name, run.settings.reward.max_tokens)
        self.preferences = read_preferences(run)
        groups = self.preferences.groups
        self.train_groups, self.eval_groups = split(groups, run.settings.reward)
        self.train = list(tokenised(self.train_groups, self.tokeniser))
        self.held_out = list(tokenised(self.eval_groups, self.tokeniser))
        check_any("reward", self.train, f"{len(groups):,} prompts", self.tokeniser)


def tokenised(groups: Sequence[PromptGroup], tokeniser: Tokeniser) -> Iterator[SharedPrefix]:
    """The groups in tokens, without those that do not fit."""
    dialogues = [answers_of(group.prompt, group.responses, group.source) for group in groups]
    for group, rows in zip(groups, tokeniser.answers(dialogues), strict=True):
        if rows is not None:
            yield SharedPrefix.of(rows, **group.labels())


def read_preferences(run: Run) -> Preferences:
    """The groups of every source in `reward.data`, in that order.

    Null labels are left out and counted. Raises InputError for a bad row, a source without data, or
    labels that are all the same; AifError for a stage that has not run.
    """
    settings = run.settings.reward
    left_out: Counter[str] = Counter()
    groups: list[PromptGroup] = []
    read = _graded if settings.objective == "grades" else _compared
    for source in settings.data:
        some = list(read(run, source, left_out))
        if not some:
            why = ", ".join(f"{n:,} {kind}" for kind, n in left_out.items())
            raise InputError(
                f"reward.data.{source}", "", got=f"nothing to learn from{why and f' ({why})'}",
                expected="at least one prompt",
            )  # fmt: skip
        groups += some
    if not groups:
        raise InputError("reward", "data", got="no source", expected="labels, a JSONL file, ...")
    _check_not_constant(groups, settings)
    return Preferences(groups, dict(left_out))


def _check_not_constant(groups: Iterable[PromptGroup], settings: RewardSettings) -> None:
    if settings.objective == "grades":
        values = {g > 0.5 if settings.hard else g for group in groups for g in group.grades}
        got = "one and the same grade everywhere"
    else:
        values = {0.5} | {row.target for group in groups for row in group.comparisons}
        got = "even labels alone"
    if len(values) < 2:
        raise InputError("reward", "data", got=got, expected="something that tells good from bad")


def _compared(run: Run, source: str, left_out: Counter[str]) -> Iterator[PromptGroup]:
    """Groups with comparisons."""
    rows = _labeled(run, left_out) if source == "labels" else _chosen(source, left_out)
    groups: dict[str, PromptGroup] = {}
    seen: set[str] = set()
    for row in rows:
        comparison = row.comparison
        if comparison.id in seen:
            left_out["repeated"] += 1
        elif comparison.first == comparison.second:
            left_out["identical"] += 1
        elif run.settings.reward.hard and row.target == 0.5:
            left_out["even"] += 1
        else:
            group = PromptGroup(comparison.prompt, source)
            groups.setdefault(comparison.prompt_id, group).add(row)
        seen.add(comparison.id)
    yield from groups.values()


def _labeled(run: Run, left_out: Counter[str]) -> Iterator[LabeledComparison]:
    """Every comparison of the run whose label is not null, with a person's choice if any."""
    run.require_labels()
    labels = run.labels()
    human = run.read("human.jsonl", HumanChoice, missing_ok=True)
    choices = {row.comparison_id: row.p_first for row in human}
    for comparison in run.read("comparisons.jsonl", Comparison):
        label, choice = labels.get(comparison.id), choices.get(comparison.id)
        if label is None or label.p_first is None:
            left_out[(label and label.fault) or "not labelled"] += 1
        else:
            yield LabeledComparison(comparison, label.p_first, label.by_principle, choice)


def _chosen(source: str, left_out: Counter[str]) -> Iterator[LabeledComparison]:
    """Every pair of a file that has a person's choice."""
    for pair in read_pairs(source):
        if pair.human is None:
            left_out["no choice"] += 1
        else:
            yield LabeledComparison(pair.comparison, p_human=pair.human.p_first)


def _graded(run: Run, source: str, left_out: Counter[str]) -> Iterator[PromptGroup]:
    """Groups with a grade for each response: the mean of its grades."""
    rows = _judge_grades(run, left_out) if source == "labels" else read_rated(source)
    groups: dict[str, PromptGroup] = {}
    grades: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for prompt, text, grade in rows:
        key = content_id("prompt", prompt)
        group = groups.setdefault(key, PromptGroup(prompt, source))
        grades[key][group.place(text)].append(grade)
    for key, group in groups.items():
        means = {text: sum(grades[key][n]) / len(grades[key][n])
                 for n, text in enumerate(group.responses)}  # fmt: skip
        if run.settings.reward.hard:
            even = [text for text, mean in means.items() if mean == 0.5]
            left_out.update(["even"] * len(even))
            means = {text: mean for text, mean in means.items() if text not in even}
        group.responses, group.grades = list(means), list(means.values())
        if group.grades:
            yield group


def _judge_grades(run: Run, left_out: Counter[str]) -> Iterator[tuple[list[Message], str, float]]:
    """(prompt, response, grade) of every response that the judge graded by itself (pointwise or
    rating). The grade is the weighted mean of the principles' log-odds, over all judges, as a
    probability."""
    run.require_labels()
    path = run.settings.label.constitution or run.settings.revise.constitution
    weights = {p.id: p.weight for p in constitutions.load(path).principle} if path else {}
    comparisons = {row.id: row for row in run.read("comparisons.jsonl", Comparison)}
    odds: dict[tuple[str, str], dict[tuple[str, str], float]] = defaultdict(dict)
    prompts = {row.prompt_id: row.prompt for row in comparisons.values()}
    for verdict in run.read("verdicts.jsonl", Verdict):
        comparison = comparisons.get(verdict.comparison_id)
        if verdict.order not in ("a", "b"):
            raise InputError(
                run.file("verdicts.jsonl"), "order", got=shown(verdict.order),
                expected='grades of single responses (label.protocol = "pointwise" or "rating")',
            )  # fmt: skip
        if comparison is None or verdict.p_first is None:
            left_out[verdict.fault or "not compared"] += 1
            continue
        first = verdict.order == "a"
        p = verdict.p_first if first else other(verdict.p_first)
        text = comparison.first if first else comparison.second
        odds[comparison.prompt_id, text][verdict.principle_id, verdict.judge] = log_odds(p)
    for (prompt_id, text), by_principle in odds.items():
        weight = sum(weights.get(name, 1.0) for name, _ in by_principle)
        total = sum(weights.get(name, 1.0) * value for (name, _), value in by_principle.items())
        yield prompts[prompt_id], text, probability(total / weight)
