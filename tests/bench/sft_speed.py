"""SFT throughput: aif against trl's SFTTrainer, on real dialogues, and whether losses agree.

    python tests/bench/sft_speed.py [--model smollm2-135m] [--rows 48] [--batch-size 8] [--rounds 3]

Data: HH helpful-rejection-sampled, its chosen responses, prompts in the model's chat template, loss
on the response and its end. All train the same rows, the same model from the same weights, float32
weights with bfloat16 autocast where the hardware has it, AdamW (torch), a linear schedule,
max_length 1024 and the same number of sequences an optimizer step.

    default    trl as it comes: gradient checkpointing, batches in random order
    grouped    the same with batches grouped by length
    tuned      and no gradient checkpointing

"aif packed" is sft.packing = true: one row a micro-batch, no padding.

Rounds are interleaved in one process; each counts real tokens (no padding) from the start of the
first optimizer step to the end of the last. The ratios are medians of ratios within a round. At the
end the loss of one step on the same rows is compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import MethodType

import torch
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from aif.config.settings import Settings, SFTSettings
from aif.data.readers import read_dialogues
from aif.models.load import load_model, load_tokenizer, torch_dtype, usable_device
from aif.progress import Progress
from aif.run import Run
from aif.train.batch import Layout, Steps
from aif.train.examples import Example
from aif.train.logprobs import nll_loss
from aif.train.metrics import Metrics
from aif.train.model import load_for_training, micro_batch, packs
from aif.train.tokens import Tokeniser
from aif.train.trainer import StepTrainer, Training
from tests.bench.training import Clock, Contenders, compare, quiet

MAX_TOKENS = 1024
HH = "hh/helpful_rejection_sampled.jsonl"


class Work:
    """The rows, as text for trl and as tokens for aif: the same tokens, which is checked."""

    def __init__(self, args: argparse.Namespace, rows: int):
        self.args = args
        self.tokenizer, _ = load_tokenizer(args.model)
        dialogues = [messages for _, messages in read_dialogues(str(args.data / HH))][:rows]
        self.tokens = list(
            Tokeniser(self.tokenizer, MAX_TOKENS).dialogues(
                [Example(str(n), "", "hh", messages) for n, messages in enumerate(dialogues)]
            )
        )
        self.rows = []
        for messages, found in zip(dialogues, self.tokens, strict=True):
            prompt = self.tokenizer.apply_chat_template(
                messages[:-1], add_generation_prompt=True, tokenize=False
            )
            cut = int(found.loss_mask_T.argmax())
            row = {"prompt": prompt, "completion": self.tokenizer.decode(found.ids_T[cut:])}
            assert self.tokenizer(prompt + row["completion"])["input_ids"] == list(found.ids_T)
            self.rows.append(row | {"length": len(found)})
        self.n_tokens = sum(map(len, self.tokens))
        self.steps = -(-len(self.rows) // args.batch_size)


def trl_run(
    work: Work, scratch: str, steps: int, dtype: str = "auto", **options
) -> tuple[float, float]:
    """(seconds, loss of the first step) of trl over `steps` steps."""
    args = work.args
    bf16 = torch_dtype(dtype, usable_device(args.device)) == torch.bfloat16
    config = SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=args.batch_size,
        max_steps=steps,
        max_length=MAX_TOKENS,
        completion_only_loss=True,
        learning_rate=2e-5,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        bf16=bf16,
        use_cpu=usable_device(args.device).type == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=load_model(args.model, "float32", args.device),
        args=config,
        train_dataset=Dataset.from_list(work.rows),
        processing_class=work.tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock.seconds, next(e["loss"] for e in trainer.state.log_history if "loss" in e)


def aif_run(work: Work, scratch: str, steps: int, **options) -> tuple[float, float]:
    """The same of aif."""
    args = work.args
    settings = SFTSettings(schedule="linear", warmup_ratio=0.0, device=args.device, **options)
    model = load_for_training(args.model, settings)
    most, call = micro_batch(model, settings)
    layout = Layout(most, packs(model, settings), work.tokenizer.pad_token_id, call)
    made = Steps(
        work.tokens, {}, layout, batch_size=args.batch_size, epochs=1.0, max_steps=steps, seed=0
    )
    model.forward = MethodType(nll_loss(model), model)
    run = Run(Path(scratch), Settings())
    training = Training(
        "sft", model, made, None, settings, Path(scratch) / "c", {}, Metrics(run, "sft"),
        Progress(quiet=True),
    )  # fmt: skip
    clock = Clock()
    trainer = StepTrainer(training)
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds, next(e["loss"] for e in trainer.state.log_history if "loss" in e)


TUNED = {"gradient_checkpointing": False}
GROUPED = {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
GROUPED |= {"remove_unused_columns": False}


def contenders(work: Work) -> Contenders:
    """What is compared, by name; each runs once over all rows."""
    found = {
        "aif": lambda at: aif_run(work, at, work.steps)[0],
        "aif packed": lambda at: aif_run(work, at, work.steps, packing=True)[0],
        "trl default": lambda at: trl_run(work, at, work.steps)[0],
        "trl grouped": lambda at: trl_run(work, at, work.steps, **GROUPED)[0],
        "trl tuned": lambda at: trl_run(work, at, work.steps, **GROUPED, **TUNED)[0],
    }
    return {
        name: run for name, run in found.items() if not work.args.only or name in work.args.only
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences an optimizer step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of contenders")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    args = parser.parse_args()
    if not (args.data / HH).exists():
        sys.exit(f"{args.data / HH} is not there; --data names the folder")
    quiet()
    work = Work(args, args.rows)
    place = usable_device(args.device)
    print(
        f"{args.model} on {place}, {torch.get_num_threads()} threads, "
        f"{str(torch_dtype('auto', place)).removeprefix('torch.')} products: "
        f"{len(work.rows)} rows, "
        f"{work.n_tokens:,} tokens, {args.batch_size} sequences a step"
    )
    compare(contenders(work), args.rounds, work.n_tokens, "tokens/s")
    with tempfile.TemporaryDirectory() as scratch:
        first = Work(args, args.batch_size)  # one step over all of them
        for dtype in ("float32", "bfloat16"):
            ours, theirs = (
                one(first, f"{scratch}/first", 1, dtype=dtype)[1] for one in (aif_run, trl_run)
            )
            print(
                f"first loss, {dtype} products: aif {ours:.6f}, trl {theirs:.6f}, "
                f"apart by {abs(ours / theirs - 1):.1e}"
            )


if __name__ == "__main__":
    main()
