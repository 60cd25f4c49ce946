"""What policy, critic and reference say of responses, against transformers' own models.

The oracle is a model's own forward, given one row at a time without any padding, and for the critic
one prefix at a time.
"""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

import numpy as np
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from aif.train import logprobs
from aif.train.batch import Layout
from aif.train.ppo.actor_critic import ActorCritic, Reference, freeze, merged_weights
from aif.train.ppo.experience import micro_batches
from aif.train.ppo.rollouts import TransformersRollouts
from aif.train.tokens import TokenRow
from tests.support.ppo import outputs_alone
from tests.support.tiny import tiny_model

VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": None,
}  # fmt: skip
KINDS = {
    "llama": lambda: tiny_model(**SHAPE, attention_dropout=0.0),
    "untied": lambda: tiny_model(**SHAPE, attention_dropout=0.0, tie_word_embeddings=False),
    "biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager")
    ),
    "scale": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
}
PLAIN = ["llama", "untied", "biases"]  # the logits are the head and no more
SHIFT, SCALE = 0.4, 1.7
WHOLE = Layout(10_000, packing=False, pad_id=0)


def policy_of(kind: str = "llama"):
    """A random one whose logits are far from even, so that what is seen matters."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    return model


def critic_of():
    torch.manual_seed(1)
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)).eval()


def adapted(model, task: str = "CAUSAL_LM", targets="all-linear", moved: bool = True):
    """`model` with adapters, that have learned something where they are `moved`."""
    torch.manual_seed(2)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type=task)
    model = peft.get_peft_model(model, config).eval()
    for name, weight in model.named_parameters():
        if moved and ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def rows(n: int = 6) -> list[TokenRow]:
    """Of many lengths in no order; a third of each, or its last token, is a response."""
    draw = np.random.default_rng(0)
    return [
        TokenRow(
            draw.integers(0, VOCAB, length).astype(np.int32),
            np.arange(length) >= min(length - 1, 1 + length // 2),
            "s",
        )
        for length in draw.permutation(np.linspace(2, 19, n).astype(int))
    ]


def inputs(some: list[TokenRow], layout: Layout = WHOLE):
    """All rows as one batch, in their order."""
    return layout.batch(some).inputs(torch.device("cpu"))


def outputs_of(actor: ActorCritic, every: list[TokenRow], layout: Layout) -> list[list]:
    """The same of all rows by `ActorCritic`, in the rows' order, as PPO asks for them."""
    parts: list = [None] * len(every)
    for numbers, batch in micro_batches(every, layout):
        lengths = [int(every[n].loss_mask_T.sum()) for n in numbers]
        split = [x.split(lengths) for x in actor(**batch.inputs(torch.device("cpu")), entropy=True)]
        for n, *part in zip(numbers, *split, strict=True):
            parts[n] = part
    return parts


def with_gradients(actor: ActorCritic, parts) -> tuple[list, list]:
    """(each row's three vectors in a row, gradients of a sum that weighs every number anew)."""
    actor.zero_grad()
    vectors = [vector for part in parts for vector in part]
    weights = torch.Generator().manual_seed(3)
    sum(torch.randn(len(x), generator=weights) @ x for x in vectors).backward()
    learning = [w for w in actor.parameters() if w.requires_grad]
    return [x.detach() for x in vectors], [w.grad.clone() for w in learning]


def close(got: tuple[list, list], want: tuple[list, list]) -> None:
    for ours, theirs in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got[1], want[1], strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_models_themselves(kind, temperature):
    actor = ActorCritic(policy_of(kind), critic_of(), temperature, SHIFT, SCALE)
    assert actor.head_is_all == (kind in PLAIN)
    every = rows()
    want = with_gradients(actor, [outputs_alone(actor, row) for row in every])
    close(with_gradients(actor, outputs_of(actor, every, WHOLE)), want)


def test_adapters_of_policy_and_critic_are_used_and_learn():
    critic = adapted(critic_of(), "SEQ_CLS")
    actor = ActorCritic(adapted(policy_of()), critic, 0.7, SHIFT, SCALE)
    every = rows()
    want = with_gradients(actor, [outputs_alone(actor, row) for row in every])
    close(with_gradients(actor, outputs_of(actor, every, WHOLE)), want)


