"""Builds PPO from settings, prompts, rewards and models. The cheap checks come first.

name = check_settings(run)
inputs = Inputs(run, name, sources)     # all but models
ppo = build(inputs, run.path)           # with models, at step 0
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
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
from aif.train.ppo.loop import PPO, TrainState
from aif.train.ppo.maths import AdaptiveKL
from aif.train.ppo.prompts import PromptStream, split_prompts, training_prompts
from aif.train.ppo.rewards import (
    ModelReward,
    RewardFunction,
    WeightedRewards,
    called_on_main_process,
    load_reward,
)
from aif.train.ppo.rollouts import Rollouts, TransformersRollouts
from aif.train.ppo.update import Learner
from aif.train.ppo.vllm_rollouts import VLLMRollouts
from aif.train.prefix_groups import SharingLayout
from aif.train.prefix_mask import shares
from aif.train.resume import SCHEDULES, digest_of, start_model
from aif.train.reward.model import Ensemble, RewardModel, member_folders
from aif.train.tokens import Tokeniser, TokenRow, token_digest

STAGE = "ppo"


def check_settings(run: Run) -> str:
    """The model to start from. Raises InputError for settings that do not go together."""
    settings = run.settings.ppo
    if settings.algorithm == "rloo" and settings.samples < 2:
        raise _wrong("samples", settings.samples, "2 or more for rloo: the others are its baseline")
    if not settings.reward:
        raise _wrong("reward", settings.reward, "model, judge or MODULE:FUNCTION with a weight")
    if (settings.load_best or settings.stop_when_gold_falls) and not settings.gold:
        raise _wrong("gold", None, "judge or MODULE:FUNCTION, to know which step is best")
    installed = [tracker.value for tracker in get_available_trackers()]
    for tracker in settings.trackers:
        if tracker not in installed:
            expected = f"one that is installed: {', '.join(installed) or 'none'}"
            raise _wrong("trackers", tracker, expected)
    if _temperature(run) <= 0:
        raise _wrong("temperature", 0, "more than 0: a policy has to explore")
    return start_model(run, settings.model)


def _temperature(run: Run) -> float:
    own = run.settings.ppo.temperature
    return run.settings.policy.temperature if own is None else own


class Inputs:
    """All inputs of PPO but the models. Raises InputError or AifError for a wrong name, file or
    setting."""

    def __init__(self, run: Run, name: str, sources: Mapping[str, RewardFunction]):
        policy, settings = run.settings.policy, run.settings.ppo
        self.name, self.settings, self.reward_settings = name, settings, run.settings.reward
        self.temperature = _temperature(run)  # of sampling, and of every log-probability
        self.response_tokens = settings.response_tokens or policy.response_tokens
        self.tokenizer, context = load_tokenizer(name)
        limit = min(settings.max_tokens, context)
        self.tokeniser = Tokeniser(self.tokenizer, limit, chat=policy.form != "text")
        self.train, self.held_out = split_prompts(
            training_prompts(run), self.tokeniser, settings, self.response_tokens
        )
        self.ptx = self._ptx_rows(run) if settings.ptx else []
        sources = {name: called_on_main_process(source) for name, source in sources.items()}
        self.gold_reward = load_reward(settings.gold, "gold", sources) if settings.gold else None
        self.functions = {
            spec: load_reward(spec, "reward", sources)
            for spec in settings.reward
            if spec != "model"
        }
        self.reward_folders: list[Path] = []
        if "model" in settings.reward:
            named = settings.reward_model
            self.reward_folders = [Path(named)] if named else member_folders(run)
        self.critic = self._critic_name() if settings.algorithm == "ppo" else None

    def digest(self) -> str:
        """The digest of all that the final weights depend on."""
        models = [model_identity(str(folder)) for folder in self.reward_folders]
        functions = [*self.functions.values(), self.gold_reward]
        others = [getattr(function, "identity", None) for function in functions]
        reward = self.reward_settings
        scored = (reward.combine, reward.max_tokens) if models else None
        critic = model_identity(self.critic) if self.critic else None
        prompts = [(prompt.id, prompt.ids_T.tolist()) for prompt in self.train]
        return digest_of(
            STAGE, self.settings, self.name,
            content_id(
                prompts, self.response_tokens, self.temperature, models, scored, others, critic
            ),
            content_id([prompt.id for prompt in self.held_out]), token_digest(self.ptx),
        )  # fmt: skip

    def _critic_name(self) -> str:
        """The model that the critic starts from."""
        name = self.settings.critic or str([*self.reward_folders, self.name][0])
        tokenizer, _ = load_tokenizer(name)
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise InputError(
                "ppo", "critic", got=f"{shown(name)}, whose tokenizer is not the policy's",
                expected=f"one with the tokens of {shown(self.name)}, since it reads the same ids",
            )  # fmt: skip
        return name

    def _ptx_rows(self, run: Run) -> list[TokenRow]:
        # Revisions are chosen as for `aif sft`.
        changes = {"data": self.settings.ptx, "objective": "response"}
        sft = run.settings.sft.model_copy(update=changes)
        return list(self.tokeniser.dialogues(read_examples(run.using(sft=sft)).rows))


def build(inputs: Inputs, project_dir: Path) -> PPO:
    """PPO with all its models, at step 0; trackers write below `project_dir`."""
    settings = inputs.settings
    dtype = torch_dtype(settings.dtype, usable_device(settings.device))
    accelerator = _accelerator(settings, dtype, project_dir)
    transformers.set_seed(settings.seed)
    ensemble = _ensemble(inputs, dtype)
    actor = _actor(inputs, ensemble)
    frozen = None
    if not settings.lora:  # adapters that are off make the policy its own reference
        frozen = freeze(load_model(inputs.name, "float32", settings.device), dtype)
    layout = _layout(actor, inputs, share=settings.samples > 1)
    prompts = PromptStream(inputs.train, settings)
    optimizer = _optimizer(actor, settings)
    scheduler = transformers.get_scheduler(
        SCHEDULES[settings.schedule],
        optimizer,
        num_warmup_steps=math.ceil(settings.warmup_ratio * len(prompts)),
        num_training_steps=len(prompts),
    )
    target = settings.kl_target or math.inf  # without a target the coefficient stays
    state = TrainState(AdaptiveKL(settings.kl_coef, target, settings.kl_horizon))
    wrapped, optimizer = accelerator.prepare(actor, optimizer)
    accelerator.register_for_checkpointing(scheduler, state)
    ptx = _ptx_steps(actor, inputs) if inputs.ptx else None
    return PPO(
        settings=settings,
        accelerator=accelerator,
        learner=Learner(accelerator, wrapped, optimizer, layout, settings, ptx),
        reference=Reference(actor, frozen),
        rollouts=_rollouts(inputs, dtype, ends_of(inner(actor.policy), inputs.tokenizer)),
        score=_score(inputs, ensemble),
        prompts=prompts,
        layout=layout,
        tokenizer=inputs.tokenizer,
        scheduler=scheduler,
        state=state,
    )


def _accelerator(settings: PPOSettings, dtype: torch.dtype, project_dir: Path) -> Accelerator:
    # Forget an earlier stage's state, as transformers' Trainer does.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        cpu=usable_device(settings.device).type == "cpu",
        log_with=settings.trackers or None,
        project_dir=str(project_dir),
        step_scheduler_with_optimizer=False,
    )
    world = accelerator.num_processes
    if settings.trackers:
        accelerator.init_trackers(project_dir.name)
    if settings.batch_size % world:
        raise _wrong("batch_size", settings.batch_size, f"a multiple of {world}, the processes")
    if world > 1 and settings.rollouts == "vllm":
        raise _wrong("rollouts", "vllm", "transformers: the processes are several")
    return accelerator


def _ensemble(inputs: Inputs, dtype: torch.dtype) -> Ensemble | None:
    """The frozen reward models on PPO's device."""
    settings = inputs.settings
    place = {"device": settings.device, "dtype": settings.dtype}
    reward = inputs.reward_settings.model_copy(update=place)
    chat = inputs.tokeniser.chat
    members = [RewardModel.load(folder, reward, chat) for folder in inputs.reward_folders]
    for member in members:
        freeze(member.model, dtype)
    return Ensemble(members, reward.combine) if members else None


