"""A step's epochs of minibatches, against PPO written out row by row on a model this small."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from dataclasses import fields, replace
from itertools import chain

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

import numpy as np

from aif.config.settings import PPOSettings
from aif.train.batch import Layout, Steps
from aif.train.model import without_dropout
from aif.train.ppo.actor_critic import Reference
from aif.train.ppo.experience import Experience, compute_logprobs
from aif.train.ppo.update import Learner, NotFinite, describe
from aif.train.tokens import TokenRow
from tests.conftest import ROOT
from tests.support.ppo import experience_of, one_thread, outputs_alone, response_row, tiny_actor
from tests.support.tiny import tiny_model

SHAPES = [(3, 4), (9, 1), (1, 7), (5, 2), (2, 7), (6, 3), (4, 1)]  # tokens of prompt and response
PROMPTS = [f"{name * 12}-and-more" for name in "abcabcd"]
ONCE = {"ppo_epochs": 1, "max_grad_norm": 0.0}
SPLIT = {"policy": "policy.", "value": "critic."}


one_process = pytest.fixture(scope="module", autouse=True)(one_thread)


def learner(
    micro_tokens: int = 10_000,
    packing: bool = False,
    rate: float = 0.05,
    optimizer: type = torch.optim.SGD,
    critic: bool = True,
    ptx: Steps | None = None,
    **settings,
) -> Learner:
    """The same weights each time, without dropout as PPO has them; SGD shows the gradient."""
    model = tiny_actor(critic)
    without_dropout(model)
    accelerator = accelerate.Accelerator(cpu=True)
    stepper = optimizer(model.parameters(), lr=rate)
    model, stepper = accelerator.prepare(model, stepper)
    layout = Layout(micro_tokens, packing, pad_id=5, call_tokens=1)
    return Learner(accelerator, model, stepper, layout, PPOSettings(**settings), ptx)


def rows() -> list[TokenRow]:
    """Each with its own first token, to recognise it by."""
    every = []
    for n, (prompt, response) in enumerate(SHAPES):
        draw = np.random.default_rng(n)
        ids = draw.integers(3, 64, response)
        every.append(response_row([10 + n, *draw.integers(3, 64, prompt - 1)], ids))
    return every


def sampled(ours: Learner) -> Experience:
    """Experience with a model as it is."""
    reference = Reference(ours.model, tiny_model(vocab_size=64, initializer_range=0.2).eval())
    layout = Layout(30, False, 5)
    outputs = compute_logprobs(rows(), ours.model, reference, layout, torch.device("cpu"))
    scores_B = torch.randn(len(SHAPES), generator=torch.Generator().manual_seed(3))
    return experience_of(rows(), PROMPTS, scores_B, outputs, ours.settings)


def moved(experience: Experience) -> Experience:
    """As if the model had moved since: ratios are off 1, some of them clipped."""
    draw = torch.Generator().manual_seed(4)
    noise = {
        name: getattr(experience, name)
        + 0.3
        * torch.randn(experience.response_mask_BT.shape, generator=draw)
        * experience.response_mask_BT
        for name in ("logprobs_BT", "values_BT", "returns_BT")
    }
    return replace(experience, **noise)


def picked(experience: Experience, places: list[int]) -> Experience:
    """These rows of it, in this order."""
    parts = {}
    for field in fields(experience):
        value = getattr(experience, field.name)
        parts[field.name] = [value[n] for n in places] if isinstance(value, list) else value[places]
    return Experience(**parts)


def weights(ours: Learner) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in ours.model.named_parameters()}


def gradients(ours: Learner, part: str = "") -> dict[str, torch.Tensor]:
    """Of the last optimizer step."""
    named = ours.model.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if name.startswith(part)}


def norm(parts: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts.values()))


def alike(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance=1e-4) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        apart = float((got[name] - value).norm())
        assert apart <= tolerance * float(value.norm()) + 1e-7, name


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert all(torch.equal(got[name], value) for name, value in want.items())


# --- by hand


def naive_loss(ours: Learner, experience: Experience) -> torch.Tensor:
    """Policy loss, value loss and entropy bonus of all tokens, one token at a time."""
    settings, losses = ours.settings, []
    for n, tokens in enumerate(experience.rows):
        for t, (logp, value, entropy) in enumerate(
            zip(*outputs_alone(ours.model, tokens), strict=True)
        ):
            ratio, advantage = (
                (logp - experience.logprobs_BT[n, t]).exp(),
                experience.advantages_BT[n, t],
            )
            held = ratio.clamp(1 - settings.cliprange, 1 + settings.cliprange)
            gain = torch.minimum(advantage * ratio, advantage * held)
            old, back = experience.values_BT[n, t], experience.returns_BT[n, t]
            near = old + (value - old).clamp(-settings.cliprange_value, settings.cliprange_value)
            missed = torch.maximum((value - back) ** 2, (near - back) ** 2)
            losses.append(-gain + settings.vf_coef * 0.5 * missed - settings.entropy_coef * entropy)
    return torch.stack(losses).mean()


def naive_gradients(ours: Learner, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(ours.model.named_parameters())
    parts = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(named[name]) if part is None else part
        for name, part in zip(named, parts, strict=True)
    }


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
@pytest.mark.parametrize("most", [0.0, 0.1])
def test_an_optimizer_step_is_ppo_written_out_by_hand(entropy_coef, most):
    settings = {"ppo_epochs": 1, "max_grad_norm": most, "vf_coef": 0.5, "cliprange": 0.1}
    ours = learner(20, entropy_coef=entropy_coef, **settings)
    experience = moved(sampled(ours))
    loss = naive_loss(ours, experience)
    want, before = naive_gradients(ours, loss), weights(ours)
    metrics = ours.update(experience, 0)
    assert 0.1 < metrics["policy/clipfrac_avg"] < 0.9
    assert 0.1 < metrics["val/clipfrac_avg"] < 0.9
    for name, part in SPLIT.items():
        mine = {key: value for key, value in want.items() if key.startswith(part)}
        assert norm(mine) > 0.1
        assert metrics[f"{name}/grad_norm"] == pytest.approx(norm(mine), rel=1e-4)
        scale = min(1.0, most / norm(mine)) if most else 1.0
        clipped = {key: scale * value for key, value in mine.items()}
        alike(gradients(ours, part), clipped)
        for key, value in clipped.items():
            torch.testing.assert_close(weights(ours)[key], before[key] - 0.05 * value)
    if not entropy_coef:
        total = metrics["loss/policy_avg"] + 0.5 * metrics["loss/value_avg"]
        assert total == pytest.approx(float(loss.detach()), rel=1e-4)


# --- what is learned from


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_at_first_the_policy_is_the_one_that_drew(algorithm):
    ours = learner(16, critic=algorithm == "ppo", algorithm=algorithm, **ONCE)
    metrics = ours.update(sampled(ours), 0)
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
    assert metrics["policy/clipfrac_avg"] == 0
    assert metrics.get("val/clipfrac_avg", 0) == 0
    assert ("loss/value_avg" in metrics) == ("value/grad_norm" in metrics) == (algorithm == "ppo")


def test_without_a_learning_rate_nothing_moves():
    ours = learner(
        rate=0.0, optimizer=torch.optim.AdamW, minibatches=2, ppo_epochs=2, entropy_coef=0.1
    )
    before, experience = weights(ours), sampled(ours)
    metrics = ours.update(experience, 0)
    same(weights(ours), before)
    torch.testing.assert_close(sampled(ours).logprobs_BT, experience.logprobs_BT, rtol=0, atol=0)
    assert metrics["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
    assert metrics["policy/updates"] == 4


def test_without_advantages_the_critic_learns_and_the_policy_does_not():
    ours = learner(vf_coef=10.0, **ONCE)
    experience = sampled(ours)
    ours.update(replace(experience, advantages_BT=torch.zeros_like(experience.advantages_BT)), 0)
    assert norm(gradients(ours, "policy.")) == 0
    assert norm(gradients(ours, "critic.")) > 0.1


def test_without_a_value_loss_the_policy_learns_and_the_critic_does_not():
    ours, plain = learner(vf_coef=0.0, **ONCE), learner(vf_coef=1.0, **ONCE)
    for each in (ours, plain):
        each.update(moved(sampled(each)), 0)
    assert norm(gradients(ours, "critic.")) == 0
    assert norm(gradients(ours, "policy.")) > 0.1
    same(gradients(ours, "policy."), gradients(plain, "policy."))


def test_neither_memory_nor_the_order_of_rows_changes_a_gradient():
    settings = ONCE | {"entropy_coef": 0.1}
    whole = learner(**settings)
    experience = moved(sampled(whole))
    metrics = whole.update(experience, 0)
    order = [4, 2, 6, 0, 5, 1, 3]
    for micro_tokens, packing in ((1, False), (25, False), (25, True)):
        for some in (experience, picked(experience, order)):
            ours = learner(micro_tokens, packing, **settings)
            assert ours.update(some, 0) == pytest.approx(metrics, rel=1e-4)
            alike(gradients(ours), gradients(whole))


class Watched:
    """Which rows (or ptx texts), known by their first token, each optimizer step is of."""

    def __init__(self, ours: Learner, texts: bool = False):
        self.steps: list[list[int]] = []
        self._seen: list[int] = []

        def ran(module, args, kwargs, *_) -> None:
            if kwargs.get("texts", False) == texts:
                self._seen += kwargs["input_ids"][:, 0].tolist()

        def stepped(*_) -> None:
            self.steps.append(self._seen)
            self._seen = []

        ours.model.register_forward_pre_hook(ran, with_kwargs=True)
        ours.optimizer.optimizer.register_step_pre_hook(stepped)


def test_every_epoch_is_a_fresh_permutation_of_all_rows():
    ours = learner(ppo_epochs=3, minibatches=3, seed=5)
    experience, watched = sampled(ours), Watched(ours)
    for step in (0, 1, 0):
        ours.update(experience, step)
    again = learner(ppo_epochs=3, minibatches=3, seed=6)
    other = Watched(again)
    again.update(experience, 0)
    sizes = [len(part) for part in watched.steps]
    assert sizes == [3, 2, 2] * 9
    # The rows of a minibatch lie in memory by length.
    parts = [sorted(part) for part in watched.steps]
    epochs = [parts[n : n + 3] for n in range(0, 27, 3)]
    assert all(sorted(chain(*epoch)) == list(range(10, 17)) for epoch in epochs)
    assert epochs[6:] == epochs[:3]
    assert len({str(epoch) for epoch in epochs}) == 6
    assert [sorted(part) for part in other.steps] != parts[:9]


def test_more_minibatches_than_rows_are_as_many_as_rows():
    ours = learner(ppo_epochs=1, minibatches=9)
    assert ours.update(sampled(ours), 0)["policy/updates"] == 7


def test_a_minibatch_is_divided_by_its_own_tokens():
    ours = learner(rate=0.0, minibatches=2, **ONCE)
    experience, watched = moved(sampled(ours)), Watched(ours)
    ours.update(experience, 0)
    first, last = ([n - 10 for n in part] for part in watched.steps)
    assert sum(SHAPES[n][1] for n in last) != sum(SHAPES[n][1] for n in first)
    alike(gradients(ours), naive_gradients(ours, naive_loss(ours, picked(experience, last))))


# --- where it has to stop


@pytest.mark.parametrize(
    ("name", "value"),
    [("logprobs_BT", math.nan), ("advantages_BT", math.inf), ("returns_BT", math.nan)],
)
def test_a_loss_that_is_no_number_names_its_prompts_and_touches_no_weight(name, value):
    ours = learner(micro_tokens=1, optimizer=torch.optim.AdamW)
    experience, before = sampled(ours), weights(ours)
    bad_BT = getattr(experience, name).clone()
    bad_BT[6, 0] = value
    with pytest.raises(NotFinite) as error:
        ours.update(replace(experience, **{name: bad_BT}), 0)
    assert str(error.value).startswith("the loss of the responses to prompts dddddddddddd is ")
    same(weights(ours), before)
    # And nothing of it is left for the next step.
    ours.update(experience, 1)
    fresh = learner(micro_tokens=1, optimizer=torch.optim.AdamW)
    fresh.update(experience, 1)
    same(weights(ours), weights(fresh))


@pytest.mark.parametrize("part", sorted(SPLIT))
def test_a_gradient_that_is_no_number_names_its_prompts_and_touches_no_weight(part):
    ours = learner(optimizer=torch.optim.AdamW)
    experience, before = sampled(ours), weights(ours)
    named = dict(ours.model.named_parameters())
    name = next(name for name in named if name.startswith(SPLIT[part]))
    named[name].register_hook(lambda grad: grad * math.nan)
    want = f"the gradient of the {part} over the responses to prompts aaaaaaaaaaaa, bbb"
    with pytest.raises(NotFinite, match=want):
        ours.update(experience, 0)
    same(weights(ours), before)


def test_an_error_names_some_of_many_prompts():
    experience = sampled(learner())
    many = replace(experience, prompt_ids=[f"{n:02}" for n in range(1020)])
    assert describe(many, [2, 1, 2]) == "the responses to prompts 01, 02"
    assert describe(many, range(1020)).endswith(" and 1,012 more")


def test_a_gradient_too_large_for_float32_is_no_number():
    ours = learner(**ONCE)
    experience, before = sampled(ours), weights(ours)
    with pytest.raises(NotFinite, match=r"the gradient of the policy .* is inf"):
        ours.update(replace(experience, advantages_BT=1e30 * experience.advantages_BT), 0)
    same(weights(ours), before)


def test_a_policy_too_far_away_ends_the_passes_before_the_next_step():
    ours, once = learner(ppo_epochs=4, target_kl=1e-6), learner(ppo_epochs=1)
    experience = sampled(ours)
    metrics = ours.update(experience, 0)
    once.update(experience, 0)
    assert metrics["policy/updates"] == 1
    assert metrics["policy/approxkl_avg"] > 1e-6  # of both passes
    same(weights(ours), weights(once))
    far = learner(ppo_epochs=4, target_kl=1e6)
    assert far.update(experience, 0)["policy/updates"] == 4
    none = learner(target_kl=1e-6)
    before = weights(none)
    metrics = none.update(moved(experience), 0)
    assert metrics["policy/updates"] == 0
    assert "policy/grad_norm" not in metrics
    same(weights(none), before)


def test_policy_and_critic_are_clipped_each_by_itself():
    free = learner(**ONCE)
    experience = moved(sampled(free))
    metrics = free.update(experience, 0)
    norms = {name: norm(gradients(free, part)) for name, part in SPLIT.items()}
    assert norms["value"] != pytest.approx(norms["policy"], rel=0.1)
    small, large = sorted(norms.values())
    for most in (small / 2, (small + large) / 2, 2 * large):
        ours = learner(ppo_epochs=1, max_grad_norm=most)
        ours.update(experience, 0)
        for name, part in SPLIT.items():
            want = min(norms[name], most)
            assert norm(gradients(ours, part)) == pytest.approx(want, rel=1e-4)
    for name in SPLIT:  # before clipping
        clipped = learner(ppo_epochs=1, max_grad_norm=small / 2).update(experience, 0)
        assert clipped[f"{name}/grad_norm"] == pytest.approx(norms[name], rel=1e-4)
        assert metrics[f"{name}/grad_norm"] == pytest.approx(norms[name], rel=1e-4)


# --- what may be added


def test_an_entropy_bonus_raises_the_entropy():
    ours = learner(entropy_coef=0.5, rate=0.01)
    experience = sampled(ours)
    ours.update(replace(experience, advantages_BT=torch.zeros_like(experience.advantages_BT)), 0)
    assert float(sampled(ours).entropy_BT.sum()) > float(experience.entropy_BT.sum()) + 0.1


def texts() -> list[TokenRow]:
    """Each with a first token of its own."""
    every = []
    for n in range(16):
        ids = np.array([40 + n, *np.random.default_rng([9, n]).integers(3, 64, 2 + n % 5)])
        every.append(TokenRow(ids.astype(np.int32), np.arange(len(ids)) > n % 2, "texts"))
    return every


def ptx_steps(layout: Layout) -> Steps:
    return Steps(texts(), {}, layout, batch_size=2, epochs=1.0, max_steps=None, seed=0)


@pytest.mark.parametrize("micro_tokens", [1, 10_000])
def test_ptx_adds_its_coefficient_times_the_mean_nll(micro_tokens):
    batches = ptx_steps(Layout(micro_tokens, False, 5))
    plain = learner(ptx_coef=0.3, **ONCE)
    ours = learner(ptx_coef=0.3, ptx=batches, **ONCE)
    experience = moved(sampled(ours))
    nlls = []
    for n in batches.numbers(3):
        ids = torch.tensor(texts()[n].ids_T).long()
        logp_TV = ours.model.policy(input_ids=ids[None]).logits[0].log_softmax(-1)
        logp_T = logp_TV[torch.arange(len(ids) - 1), ids[1:]]
        nlls.append(-logp_T[torch.tensor(texts()[n].loss_mask_T)[1:]])
    mean = torch.cat(nlls).mean()
    extra = naive_gradients(ours, 0.3 * mean)
    metrics = ours.update(experience, 3)
    plain.update(experience, 3)
    alike(gradients(ours), {k: g + extra[k] for k, g in gradients(plain).items()})
    assert norm(extra) > 0.1
    assert metrics["loss/ptx_avg"] == pytest.approx(float(mean.detach()), rel=1e-5)


def test_optimizer_steps_take_one_ptx_batch_after_another():
    ours = learner(ppo_epochs=2, minibatches=2, ptx=ptx_steps(Layout(10_000, False, 5)))
    experience, watched = sampled(ours), Watched(ours, texts=True)
    for step in (0, 1):
        ours.update(experience, step)
    assert [len(part) for part in watched.steps] == [2] * 8
    assert sorted(chain(*watched.steps)) == list(range(40, 56))


# --- several processes


SHARES = [[0, 2, 4], [1, 3, 5, 6]]
SHARED = {"ppo_epochs": 1, "max_grad_norm": 0.5, "entropy_coef": 0.1}


def one_of_two(folder: str) -> None:
    """What a process learns from its share; called in a process of its own."""
    torch.set_num_threads(1)
    ours = learner(16, ptx=ptx_steps(Layout(10_000, False, 5)), **SHARED)
    rank = ours.accelerator.process_index
    experience = torch.load(f"{folder}/experience.pt", weights_only=False)
    metrics = ours.update(picked(experience, SHARES[rank]), 0)
    ours.model = ours.accelerator.unwrap_model(ours.model)
    torch.save((metrics, weights(ours)), f"{folder}/{rank}.pt")
    ours.accelerator.end_training()


def test_two_processes_learn_what_one_does(tmp_path):
    """Though their shares are of unlike size: losses are over the tokens of both."""
    one = learner(ptx=ptx_steps(Layout(10_000, False, 5)), **SHARED)
    experience = moved(sampled(one))
    metrics = one.update(experience, 0)
    torch.save(experience, tmp_path / "experience.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"ACCELERATE_USE_CPU": "true"}
    script = f"from tests.train.ppo.test_update import one_of_two; one_of_two({str(tmp_path)!r})"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT,
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [process.wait(120) for process in processes] == [0, 0]
    for rank in (0, 1):
        theirs, moved_to = torch.load(tmp_path / f"{rank}.pt")
        assert theirs == pytest.approx(metrics, rel=1e-4)
        for name, weight in weights(one).items():
            torch.testing.assert_close(moved_to[name], weight)