LAYOUTS = {
    "padded": WHOLE,
    "another pad": Layout(10_000, packing=False, pad_id=VOCAB - 1),
    "one by one": Layout(1, packing=False, pad_id=0),
    "micro-batches": Layout(40, packing=False, pad_id=0, call_tokens=1),
    "packed": Layout(10_000, packing=True, pad_id=0),
}


@pytest.mark.parametrize("chunk", [1, 4, 10_000], ids="chunks of {}".format)
@pytest.mark.parametrize("kind", ["llama", "soft cap"])
def test_neither_neighbours_nor_chunks_change_values_or_gradients(kind, chunk, monkeypatch):
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * VOCAB * chunk)
    actor, every = ActorCritic(policy_of(kind), critic_of(), 0.7, SHIFT, SCALE), rows()
    want = with_gradients(actor, [outputs_alone(actor, row) for row in every])
    for layout in LAYOUTS.values():
        close(with_gradients(actor, outputs_of(actor, every, layout)), want)


def test_the_head_runs_in_chunks_for_the_tokens_of_responses_alone(monkeypatch):
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * VOCAB * 4)
    actor, every, sizes = ActorCritic(policy_of(), None, 1.0), rows(), []
    actor.policy.lm_head.register_forward_hook(lambda *call: sizes.append(call[2].shape[0]))
    actor(**inputs(every), entropy=True)
    assert max(sizes) == 4
    assert sum(sizes) == sum(row.loss_mask_T.sum() for row in every)


def test_outputs_come_row_by_row_in_the_order_of_the_batch():
    actor, every = ActorCritic(policy_of(), critic_of(), 0.7), rows()
    assert sorted(map(len, every)) != list(map(len, every)) != sorted(map(len, every))[::-1]
    for some in (every, every[::-1]):
        want = zip(*[outputs_alone(actor, row) for row in some], strict=True)
        for ours, theirs in zip(actor(**inputs(some), entropy=True), want, strict=True):
            torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-5, atol=1e-5)


def test_without_a_critic_there_are_no_values_and_no_entropies_by_default():
    logprobs_N, values_N, entropy_N = ActorCritic(policy_of(), None, 1.0)(**inputs(rows()))
    assert values_N is None
    assert entropy_N is None
    both = ActorCritic(policy_of(), critic_of(), 1.0)(**inputs(rows()))
    assert torch.equal(both[0], logprobs_N)
    assert both[1].shape == logprobs_N.shape


@pytest.mark.parametrize("kind", ["llama", "scale"])
def test_texts_give_their_nll_at_temperature_one(kind):
    actor, every = ActorCritic(policy_of(kind), critic_of(), 0.7), rows()
    want = 0
    for row in every:
        ids_1T = torch.tensor(row.ids_T[None].astype(int))
        labels_1T = ids_1T.masked_fill(~torch.tensor(row.loss_mask_T[None]), -100)
        nll = actor.policy(input_ids=ids_1T, labels=labels_1T).loss
        want += nll * int(row.loss_mask_T.sum())
    torch.testing.assert_close(actor(**inputs(every), texts=True), want, rtol=1e-5, atol=1e-5)


