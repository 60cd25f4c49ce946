"""PPO's arithmetic against plain loops over real tokens, exact enumeration and closed forms."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import io
import math
import statistics

import pytest

torch = pytest.importorskip("torch")

import numpy as np
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from aif.train.ppo.maths import (
    AdaptiveKL,
    RunningMoments,
    gae,
    kl_estimate,
    leave_one_out,
    moments_of,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)

quick = limits(max_examples=40, deadline=None)
seeds = st.integers(0, 10_000)
discounts = st.sampled_from([0.0, 0.5, 0.95, 1.0])
KINDS = ("k1", "k2", "k3")
CLIP = 0.2


@st.composite
def masks(draw) -> torch.Tensor:
    """[B, T] with gaps anywhere, and a real token in each row."""
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    row = st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))


def drawn(mask: torch.Tensor, seed: int, n: int) -> list[torch.Tensor]:
    """`n` tensors of normal values at real tokens and of nan elsewhere, where nobody may look."""
    source = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, *mask.shape, generator=source, dtype=torch.float64)
    return list(normal.masked_fill(~mask, torch.nan))


def wide(x_BT: torch.Tensor, fill: float | bool) -> torch.Tensor:
    """The same with a new place before and after each token, and a new row."""
    rows, tokens = x_BT.shape
    wider = torch.full((rows + 1, 2 * tokens + 1), fill, dtype=x_BT.dtype)
    wider[:rows, 1::2] = x_BT
    return wider


def narrow(x_BT: torch.Tensor) -> torch.Tensor:
    return x_BT[:-1, 1::2]


def real(mask_T: torch.Tensor) -> list[int]:
    return mask_T.nonzero().flatten().tolist()


def scalar(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def numbers(loss) -> list[float]:
    return [float(value) for value in vars(loss).values()]


# --- whitening


@quick
@given(masks(), seeds, st.booleans())
def test_whitening_is_its_formula_over_real_tokens(mask, seed, shift_mean):
    (values,) = drawn(mask, seed, 1)
    kept = values[mask].tolist()
    mean, variance = statistics.mean(kept), statistics.variance(kept) if len(kept) > 1 else 0.0
    whitened = whiten(values, mask, shift_mean=shift_mean)
    for place in mask.nonzero().tolist():
        want = (float(values[*place]) - mean) / math.sqrt(variance + 1e-8)
        want += 0.0 if shift_mean else mean
        assert float(whitened[*place]) == pytest.approx(want, rel=1e-6, abs=1e-6)
    assert (whitened[~mask] == 0).all()


def test_whitened_values_have_mean_0_and_variance_1_or_keep_their_mean():
    mask = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) < 0.6
    values = 3 * drawn(mask, 0, 1)[0].float() + 1000  # float32 sums of squares would fail here
    for whitened in (whiten(values, mask), whiten(values, mask, shift_mean=False)):
        assert whitened.dtype == torch.float32
        assert float(whitened[mask].double().var()) == pytest.approx(1, rel=1e-3)
        assert (whitened[~mask] == 0).all()
    assert float(whiten(values, mask)[mask].mean()) == pytest.approx(0, abs=1e-4)
    kept = whiten(values, mask, shift_mean=False)[mask]
    assert float(kept.mean()) == pytest.approx(float(values[mask].mean()), rel=1e-6)


@quick
@given(masks(), seeds, st.booleans())
def test_whitening_in_parts_by_summed_moments_is_whitening_the_whole(mask, seed, shift_mean):
    (values,) = drawn(mask, seed, 1)
    parts = [(values[:1], mask[:1]), (values[1:], mask[1:])]
    moments = sum(moments_of(*part) for part in parts)
    assert int(moments[0]) == int(mask.sum())
    whitened = torch.cat([whiten(*part, shift_mean=shift_mean, moments=moments) for part in parts])
    torch.testing.assert_close(whitened, whiten(values, mask, shift_mean=shift_mean))


# --- KL


def policies(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [V] of a policy and a reference over five tokens."""
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)).double()
    return tuple(logits.log_softmax(-1))