def _score(inputs: Inputs, ensemble: Ensemble | None) -> WeightedRewards:
    rewards = dict(inputs.functions)
    if ensemble is not None:
        rewards["model"] = ModelReward(ensemble, inputs.settings.normalise)
    return WeightedRewards({name: (rewards[name], w) for name, w in inputs.settings.reward.items()})


def _actor(inputs: Inputs, ensemble: Ensemble | None) -> ActorCritic:
    settings, critic = inputs.settings, None
    policy = load_for_training(inputs.name, settings)
    if inputs.critic is not None:
        critic = load_for_training(inputs.critic, settings, partial(load_critic, settings=settings))
        inner(critic).config.pad_token_id = inputs.tokenizer.pad_token_id
    actor = ActorCritic(policy, critic, inputs.temperature, *_value_scale(inputs, ensemble))
    without_dropout(actor)  # detail 1; of the adapters too
    return actor


def load_critic(name: str, dtype: str, device: str, settings: PPOSettings) -> Any:
    """A model with a value at every token; `critic_head` decides its head (detail 6)."""
    model = load_reward_model(name, dtype, device, new_head=settings.seed)
    if settings.critic_head == "zero":
        torch.nn.init.zeros_(model.score.weight)
    return model


def _value_scale(inputs: Inputs, ensemble: Ensemble | None) -> tuple[float, float]:
    """(shift, scale) for a critic that starts as the reward model: its values are then on the scale
    of the rewards (detail 6)."""
    settings = inputs.settings
    is_reward_model = ensemble is not None and inputs.critic == str(inputs.reward_folders[0])
    if not is_reward_model or settings.critic_head == "zero":
        return 0.0, 1.0
    weight, first = settings.reward["model"], ensemble.members[0]
    normalised = settings.normalise or len(ensemble.members) > 1
    return (first.mean, weight / first.std) if normalised else (0.0, weight)


