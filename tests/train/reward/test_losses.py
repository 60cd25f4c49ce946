"""Losses of scores against their formulas, written out one response at a time."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from aif.config.settings import RewardSettings
from aif.errors import InputError
from aif.train.prefix_groups import SharedPrefix
from aif.train.reward.losses import (
    OBJECTIVES,
    Grades,
    Pairs,
    Ranking,
    bradley_terry,
    objective_of,
    plackett_luce,
)
from aif.train.reward.model import combined

scores = st.floats(-20, 20)
labels = st.floats(0, 1)
quick = limits(max_examples=60, deadline=None)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(d: float, p: float) -> float:
    return -p * math.log(sigmoid(d)) - (1 - p) * math.log(sigmoid(-d))


def double(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def loss(a: float, b: float, p: float, **options: float) -> float:
    return float(bradley_terry(*double(a, b, p), **options))


def tree(responses: int, compared=(), grades=()) -> SharedPrefix:
    """`compared` holds (first, second, p_first)."""
    one_T = np.ones(1, np.int32)
    first, second, p_first = map(list, zip(*compared, strict=True)) if compared else ([], [], [])
    return SharedPrefix("s", one_T, [one_T] * responses, first, second, p_first, list(grades))


def ranked(order, rng: np.random.Generator) -> SharedPrefix:
    """Every pair compared, either one called first; `order` names the responses, best first."""
    compared = []
    for better, worse in combinations(order, 2):
        compared.append((better, worse, 1.0) if rng.random() < 0.5 else (worse, better, 0.0))
    return tree(len(order), [compared[n] for n in rng.permutation(len(compared))])


def loss_of(kind, rows: list[SharedPrefix], scores_N: torch.Tensor, **options) -> torch.Tensor:
    objective = kind(RewardSettings(**options))
    return objective.loss(scores_N, objective.targets(rows))


def drawn(n: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n, generator=torch.Generator().manual_seed(seed))


@quick
@given(scores, scores)
def test_a_certain_label_is_the_hard_loss(a, b):
    want = float(-torch.nn.functional.logsigmoid(torch.tensor(a - b, dtype=torch.float64)))
    assert loss(a, b, 1.0) == pytest.approx(want, abs=1e-12)
    assert loss(b, a, 0.0) == pytest.approx(want, abs=1e-12)


@quick
@given(scores, scores, labels, st.floats(0, 3), st.floats(0, 0.49))
def test_bradley_terry_is_its_formula(a, b, p, margin, smoothing):
    d, q = a - b - margin * (2 * p - 1), p * (1 - 2 * smoothing) + smoothing
    got = loss(a, b, p, margin=margin, smoothing=smoothing)
    assert got == pytest.approx(cross_entropy(d, q), abs=1e-9)


@quick
@given(scores, scores, labels, st.floats(0, 3), st.floats(0, 0.49), st.floats(-50, 50))
def test_neither_a_shift_nor_which_comes_first_matters(a, b, p, margin, smoothing, shift):
    options = {"margin": margin, "smoothing": smoothing}
    want = loss(a, b, p, **options)
    assert loss(a + shift, b + shift, p, **options) == pytest.approx(want, abs=1e-9)
    assert loss(b, a, 1 - p, **options) == pytest.approx(want, abs=1e-9)


@quick
@given(st.floats(-8, 8), st.floats(-8, 8))
def test_a_model_that_says_what_the_label_says_has_nothing_to_learn(a, b):
    first, second, p = double(a, b, sigmoid(a - b))
    first.requires_grad_(), second.requires_grad_()
    bradley_terry(first, second, p).backward()
    assert abs(float(first.grad)) < 1e-12
    assert abs(float(second.grad)) < 1e-12


def test_a_margin_and_smoothing_move_the_best_difference():
    assert loss(3.0, 1.0, 1.0, margin=2.0) == pytest.approx(math.log(2))
    assert loss(1.0, 3.0, 0.0, margin=2.0) == pytest.approx(math.log(2))
    assert loss(0.3, 0.0, 0.5, margin=2.0) == loss(0.3, 0.0, 0.5)
    best = math.log(0.9 / 0.1)  # where sigmoid(d) is the smoothed label
    around = [loss(best + step, 0.0, 1.0, smoothing=0.1) for step in (-0.01, 0.0, 0.01)]
    assert min(around) == around[1]
    assert loss(40.0, 0.0, 1.0, smoothing=0.1) == pytest.approx(0.1 * 40)


def test_extreme_scores_give_finite_losses_and_gradients():
    for d in (-1e4, 1e4):
        first, second, p = double(d, 0.0, 0.7)
        first.requires_grad_()
        total = bradley_terry(first, second, p)
        total.backward()
        assert torch.isfinite(total).all()
        assert torch.isfinite(first.grad).all()


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_ranking_of_two_is_bradley_terry(p):
    rows, scores_N = [tree(2, [(0, 1, p)]), tree(2, [(1, 0, p)])], drawn(4)
    torch.testing.assert_close(loss_of(Ranking, rows, scores_N), loss_of(Pairs, rows, scores_N))


@pytest.mark.parametrize("responses", [3, 4])
def test_a_ranking_is_plackett_luce(responses):
    rng = np.random.default_rng(0)
    for seed, order in enumerate(permutations(range(responses))):
        scores_N = drawn(responses, seed)
        by_rank = scores_N[list(order)].double().exp()
        chances = [by_rank[n] / by_rank[n:].sum() for n in range(responses)]
        want = -math.log(math.prod(map(float, chances)))
        row = ranked(order, rng)
        assert float(loss_of(Ranking, [row], scores_N)) == pytest.approx(want, rel=1e-5)
        assert float(loss_of(Ranking, [row], scores_N + 7)) == pytest.approx(want, rel=1e-4)
        assert Ranking(RewardSettings()).count(row) == responses - 1


def test_a_batch_of_rankings_is_the_sum_of_them():
    rng = np.random.default_rng(1)
    rows = [ranked(rng.permutation(k).tolist(), rng) for k in (2, 4, 3)]
    scores_N = drawn(9)
    parts = [loss_of(Ranking, [t], s) for t, s in zip(rows, scores_N.split([2, 4, 3]), strict=True)]
    torch.testing.assert_close(loss_of(Ranking, rows, scores_N), sum(parts))


def test_a_tie_says_nothing():
    even = [(a, b, 0.5) for a, b in combinations(range(3), 2)]
    scores_N = drawn(3).requires_grad_()
    total = loss_of(Ranking, [tree(3, even)], scores_N)
    total.backward()
    assert float(total.detach()) == pytest.approx(0, abs=1e-6)
    assert scores_N.grad.abs().max() < 1e-6
    assert Ranking(RewardSettings()).count(tree(3, even)) == 0


def test_a_tie_behind_the_best_says_only_who_is_best():
    row = tree(3, [(1, 0, 0.0), (0, 2, 1.0), (1, 2, 0.5)])
    scores_N = drawn(3)
    assert float(loss_of(Ranking, [row], scores_N)) == pytest.approx(
        float(-scores_N.log_softmax(0)[0])
    )
    assert Ranking(RewardSettings()).count(row) == 1


def test_a_response_that_was_never_compared_is_in_no_ranking():
    scores_N = drawn(3)
    want = loss_of(Pairs, [tree(2, [(0, 1, 1.0)])], scores_N[[0, 2]])
    row = tree(3, [(0, 2, 1.0)])
    torch.testing.assert_close(loss_of(Ranking, [row], scores_N), want)
    assert Ranking(RewardSettings()).count(row) == 1


def test_soft_labels_rank_by_how_often_a_response_wins():
    row = tree(3, [(0, 1, 0.6), (0, 2, 0.3), (1, 2, 0.45)])  # 0.45, 0.425, 0.625 a comparison
    want = ranked([2, 0, 1], np.random.default_rng(0))
    scores_N = drawn(3)
    assert float(loss_of(Ranking, [row], scores_N)) == float(loss_of(Ranking, [want], scores_N))


def test_plackett_luce_is_per_response():
    rivals_NN = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 1, 1]]).bool()
    scores_N = drawn(3)
    want = [-scores_N.log_softmax(0)[0], torch.tensor(0.0), -scores_N[[2, 1]].log_softmax(0)[0]]
    torch.testing.assert_close(plackett_luce(scores_N, rivals_NN), torch.stack(want))


COMPARED = [tree(2, [(0, 1, 0.8)]), tree(3, [(2, 0, 0.3), (1, 2, 1.0), (0, 1, 0.5)])]
BY_PLACE = [(0, 1, 0.8), (4, 2, 0.3), (3, 4, 1.0), (2, 3, 0.5)]  # the same, numbered through


def test_pairs_are_found_by_their_place_in_the_batch():
    scores_N = drawn(5)
    want = sum(cross_entropy(float(scores_N[a] - scores_N[b]), p) for a, b, p in BY_PLACE)
    assert float(loss_of(Pairs, COMPARED, scores_N)) == pytest.approx(want, rel=1e-5)
    assert [Pairs(RewardSettings()).count(row) for row in COMPARED] == [1, 3]


def test_hard_pairs_learn_who_won():
    scores_N, sure = drawn(5), [row for row in BY_PLACE if row[2] != 0.5]
    rows = [COMPARED[0], tree(3, [(2, 0, 0.3), (1, 2, 1.0)])]
    want = sum(cross_entropy(float(scores_N[a] - scores_N[b]), float(p > 0.5)) for a, b, p in sure)
    assert float(loss_of(Pairs, rows, scores_N, hard=True)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_pairs_are_weighed_by_how_sure_the_label_is(hard):
    scores_N = drawn(5)
    want = sum(
        abs(2 * p - 1) * cross_entropy(float(scores_N[a] - scores_N[b]), (p > 0.5) if hard else p)
        for a, b, p in BY_PLACE
    )
    got = loss_of(Pairs, COMPARED, scores_N, hard=hard, confidence_weights=True)
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_pairs_take_margin_and_smoothing_from_the_settings():
    scores_N = drawn(5)
    want = sum(
        loss(float(scores_N[a]), float(scores_N[b]), p, margin=0.7, smoothing=0.1)
        for a, b, p in BY_PLACE
    )
    got = loss_of(Pairs, COMPARED, scores_N, margin=0.7, label_smoothing=0.1)
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_centering_pulls_the_mean_of_a_pair_to_zero():
    scores_N = drawn(5)
    squares = sum(float(scores_N[a] + scores_N[b]) ** 2 for a, b, _ in BY_PLACE)
    without = float(loss_of(Pairs, COMPARED, scores_N))
    got = float(loss_of(Pairs, COMPARED, scores_N, centering=0.1))
    assert got - without == pytest.approx(0.1 * squares, rel=1e-4)
    mirrored_N = torch.tensor([1.5, -1.5])
    plain, centred = (loss_of(Pairs, COMPARED[:1], mirrored_N, centering=c) for c in (0.0, 1.0))
    assert float(plain) == float(centred)


def test_centering_of_a_ranking_pulls_every_score():
    rows, scores_N = [ranked([2, 0, 1], np.random.default_rng(0))], drawn(3)
    without, got = (float(loss_of(Ranking, rows, scores_N, centering=c)) for c in (0.0, 0.1))
    assert got - without == pytest.approx(0.1 * float(scores_N.square().sum()), rel=1e-4)


GRADED = [tree(2, grades=[0.9, 0.25]), tree(1, grades=[0.5]), tree(3, grades=[1.0, 0.0, 0.6])]
GRADES = [0.9, 0.25, 0.5, 1.0, 0.0, 0.6]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hard": True},
        {"label_smoothing": 0.1},
        {"hard": True, "label_smoothing": 0.2},
        {"confidence_weights": True},
        {"hard": True, "confidence_weights": True, "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_grades_are_binary_cross_entropy(options):
    scores_N, grades_N = drawn(6), torch.tensor(GRADES)
    smoothing = options.get("label_smoothing", 0.0)
    target_N = (grades_N > 0.5).float() if options.get("hard") else grades_N
    weight_N = (2 * grades_N - 1).abs() if options.get("confidence_weights") else None
    want = torch.nn.functional.binary_cross_entropy(
        scores_N.sigmoid(),
        target_N * (1 - smoothing) + (1 - target_N) * smoothing,
        weight=weight_N,
        reduction="sum",
    )
    torch.testing.assert_close(loss_of(Grades, GRADED, scores_N, **options), want)
    assert sum(map(Grades(RewardSettings()).count, GRADED)) == len(GRADES)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_has_its_setting(objective):
    kind = OBJECTIVES[RewardSettings(objective=objective).objective]
    total = loss_of(kind, [tree(2, [(0, 1, 0.9)], grades=[0.9, 0.1])], drawn(2))
    assert total.shape == ()


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("ranking", {"margin": 0.5}),
        ("ranking", {"hard": True}),
        ("ranking", {"confidence_weights": True}),
        ("ranking", {"label_smoothing": 0.1}),
        ("grades", {"margin": 0.5}),
        ("grades", {"centering": 0.1}),
    ],
)
def test_an_option_that_an_objective_would_pass_over_is_an_error(objective, options):
    (key,) = options
    with pytest.raises(InputError, match=f"reward: {key}: got .*, expected nothing; objective ="):
        objective_of(RewardSettings(objective=objective, **options))
    assert objective_of(RewardSettings(**options)).settings
    assert objective_of(RewardSettings(objective=objective)).settings


def test_an_ensemble_speaks_by_mean_minimum_or_lower_bound():
    rows = [1.0, 2.0, 6.0]
    assert combined(rows, "mean") == 3.0
    assert combined(rows, "min") == 1.0
    assert combined(rows, "lower") == pytest.approx(3.0 - math.sqrt((4 + 1 + 9) / 3))
    for how in ("mean", "min", "lower"):
        assert combined([2.5], how) == 2.5
        assert combined(rows[::-1], how) == combined(rows, how)
