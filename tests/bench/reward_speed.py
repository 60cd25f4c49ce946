"""Reward-model training: aif against trl's RewardTrainer, on real pairs, and whether they agree.

    python tests/bench/reward_speed.py [--model smollm2-135m] [--rows 48] [--rounds 3]

Data: HH harmless-base, people's choices. All train the same token ids from the same weights and
score head, hard labels, float32 weights with bfloat16 autocast where the hardware has it, AdamW
(torch), a linear schedule, max_length 1024 and the same number of pairs an optimizer step.

    aif         prompts run once, micro-batches of like lengths
    aif plain   each response with its prompt
    default     trl as it comes: gradient checkpointing, batches in random order
    grouped     the same with batches grouped by length
    tuned       and no gradient checkpointing

Rounds are interleaved in one process. First, one batch's loss and gradients are compared in
float32. --accuracy N also trains both on N pairs and holds their accuracy on 200 others against
each other.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from types import MethodType

import torch
import transformers
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from aif.config.settings import RewardSettings, Settings
from aif.data.readers import read_pairs
from aif.models.load import load_reward_model, load_tokenizer, torch_dtype, usable_device
from aif.progress import Progress
from aif.run import Run
from aif.train.batch import Steps
from aif.train.metrics import Metrics
from aif.train.model import load_for_training, micro_batch, without_dropout
from aif.train.prefix_groups import PrefixLayout
from aif.train.reward.data import tokenised
from aif.train.reward.labeled import LabeledComparison, PromptGroup
from aif.train.reward.losses import OBJECTIVES
from aif.train.reward.model import score_loss, scores_of
from aif.train.tokens import Tokeniser
from aif.train.trainer import StepTrainer, Training
from tests.bench.training import Clock, Contenders, compare, quiet

MAX_TOKENS = 1024
HH = "hh/harmless_base.jsonl"
GROUPED = {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
GROUPED |= {"remove_unused_columns": False}
TUNED = {"gradient_checkpointing": False}


class Work:
    """Pairs as trees for aif and as token ids for trl, and the model that all start from."""

    def __init__(self, args: argparse.Namespace, folder: str, pairs: list):
        self.args, self.folder = args, folder
        self.tokenizer, _ = load_tokenizer(folder)
        groups: dict[str, PromptGroup] = {}
        for pair in pairs:
            found = pair.comparison
            # One group a pair, so that a step has as many pairs for both.
            group = groups.setdefault(found.id, PromptGroup(found.prompt, "hh"))
            group.add(LabeledComparison(found, p_human=pair.human.p_first))
        self.trees = list(tokenised(list(groups.values()), Tokeniser(self.tokenizer, MAX_TOKENS)))
        self.rows = []
        for tree in self.trees:
            both = [[*tree.shared_T.tolist(), *branch.tolist()] for branch in tree.branches]
            chosen, rejected = both if tree.p_first[0] > 0.5 else both[::-1]
            self.rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
            self.rows[-1]["length"] = max(map(len, both))
        self.steps = -(-len(self.rows) // args.batch_size)

    def layout(self, model, settings: RewardSettings) -> PrefixLayout:
        most, call = micro_batch(model, settings)
        objective = OBJECTIVES["pairs"](settings)
        share = settings.share_prompt is not False
        return PrefixLayout(most, self.tokenizer.pad_token_id, share, objective, call)


def aif_trainer(work: Work, scratch: str, clock: Clock, **options) -> StepTrainer:
    args = work.args
    settings = RewardSettings(
        schedule="linear", warmup_ratio=0.0, device=args.device, max_tokens=MAX_TOKENS,
        learning_rate=args.learning_rate, **options,
    )  # fmt: skip
    model = load_for_training(work.folder, settings, load_reward_model)
    without_dropout(model)
    layout = work.layout(model, settings)
    steps = Steps(
        work.trees, {}, layout, batch_size=args.batch_size, epochs=1.0, max_steps=None, seed=0
    )
    model.forward = MethodType(score_loss(layout.objective), model)
    run = Run(Path(scratch), Settings())
    training = Training(
        "reward", model, steps, None, settings, Path(scratch) / "c", {}, Metrics(run, "reward"),
        Progress(quiet=True),
    )  # fmt: skip
    trainer = StepTrainer(training)
    trainer.add_callback(clock)
    return trainer


def trl_trainer(work: Work, scratch: str, clock: Clock, dtype: str = "auto", **options):
    args = work.args
    place = usable_device(args.device)
    config = RewardConfig(
        output_dir=scratch,
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=1,
        max_length=MAX_TOKENS,
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        bf16=torch_dtype(dtype, place) == torch.bfloat16,
        use_cpu=place.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = RewardTrainer(
        model=load_reward_model(work.folder, "float32", args.device),
        args=config,
        train_dataset=Dataset.from_list(work.rows),
        processing_class=work.tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def seconds(make, work: Work, scratch: str, **options) -> float:
    clock = Clock()
    make(work, scratch, clock, **options).train()
    return clock.seconds


def contenders(work: Work) -> Contenders:
    found = {
        "aif": lambda at: seconds(aif_trainer, work, at),
        "aif plain": lambda at: seconds(aif_trainer, work, at, share_prompt=False),
        "trl default": lambda at: seconds(trl_trainer, work, at),
        "trl grouped": lambda at: seconds(trl_trainer, work, at, **GROUPED),
        "trl tuned": lambda at: seconds(trl_trainer, work, at, **GROUPED, **TUNED),
    }
    return {k: run for k, run in found.items() if not work.args.only or k in work.args.only}


def agreement(work: Work, scratch: str) -> None:
    """Loss and gradients of one batch, float32."""
    ours = aif_trainer(work, scratch, Clock(), dtype="float32")
    step = ours.training.steps.layout.step(work.trees)
    loss = ours.training_step(ours.model, step)
    peer = trl_trainer(work, scratch, Clock(), dtype="float32", **TUNED)
    batch = peer._prepare_inputs(peer.data_collator(work.rows))
    theirs = peer.compute_loss(peer.model, batch)
    theirs.backward()
    off = {
        name: float((p.grad - q.grad).norm() / q.grad.norm())
        for (name, p), (_, q) in zip(
            ours.model.named_parameters(), peer.model.named_parameters(), strict=True
        )
        if q.grad is not None and float(q.grad.norm()) > 0
    }
    print(
        f"one batch in float32: loss aif {float(loss):.7f}, trl {float(theirs):.7f}, apart by "
        f"{abs(float(loss) / float(theirs) - 1):.1e}; gradients of {len(off)} tensors apart by "
        f"{max(off.values()):.1e} at most"
    )


def accuracies(work: Work, test: Work, scratch: str) -> None:
    """Accuracy on pairs that neither trained on."""
    for name, make, options in (
        ("aif", aif_trainer, {}),
        ("trl", trl_trainer, GROUPED),  # with gradient checkpointing, for the memory
    ):
        trainer = make(work, f"{scratch}/{name}", Clock(), **options)
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        layout = test.layout(model, RewardSettings())
        right = 0.0
        for group in layout.groups(test.trees):
            batch = layout.batch(group).inputs(model.device)
            targets = batch.pop("targets")
            with torch.no_grad():
                scores = scores_of(model, **batch)
            delta = scores[targets["first"]] - scores[targets["second"]]
            right += float(((delta > 0) == (targets["p_first"] > 0.5)).float().sum())
        print(f"{name}: {right / len(test.trees):.3f} of {len(test.trees)} held-out pairs right")
        del trainer, model
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs an optimizer step")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accuracy", type=int, metavar="N", help="train both on N pairs")
    parser.add_argument("--only", nargs="*", help="names of contenders")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    args = parser.parse_args()
    if not (args.data / HH).exists():
        sys.exit(f"{args.data / HH} is not there; --data names the folder")
    quiet()
    pairs = list(read_pairs(str(args.data / HH)))
    with tempfile.TemporaryDirectory() as scratch:
        start = f"{scratch}/start"
        model = load_reward_model(args.model, "float32", "cpu", new_head=0)
        tokenizer, _ = load_tokenizer(args.model)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(start)
        tokenizer.save_pretrained(start)
        del model
        agreement(Work(args, start, pairs[: args.batch_size]), f"{scratch}/one")
        work = Work(args, start, pairs[: args.rows])
        place = usable_device(args.device)
        print(
            f"{args.model} on {place}, {torch.get_num_threads()} threads, "
            f"{str(torch_dtype('auto', place)).removeprefix('torch.')} products: "
            f"{len(work.rows)} pairs, {args.batch_size} a step"
        )
        if args.rounds:
            compare(contenders(work), args.rounds, len(work.rows), "pairs/s")
        if args.accuracy:
            found = [Work(args, start, part) for part in (pairs[: args.accuracy], pairs[-200:])]
            accuracies(*found, f"{scratch}/accuracy")


if __name__ == "__main__":
    main()