def full_kl(logp_V: torch.Tensor, ref_V: torch.Tensor) -> torch.Tensor:
    return (logp_V.exp() * (logp_V - ref_V)).sum()


@quick
@given(st.floats(-15, 0), st.floats(-15, 0))
def test_kl_estimates_are_their_formulas(logp, ref):
    d = logp - ref
    wants = {"k1": d, "k2": 0.5 * d * d, "k3": math.exp(-d) - 1 + d}
    for kind, want in wants.items():
        estimate = float(kl_estimate(*scalar(logp, ref), kind))
        assert estimate == pytest.approx(want, rel=1e-9, abs=1e-9)
        assert kind == "k1" or estimate >= 0
    for kind in KINDS:
        assert float(kl_estimate(*scalar(logp, logp), kind)) == 0


def test_k3_of_close_policies_is_not_lost_to_rounding():
    d = 1e-4 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    estimate = kl_estimate(d, torch.zeros_like(d), "k3")
    assert estimate.dtype == torch.float32
    assert (estimate >= 0).all()
    assert float(estimate.mean()) == pytest.approx(float(0.5 * d.square().mean()), rel=1e-3)


@quick
@given(seeds)
def test_k1_and_k3_are_the_kl_on_average(seed):
    logp_V, ref_V = policies(seed)
    for kind in ("k1", "k3"):
        mean = (logp_V.exp() * kl_estimate(logp_V, ref_V, kind)).sum()
        torch.testing.assert_close(mean, full_kl(logp_V, ref_V))


@pytest.mark.parametrize("seed", range(5))
def test_only_the_gradient_of_k2_is_that_of_the_kl_on_average(seed):
    logits_V, ref_V = policies(seed)
    logits_V = logits_V.clone().requires_grad_()

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits_V)[0]

    def expected(kind: str) -> torch.Tensor:
        logp_V = logits_V.log_softmax(-1)
        return gradient((logp_V.exp().detach() * kl_estimate(logp_V, ref_V, kind)).sum())

    want = gradient(full_kl(logits_V.log_softmax(-1), ref_V))
    torch.testing.assert_close(expected("k2"), want)
    torch.testing.assert_close(expected("k1"), torch.zeros_like(want))
    reverse = gradient((ref_V.exp() * (ref_V - logits_V.log_softmax(-1))).sum())
    torch.testing.assert_close(expected("k3"), reverse)
    assert (reverse - want).abs().max() > 1e-2


@pytest.mark.parametrize("logp", [-200.0, 200.0])
def test_a_log_ratio_beyond_20_counts_as_20(logp):
    at = math.copysign(20, logp)
    for kind in KINDS:
        estimate = kl_estimate(*scalar(logp, 0.0), kind)
        assert float(estimate) == float(kl_estimate(*scalar(at, 0.0), kind))
    far, edge = (
        policy_loss(*scalar(x, 0.0, -1.0), torch.tensor([True]), CLIP, 1) for x in (logp, at)
    )
    assert numbers(far) == numbers(edge)
    assert numbers(far)[0] == pytest.approx(max(math.exp(at), 1 - CLIP))


# --- rewards and advantages


@quick
@given(masks(), seeds)
def test_the_score_comes_once_at_the_last_real_token(mask, seed):
    (kl_BT,) = drawn(mask, seed, 1)
    scores_B = torch.arange(1.0, len(mask) + 1).double()
    rewards_BT = token_rewards(scores_B, kl_BT, mask, 0.3)
    for b, row in enumerate(mask):
        for t in range(len(row)):
            want = -0.3 * float(kl_BT[b, t]) if row[t] else 0.0
            want += float(scores_B[b]) if t == real(row)[-1] else 0.0
            assert float(rewards_BT[b, t]) == pytest.approx(want, abs=1e-12)
    torch.testing.assert_close(token_rewards(scores_B, kl_BT, mask, 0.0).sum(1), scores_B)


def test_a_row_without_a_real_token_has_no_place_for_its_score():
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match=r"rows \[1\] have no real token"):
        token_rewards(torch.ones(2), torch.zeros(2, 2), mask, 0.1)


