"""What PPO starts from: models, rewards and prompts, checked before any of it is expensive."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers

from aif.config.settings import PPOSettings
from aif.errors import InputError, shown
from aif.models.load import (
    ends_of,
    load_model,
    load_reward_model,
    load_tokenizer,
    torch_dtype,
    usable_device,
)
from aif.run import Run
from aif.store.records import content_id
from aif.train.batch import Layout, Steps
from aif.train.examples import read_examples
from aif.train.model import (
    inner,
    learning_rate,
    load_for_training,
    micro_batch,
    model_identity,
    without_dropout,
)
from aif.train.ppo.actor_critic import ActorCritic, Reference, freeze
from aif.train.ppo.loop import PPO, Position
from aif.train.ppo.maths import AdaptiveKL
from aif.train.ppo.prompts import PromptStream, prompts_of
from aif.train.ppo.rewards import ModelReward, Reward, Rewards, asked_by_the_first, source_of
from aif.train.ppo.rollouts import Rollouts, TransformersRollouts
from aif.train.ppo.update import Learner
from aif.train.ppo.vllm_rollouts import VLLMRollouts
from aif.train.prefix_groups import SharingLayout
from aif.train.prefix_mask import shares
from aif.train.resume import SCHEDULES, digest_of, start_model
from aif.train.reward.model import Ensemble, RewardModel, member_folders
from aif.train.tokens import Tokeniser, TokenRow, token_digest

STAGE = "ppo"
LOOKS = 10  # in all, where ppo.eval_every does not say how often


def check_settings(run: Run) -> str:
    """The model to start from. Raises InputError for settings that do not go together."""
    settings = run.settings.ppo
    if settings.algorithm == "rloo" and settings.samples < 2:
        raise _wrong("samples", settings.samples, "2 or more for rloo: the others are its baseline")
    if not settings.reward:
        raise _wrong("reward", settings.reward, "model, judge or MODULE:FUNCTION with a weight")
    if (settings.load_best or settings.stop_when_gold_falls) and not settings.gold:
        raise _wrong("gold", None, "judge or MODULE:FUNCTION, to know what is best by")
    known = [tracker.value for tracker in get_available_trackers()]
    for tracker in settings.trackers:
        if tracker not in known:
            raise _wrong(
                "trackers", tracker, f"one that is installed: {', '.join(known) or 'none'}"
            )
    if temperature(run) <= 0:
        raise _wrong("temperature", 0, "more than 0: a policy has to try things out")
    return start_model(run, settings.model)


def temperature(run: Run) -> float:
    """Of sampling, and so of every log-probability."""
    given = run.settings.ppo.temperature
    return run.settings.policy.temperature if given is None else given


def look_every(settings: PPOSettings, steps: int) -> int:
    """Steps from one look at the held-out prompts to the next."""
    return settings.eval_every or max(1, steps // LOOKS)


class Prepared:
    """Everything but models; what is wrong with a name, a file or a setting is found here."""

    def __init__(self, run: Run, name: str, sources: Mapping[str, Reward]):
        self.run, self.name, self.settings = run, name, run.settings.ppo
        self.tokenizer, context = load_tokenizer(name)
        limit = min(self.settings.max_tokens, context)
        self.room = self.settings.response_tokens or run.settings.policy.response_tokens
        self.tokeniser = Tokeniser(self.tokenizer, limit, chat=run.settings.policy.form != "text")
        self.learn, self.held_out = prompts_of(run, self.tokeniser, self.room)
        self.ptx = self._ptx()
        sources = {name: asked_by_the_first(source) for name, source in sources.items()}
        gold, named = self.settings.gold, self.settings.reward
        self.gold = source_of(gold, "gold", sources) if gold else None
        self.functions = {s: source_of(s, "reward", sources) for s in named if s != "model"}
        self.reward_folders = self._reward_folders() if "model" in named else []
        self.critic = self._critic()

    def digest(self) -> str:
        """Of all that the weights at the end depend on."""
        models = [model_identity(str(folder)) for folder in self.reward_folders]
        sources = [*self.functions.values(), self.gold]
        others = [getattr(source, "identity", None) for source in sources]
        reward = self.run.settings.reward
        scored = (reward.combine, reward.max_tokens) if models else None
        critic = model_identity(self.critic) if self.critic else None
        prompts = [(prompt.id, prompt.ids_T.tolist()) for prompt in self.learn]
        return digest_of(
            STAGE, self.settings, self.name,
            content_id(prompts, self.room, temperature(self.run), models, scored, others, critic),
            content_id([prompt.id for prompt in self.held_out]), token_digest(self.ptx),
        )  # fmt: skip

    def rewards(self, ensemble: Ensemble | None) -> Rewards:
        """All sources with their weights."""
        found: dict[str, Reward] = dict(self.functions)
        if ensemble is not None:
            found["model"] = ModelReward(ensemble, self.settings.normalise)
        return Rewards({name: (found[name], w) for name, w in self.settings.reward.items()})

    def load_ensemble(self) -> Ensemble | None:
        """The reward model or models, on PPO's device, frozen."""
        settings = self.settings
        place = {"device": settings.device, "dtype": settings.dtype}
        reward = self.run.settings.reward.model_copy(update=place)
        members = [
            RewardModel.load(folder, reward, self.tokeniser.chat) for folder in self.reward_folders
        ]
        for member in members:
            freeze(member.model, torch_dtype(settings.dtype, member.model.device))
        return Ensemble(members, reward.combine) if members else None

    def value_scale(self, ensemble: Ensemble | None) -> tuple[float, float]:
        """(shift, scale) that put a critic which begins as the reward model on the rewards' scale
        (detail 6)."""
        settings = self.settings
        theirs = ensemble is not None and self.critic == str(self.reward_folders[0])
        if not theirs or settings.critic_head == "zero":
            return 0.0, 1.0
        weight, first = settings.reward["model"], ensemble.members[0]
        as_is = not settings.normalise and len(ensemble.members) == 1
        return (0.0, weight) if as_is else (first.mean, weight / first.std)

    def _reward_folders(self) -> list[Path]:
        named = self.settings.reward_model
        return [Path(named)] if named else member_folders(self.run)

    def _critic(self) -> str | None:
        """What the critic begins as: a name, or None where the algorithm has none."""
        if self.settings.algorithm != "ppo":
            return None
        named = self.settings.critic or str([*self.reward_folders, self.name][0])
        other, _ = load_tokenizer(named)
        if other.get_vocab() != self.tokenizer.get_vocab():
            raise InputError(
                "ppo", "critic", got=f"{shown(named)}, whose tokenizer is not the policy's",
                expected=f"one with the tokens of {shown(self.name)}, since it reads the same ids",
            )  # fmt: skip
        return named

    def _ptx(self) -> list[TokenRow]:
        if not self.settings.ptx:
            return []
        # Revisions are picked as for `aif sft`.
        kept = {"data": self.settings.ptx, "objective": "response"}
        sft = self.run.settings.sft.model_copy(update=kept)
        return list(self.tokeniser.dialogues(read_examples(self.run.using(sft=sft)).rows))


