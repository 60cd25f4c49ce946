"""How long `aif run` will take: the tokens of each stage, at a speed measured on this machine.

    models -> models/speed (a few seconds) -> tokens a second
    run.toml -> tokens that each stage reads, writes and learns from -> seconds

It assumes that texts are as long as the settings allow. A stage has no forecast if it
asks a served model, or if the settings do not say how much data it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from os.path import commonprefix
from typing import TYPE_CHECKING

from aif.config.settings import LLMSettings, TrainSettings
from aif.data.readers import read_prompts
from aif.errors import InputError, TooSlow
from aif.judge.panel import judge_of
from aif.llm import Ask
from aif.pipeline import Step
from aif.planning import comparisons_of, prompts_of, samples_of
from aif.progress import Progress, duration
from aif.run import Run
from aif.store.records import Comparison

if TYPE_CHECKING:
    from aif.models.speed import Speed

LETTERS = 4  # characters of a token, in English
TEMPLATE = 20  # tokens that a chat template adds to a prompt
REQUEST = 300  # tokens of a request to criticise or to revise, without the response
SERVED = ("openai:", "openai-batch:", "vllm:", "scripted:")
PADDING = 96  # tokens that a judge's call costs besides: its blocks are padded, its batches small
STARTUP_S = 4.0  # for a stage to load its model and write its files
ADAPTERS = 0.7  # the time of learning with LoRA: frozen weights have no gradients
WATCHED = 10  # evaluations of `aif ppo`, unless `ppo.eval_every` says otherwise


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a model in a stage, in tokens."""

    model: LLMSettings
    read: float = 0.0
    written: float = 0.0
    learned: float = 0.0

    def seconds(self, speed: Speed) -> float:
        """How long it takes."""
        return self.read / speed.read + self.written / speed.written + self.learned / speed.learned


def forecast(run: Run, todo: Sequence[Step], progress: Progress) -> dict[str, float | None]:
    """The seconds of each step; None if it is not known. Each model that runs in this
    process is timed for a few seconds."""

    @cache
    def speed(weights: str, dtype: str, device: str) -> Speed | None:
        from aif.models.speed import measure

        progress.stage(f"timing {weights} on this machine")
        try:
            return measure(weights, dtype, device)
        except (InputError, RuntimeError, ValueError):  # a model that cannot be timed may still run
            return None

    def seconds(stage: str) -> float | None:
        if stage not in WORK:
            return STARTUP_S
        if not _is_known(run, stage):
            return None
        try:
            parts = WORK[stage](run)
            if any(part.model.model.startswith(SERVED) for part in parts):
                return None
            models = [part.model for part in parts]
            speeds = [speed(model.weights, model.dtype, model.device) for model in models]
            if None in speeds:
                return None
            return STARTUP_S + sum(map(Work.seconds, parts, speeds))
        except InputError:  # the stage itself reports it, if it is still wrong by then
            return None

    return {step.name: seconds(step.stage.name) for step in todo}


def check_time(expected_s: Mapping[str, float | None], minutes: float | None, command: str) -> None:
    """Raise TooSlow if the steps that have a forecast take longer than `minutes`."""
    seconds = sum(filter(None, expected_s.values()))
    if minutes is not None and seconds > 60 * minutes:
        raise TooSlow(
            f"about {duration(seconds)} on this machine, more than --within {minutes:g} (minutes); "
            f"`{command}` starts it all the same"
        )


def _is_known(run: Run, stage: str) -> bool:
    """Whether the settings say how much data a stage has. For a run with its own pairs they do so
    for `label` alone, and for `sft` only if it learns from revisions."""
    if stage == "sft" and set(run.settings.sft.data) != {"revisions"}:
        return False
    return stage == "label" or run.settings.respond.prompts is not None


def _respond(run: Run) -> list[Work]:
    return [_sampling(run, run.settings.respond.samples)]


def _resample(run: Run) -> list[Work]:
    return [_sampling(run, samples_of(run))]


def _sampling(run: Run, samples: int) -> Work:
    prompts, tokens = _prompts(run)
    policy = run.settings.policy
    return Work(policy, read=tokens, written=prompts * samples * policy.response_tokens)


def _prompts(run: Run) -> tuple[int, float]:
    """The number of prompts, and the tokens of all."""
    prompts = prompts_of(run)
    letters = sum(len(message["content"]) for row in prompts for message in row.messages)
    return len(prompts), letters / LETTERS + TEMPLATE * len(prompts)


def _revised(run: Run) -> int:
    """Responses that are revised."""
    responses = len(prompts_of(run)) * run.settings.respond.samples
    return min(responses, run.settings.revise.limit or responses)


def _revise(run: Run) -> list[Work]:
    reviser = run.settings.reviser_model
    calls = _revised(run) * run.settings.revise.rounds * 2
    each = REQUEST + run.settings.policy.response_tokens
    return [Work(reviser, read=calls * each, written=calls * reviser.response_tokens)]