def deltas(rewards_T, values_T, places: list[int], gamma: float) -> list[float]:
    nexts = [float(values_T[t]) for t in places[1:]] + [0.0]
    return [
        float(rewards_T[t]) + gamma * after - float(values_T[t])
        for t, after in zip(places, nexts, strict=True)
    ]


@quick
@given(masks(), seeds, discounts, discounts)
def test_gae_is_the_double_loop_over_real_tokens(mask, seed, gamma, lam):
    rewards, values = drawn(mask, seed, 2)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b, row in enumerate(mask):
        places = real(row)
        delta = deltas(rewards[b], values[b], places, gamma)
        for n, t in enumerate(places):
            want = 0.0
            for ahead in range(len(places) - n):
                want += (gamma * lam) ** ahead * delta[n + ahead]
            assert float(advantages[b, t]) == pytest.approx(want, abs=1e-9)
            assert float(returns[b, t]) == pytest.approx(want + float(values[b, t]), abs=1e-9)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


@quick
@given(st.integers(1, 8), seeds, discounts, discounts)
def test_advantages_are_a_triangle_of_discounts_times_delta(tokens, seed, gamma, lam):
    mask = torch.ones(1, tokens, dtype=torch.bool)
    rewards, values = drawn(mask, seed, 2)
    ahead = torch.arange(tokens) - torch.arange(tokens)[:, None]
    triangle = ((gamma * lam) ** ahead.clamp(min=0).double()).triu()
    delta = torch.tensor(deltas(rewards[0], values[0], list(range(tokens)), gamma)).double()
    advantages, _ = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages[0], triangle @ delta, atol=1e-6, rtol=1e-6)


@quick
@given(masks(), seeds, discounts)
def test_lam_1_is_reward_to_go_less_value_and_lam_0_is_delta(mask, seed, gamma):
    rewards, values = drawn(mask, seed, 2)
    (monte_carlo, returns), (one_step, _) = (gae(rewards, values, mask, gamma, x) for x in (1, 0))
    for b, row in enumerate(mask):
        places, to_go = real(row), 0.0
        one_step_want = deltas(rewards[b], values[b], places, gamma)
        assert one_step[b, row].tolist() == pytest.approx(one_step_want, abs=1e-9)
        for t in reversed(places):
            to_go = float(rewards[b, t]) + gamma * to_go
            assert float(returns[b, t]) == pytest.approx(to_go, abs=1e-9)
            assert float(monte_carlo[b, t]) == pytest.approx(to_go - float(values[b, t]), abs=1e-9)


@quick
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=1, max_size=9))
def test_leave_one_out_is_the_naive_loop(rows):
    rewards, groups = (list(column) for column in zip(*rows, strict=True))
    advantages_N = leave_one_out(torch.tensor(rewards).double(), torch.tensor(groups))
    for n, (reward, group) in enumerate(rows):
        others = [r for m, (r, g) in enumerate(rows) if g == group and m != n]
        want = reward - sum(others) / len(others) if others else 0.0
        assert float(advantages_N[n]) == pytest.approx(want, abs=1e-6)


def test_leave_one_out_sums_to_zero_over_each_prompt_and_sees_no_other():
    (rewards_N,) = drawn(torch.ones(12, dtype=torch.bool), 0, 1)
    group_N = torch.tensor([7, 2, 5]).repeat(4)
    advantages_N = leave_one_out(rewards_N, group_N)
    for group in (7, 2, 5):
        here = group_N == group
        assert float(advantages_N[here].sum()) == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(
            advantages_N[here], leave_one_out(rewards_N[here], group_N[here])
        )


# --- losses


@quick
@given(masks(), seeds)
def test_at_equal_logprobs_the_loss_is_the_plain_policy_gradient(mask, seed):
    logprobs, advantages = drawn(mask, seed, 2)
    logprobs.requires_grad_()
    total = int(mask.sum())
    policy = policy_loss(logprobs, logprobs.detach(), advantages, mask, CLIP, total)
    policy.loss.backward()
    assert float(policy.ratio) == total
    assert float(policy.approxkl) == float(policy.clipped) == 0
    torch.testing.assert_close(logprobs.grad, (-advantages / total).masked_fill(~mask, 0))
    whitened = whiten(advantages, mask)
    first = policy_loss(logprobs, logprobs.detach(), whitened, mask, CLIP, total)
    assert float(first.loss.detach()) == pytest.approx(0, abs=1e-9)