def load_critic(name: str, dtype: str, device: str, settings: PPOSettings) -> Any:
    """A model with a value at every token, its head as `critic_head` has it (detail 6)."""
    model = load_reward_model(name, dtype, device, new_head=settings.seed)
    if settings.critic_head == "zero":
        torch.nn.init.zeros_(model.score.weight)
    return model


def made(run: Run, prepared: Prepared) -> PPO:
    """The algorithm with all its models, at its first step."""
    settings = prepared.settings
    place = usable_device(settings.device)
    kind = torch_dtype(settings.dtype, place)
    accelerator = _accelerator(run, settings, place, kind)
    _check_share(settings, accelerator.num_processes)
    transformers.set_seed(settings.seed)
    ensemble = prepared.load_ensemble()
    actor = _actor(run, prepared, prepared.value_scale(ensemble))
    frozen = None if settings.lora else _frozen(prepared, kind)
    ends = ends_of(inner(actor.policy), prepared.tokenizer)
    layout = _layout(actor, prepared, share=_shares_prompts(actor, settings))
    prompts = PromptStream(prepared.learn, settings)
    optimizer = _optimizer(actor, settings)
    scheduler = transformers.get_scheduler(
        SCHEDULES[settings.schedule],
        optimizer,
        num_warmup_steps=math.ceil(settings.warmup_ratio * len(prompts)),
        num_training_steps=len(prompts),
    )
    target = settings.kl_target or math.inf  # without one nothing is adapted
    position = Position(AdaptiveKL(settings.kl_coef, target, settings.kl_horizon))
    wrapped, optimizer = accelerator.prepare(actor, optimizer)
    accelerator.register_for_checkpointing(scheduler, position)
    return PPO(
        settings=settings,
        accelerator=accelerator,
        learner=Learner(
            accelerator, wrapped, optimizer, layout, settings, _ptx_steps(actor, prepared)
        ),
        reference=Reference(actor, frozen),
        rollouts=_rollouts(prepared, kind, actor.temperature, ends),
        rewards=prepared.rewards(ensemble),
        prompts=prompts,
        layout=layout,
        tokenizer=prepared.tokenizer,
        scheduler=scheduler,
        position=position,
    )