def _filter(run: Run) -> list[Work]:
    words = " word" * run.settings.policy.response_tokens
    revisions = run.settings.revise.rounds
    rows = [
        Comparison.of(prompt.messages, f"before{words}", f"{number}{words}")
        for prompt in prompts_of(run)
        for number in range(revisions)
    ]
    return [_judging(run, rows[: _revised(run) * revisions])]


def _label(run: Run) -> list[Work]:
    rows = list(comparisons_of(run))
    return [_judging(run, rows, model) for model in (run.settings.judge, *run.settings.panel)]


def _judging(run: Run, rows: Iterable[Comparison], model: LLMSettings | None = None) -> Work:
    judge = judge_of(run.settings, model)
    rows = list(rows)
    calls = {call.digest for row in rows for call in judge.calls_for(row)}
    return Work(judge.model, read=_new_tokens(judge.asks(rows, calls)))


def _new_tokens(asks: Iterable[Ask]) -> float:
    """The tokens of some calls; what a call and the one before begin with counts once."""
    tokens, before = 0.0, ""
    for ask in asks:
        text = ask.text or "".join(message["content"] for message in ask.messages or [])
        shared = len(commonprefix([before, text]))  # noqa: RUF071  letters, not paths
        tokens += (len(text) - shared) / LETTERS + PADDING
        before = text
    return tokens


def _sft(run: Run) -> list[Work]:
    rows = _revised(run) * run.settings.revise.rounds
    prompts, tokens = _prompts(run)
    each = tokens / max(1, prompts) + run.settings.policy.response_tokens
    return [Work(run.settings.policy, learned=_learned(run.settings.sft, rows, each))]


def _learned(settings: TrainSettings, rows: float, tokens: float) -> float:
    """Tokens to learn from, scaled to full fine-tuning; `rows` per epoch, `tokens` per row."""
    learned = rows * settings.epochs
    if settings.max_steps:
        learned = min(learned, settings.max_steps * settings.batch_size)
    return learned * tokens * (ADAPTERS if settings.lora else 1.0)


def _group(run: Run, samples: int) -> float:
    """The tokens of a prompt with its responses."""
    prompts, tokens = _prompts(run)
    return tokens / max(1, prompts) + samples * run.settings.policy.response_tokens


def _reward(run: Run) -> list[Work]:
    settings, prompts = run.settings.reward, len(prompts_of(run))
    each = _group(run, samples_of(run))
    read = prompts * each * (1 + settings.eval_fraction * (settings.epochs + 1))
    learned = _learned(settings, prompts * (1 - settings.eval_fraction), each)
    return [Work(run.settings.policy, read=read, learned=learned * settings.members)]


def _ppo(run: Run) -> list[Work]:
    settings, policy = run.settings.ppo, run.settings.policy
    prompts = len(prompts_of(run)) * (1 - settings.eval_fraction)
    steps = settings.max_steps or max(1, prompts * settings.epochs // settings.batch_size)
    critic = 1 if settings.algorithm == "ppo" else 0
    each = _group(run, settings.samples)
    rows = steps * settings.batch_size
    watched = len(prompts_of(run)) * settings.eval_fraction
    watched *= 1 + (steps / settings.eval_every if settings.eval_every else WATCHED)
    learned = rows * settings.ppo_epochs * each * (ADAPTERS if settings.lora else 1.0)
    return [
        Work(
            policy,
            # The policy, the reference and the reward model read each response; the critic too.
            read=(rows * each + watched * _group(run, 1)) * (3 + critic),
            written=(rows * settings.samples + watched)
            * (settings.response_tokens or policy.response_tokens),
            learned=learned * (1 + critic),
        ),
        *_live_judge(run, rows * settings.samples + watched),
    ]


def _live_judge(run: Run, responses: float) -> list[Work]:
    """The judge, if it grades the responses of PPO."""
    if "judge" not in (*run.settings.ppo.reward, run.settings.ppo.gold):
        return []
    each = run.settings.policy.response_tokens + PADDING
    return [Work(run.settings.judge, read=responses * each)]


def _evaluate(run: Run) -> list[Work]:
    settings, policy = run.settings.evaluate, run.settings.policy
    source = settings.prompts
    prompts = len(list(read_prompts(source))) if source else len(prompts_of(run)) / 10
    prompts = min(prompts, settings.limit or prompts)
    names = settings.policies or ["base", "sft", "best-of-4", "ppo"]
    texts = sum(4 if name.startswith("best-of") else 1 for name in names) * prompts
    tokens = policy.response_tokens
    words = " word" * tokens
    rows = [
        Comparison.of([{"role": "user", "content": f"{number}"}], f"{name}{words}", "")
        for number in range(int(prompts))
        for name in names
    ]
    # The reward model reads each text once, the policies twice and in float32.
    drawn = Work(policy, read=texts * _group(run, 1) * 4, written=texts * tokens)
    return [drawn, _judging(run, rows)]


WORK: dict[str, Callable[[Run], list[Work]]] = {
    "respond": _respond,
    "revise": _revise,
    "filter": _filter,
    "sft": _sft,
    "resample": _resample,
    "label": _label,
    "reward": _reward,
    "ppo": _ppo,
    "evaluate": _evaluate,
}
