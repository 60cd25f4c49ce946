"""PPO that runs a prompt once for its samples: all it reads and learns is what it would be apart.

The oracle is the plain layout, which other tests hold against transformers' own forwards.
"""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("peft")

import numpy as np

from aif.config.settings import PPOSettings
from aif.errors import InputError
from aif.train.batch import Layout
from aif.train.model import without_dropout
from aif.train.ppo.actor_critic import ActorCritic, Reference
from aif.train.ppo.experience import (
    Experience,
    ModelOutputs,
    compute_logprobs,
    micro_batches,
)
from aif.train.ppo.setup import Inputs, build, check_settings
from aif.train.ppo.train import ppo
from aif.train.ppo.update import Learner
from aif.train.prefix_groups import SharingLayout
from aif.train.prefix_mask import before
from aif.train.tokens import TokenRow
from tests.support.ppo import experience_of, one_thread, response_row, tiny_actor
from tests.support.tiny import Said, tiny_model
from tests.support.toy import of_step, save_toy, toy_run

CPU = torch.device("cpu")
# TokenRow of prompt and response; prompts of one length are the same.
SHAPES = [(3, 4), (9, 1), (3, 7), (1, 7), (9, 5), (3, 1), (1, 2), (5, 2), (9, 5), (2, 7), (12, 1)]
PLAIN = Layout(10_000, False, pad_id=5)
SHARED = SharingLayout(10_000, False, pad_id=5)
# A budget that parts a prompt's responses, one that parts prompts, and another pad.
SHARINGS = [
    SHARED,
    SharingLayout(18, False, pad_id=5, call_tokens=1),
    SharingLayout(40, False, pad_id=63, call_tokens=1),
    SharingLayout(1, False, pad_id=5),
]


one_process = pytest.fixture(scope="module", autouse=True)(one_thread)


def row(prompt: int, response: int, n: int) -> TokenRow:
    prompt_T = np.random.default_rng([1, prompt]).integers(3, 64, prompt)
    return response_row(prompt_T, np.random.default_rng([2, n]).integers(3, 64, response))


def rows() -> list[TokenRow]:
    return [row(*shape, n) for n, shape in enumerate(SHAPES)]


def actor(critic: bool = True, lora: bool = False) -> ActorCritic:
    model = tiny_actor(critic, lora)
    without_dropout(model)
    return model


def learner(layout: Layout, critic: bool = True, lora: bool = False, **settings) -> Learner:
    accelerator, model = accelerate.Accelerator(cpu=True), actor(critic, lora)
    learning = [w for w in model.parameters() if w.requires_grad]
    model, stepper = accelerator.prepare(model, torch.optim.SGD(learning, lr=1e-5))
    settings = {"ppo_epochs": 1, "max_grad_norm": 0.0, "entropy_coef": 0.1} | settings
    return Learner(accelerator, model, stepper, layout, PPOSettings(samples=4, **settings))


def outputs_of(
    model: ActorCritic, layout: Layout, some: list[TokenRow] | None = None
) -> dict[str, torch.Tensor | None]:
    other = None if hasattr(model.policy, "disable_adapter") else tiny_model(vocab_size=64)
    some = rows() if some is None else some
    return vars(
        compute_logprobs(some, model, Reference(model, other and other.eval()), layout, CPU)
    )


def moved(ours: Learner) -> Experience:
    """As if the model had moved since it sampled: some ratios and values are clipped."""
    outputs, draw = outputs_of(ours.model, PLAIN), torch.Generator().manual_seed(4)
    scores_B = torch.randn(len(SHAPES), generator=draw)
    names = [str(prompt) for prompt, _ in SHAPES]
    experience = experience_of(rows(), names, scores_B, ModelOutputs(**outputs), ours.settings)
    for old_BT in (experience.logprobs_BT, experience.values_BT):
        if old_BT is not None:
            old_BT += 0.3 * torch.randn(old_BT.shape, generator=draw) * experience.response_mask_BT
    return experience


def gradients(ours: Learner) -> dict[str, torch.Tensor]:
    named = ours.model.named_parameters()
    return {name: w.grad.clone() for name, w in named if w.requires_grad}