def test_a_value_under_autocast_is_not_rounded():
    actor = ActorCritic(policy_of(), critic_of(), 1.0, SHIFT, SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        values_N = actor(**inputs(rows()))[1]
    assert values_N.dtype == torch.float32
    raw_N = values_N / SCALE + SHIFT
    assert ((raw_N - raw_N.bfloat16()).abs() > 1e-5 * raw_N.abs()).float().mean() > 0.9


@torch.no_grad()
def test_the_reference_of_a_policy_with_adapters_is_its_base_to_the_bit():
    batch, actor = inputs(rows()), ActorCritic(adapted(policy_of()), None, 0.7)
    learning = [w.requires_grad for w in actor.parameters()]
    before_N = actor(**batch)[0]
    got_N = Reference(actor).logprobs(**batch)
    assert torch.equal(got_N, ActorCritic(policy_of(), None, 0.7)(**batch)[0])
    assert (before_N - got_N).abs().mean() > 0.1
    assert torch.equal(actor(**batch)[0], before_N), "its adapters were left off"
    assert [w.requires_grad for w in actor.parameters()] == learning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_frozen_policy_says_what_the_policy_says_to_the_bit(kind, dtype):
    batch, actor = inputs(rows()), ActorCritic(policy_of(kind), critic_of(), 0.7)
    reference = Reference(actor, freeze(policy_of(kind), dtype))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        want_N = actor(**batch)[0]
        assert torch.equal(reference.logprobs(**batch), want_N)
    assert torch.equal(reference.logprobs(**batch), want_N), "not without the caller's autocast"
    for weight in actor.policy.parameters():
        weight.mul_(1.1)
    assert torch.equal(reference.logprobs(**batch), want_N)
    assert (actor(**batch)[0] - want_N).abs().mean() > 0.1


@pytest.mark.parametrize("lora", [False, True])
@torch.no_grad()
def test_before_training_there_is_no_kl_in_mixed_precision(lora):
    """As the stage has it: autocast is the accelerator's, around the policy's forward alone."""
    policy, frozen = policy_of(), None
    if lora:
        policy = adapted(policy.bfloat16(), moved=False)
    else:
        frozen = freeze(policy_of(), torch.bfloat16)
    AcceleratorState._reset_state(reset_partial_state=True)
    actor = Accelerator(mixed_precision="bf16", cpu=True).prepare(ActorCritic(policy, None, 0.7))
    AcceleratorState._reset_state(reset_partial_state=True)
    batch = inputs(rows())
    want_N = actor.eval()(**batch)[0]
    assert torch.equal(Reference(actor, frozen).logprobs(**batch), want_N)
    exact_N = ActorCritic(policy_of(), None, 0.7)(**batch)[0]
    assert not torch.allclose(exact_N, want_N, atol=1e-4), "nothing was rounded"


@pytest.mark.parametrize("kind", ["llama", "untied", "biases", "critic"])
def test_freezing_halves_linear_weights_and_nothing_else(kind):
    model = (critic_of() if kind == "critic" else policy_of(kind)).train()
    frozen = freeze(model, torch.bfloat16)
    assert not frozen.training
    linear = {
        f"{name}.weight" for name, module in frozen.named_modules()
        if isinstance(module, torch.nn.Linear)
    } - {"score.weight"}  # fmt: skip
    every = dict(frozen.named_parameters(remove_duplicate=False))
    assert len(linear) == 2 * 7 + (kind != "critic")
    assert {name for name, w in every.items() if w.dtype == torch.bfloat16} == linear
    rest = {w.dtype for name, w in every.items() if name not in linear}
    assert rest == {torch.float32}
    assert not any(w.requires_grad for w in every.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_policys_weights_are_its_parameters(kind):
    model = policy_of(kind)
    got = dict(merged_weights(model))
    assert list(got) == [name for name, _ in model.named_parameters()]
    assert all(got[name] is weight for name, weight in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", "all-linear"),
        ("biases", "all-linear"),
        ("scale", ["q_proj", "down_proj"]),
        ("untied", ["lm_head", "v_proj"]),
    ],
)
def test_adapters_are_merged_as_peft_merges_them(kind, targets, dtype):
    policy = adapted(policy_of(kind).to(dtype), targets=targets)
    before = copy.deepcopy(policy.state_dict())
    got = dict(merged_weights(policy))
    want = dict(copy.deepcopy(policy).merge_and_unload().named_parameters())
    assert list(got) == list(want) == [name for name, _ in policy_of(kind).named_parameters()]
    for name, weight in want.items():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], weight), name
    after = policy.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("kind", ["llama", "untied", "biases", "soft cap"])
@torch.no_grad()
def test_a_sampler_with_these_weights_is_the_policy_with_its_adapters(kind):
    policy, ids_BT = adapted(policy_of(kind)), torch.arange(12).reshape(2, 6)
    rollouts = TransformersRollouts(
        policy_of(kind), max_tokens=4, temperature=1.0, ends=set(), pad_id=0
    )
    want, base = policy(ids_BT).logits, rollouts.model(ids_BT).logits
    assert (want - base).abs().mean() > 0.1
    rollouts.sync(merged_weights(policy))
    torch.testing.assert_close(rollouts.model(ids_BT).logits, want, rtol=1e-4, atol=2e-5)
