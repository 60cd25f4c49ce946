"""What a step learns from, against a reading row by row and sums written out."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

from dataclasses import replace
from itertools import chain, permutations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import numpy as np

from aif.config.settings import PPOSettings
from aif.models.decode import SampledTokens
from aif.train.batch import Layout
from aif.train.ppo import experience as experience_module
from aif.train.ppo.actor_critic import ActorCritic, Reference
from aif.train.ppo.experience import (
    Experience,
    ModelOutputs,
    compute_logprobs,
    micro_batches,
    response_mask,
    tokens_of,
)
from aif.train.ppo.maths import gae, kl_estimate, leave_one_out, moments_of, whiten
from aif.train.tokens import TokenRow
from tests.support.ppo import T, experience_of, outputs_alone, response_row, tiny_actor
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")
SHAPES = [(3, 4), (9, 1), (1, 7), (5, 2), (2, 7), (6, 3), (4, 1)]  # tokens of prompt and response
NAMES = ("logprobs_BT", "ref_logprobs_BT", "entropy_BT", "values_BT")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def frozen():
    """A reference that is not the policy."""
    model = tiny_model(vocab_size=64, initializer_range=0.3).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.2)
    return model


def row(prompt: int, response: int, seed: int = 0) -> TokenRow:
    draw = np.random.default_rng([seed, prompt, response])
    ids = draw.integers(3, 64, response)
    return response_row(draw.integers(3, 64, prompt), ids)


def rows() -> list[TokenRow]:
    return [row(*shape) for shape in SHAPES]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro_tokens", [1, 16, 25, 10_000])
def test_outputs_stand_at_their_row_and_column_however_they_lay_in_memory(micro_tokens, packing):
    model, other = tiny_actor().train(), frozen()
    layout = Layout(micro_tokens, packing, pad_id=5, call_tokens=1)
    outputs = compute_logprobs(rows(), model, Reference(model, other), layout, CPU)
    model.eval()
    with torch.no_grad():
        for n, (tokens, (_, length)) in enumerate(zip(rows(), SHAPES, strict=True)):
            own = outputs_alone(model, tokens)
            want = {"logprobs_BT": own.logprobs_N, "entropy_BT": own.entropy_N}
            want["values_BT"] = own.values_N
            want["ref_logprobs_BT"] = outputs_alone(ActorCritic(other, None, T), tokens).logprobs_N
            assert set(want) == set(vars(outputs))
            for name, values in want.items():
                output_BT = getattr(outputs, name)
                torch.testing.assert_close(output_BT[n, :length], values, **CLOSE)
                assert (output_BT[n, length:] == 0).all()
                assert output_BT.shape == (len(SHAPES), 7)


def test_those_layouts_do_split_and_permute_the_rows():
    for micro_tokens, batches in ((1, 7), (16, 4), (25, 3), (10_000, 1)):
        layout = Layout(micro_tokens, False, pad_id=5, call_tokens=1 if micro_tokens < 99 else 64)
        numbers = [some for some, _ in micro_batches(rows(), layout)]
        assert len(numbers) >= batches
        order = list(chain(*numbers))
        assert sorted(order) == list(range(7)) != order


def test_without_a_critic_there_are_no_values():
    model = tiny_actor(critic=False).train()
    reference = Reference(model, frozen())
    outputs = compute_logprobs(rows(), model, reference, Layout(20, False, 5), CPU)
    assert outputs.values_BT is None
    others = [values_BT for name, values_BT in vars(outputs).items() if name != "values_BT"]
    assert all(values_BT.abs().sum() > 0 for values_BT in others)


def test_without_its_adapters_the_policy_is_its_own_reference():
    model = tiny_actor(lora=True).train()
    outputs = compute_logprobs(rows(), model, Reference(model), Layout(20, False, 5), CPU)
    model.eval()
    with torch.no_grad(), model.policy.disable_adapter():
        for n, tokens in enumerate(rows()):
            want = outputs_alone(model, tokens).logprobs_N
            torch.testing.assert_close(outputs.ref_logprobs_BT[n, : len(want)], want, **CLOSE)
    assert (outputs.ref_logprobs_BT - outputs.logprobs_BT).abs().max() > 0.1


# --- rewards and advantages


PROMPTS = ["b", "a", "b", "c", "a", "b", "a"]


def outputs_of(seed: int = 0) -> ModelOutputs:
    """Normal numbers, zero at padding."""
    mask_BT = response_mask(rows())
    draw = torch.Generator().manual_seed(seed)
    return ModelOutputs(
        **{name: torch.randn(mask_BT.shape, generator=draw) * mask_BT for name in NAMES}
    )


def scores(seed: int = 1) -> torch.Tensor:
    return 2 * torch.randn(len(SHAPES), generator=torch.Generator().manual_seed(seed)) + 3


def step(algorithm: str = "ppo", kl_coef: float = 0.3, **more) -> Experience:
    outputs = outputs_of()
    if algorithm != "ppo":
        outputs = replace(outputs, values_BT=None)
    settings = PPOSettings(algorithm=algorithm, gamma=0.9, lam=0.8, **more)
    return experience_of(rows(), PROMPTS, scores(), outputs, settings, kl_coef)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_each_token_pays_for_its_kl_and_the_last_one_earns_the_score(kind):
    experience, outputs = step(kl_estimator=kind), outputs_of()
    for n, (_, length) in enumerate(SHAPES):
        for t in range(experience.response_mask_BT.shape[1]):
            kl = float(kl_estimate(outputs.logprobs_BT[n, t], outputs.ref_logprobs_BT[n, t], kind))
            want = -0.3 * kl if t < length else 0.0
            want += float(scores()[n]) if t == length - 1 else 0.0
            assert float(experience.rewards_BT[n, t]) == pytest.approx(want, abs=1e-6)


def test_the_kl_of_a_response_is_the_sum_of_its_log_ratios():
    experience, outputs = step(), outputs_of()
    for n, (_, length) in enumerate(SHAPES):
        want = sum(float(outputs.logprobs_BT[n, t] - outputs.ref_logprobs_BT[n, t])
                   for t in range(length))  # fmt: skip
        assert float(experience.kl_B[n]) == pytest.approx(want, abs=1e-5)
    torch.testing.assert_close(experience.rewards_BT.sum(1), scores() - 0.3 * experience.kl_B)


def test_ppo_has_whitened_advantages_and_returns_of_unwhitened_ones():
    experience, outputs = step(), outputs_of()
    advantages, returns = gae(
        experience.rewards_BT, outputs.values_BT, experience.response_mask_BT, 0.9, 0.8
    )
    torch.testing.assert_close(
        experience.advantages_BT, whiten(advantages, experience.response_mask_BT)
    )
    torch.testing.assert_close(experience.returns_BT, returns)
    for name in NAMES:
        assert torch.equal(getattr(experience, name), getattr(outputs, name))


def test_a_small_case_of_ppo_by_hand():
    outputs = ModelOutputs(
        logprobs_BT=torch.tensor([[-1.0, 0.0], [-2.0, -3.0]]),
        ref_logprobs_BT=torch.tensor([[-2.0, 0.0], [-1.0, -5.0]]),
        values_BT=torch.tensor([[0.5, 0.0], [1.0, 2.0]]),
        entropy_BT=torch.ones(2, 2),
    )
    settings = PPOSettings(gamma=0.5, lam=0.5)
    scores_B = torch.tensor([3.0, -1.0])
    experience = experience_of([row(2, 1), row(2, 2)], ["a", "b"], scores_B, outputs, settings)
    rewards_BT = [[pytest.approx(2.9), 0], pytest.approx([0.1, -1.2])]
    assert experience.rewards_BT.tolist() == rewards_BT
    # deltas: 2.9 - 0.5; then -1.2 - 2.0, and 0.1 + 0.5 * 2.0 - 1.0 with a quarter of that
    advantages = torch.tensor([2.4, 0.1 - 0.25 * 3.2, -3.2])
    want = (advantages - advantages.mean()) / advantages.std()
    mask_BT = experience.response_mask_BT
    torch.testing.assert_close(experience.advantages_BT[mask_BT], want)
    assert experience.returns_BT[mask_BT].tolist() == pytest.approx([2.9, 0.3, -1.2])
    assert experience.advantages_BT[0, 1] == experience.returns_BT[0, 1] == 0


@pytest.mark.parametrize("order", list(permutations(range(7)))[::1000])
def test_rloo_gives_all_tokens_their_response_less_the_others_of_its_prompt(order):
    outputs, places = replace(outputs_of(), values_BT=None), list(order)
    experience = experience_of(
        [rows()[n] for n in places], [PROMPTS[n] for n in places], scores()[places],
        ModelOutputs(**{k: v if v is None else v[places] for k, v in vars(outputs).items()}),
        PPOSettings(algorithm="rloo", samples=2), 0.3,
    )  # fmt: skip
    worth = scores() - 0.3 * outputs.kl_B
    for place, n in enumerate(places):
        others = [float(worth[m]) for m in range(7) if m != n and PROMPTS[m] == PROMPTS[n]]
        want = float(worth[n]) - sum(others) / len(others) if others else 0.0
        length = SHAPES[n][1]
        got = experience.advantages_BT[place].tolist()
        assert got == pytest.approx([want] * length + [0] * (7 - length), abs=1e-5)
    assert experience.values_BT is None
    assert experience.returns_BT is None


def test_reinforce_gives_all_tokens_the_reward_of_their_response():
    experience = step("reinforce")
    worth = scores() - 0.3 * experience.kl_B
    torch.testing.assert_close(
        experience.advantages_BT, worth[:, None] * experience.response_mask_BT
    )
    assert experience.returns_BT is None


def test_whitened_rewards_have_deviation_1_and_the_mean_that_they_had():
    plain, experience = step(), step(whiten_rewards=True)
    before, after = (x.rewards_BT[x.response_mask_BT] for x in (plain, experience))
    torch.testing.assert_close(after.mean(), before.mean())
    assert float(before.std()) != pytest.approx(1, abs=0.1)
    assert float(after.std()) == pytest.approx(1, abs=1e-5)
    assert (experience.rewards_BT[~experience.response_mask_BT] == 0).all()
    _, returns = gae(
        experience.rewards_BT, experience.values_BT, experience.response_mask_BT, 0.9, 0.8
    )
    torch.testing.assert_close(experience.returns_BT, returns)
    rloo = step("rloo", samples=2, whiten_rewards=True)
    group_B = torch.tensor([ord(prompt) for prompt in PROMPTS])
    want = leave_one_out(rloo.rewards_BT.sum(1), group_B)
    torch.testing.assert_close(rloo.advantages_BT, want[:, None] * rloo.response_mask_BT)


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_moments_are_of_all_processes(whiten_rewards, monkeypatch):
    """A second process with the same responses counts as the same responses twice."""
    settings = PPOSettings(gamma=0.9, lam=0.8, whiten_rewards=whiten_rewards)
    twice = ModelOutputs(**{k: v.repeat(2, 1) for k, v in vars(outputs_of()).items()})
    two = experience_of(rows() * 2, PROMPTS * 2, scores().repeat(2), twice, settings, 0.3)
    by_itself = step(whiten_rewards=whiten_rewards)
    reduced = []

    def both(moments: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        reduced.append(moments)
        return 2 * moments

    monkeypatch.setattr(experience_module, "reduce", both)
    one = step(whiten_rewards=whiten_rewards)
    for name in ("rewards_BT", "advantages_BT", "returns_BT"):
        got, want = getattr(one, name), getattr(two, name)
        torch.testing.assert_close(torch.cat([got, got]), want)
    assert len(reduced) == 1 + whiten_rewards
    assert not torch.equal(by_itself.advantages_BT, one.advantages_BT)
    mine = gae(one.rewards_BT, one.values_BT, one.response_mask_BT, 0.9, 0.8)[0]
    torch.testing.assert_close(reduced[-1], moments_of(mine, one.response_mask_BT))


def test_a_response_is_all_that_is_learned_of_a_row():
    tokens = tokens_of(np.array([7, 8, 9]), SampledTokens((4, 2), True))
    assert tokens.ids_T.tolist() == [7, 8, 9, 4, 2]
    assert tokens.ids_T.dtype == np.int32
    assert tokens.loss_mask_T.tolist() == [False] * 3 + [True] * 2
    assert response_mask([tokens, row(4, 3)]).tolist() == [[True, True, False], [True] * 3]