def alike(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        assert value.norm() > 0
        assert (got[name] - value).norm() <= 1e-5 * value.norm(), name


# --- how they lie


def test_a_prompts_responses_are_branches_of_one_row():
    first, second = response_row([11, 12, 13], [7, 8]), response_row([11, 12, 13], [9])
    other = response_row([21, 22], [7, 8])
    ((numbers, batch),) = micro_batches([first, other, second], SHARED)
    assert numbers == [0, 2, 1]
    assert batch.input_ids.tolist() == [[11, 12, 13, 7, 8, 9], [21, 22, 7, 8, 5, 5]]
    assert batch.loss_mask.tolist() == [
        [False] * 3 + [True] * 3,
        [False, False, True, True] + [False] * 2,
    ]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 3]
    place_BTD = torch.arange(12.0).reshape(2, 6, 1)
    from_BT = before(place_BTD, batch.branch)[:, :, 0]
    assert from_BT[batch.loss_mask].tolist() == [2, 3, 2, 7, 8]


@pytest.mark.parametrize("layout", SHARINGS)
def test_every_response_is_run_once_within_the_budget(layout):
    every = rows()
    batches = list(micro_batches(every, layout))
    assert sorted(chain(*(numbers for numbers, _ in batches))) == list(range(len(every)))
    for numbers, batch in batches:
        assert batch.input_ids.numel() <= layout.micro_tokens or len(numbers) == 1
        learned = np.concatenate([every[n].ids_T[every[n].loss_mask_T] for n in numbers])
        assert batch.input_ids[batch.loss_mask].tolist() == learned.tolist()