@quick
@given(masks(), seeds)
def test_zero_advantages_teach_the_policy_nothing(mask, seed):
    logprobs, old = drawn(mask, seed, 2)
    logprobs.requires_grad_()
    policy_loss(logprobs, old, torch.zeros_like(old), mask, CLIP, 5).loss.backward()
    assert (logprobs.grad == 0).all()


@quick
@given(masks(), seeds, st.sampled_from([0.05, 0.2]), st.integers(1, 20))
def test_the_policy_loss_is_its_formula_token_by_token(mask, seed, cliprange, total):
    logprobs, old, advantages = drawn(mask, seed, 3)
    want = [0.0] * 4
    for place in mask.nonzero().tolist():
        log_ratio, a = float(logprobs[*place] - old[*place]), float(advantages[*place])
        ratio = math.exp(log_ratio)
        clipped = min(max(ratio, 1 - cliprange), 1 + cliprange)
        gained = min(a * ratio, a * clipped)
        terms = (-gained / total, float(gained < a * ratio), 0.5 * log_ratio**2, ratio)
        want = [sum(pair) for pair in zip(want, terms, strict=True)]
    sums = numbers(policy_loss(logprobs, old, advantages, mask, cliprange, total))
    assert sums == pytest.approx(want, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "clipped"),
    [
        (2.0, 1.5, -2.4, 1),  # good, and likely enough already
        (2.0, 0.5, -1.0, 0),
        (-2.0, 1.5, 3.0, 0),
        (-2.0, 0.5, 1.6, 1),  # bad, and rare enough already
        (2.0, 1.1, -2.2, 0),
        (-2.0, 0.9, 1.8, 0),
    ],
)
def test_the_clip_holds_back_what_went_far_enough_and_nothing_else(advantage, ratio, loss, clipped):
    logprobs, old, advantages = scalar(math.log(ratio), 0.0, advantage)
    logprobs.requires_grad_()
    policy = policy_loss(logprobs, old, advantages, torch.tensor([True]), CLIP, 1)
    policy.loss.backward()
    assert float(policy.loss.detach()) == pytest.approx(loss)
    assert float(policy.clipped) == clipped
    assert float(logprobs.grad) == pytest.approx(0 if clipped else -advantage * ratio)


@quick
@given(masks(), seeds, st.sampled_from([None, 0.05, 0.5, 100.0]), st.integers(1, 20))
def test_the_value_loss_is_its_formula_token_by_token(mask, seed, cliprange, total):
    values, old, returns = drawn(mask, seed, 3)
    loss, clips, slope = 0.0, 0, torch.zeros_like(values)
    for place in mask.nonzero().tolist():
        v, o, r = (float(x[*place]) for x in (values, old, returns))
        near = v if cliprange is None else min(max(v, o - cliprange), o + cliprange)
        free, held = (v - r) ** 2, (near - r) ** 2
        loss += 0.5 * max(free, held) / total
        clips += held > free
        slope[*place] = 0.0 if held > free else (v - r) / total
    values.requires_grad_()
    value = value_loss(values, old, returns, mask, cliprange, total)
    value.loss.backward()
    assert float(value.loss.detach()) == pytest.approx(loss, abs=1e-9)
    assert float(value.clipped) == clips
    torch.testing.assert_close(values.grad, slope)


# --- what a batch looks like does not matter


