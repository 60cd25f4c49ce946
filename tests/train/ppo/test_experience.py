"""What a step learns from, against a reading row by row and sums written out."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import copy
from itertools import chain, permutations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
from transformers import LlamaForSequenceClassification

from aif.config.settings import PPOSettings
from aif.models.decode import SampledTokens
from aif.train.batch import Layout
from aif.train.ppo.actor_critic import ActorCritic, Reference
from aif.train.ppo.experience import (
    Experience,
    experience,
    micro_batches,
    read,
    response_mask,
    tokens_of,
)
from aif.train.ppo.maths import gae, kl_estimate, leave_one_out, moments_of, whiten
from aif.train.tokens import TokenRow
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")
SHAPES = [(3, 4), (9, 1), (1, 7), (5, 2), (2, 7), (6, 3), (4, 1)]  # tokens of prompt and response
T = 0.7
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def actor(critic: bool = True, lora: bool = False) -> ActorCritic:
    """A policy whose distributions are far from even, in training with dropout on."""
    policy = tiny_model(vocab_size=64, initializer_range=0.3)
    scorer = None
    if critic:
        config = copy.deepcopy(policy.config)
        config.num_labels = 1
        scorer = LlamaForSequenceClassification(config)
    if lora:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        policy = peft.get_peft_model(policy, config)
    return ActorCritic(policy, scorer, T, shift=0.3, scale=2.0).train()


def frozen():
    """A reference that is not the policy."""
    model = tiny_model(vocab_size=64, initializer_range=0.3).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.2)
    return model


def row(prompt: int, response: int, seed: int = 0) -> TokenRow:
    draw = np.random.default_rng([seed, prompt, response])
    made = SampledTokens(tuple(draw.integers(3, 64, response).tolist()), True)
    return tokens_of(draw.integers(3, 64, prompt).astype(np.int32), made)


def rows() -> list[TokenRow]:
    return [row(*shape) for shape in SHAPES]


def alone(tokens: TokenRow, policy, temperature: float = T) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, entropies) of a row's response by transformers alone."""
    ids = torch.tensor(tokens.ids_T).long()
    logp_TV = (policy(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
    start = int(tokens.loss_mask_T.argmax())
    places = torch.arange(start, len(ids))
    logp_TV = logp_TV[places - 1]
    return logp_TV[torch.arange(len(places)), ids[places]], -(logp_TV.exp() * logp_TV).sum(-1)


def values_alone(tokens: TokenRow, model: ActorCritic) -> torch.Tensor:
    """The critic's value of the state before each token of the response."""
    start = int(tokens.loss_mask_T.argmax())
    ids = torch.tensor(tokens.ids_T).long()
    ends = [model.critic(input_ids=ids[None, :t]).logits[0, 0] for t in range(start, len(ids))]
    return 2.0 * (torch.stack(ends) - 0.3)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro_tokens", [1, 16, 25, 10_000])
def test_what_is_read_stands_at_its_row_and_column_however_it_lay_in_memory(micro_tokens, packing):
    model, other, asked = actor(), frozen(), rows()
    layout = Layout(micro_tokens, packing, pad_id=5, call_tokens=1)
    found = read(asked, model, Reference(model, other), layout, CPU)
    model.eval()
    with torch.no_grad():
        for n, (tokens, (_, length)) in enumerate(zip(asked, SHAPES, strict=True)):
            logprobs, entropy = alone(tokens, model.policy)
            want = {"logprobs": logprobs, "entropy": entropy}
            want |= {"values": values_alone(tokens, model)}
            want |= {"ref_logprobs": alone(tokens, other)[0]}
            assert set(want) == set(found)
            for name, values in want.items():
                torch.testing.assert_close(found[name][n, :length], values, **CLOSE)
                assert (found[name][n, length:] == 0).all()
                assert found[name].shape == (len(SHAPES), 7)


def test_those_layouts_do_split_and_permute_the_rows():
    for micro_tokens, batches in ((1, 7), (16, 4), (25, 3), (10_000, 1)):
        layout = Layout(micro_tokens, False, pad_id=5, call_tokens=1 if micro_tokens < 99 else 64)
        found = [numbers for numbers, _ in micro_batches(rows(), layout)]
        assert len(found) >= batches
        order = list(chain(*found))
        assert sorted(order) == list(range(7)) != order


def test_without_a_critic_there_are_no_values():
    model = actor(critic=False)
    found = read(rows(), model, Reference(model, frozen()), Layout(20, False, 5), CPU)
    assert found.pop("values") is None
    assert all(values.abs().sum() > 0 for values in found.values())


def test_without_its_adapters_the_policy_is_its_own_reference():
    model = actor(lora=True)
    found = read(rows(), model, Reference(model), Layout(20, False, 5), CPU)
    model.eval()
    with torch.no_grad(), model.policy.disable_adapter():
        for n, tokens in enumerate(rows()):
            want, _ = alone(tokens, model.policy)
            torch.testing.assert_close(found["ref_logprobs"][n, : len(want)], want, **CLOSE)
    assert (found["ref_logprobs"] - found["logprobs"]).abs().max() > 0.1


# --- rewards and advantages


PROMPTS = ["b", "a", "b", "c", "a", "b", "a"]


def told(seed: int = 0, asked: list[TokenRow] | None = None) -> dict[str, torch.Tensor]:
    """As `read` might have found it: normal numbers, zero at padding."""
    mask_BT = response_mask(rows() if asked is None else asked)
    draw = torch.Generator().manual_seed(seed)
    names = ("logprobs", "ref_logprobs", "entropy", "values")
    return {name: torch.randn(mask_BT.shape, generator=draw) * mask_BT for name in names}


def scores(seed: int = 1) -> torch.Tensor:
    return 2 * torch.randn(len(SHAPES), generator=torch.Generator().manual_seed(seed)) + 3


def made(algorithm: str = "ppo", kl_coef: float = 0.3, reduce=lambda x: x, **more) -> Experience:
    found = told()
    if algorithm != "ppo":
        found["values"] = None
    settings = PPOSettings(algorithm=algorithm, gamma=0.9, lam=0.8, **more)
    return experience(rows(), PROMPTS, scores(), found, settings, kl_coef, reduce)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_each_token_pays_for_its_kl_and_the_last_one_earns_the_score(kind):
    found, known = made(kl_estimator=kind), told()
    for n, (_, length) in enumerate(SHAPES):
        for t in range(found.mask_BT.shape[1]):
            kl = float(kl_estimate(known["logprobs"][n, t], known["ref_logprobs"][n, t], kind))
            want = -0.3 * kl if t < length else 0.0
            want += float(scores()[n]) if t == length - 1 else 0.0
            assert float(found.rewards_BT[n, t]) == pytest.approx(want, abs=1e-6)


def test_the_kl_of_a_response_is_the_sum_of_its_log_ratios():
    found, known = made(), told()
    for n, (_, length) in enumerate(SHAPES):
        want = sum(float(known["logprobs"][n, t] - known["ref_logprobs"][n, t])
                   for t in range(length))  # fmt: skip
        assert float(found.kl_B[n]) == pytest.approx(want, abs=1e-5)
    torch.testing.assert_close(found.rewards_BT.sum(1), scores() - 0.3 * found.kl_B)


def test_ppo_has_whitened_advantages_and_returns_of_unwhitened_ones():
    found, known = made(), told()
    advantages, returns = gae(found.rewards_BT, known["values"], found.mask_BT, 0.9, 0.8)
    torch.testing.assert_close(found.advantages_BT, whiten(advantages, found.mask_BT))
    torch.testing.assert_close(found.returns_BT, returns)
    for name in ("logprobs", "ref_logprobs", "entropy", "values"):
        assert getattr(found, f"{name}_BT") is not None
        torch.testing.assert_close(getattr(found, f"{name}_BT"), known[name])


def test_a_small_case_of_ppo_by_hand():
    asked = [row(2, 1), row(2, 2)]
    known = {
        "logprobs": torch.tensor([[-1.0, 0.0], [-2.0, -3.0]]),
        "ref_logprobs": torch.tensor([[-2.0, 0.0], [-1.0, -5.0]]),
        "values": torch.tensor([[0.5, 0.0], [1.0, 2.0]]),
        "entropy": torch.ones(2, 2),
    }
    settings = PPOSettings(gamma=0.5, lam=0.5)
    scores_B = torch.tensor([3.0, -1.0])
    found = experience(asked, ["a", "b"], scores_B, known, settings, 0.1, lambda x: x)
    assert found.rewards_BT.tolist() == [[pytest.approx(2.9), 0], pytest.approx([0.1, -1.2])]
    # deltas: 2.9 - 0.5; then -1.2 - 2.0, and 0.1 + 0.5 * 2.0 - 1.0 with a quarter of that
    advantages = torch.tensor([2.4, 0.1 - 0.25 * 3.2, -3.2])
    want = (advantages - advantages.mean()) / advantages.std()
    torch.testing.assert_close(found.advantages_BT[found.mask_BT], want)
    assert found.returns_BT[found.mask_BT].tolist() == pytest.approx([2.9, 0.3, -1.2])
    assert found.advantages_BT[0, 1] == found.returns_BT[0, 1] == 0


@pytest.mark.parametrize("order", list(permutations(range(7)))[::1000])
def test_rloo_gives_all_tokens_their_response_less_the_others_of_its_prompt(order):
    asked, known = rows(), told()
    known["values"] = None
    places = list(order)
    found = experience(
        [asked[n] for n in places], [PROMPTS[n] for n in places], scores()[places],
        {k: v if v is None else v[places] for k, v in known.items()},
        PPOSettings(algorithm="rloo", samples=2), 0.3, lambda x: x,
    )  # fmt: skip
    worth = scores() - 0.3 * (known["logprobs"] - known["ref_logprobs"]).sum(1)
    for place, n in enumerate(places):
        others = [float(worth[m]) for m in range(7) if m != n and PROMPTS[m] == PROMPTS[n]]
        want = float(worth[n]) - sum(others) / len(others) if others else 0.0
        length = SHAPES[n][1]
        got = found.advantages_BT[place].tolist()
        assert got == pytest.approx([want] * length + [0] * (7 - length), abs=1e-5)
    assert found.values_BT is None
    assert found.returns_BT is None


def test_reinforce_gives_all_tokens_the_reward_of_their_response():
    found = made("reinforce")
    worth = scores() - 0.3 * found.kl_B
    torch.testing.assert_close(found.advantages_BT, worth[:, None] * found.mask_BT)
    assert found.returns_BT is None


def test_whitened_rewards_have_deviation_1_and_the_mean_that_they_had():
    plain, found = made(), made(whiten_rewards=True)
    before, after = (x.rewards_BT[x.mask_BT] for x in (plain, found))
    torch.testing.assert_close(after.mean(), before.mean())
    assert float(before.std()) != pytest.approx(1, abs=0.1)
    assert float(after.std()) == pytest.approx(1, abs=1e-5)
    assert (found.rewards_BT[~found.mask_BT] == 0).all()
    _, returns = gae(found.rewards_BT, found.values_BT, found.mask_BT, 0.9, 0.8)
    torch.testing.assert_close(found.returns_BT, returns)
    rloo = made("rloo", samples=2, whiten_rewards=True)
    group_B = torch.tensor([ord(prompt) for prompt in PROMPTS])
    want = leave_one_out(rloo.rewards_BT.sum(1), group_B)
    torch.testing.assert_close(rloo.advantages_BT, want[:, None] * rloo.mask_BT)


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_moments_are_of_all_processes(whiten_rewards):
    """A second process with the same responses counts as the same responses twice."""
    asked = []

    def both(moments: torch.Tensor) -> torch.Tensor:
        asked.append(moments)
        return 2 * moments

    one = made(reduce=both, whiten_rewards=whiten_rewards)
    settings = PPOSettings(gamma=0.9, lam=0.8, whiten_rewards=whiten_rewards)
    twice = {name: values.repeat(2, 1) for name, values in told().items()}
    two = experience(
        rows() + rows(), PROMPTS * 2, scores().repeat(2), twice, settings, 0.3, lambda x: x
    )
    for name in ("rewards_BT", "advantages_BT", "returns_BT"):
        got, want = getattr(one, name), getattr(two, name)
        torch.testing.assert_close(torch.cat([got, got]), want)
    assert len(asked) == 1 + whiten_rewards
    by_itself = made(whiten_rewards=whiten_rewards)
    assert not torch.equal(by_itself.advantages_BT, one.advantages_BT)
    mine = gae(one.rewards_BT, one.values_BT, one.mask_BT, 0.9, 0.8)[0]
    torch.testing.assert_close(asked[-1], moments_of(mine, one.mask_BT))


def test_a_response_is_all_that_is_learned_of_a_row():
    found = tokens_of(np.array([7, 8, 9]), SampledTokens((4, 2), True))
    assert found.ids_T.tolist() == [7, 8, 9, 4, 2]
    assert found.ids_T.dtype == np.int32
    assert found.loss_mask_T.tolist() == [False] * 3 + [True] * 2
    assert response_mask([found, row(4, 3)]).tolist() == [[True, True, False], [True] * 3]