def test_a_prompt_is_run_once_by_policy_critic_and_reference_and_no_head_for_it():
    model, other, ran, heads = actor(), tiny_model(vocab_size=64).eval(), [], []
    for body in (model.policy.model, model.critic.model, other.model):
        body.register_forward_pre_hook(
            lambda module, args, kwargs: ran.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
    for head in (model.policy.lm_head, model.critic.score, other.lm_head):
        head.register_forward_hook(lambda module, args, out: heads.append(out.shape[0]))
    ran.clear()
    same_prompt = [row(9, 4, n) for n in range(3)]
    compute_logprobs(same_prompt, model, Reference(model, other), SHARED, CPU)
    assert ran == [9 + 3 * 4] * 3
    assert heads == [3 * 4] * 3


def test_the_budget_parts_a_prompts_responses_where_it_has_to():
    same_prompt = [row(9, 5, n) for n in range(4)]
    for micro_tokens, parts in ((29, [4]), (28, [1, 3]), (19, [2, 2]), (14, [1] * 4)):
        layout = SharingLayout(micro_tokens, False, 5, call_tokens=1, attention_tokens=1 << 20)
        numbers = [some for some, _ in micro_batches(same_prompt, layout)]
        assert sorted(map(len, numbers)) == parts


@pytest.mark.parametrize(("attention_tokens", "trees"), [(1 << 20, 1), (100, 2), (10, 4)])
def test_long_responses_are_run_apart_where_attention_would_cost_more(attention_tokens, trees):
    same_prompt = [row(9, 20, n) for n in range(4)]
    layout = SharingLayout(10_000, False, 5, attention_tokens=attention_tokens)
    ((_, batch),) = micro_batches(same_prompt, layout)
    assert len(batch.input_ids) == trees
    assert (batch.branch is None) == (trees == 4)


def test_where_no_prompt_comes_twice_nothing_is_a_branch():
    last = rows()[-4:]
    for ours, theirs in zip(SHARED.batches(last), PLAIN.batches(last), strict=True):
        assert [id(a) for a in ours[0]] == [id(b) for b in theirs[0]]
        assert torch.equal(ours[1].input_ids, theirs[1].input_ids)
        assert ours[1].branch is ours[1].position_ids is None


# --- what they say


@pytest.mark.parametrize("layout", SHARINGS)
@pytest.mark.parametrize(("critic", "lora"), [(True, False), (False, True), (True, True)])
def test_all_that_is_read_is_what_it_is_apart(layout, critic, lora):
    model = actor(critic, lora)
    want, outputs = outputs_of(model, PLAIN), outputs_of(model, layout)
    assert (want["values_BT"] is not None) == critic
    assert (want["logprobs_BT"] - want["ref_logprobs_BT"]).abs().max() > 0.1
    for name, want_BT in want.items():
        if want_BT is not None:
            torch.testing.assert_close(outputs[name], want_BT, rtol=1e-5, atol=1e-5)
            assert want_BT.std() > 0.1


def test_logits_that_are_more_than_the_head_are_read_too():
    model = actor()
    want = outputs_of(model, SHARED)
    model.head_is_all = False
    for name, output_BT in outputs_of(model, SHARED).items():
        torch.testing.assert_close(output_BT, want[name], rtol=1e-5, atol=1e-5)


def test_the_order_of_the_rows_changes_nothing():
    model, order = actor(), [4, 10, 2, 6, 0, 5, 8, 1, 3, 9, 7]
    want, every = outputs_of(model, SHARED), rows()
    outputs = outputs_of(model, SHARED, [every[n] for n in order])
    for name, want_BT in want.items():
        torch.testing.assert_close(outputs[name], want_BT[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", SHARINGS)
@pytest.mark.parametrize(
    ("critic", "lora", "settings"),
    [
        (True, False, {}),
        (True, True, {"minibatches": 3}),
        (False, True, {"algorithm": "rloo"}),
        (False, False, {"algorithm": "rloo", "minibatches": 2}),
    ],
)
def test_an_update_has_the_gradients_it_has_apart(layout, critic, lora, settings):
    apart, ours = (learner(each, critic, lora, **settings) for each in (PLAIN, layout))
    experience = moved(apart)
    want = apart.update(experience, 0)
    assert ours.update(experience, 0) == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert 0 < want["policy/clipfrac_avg"] < 1
    alike(gradients(ours), gradients(apart))


def test_a_gradient_is_the_same_to_the_bit_each_time_with_threads():
    torch.set_num_threads(2)
    branch_BT = torch.cat([torch.zeros(8), torch.arange(1, 4000)])[None]
    draw = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(1, 4007, 64, generator=draw, requires_grad=True)
    weights_BTD = torch.randn(1, 4007, 64, generator=draw)
    gradients_BTD = []
    for _ in range(10):
        state_ND = before(hidden_BTD, branch_BT)[branch_BT > 0]
        (state_ND * weights_BTD[branch_BT > 0]).sum().backward()
        gradients_BTD.append(hidden_BTD.grad)
        hidden_BTD.grad = None
    torch.set_num_threads(1)
    assert all(torch.equal(gradients_BTD[0], other) for other in gradients_BTD[1:])


# --- the stage


SMALL = {"max_steps": 2, "batch_size": 4, "samples": 4, "ppo_epochs": 1, "kl_coef": 0.1}


def layout_of(path: Path, model: Path, **options) -> type:
    run = toy_run(path, model, **SMALL | options)
    algorithm = build(Inputs(run, check_settings(run), {}), run.path)
    assert algorithm.layout is algorithm.learner.layout
    return type(algorithm.layout)


def test_it_shares_prompts_unless_the_setting_forbids_it_or_none_repeats(tmp_path, model):
    for options, want in (
        ({}, SharingLayout),
        ({"share_prompt": True}, SharingLayout),
        ({"share_prompt": False}, Layout),
        ({"samples": 1}, Layout),
        ({"samples": 1, "share_prompt": True}, Layout),
    ):
        assert layout_of(tmp_path / "run", model, **options) is want


def test_a_policy_or_critic_whose_attention_cannot_is_run_apart(tmp_path, model):
    other = save_toy(tmp_path / "sliding", "LlamaForSequenceClassification", num_labels=1)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace("{", '{"sliding_window": 4,', 1))
    assert layout_of(tmp_path / "a", model, critic=str(other)) is Layout
    with pytest.raises(InputError, match="ppo: share_prompt: got true for a model whose attention"):
        layout_of(tmp_path / "b", model, critic=str(other), share_prompt=True)


def test_texts_that_are_mixed_in_are_run_as_they_are(tmp_path, model):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "c", "response": "d e f"}\n' * 4)
    run = toy_run(tmp_path / "run", model, **SMALL, ptx={str(texts): 1.0})
    algorithm = build(Inputs(run, check_settings(run), {}), run.path)
    assert type(algorithm.learner.ptx.layout) is Layout
    assert type(algorithm.layout) is SharingLayout


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_a_step_is_on_policy_and_learns_what_it_would_apart(tmp_path, model, algorithm):
    runs = {}
    for share in (True, False):
        options = SMALL | {"algorithm": algorithm, "share_prompt": share, "learning_rate": 1e-3}
        runs[share] = toy_run(tmp_path / f"{share}", model, **options)
        first = ppo(runs[share], Said())["first"]
        assert first["objective/kl"] == 0.0
        assert first["val/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert first["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-9)
    for name in ("objective/scores", "objective/kl", "policy/grad_norm", "policy/entropy_avg"):
        ours, theirs = (of_step(runs[share], name) for share in (True, False))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
