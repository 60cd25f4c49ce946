"""PPO that runs a prompt once for its samples: all it reads and learns is what it would be apart.

The oracle is the plain layout, which other tests hold against transformers' own forwards.
"""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

import numpy as np
from accelerate.state import AcceleratorState
from transformers import LlamaForSequenceClassification

from aif.config.settings import PPOSettings
from aif.errors import InputError
from aif.models.decode import SampledTokens
from aif.train.batch import Layout
from aif.train.model import without_dropout
from aif.train.ppo.actor_critic import ActorCritic, Reference
from aif.train.ppo.experience import Experience, experience, micro_batches, read, tokens_of
from aif.train.ppo.setup import Prepared, check_settings, made
from aif.train.ppo.train import ppo
from aif.train.ppo.update import Learner
from aif.train.prefix_groups import SharingLayout
from aif.train.prefix_mask import before
from aif.train.tokens import TokenRow
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


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """Bits are those of a number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def row(prompt: int, response: int, n: int) -> TokenRow:
    asked = np.random.default_rng([1, prompt]).integers(3, 64, prompt).astype(np.int32)
    drawn = np.random.default_rng([2, n]).integers(3, 64, response).astype(np.int32)
    return tokens_of(asked, SampledTokens(tuple(drawn.tolist()), True))


def rows() -> list[TokenRow]:
    return [row(*shape, n) for n, shape in enumerate(SHAPES)]


def actor(critic: bool = True, lora: bool = False) -> ActorCritic:
    """A policy whose attention and distributions are far from even."""
    policy = tiny_model(vocab_size=64, initializer_range=0.3)
    scorer = None
    if critic:
        config = copy.deepcopy(policy.config)
        config.num_labels = 1
        scorer = LlamaForSequenceClassification(config)
    if lora:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        policy = peft.get_peft_model(policy, config)
    model = ActorCritic(policy, scorer, 0.7, shift=0.3, scale=2.0)
    without_dropout(model)
    return model


def learner(layout: Layout, critic: bool = True, lora: bool = False, **settings) -> Learner:
    accelerator, model = accelerate.Accelerator(cpu=True), actor(critic, lora)
    learning = [w for w in model.parameters() if w.requires_grad]
    model, stepper = accelerator.prepare(model, torch.optim.SGD(learning, lr=1e-5))
    settings = {"ppo_epochs": 1, "max_grad_norm": 0.0, "entropy_coef": 0.1} | settings
    return Learner(accelerator, model, stepper, layout, PPOSettings(samples=4, **settings))


def told(model: ActorCritic, layout: Layout, asked: list[TokenRow] | None = None):
    other = None if hasattr(model.policy, "disable_adapter") else tiny_model(vocab_size=64)
    asked = rows() if asked is None else asked
    return read(asked, model, Reference(model, other and other.eval()), layout, CPU)


def known(ours: Learner) -> Experience:
    """As if the model had moved since it drew: some ratios and values are clipped."""
    found, draw = told(ours.model, PLAIN), torch.Generator().manual_seed(4)
    scores_B = torch.randn(len(SHAPES), generator=draw)
    names = [str(prompt) for prompt, _ in SHAPES]
    made = experience(rows(), names, scores_B, found, ours.settings, 0.1, lambda x: x)
    for old_BT in (made.logprobs_BT, made.values_BT):
        if old_BT is not None:
            old_BT += 0.3 * torch.randn(old_BT.shape, generator=draw) * made.mask_BT
    return made


def gradients(ours: Learner) -> dict[str, torch.Tensor]:
    named = ours.model.named_parameters()
    return {name: w.grad.clone() for name, w in named if w.requires_grad}


def alike(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(want)
    for name, value in want.items():
        assert value.norm() > 0
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


# --- how they lie


def test_a_prompts_responses_are_branches_of_one_row():
    ids = (7, 8), (9,)
    first = tokens_of(np.array([11, 12, 13]), SampledTokens(ids[0], True))
    other = tokens_of(np.array([21, 22]), SampledTokens(ids[0], True))
    second = tokens_of(np.array([11, 12, 13]), SampledTokens(ids[1], True))
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
    asked = rows()
    found = list(micro_batches(asked, layout))
    assert sorted(chain(*(numbers for numbers, _ in found))) == list(range(len(asked)))
    for numbers, batch in found:
        assert batch.input_ids.numel() <= layout.micro_tokens or len(numbers) == 1
        learned = np.concatenate([asked[n].ids_T[asked[n].loss_mask_T] for n in numbers])
        assert batch.input_ids[batch.loss_mask].tolist() == learned.tolist()


def test_a_prompt_is_run_once_by_policy_critic_and_reference_and_no_head_for_it():
    model, other, ran, heads = actor(), tiny_model(vocab_size=64).eval(), [], []
    for body in (model.policy.model, model.critic.model, other.model):
        body.register_forward_pre_hook(
            lambda module, args, given: ran.append(given["input_ids"].numel()), with_kwargs=True
        )
    for head in (model.policy.lm_head, model.critic.score, other.lm_head):
        head.register_forward_hook(lambda module, args, out: heads.append(out.shape[0]))
    ran.clear()
    asked = [row(9, 4, n) for n in range(3)]
    read(asked, model, Reference(model, other), SHARED, CPU)
    assert ran == [9 + 3 * 4] * 3
    assert heads == [3 * 4] * 3


def test_the_budget_parts_a_prompts_responses_where_it_has_to():
    asked = [row(9, 5, n) for n in range(4)]
    for micro_tokens, parts in ((29, [4]), (28, [1, 3]), (19, [2, 2]), (14, [1] * 4)):
        layout = SharingLayout(micro_tokens, False, 5, call_tokens=1, attention_tokens=1 << 20)
        found = [numbers for numbers, _ in micro_batches(asked, layout)]
        assert sorted(map(len, found)) == parts


@pytest.mark.parametrize(("attention_tokens", "trees"), [(1 << 20, 1), (100, 2), (10, 4)])
def test_long_responses_are_run_apart_where_attention_would_cost_more(attention_tokens, trees):
    asked = [row(9, 20, n) for n in range(4)]
    layout = SharingLayout(10_000, False, 5, attention_tokens=attention_tokens)
    ((_, batch),) = micro_batches(asked, layout)
    assert len(batch.input_ids) == trees
    assert (batch.branch is None) == (trees == 4)


def test_where_no_prompt_comes_twice_nothing_is_a_branch():
    asked = rows()[-4:]
    for ours, theirs in zip(SHARED.batches(asked), PLAIN.batches(asked), strict=True):
        assert [id(a) for a in ours[0]] == [id(b) for b in theirs[0]]
        assert torch.equal(ours[1].input_ids, theirs[1].input_ids)
        assert ours[1].branch is ours[1].position_ids is None


# --- what they say


@pytest.mark.parametrize("layout", SHARINGS)
@pytest.mark.parametrize(("critic", "lora"), [(True, False), (False, True), (True, True)])
def test_all_that_is_read_is_what_it_is_apart(layout, critic, lora):
    model = actor(critic, lora)
    want, found = told(model, PLAIN), told(model, layout)
    assert set(found) == {"logprobs", "values", "entropy", "ref_logprobs"}
    assert (want["values"] is not None) == critic
    assert (want["logprobs"] - want["ref_logprobs"]).abs().max() > 0.1
    for name, want_BT in want.items():
        if want_BT is not None:
            torch.testing.assert_close(found[name], want_BT, rtol=1e-5, atol=1e-5)
            assert want_BT.std() > 0.1


def test_logits_that_are_more_than_the_head_are_read_too():
    model = actor()
    want = told(model, SHARED)
    model.head_is_all = False
    for name, found_BT in told(model, SHARED).items():
        torch.testing.assert_close(found_BT, want[name], rtol=1e-5, atol=1e-5)


def test_the_order_of_the_rows_changes_nothing():
    model, order = actor(), [4, 10, 2, 6, 0, 5, 8, 1, 3, 9, 7]
    want, asked = told(model, SHARED), rows()
    found = told(model, SHARED, [asked[n] for n in order])
    for name, want_BT in want.items():
        torch.testing.assert_close(found[name], want_BT[order], rtol=1e-5, atol=1e-5)


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
    found = known(apart)
    want = apart.update(found, 0)
    assert ours.update(found, 0) == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert 0 < want["policy/clipfrac_avg"] < 1
    alike(gradients(ours), gradients(apart))


def test_a_gradient_is_the_same_to_the_bit_each_time_with_threads():
    torch.set_num_threads(2)
    branch_BT = torch.cat([torch.zeros(8), torch.arange(1, 4000)])[None]
    draw = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(1, 4007, 64, generator=draw, requires_grad=True)
    weights_BTD = torch.randn(1, 4007, 64, generator=draw)
    found = []
    for _ in range(10):
        told_BTD = before(hidden_BTD, branch_BT)[branch_BT > 0]
        (told_BTD * weights_BTD[branch_BT > 0]).sum().backward()
        found.append(hidden_BTD.grad)
        hidden_BTD.grad = None
    torch.set_num_threads(1)
    assert all(torch.equal(found[0], other) for other in found[1:])


# --- the stage


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_toy(tmp_path_factory.mktemp("models") / "toy")


SMALL = {"max_steps": 2, "batch_size": 4, "samples": 4, "ppo_epochs": 1, "kl_coef": 0.1}


def layout_of(path: Path, model: Path, **options) -> type:
    run = toy_run(path, model, **SMALL | options)
    algorithm = made(run, Prepared(run, check_settings(run), {}))
    assert algorithm.layout is algorithm.learner.layout
    return type(algorithm.layout)


def test_it_shares_prompts_unless_it_is_told_not_to_or_has_none_to_share(tmp_path, model):
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
    algorithm = made(run, Prepared(run, check_settings(run), {}))
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