def _rollouts(inputs: Inputs, dtype: torch.dtype, ends: set[int]) -> Rollouts:
    name, settings = str(dtype).removeprefix("torch."), inputs.settings
    sampling = {
        "max_tokens": inputs.response_tokens, "temperature": inputs.temperature, "ends": ends
    }  # fmt: skip
    if settings.rollouts == "vllm":
        context = inputs.tokeniser.max_tokens
        return VLLMRollouts(
            inputs.name, dtype=name, context=context, memory=settings.vllm_memory, **sampling
        )
    model = load_model(inputs.name, name, settings.device)
    return TransformersRollouts(model, pad_id=inputs.tokenizer.pad_token_id, **sampling)


def _optimizer(actor: ActorCritic, settings: PPOSettings) -> torch.optim.Optimizer:
    """Adam (detail 15) with a group of parameters for the policy and one for the critic."""
    rate, critic_rate = learning_rate(settings), settings.critic_learning_rate
    rates = [(actor.policy, rate), (actor.critic, rate if critic_rate is None else critic_rate)]
    groups = [
        {"params": [w for w in part.parameters() if w.requires_grad], "lr": lr}
        for part, lr in rates
        if part is not None
    ]
    return torch.optim.AdamW(
        groups,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _layout(actor: ActorCritic, inputs: Inputs, share: bool) -> Layout:
    """`share`: run a prompt once for all its responses, if the models can."""
    micro_tokens, call_tokens = micro_batch(actor.policy, inputs.settings)
    options = (micro_tokens, False, inputs.tokenizer.pad_token_id, call_tokens)
    parts = [part for part in (actor.policy, actor.critic) if part is not None]
    share_prompt = inputs.settings.share_prompt
    if not all(shares(part, share_prompt, STAGE) for part in parts) or not share:
        return Layout(*options)
    # Products are about 24 hidden^2 operations a token, attention 4 hidden a pair of tokens.
    hidden = inner(actor.policy).config.get_text_config().hidden_size
    return SharingLayout(*options, attention_tokens=6 * hidden)


def _ptx_steps(actor: ActorCritic, inputs: Inputs) -> Steps:
    settings = inputs.settings
    rows = max(1, settings.batch_size * settings.samples // settings.minibatches)
    return Steps(
        inputs.ptx, settings.ptx, _layout(actor, inputs, share=False), batch_size=rows, epochs=1.0,
        max_steps=None, seed=settings.seed,
    )  # fmt: skip


def memory_line(ppo: PPO) -> str:
    """The memory for weights, gradients and Adam, and the memory of the device."""
    device = ppo.accelerator.device
    models = [ppo.learner.model, ppo.reference.frozen, *ppo.rollouts.models, *ppo.score.models]
    weights = [w for model in models if model is not None for w in model.parameters()]
    learned = sum(w.numel() * w.element_size() for w in weights if w.requires_grad)
    need = sum(w.numel() * w.element_size() for w in weights)
    need += 3 * learned  # a gradient and Adam's two moments
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"ppo: {need / 1e9:.1f} GB of {total / 1e9:.0f} GB on {device} for weights, gradients and "
        "Adam; activations need more, and less of it with a smaller ppo.micro_tokens"
    )


def _wrong(key: str, got: Any, expected: str) -> InputError:
    got = "nothing" if got is None else shown(got)
    return InputError("ppo", key, got=got, expected=expected)