@quick
@given(masks(), seeds)
def test_padding_changes_nothing(mask, seed):
    a, b, c = drawn(mask, seed, 3)
    more, (a_, b_, c_) = wide(mask, False), (wide(x, torch.nan) for x in (a, b, c))
    close = torch.testing.assert_close
    close(moments_of(a_, more), moments_of(a, mask))
    for shift_mean in (True, False):
        close(narrow(whiten(a_, more, shift_mean)), whiten(a, mask, shift_mean))
    for kind in KINDS:
        close(narrow(kl_estimate(a_, b_, kind)), kl_estimate(a, b, kind), equal_nan=True)
    scores_B = torch.arange(1.0, len(mask) + 1).double()
    rewards_BT = token_rewards(scores_B, a_[:-1], more[:-1], 0.3)
    close(rewards_BT[:, 1::2], token_rewards(scores_B, a, mask, 0.3))
    padded, plain = gae(a_, b_, more, 0.9, 0.8), gae(a, b, mask, 0.9, 0.8)
    for got, want in zip(padded, plain, strict=True):
        close(narrow(got), want)
    padded, plain = policy_loss(a_, b_, c_, more, CLIP, 5), policy_loss(a, b, c, mask, CLIP, 5)
    assert numbers(padded) == pytest.approx(numbers(plain))
    padded, plain = value_loss(a_, b_, c_, more, CLIP, 5), value_loss(a, b, c, mask, CLIP, 5)
    assert numbers(padded) == pytest.approx(numbers(plain))


@quick
@given(masks(), seeds)
def test_micro_batches_add_up_to_their_minibatch(mask, seed):
    learned, *given_ = drawn(mask, seed, 3)
    total = int(mask.sum())
    for lossy in (policy_loss, value_loss):
        gradients, sums = [], []
        for parts in ([slice(None)], [slice(0, 1), slice(1, None)]):
            x = learned.clone().requires_grad_()
            losses = [lossy(x[p], *(g[p] for g in given_), mask[p], CLIP, total) for p in parts]
            sum(part.loss for part in losses).backward()
            gradients.append(x.grad)
            columns = zip(*(vars(part).values() for part in losses), strict=True)
            sums.append([float(sum(column).detach()) for column in columns])
        assert sums[0] == pytest.approx(sums[1])
        torch.testing.assert_close(*gradients)
        assert (gradients[0][~mask] == 0).all()


# --- what lasts from step to step


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@quick
@given(st.floats(0, 50), st.integers(1, 1000))
def test_the_kl_coefficient_follows_its_formula(kl, n):
    controller = AdaptiveKL(value=0.05, target=6.0, horizon=10_000)
    controller.update(kl, n)
    error = float(np.clip(kl / 6.0 - 1, -0.2, 0.2))
    assert controller.value == pytest.approx(0.05 * (1 + error * n / 10_000))
    assert abs(controller.value / 0.05 - 1) <= 0.2 * n / 10_000 + 1e-12
    assert (controller.value > 0.05) == (kl > 6.0) or abs(error) < 1e-9
    controller.update(6.0, n)
    assert controller.value == pytest.approx(0.05 * (1 + error * n / 10_000))


def test_the_kl_coefficient_is_kept_in_a_checkpoint():
    ours, theirs = (AdaptiveKL(value=v, target=6.0, horizon=100) for v in (0.05, 0.9))
    ours.update(9.0, 64)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    assert theirs == ours
    ours.update(1.0, 64)
    theirs.update(1.0, 64)
    assert theirs == ours
    assert ours.value == pytest.approx(0.05 * (1 + 0.2 * 0.64) * (1 - 0.2 * 0.64))


@quick
@given(st.lists(st.lists(st.floats(-100, 100), max_size=5), max_size=5))
def test_running_moments_are_those_of_all_scores(batches):
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64))
    scores = [score for batch in batches for score in batch]
    assert moments.count == len(scores)
    assert moments.mean == pytest.approx(np.mean(scores) if scores else 0.0, abs=1e-9)
    want = np.std(scores, ddof=1) if len(scores) > 1 else 1.0
    assert moments.std == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_running_moments_are_kept_in_a_checkpoint():
    ours, theirs = RunningMoments(), RunningMoments()
    ours.update(torch.tensor([1.0, 5.0, 3.0]))
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    for moments in (ours, theirs):
        moments.update(torch.tensor([2.0, 9.0]))
    assert theirs == ours
    assert (ours.mean, ours.std) == pytest.approx((4.0, math.sqrt(10)))
