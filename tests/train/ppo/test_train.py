"""PPO as a stage: what it learns, what it leaves, and what it says of bad settings and numbers."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from aif.errors import AifError, InputError
from aif.store import checkpoint
from aif.train.ppo.evaluate import best_step, evals_since_best
from aif.train.ppo.train import ppo
from tests.conftest import read_jsonl, write_jsonl
from tests.support.ppo import one_thread
from tests.support.tiny import Said
from tests.support.toy import LENGTH, of_step, save_toy, toy_run, toy_tokenizer

quickly = pytest.fixture(scope="module", autouse=True)(one_thread)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Path:
    return save_toy(
        tmp_path_factory.mktemp("models") / "scorer", "LlamaForSequenceClassification", num_labels=1
    )


def quick_run(path: Path, model: Path, reward: str | dict = "share", **options):
    return toy_run(path, model, reward, **{"max_steps": 2, "batch_size": 4} | options)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_comes_to_the_optimum_of_a_toy(tmp_path, model, seed):
    run = toy_run(tmp_path / "run", model, seed=seed)
    summary = ppo(run, Said())
    scores = of_step(run, "objective/scores")
    assert len(scores) == 30
    assert scores[0] < 0.15
    assert summary["last"]["objective/scores"] >= 0.95
    assert summary["last"]["objective/kl"] > 5


def test_rloo_comes_to_the_optimum_without_a_critic(tmp_path, model):
    run = toy_run(tmp_path / "run", model, algorithm="rloo", samples=4, batch_size=8)
    assert ppo(run, Said())["last"]["objective/scores"] >= 0.95
    assert not (run.path / "ppo-critic").exists()


def test_reinforce_learns(tmp_path, model):
    run = toy_run(tmp_path / "run", model, algorithm="reinforce", max_steps=20)
    summary = ppo(run, Said())
    assert summary["last"]["objective/scores"] > 2 * summary["first"]["objective/scores"]


def test_a_dear_kl_keeps_the_policy_near_its_reference(tmp_path, model):
    last = [
        ppo(toy_run(tmp_path / f"run{coef}", model, kl_coef=coef, max_steps=12), Said())["last"]
        for coef in (0.0, 1.0)
    ]
    assert last[1]["objective/kl"] < last[0]["objective/kl"] / 4
    assert last[1]["objective/scores"] < last[0]["objective/scores"]


def test_a_kl_coefficient_adapts(tmp_path, model):
    run = quick_run(
        tmp_path / "run", model, kl_coef=0.1, kl_target=50.0, kl_horizon=40, max_steps=4
    )
    ppo(run, Said())
    # KL is far below the target: each step takes a fifth off for 4 of 40 responses.
    assert of_step(run, "objective/kl_coef") == pytest.approx([0.1 * 0.98**k for k in range(4)])


def test_what_it_leaves_is_a_model_and_a_critic_that_anyone_loads(tmp_path, model):
    run = quick_run(tmp_path / "run", model)
    summary = ppo(run, Said())
    assert summary["model"] == f"{run.path}/ppo"
    policy = AutoModelForCausalLM.from_pretrained(run.path / "ppo")
    critic = AutoModelForSequenceClassification.from_pretrained(run.path / "ppo-critic")
    assert policy.generation_config.eos_token_id == 1
    assert critic.config.num_labels == 1
    assert checkpoint.fault(run.path / "ppo") is checkpoint.fault(run.path / "ppo-critic") is None
    before = AutoModelForCausalLM.from_pretrained(model)
    moved = [
        not torch.equal(a, b) for a, b in zip(policy.parameters(), before.parameters(), strict=True)
    ]
    assert all(moved)


def test_the_first_step_is_on_policy_and_its_numbers_hang_together(tmp_path, model):
    run = quick_run(tmp_path / "run", model, ppo_epochs=1, kl_coef=0.1, missing_eos_penalty=0.25)
    first = ppo(run, Said())["first"]
    assert first["objective/kl"] == 0.0
    assert first["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-9)
    assert first["policy/clipfrac_avg"] == 0.0
    unended = 1 - first["val/eos_rate"]
    assert first["objective/rlhf_reward"] == pytest.approx(
        first["objective/scores"] - 0.25 * unended, abs=1e-6
    )
    assert first["episode"] == 4
    assert first["val/response_length"] <= LENGTH
    names = {row["name"] for row in read_jsonl(run.path / "metrics.jsonl")}
    assert {"objective/entropy", "loss/value_avg", "policy/grad_norm", "value/grad_norm"} <= names
    assert {"time/rollout_tokens_per_s", "val/explained_variance", "lr", "val/unscored"} <= names


def test_at_rate_zero_nothing_changes_and_the_policy_is_its_reference(tmp_path, model):
    run = quick_run(tmp_path / "run", model, learning_rate=0.0, max_steps=3, kl_coef=0.5)
    ppo(run, Said())
    assert of_step(run, "objective/kl") == [0.0] * 3
    assert of_step(run, "val/ratio") == pytest.approx([1.0] * 3, abs=1e-5)
    before, after = (load_file(p / "model.safetensors") for p in (model, run.path / "ppo"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_in_its_head_start_only_the_critic_learns(tmp_path, model):
    run = quick_run(tmp_path / "run", model, critic_warmup=2, max_steps=3)
    ppo(run, Said())
    assert of_step(run, "objective/kl")[:2] == [0.0, 0.0]
    assert of_step(run, "policy/approxkl_avg")[:2] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert of_step(run, "policy/approxkl_avg")[2] > 0
    assert of_step(run, "loss/value_avg")[1] != of_step(run, "loss/value_avg")[0]


@pytest.mark.parametrize("head", ["reward", "zero"])
def test_the_critic_begins_on_the_scale_of_the_rewards(tmp_path, model, scorer, head):
    from aif.train.ppo.setup import Inputs, build, check_settings

    run = quick_run(tmp_path / "run", model, reward_model=str(scorer))
    config = json.loads((scorer / "config.json").read_text())
    config["aif_reward"] = {"mean": 0.5, "std": 2.0, "chat": False}
    (scorer / "config.json").write_text(json.dumps(config))
    changed = {"reward": {"model": 3.0}, "critic_head": head}
    table = run.settings.ppo.model_copy(update=changed)
    run.settings = run.settings.model_copy(update={"ppo": table})
    algorithm = build(Inputs(run, check_settings(run), {}), run.path)
    prompt = algorithm.prompts[0][0]
    (normalised,) = algorithm.score([prompt.messages], ["a b c"])
    ids = algorithm.tokenizer(f"User: {prompt.messages[0]['content']}\n\nAssistant: a b c")
    ids = torch.tensor([[*ids["input_ids"], 1]])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 1:] = True
    # The value before a token that came after the EOS would be the reward model's score.
    more = torch.cat([ids, ids[:, :1]], 1)
    mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.bool)], 1)
    model = algorithm.learner.model.eval()
    values_N = model(input_ids=more, loss_mask=mask).values_N
    expected = normalised if head == "reward" else 0.0
    assert float(values_N[-1].detach()) == pytest.approx(expected, abs=1e-5)


def test_a_response_without_a_score_is_not_learned_from(tmp_path, model):
    run = quick_run(tmp_path / "run", model, "picky", batch_size=16)
    ppo(run, Said())
    unscored = of_step(run, "val/unscored")
    assert all(0 < n < 16 for n in unscored)
    with pytest.raises(AifError, match="ppo: step 1: none of its responses has a score"):
        ppo(quick_run(tmp_path / "other", model, "never"), Said())


def test_a_mixture_of_rewards_has_a_mean_by_name(tmp_path, model, scorer):
    path = tmp_path / "run"
    functions = {f"{path}/rewards.py:share": 2.0, f"{path}/rewards.py:unshare": 1.0, "model": 0.5}
    run = quick_run(path, model, reward=functions, reward_model=str(scorer))
    first = ppo(run, Said())["first"]
    means = [first[f"objective/scores/{name}"] for name in functions]
    assert means[0] == -means[1]
    assert first["objective/scores"] == pytest.approx(
        2 * means[0] + means[1] + 0.5 * means[2], abs=1e-6
    )


def test_with_adapters_the_reference_is_the_base(tmp_path, model):
    run = quick_run(tmp_path / "run", model, lora={"rank": 4}, max_steps=3, learning_rate=0.05)
    summary = ppo(run, Said())
    assert of_step(run, "objective/kl")[0] == 0.0
    assert summary["last"]["objective/kl"] != 0.0
    assert (run.path / "ppo" / "adapter" / "adapter_model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(run.path / "ppo")
    assert not torch.equal(
        merged.model.layers[0].self_attn.q_proj.weight,
        AutoModelForCausalLM.from_pretrained(model).model.layers[0].self_attn.q_proj.weight,
    )


def test_in_bfloat16_policy_and_reference_begin_as_one(tmp_path, model):
    run = quick_run(tmp_path / "run", model, dtype="bfloat16")
    assert ppo(run, Said())["first"]["objective/kl"] == 0.0


def test_texts_that_are_mixed_in_stay_likely(tmp_path, model):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"prompt": "c", "response": "d e f d e f"}] * 2)
    losses = {}
    for name, ptx in (("without", {}), ("with", {str(texts): 1.0})):
        run = toy_run(tmp_path / name, model, max_steps=12, ptx=ptx)
        ppo(run, Said())
        ids = torch.tensor([toy_tokenizer()("User: c Assistant: d e f d e f")["input_ids"]])
        policy = AutoModelForCausalLM.from_pretrained(run.path / "ppo")
        losses[name] = policy(ids, labels=ids).loss.item()
    assert losses["with"] < losses["without"] - 0.5
    assert of_step(run, "loss/ptx_avg")[-1] < of_step(run, "loss/ptx_avg")[0]


def test_held_out_prompts_are_evaluated_with_a_gold_reward(tmp_path, model):
    path = tmp_path / "run"
    run = toy_run(
        path, model, eval_fraction=0.25, eval_every=5, max_steps=10,
        gold=f"{path}/rewards.py:unshare",
    )  # fmt: skip
    summary = ppo(run, Said())
    rows = read_jsonl(path / "ppo-samples.jsonl")
    assert sorted({row["step"] for row in rows}) == [0, 5, 10]
    assert summary["eval_prompts"] == len(rows) / 3
    for row in rows:
        assert row["score"] == -row["gold"] == row["response"].split().count("a") / 8
    assert of_step(run, "eval/scores") == pytest.approx([-x for x in of_step(run, "eval/gold")])
    assert of_step(run, "eval/scores")[-1] > of_step(run, "eval/scores")[0] + 0.3
    assert of_step(run, "eval/kl")[0] == 0.0
    assert {row["prompt_id"] for row in rows if row["step"] == 0} == {
        row["prompt_id"] for row in rows if row["step"] == 10
    }


def test_it_stops_when_gold_falls_and_ends_with_the_best_weights(tmp_path, model):
    path = tmp_path / "run"
    run = toy_run(
        path, model, eval_fraction=0.25, eval_every=2, max_steps=30, learning_rate=2e-3,
        gold=f"{path}/rewards.py:unshare", stop_when_gold_falls=3,
    )  # fmt: skip
    progress = Said()
    summary = ppo(run, progress)
    gold = of_step(run, "eval/gold")
    best = gold.index(max(gold))
    assert summary["steps"] == 2 * (best + 3) < 30
    assert summary["best_step"] == 2 * best
    assert "ppo: stopped: the gold reward is below its best for 3 evaluations" in progress.lines
    assert summary["eval_after"]["step"] == 2 * best
    kept = path / "checkpoints" / "ppo" / f"checkpoint-{2 * best}"
    ours, theirs = (
        load_file(path / "ppo" / "model.safetensors"),
        load_file(kept / "model.safetensors"),
    )
    assert all(torch.equal(ours[name], theirs[f"policy.{name}"]) for name in ours)


def test_what_is_best_is_the_first_of_the_highest():
    golds = [(0, 0.1), (5, 0.4), (10, 0.4), (15, 0.2)]
    log = [{"step": s, "eval/gold": g, "eval/kl": 0.0} for s, g in golds]
    log.insert(1, {"step": 1, "objective/kl": 0.0})
    assert (best_step(log), evals_since_best(log)) == (5, 2)
    assert (best_step([]), evals_since_best([])) == (None, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "rloo"}, "ppo: samples: got 1, expected 2 or more for rloo"),
        ({"reward": {}}, "ppo: reward: got {}, expected model, judge or MODULE:FUNCTION"),
        ({"load_best": True}, "ppo: gold: got nothing, expected judge or MODULE:FUNCTION"),
        ({"reward": {"modle": 1.0}}, "ppo: reward: got 'modle', expected model, judge or"),
        ({"reward": {"nowhere:f": 1.0}}, "ppo: reward: got 'nowhere:f' "),
        ({"reward": {"model": 1.0}}, "/reward: not there or not complete; `aif reward"),
        ({"response_tokens": 63}, "none of 8 prompts leaves room for 63 tokens"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"trackers": ["nowhere"]}, "ppo: trackers: got 'nowhere', expected one that is installed"),
    ],
)
def test_wrong_settings_stop_before_the_first_step(tmp_path, model, options, message, monkeypatch):
    monkeypatch.setattr("aif.train.ppo.train.build", lambda *_: pytest.fail("it goes on"))
    with pytest.raises(AifError) as error:
        ppo(quick_run(tmp_path / "run", model, **options), Said())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rewards_of_the_wrong_shape_stop_before_the_first_step(tmp_path, model, monkeypatch):
    monkeypatch.setattr("aif.train.ppo.train.build", lambda *_: pytest.fail("it goes on"))
    for name, message in (("one", "got 1 values, expected 2 numbers"), ("broken", "got nan")):
        with pytest.raises(AifError, match=message):
            ppo(quick_run(tmp_path / name, model, name), Said())


def test_a_greedy_policy_cannot_explore(tmp_path, model):
    run = quick_run(tmp_path / "run", model)
    policy = run.settings.policy.model_copy(update={"temperature": 0.0})
    run.settings = run.settings.model_copy(update={"policy": policy})
    with pytest.raises(InputError, match="ppo: temperature: got 0, expected more than 0"):
        ppo(run, Said())


def test_a_critic_with_other_tokens_is_an_error(tmp_path, model):
    other = save_toy(tmp_path / "other")
    toy_tokenizer(["<pad>", "<eos>", "<unk>", *"nopqrstuvwxyz"]).save_pretrained(other)
    with pytest.raises(InputError, match="whose tokenizer is not the policy's"):
        ppo(quick_run(tmp_path / "run", model, critic=str(other)), Said())


def test_prompts_that_are_none_are_an_error(tmp_path, model):
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(InputError, match="no prompts at all"):
        ppo(quick_run(tmp_path / "run", model, prompts=str(empty)), Said())


def test_numbers_that_are_none_stop_it_by_name(tmp_path, model, monkeypatch):
    """A poisoned advantage in step 2: the step, the prompts and the last checkpoint are named."""
    from aif.train.ppo import loop

    real, steps = loop.compute_advantages, []

    def poisoned(*args):
        advantages_BT, returns_BT = real(*args)
        steps.append(1)
        if len(steps) == 2:
            advantages_BT[1, 0] = math.nan
        return advantages_BT, returns_BT

    monkeypatch.setattr(loop, "compute_advantages", poisoned)
    run = quick_run(tmp_path / "run", model, max_steps=3, save_every=1)
    with pytest.raises(AifError) as error:
        ppo(run, Said())
    line = str(error.value)
    assert line.startswith("ppo: step 2: the loss of the responses to prompts ")
    assert " is nan; a lower ppo.learning_rate may help. The last good checkpoint is " in line
    assert line.endswith(f"{run.path}/checkpoints/ppo/checkpoint-1")
    monkeypatch.undo()
    assert ppo(run, Said())["resumed_from"] == 1


def test_a_tracker_gets_the_metrics(tmp_path, model):
    pytest.importorskip("tensorboardX")
    run = quick_run(tmp_path / "run", model, trackers=["tensorboard"])
    ppo(run, Said())
    assert list(run.path.rglob("events.out.tfevents*"))