def _accelerator(
    run: Run, settings: PPOSettings, place: torch.device, kind: torch.dtype
) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier stage's, as Trainer does
    accelerator = Accelerator(
        mixed_precision="bf16" if kind == torch.bfloat16 else "no",
        cpu=place.type == "cpu",
        log_with=settings.trackers or None,
        project_dir=str(run.path),
        step_scheduler_with_optimizer=False,
    )
    if settings.trackers:
        accelerator.init_trackers(run.path.name)
    return accelerator


def _check_share(settings: PPOSettings, world: int) -> None:
    """Whether so many processes can share a step evenly."""
    if settings.batch_size % world:
        raise _wrong("batch_size", settings.batch_size, f"a multiple of {world}, the processes")
    if world > 1 and settings.rollouts == "vllm":
        raise _wrong("rollouts", "vllm", "transformers: the processes are several")


def _frozen(prepared: Prepared, kind: torch.dtype) -> Any:
    return freeze(load_model(prepared.name, "float32", prepared.settings.device), kind)


def _rollouts(
    prepared: Prepared, kind: torch.dtype, temperature: float, ends: set[int]
) -> Rollouts:
    dtype, settings = str(kind).removeprefix("torch."), prepared.settings
    sampling = {"max_tokens": prepared.room, "temperature": temperature, "ends": ends}
    if settings.rollouts == "vllm":
        context = prepared.tokeniser.max_tokens
        return VLLMRollouts(
            prepared.name, dtype=dtype, context=context, memory=settings.vllm_memory, **sampling
        )
    model = load_model(prepared.name, dtype, settings.device)
    return TransformersRollouts(model, pad_id=prepared.tokenizer.pad_token_id, **sampling)


def _actor(run: Run, prepared: Prepared, scale: tuple[float, float]) -> ActorCritic:
    settings = prepared.settings
    policy = load_for_training(prepared.name, settings)
    critic = None
    if prepared.critic is not None:
        critic = load_for_training(
            prepared.critic, settings, lambda *place: load_critic(*place, settings)
        )
        inner(critic).config.pad_token_id = prepared.tokenizer.pad_token_id
    actor = ActorCritic(policy, critic, temperature(run), *scale)
    without_dropout(actor)  # detail 1; that of adapters too
    return actor


def _optimizer(actor: ActorCritic, settings: PPOSettings) -> torch.optim.Optimizer:
    """Adam (detail 15); the critic's parameters are a group of their own."""
    rate = learning_rate(settings)
    critic_rate = settings.critic_learning_rate
    rates = {"policy": rate, "critic": rate if critic_rate is None else critic_rate}
    groups = [
        {"params": [w for w in part.parameters() if w.requires_grad], "lr": rates[name]}
        for name, part in (("policy", actor.policy), ("critic", actor.critic))
        if part is not None
    ]
    return torch.optim.AdamW(
        groups,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _shares_prompts(actor: ActorCritic, settings: PPOSettings) -> bool:
    parts = [part for part in (actor.policy, actor.critic) if part is not None]
    can = [shares(part, settings.share_prompt, STAGE) for part in parts]
    return all(can) and settings.samples > 1


def _layout(actor: ActorCritic, prepared: Prepared, share: bool) -> Layout:
    most, call = micro_batch(actor.policy, prepared.settings)
    options = (most, False, prepared.tokenizer.pad_token_id, call)
    if not share:
        return Layout(*options)
    # Products are about 24 hidden^2 operations a token, attention 4 hidden a pair of tokens.
    hidden = inner(actor.policy).config.get_text_config().hidden_size
    return SharingLayout(*options, attention_tokens=6 * hidden)


def _ptx_steps(actor: ActorCritic, prepared: Prepared) -> Steps | None:
    settings = prepared.settings
    if not prepared.ptx:
        return None
    layout = _layout(actor, prepared, share=False)
    rows = max(1, settings.batch_size * settings.samples // settings.minibatches)
    return Steps(
        prepared.ptx, settings.ptx, layout, batch_size=rows, epochs=1.0, max_steps=None,
        seed=settings.seed,
    )  # fmt: skip


def memory_line(algorithm: PPO) -> str:
    """What weights, gradients and Adam take on the device, against what it has."""
    device = algorithm.accelerator.device
    models = [algorithm.learner.model, algorithm.reference.frozen, *algorithm.rollouts.models]
    models += algorithm.rewards.models
    weights = [w for model in models if model is not None for w in model.parameters()]
    learned = sum(w.numel() * w.element_size() for w in weights if w.requires_grad)
    held = sum(w.numel() * w.element_size() for w in weights)
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = held + 3 * learned  # a gradient and Adam's two moments
    return (
        f"ppo: {need / 1e9:.1f} GB for weights, gradients and Adam of {total / 1e9:.0f} GB on "
        f"{device}; activations come on top, less of them with a smaller ppo.micro_tokens"
    )


def _wrong(key: str, got: Any, expected: str) -> InputError:
    return InputError("ppo", key, got=shown(got), expected=expected)
