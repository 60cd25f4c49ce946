"""What a reward model learns from: AI labels, people's choices, grades of single responses.

    [reward.data]
    labels = 1.0                 # what `aif label` made of the run's comparisons
    "human.jsonl" = 0.5          # pairs as `aif label --pairs` reads them, with a choice

A prompt with all its responses and comparisons is one group: it is split, shuffled, weighed and run
through the model as a whole, as InstructGPT did (Ouyang et al. 2022, 2203.02155, section 3.5).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from aif.config.settings import RewardSettings
from aif.constitution import file as constitutions
from aif.data.readers import Pair, read_pairs, read_rated
from aif.errors import AifError, InputError, shown
from aif.run import Run
from aif.stats.odds import log_odds, probability
from aif.store.records import Comparison, Label, Message, Verdict, content_id
from aif.train.examples import held_out, split_key


@dataclass(frozen=True, slots=True)
class Preference:
    """How two of a group's responses compare: `first` and `second` are places among them."""

    comparison_id: str
    first: int
    second: int
    p_first: float


@dataclass(slots=True)
class PromptGroup:
    """A prompt, the distinct responses to it, and all that is known of how good they are."""

    prompt: list[Message]
    source: str
    responses: list[str] = field(default_factory=list)
    pairs: list[Preference] = field(default_factory=list)
    grades: list[float] = field(default_factory=list)  # probability of being good; [] for pairs

    @property
    def split_key(self) -> str:
        return split_key(self.prompt)

    def place(self, text: str) -> int:
        """The number of a response, which joins the others if it is new."""
        if text not in self.responses:
            self.responses.append(text)
        return self.responses.index(text)


@dataclass(frozen=True, slots=True)
class Preferences:
    """All groups, and how many rows were left out by reason."""

    groups: list[PromptGroup]
    left_out: dict[str, int]


def read_preferences(run: Run) -> Preferences:
    """The groups of every source in `reward.data`, in that order.

    Null labels are left out and counted. Raises InputError for a bad row, a source without any
    data, or data that all say the same; AifError for a stage that has not been run.
    """
    settings = run.settings.reward
    left_out: Counter[str] = Counter()
    groups: list[PromptGroup] = []
    read = _graded if settings.objective == "grades" else _paired
    for source in settings.data:
        found = list(read(run, source, left_out))
        if not found:
            why = ", ".join(f"{n:,} {kind}" for kind, n in left_out.items())
            raise InputError(
                f"reward.data.{source}", "", got=f"nothing to learn from{why and f' ({why})'}",
                expected="at least one prompt",
            )  # fmt: skip
        groups += found
    if not groups:
        raise InputError("reward", "data", got="no source", expected="labels, a JSONL file, ...")
    _check_not_constant(groups, settings)
    return Preferences(groups, dict(left_out))


def split(
    groups: list[PromptGroup], settings: RewardSettings
) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """(to train on, held out); no opening of a conversation is in both."""
    out = held_out((group.split_key for group in groups), settings.eval_fraction, settings.seed)
    train = [group for group in groups if group.split_key not in out]
    return train, [group for group in groups if group.split_key in out]


def _check_not_constant(groups: Iterable[PromptGroup], settings: RewardSettings) -> None:
    if settings.objective == "grades":
        values = {g > 0.5 if settings.hard else g for group in groups for g in group.grades}
        told = "one and the same grade everywhere"
    else:
        values = {0.5} | {pair.p_first for group in groups for pair in group.pairs}
        told = "even labels alone"
    if len(values) < 2:
        raise InputError("reward", "data", got=told, expected="something that tells good from bad")


def _paired(run: Run, source: str, left_out: Counter[str]) -> Iterator[PromptGroup]:
    """Groups with comparisons."""
    found = _labelled(run, left_out) if source == "labels" else _chosen(source, left_out)
    groups: dict[str, PromptGroup] = {}
    seen: set[str] = set()
    for comparison, p_first in found:
        if comparison.id in seen:
            left_out["repeated"] += 1
        elif comparison.first == comparison.second:
            left_out["identical"] += 1
        elif run.settings.reward.hard and p_first == 0.5:
            left_out["even"] += 1
        else:
            group = groups.setdefault(comparison.prompt_id, PromptGroup(comparison.prompt, source))
            first, second = group.place(comparison.first), group.place(comparison.second)
            group.pairs.append(Preference(comparison.id, first, second, p_first))
        seen.add(comparison.id)
    yield from groups.values()


def _labelled(run: Run, left_out: Counter[str]) -> Iterator[tuple[Comparison, float]]:
    """Every comparison whose label is not null, with it."""
    _check_labelled(run)
    labels = {label.comparison_id: label for label in run.read("labels.jsonl", Label)}
    for comparison in run.read("comparisons.jsonl", Comparison):
        label = labels.get(comparison.id)
        if label is None or label.p_first is None:
            left_out[(label and label.fault) or "not labelled"] += 1
        else:
            yield comparison, label.p_first


def _check_labelled(run: Run) -> None:
    if run.state("label").get("in_progress"):
        raise AifError(f"{run.path}: labelling was cut off; `aif label --out {run.path}` first")
    if not run.file("labels.jsonl").exists():
        raise AifError(f"{run.file('labels.jsonl')}: not there; `aif label --out {run.path}` first")


def _chosen(source: str, left_out: Counter[str]) -> Iterator[tuple[Comparison, float]]:
    """Every pair of a file that a person chose from, with the choice."""
    pair: Pair
    for pair in read_pairs(source):
        if pair.human is None:
            left_out["no choice"] += 1
        else:
            yield pair.comparison, pair.human.p_first


def _graded(run: Run, source: str, left_out: Counter[str]) -> Iterator[PromptGroup]:
    """Groups with a grade for each response."""
    found = _judged(run, left_out) if source == "labels" else read_rated(source)
    groups: dict[str, PromptGroup] = {}
    grades: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for prompt, text, grade in found:
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


def _judged(run: Run, left_out: Counter[str]) -> Iterator[tuple[list[Message], str, float]]:
    """The judge's grade of every response that `aif label` had graded by itself (pointwise or
    rating): the principles' log-odds, by weight; of several judges their mean."""
    _check_labelled(run)
    path = run.settings.label.constitution or run.settings.revise.constitution
    weights = {p.id: p.weight for p in constitutions.load(path).principle} if path else {}
    comparisons = {row.id: row for row in run.read("comparisons.jsonl", Comparison)}
    found: dict[tuple[str, str], dict[tuple[str, str], float]] = defaultdict(dict)
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
        p = verdict.p_first if first else 1 - verdict.p_first
        text = comparison.first if first else comparison.second
        found[comparison.prompt_id, text][verdict.principle_id, verdict.judge] = log_odds(p)
    for (prompt_id, text), said in found.items():
        weight = sum(weights.get(name, 1.0) for name, _ in said)
        total = sum(weights.get(name, 1.0) * value for (name, _), value in said.items())
        yield prompts[prompt_id], text, probability(total / weight)
