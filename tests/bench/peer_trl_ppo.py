"""The peer of ppo_speed.py: trl 1.12.0's PPOTrainer, in an environment of its own.

    python -m venv trl112
    trl112/bin/pip install torch==2.13.0
    trl112/bin/pip install trl==1.12.0

Reads the job (JSON) on stdin, prints a line of JSON an update: its seconds and what trl logged.
"""

import json
import sys
import tempfile
import time
import warnings

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Teller(TrainerCallback):
    """Prints what is logged, with the seconds since the last time."""

    def on_train_begin(self, args, state, control, **_):
        self.began = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        now = time.perf_counter()
        print(json.dumps({"seconds": now - self.began, **(logs or {})}), flush=True)
        self.began = now


def main() -> None:
    warnings.simplefilter("ignore")
    job = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    scorers = [
        AutoModelForSequenceClassification.from_pretrained(
            job["reward"], num_labels=1, dtype=torch.float32
        )
        for _ in range(2)
    ]
    for model in (policy, reference, *scorers):
        model.config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(job["seed"])
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["batch"] // job["micro_batch"],
        local_rollout_forward_batch_size=job["micro_batch"],
        num_mini_batches=1,
        num_ppo_epochs=job["ppo_epochs"],
        total_episodes=job["batch"] * job["steps"],
        response_length=job["response_tokens"],
        stop_token="eos",
        missing_eos_penalty=job["missing_eos_penalty"],
        temperature=job["temperature"],
        kl_coef=job["kl_coef"],
        learning_rate=job["learning_rate"],
        adam_epsilon=1e-5,
        lr_scheduler_type="linear",
        num_sample_generations=0,
        seed=job["seed"],
        bf16=job["bf16"],
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=job["gradient_checkpointing"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
    )
    rows = Dataset.from_list([{"input_ids": ids} for ids in job["prompts"]])
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        callbacks=[Teller()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


if __name__ == "__main__":
    main()
