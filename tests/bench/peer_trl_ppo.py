"""The peer of ppo_speed.py: trl 1.12.0's PPOTrainer, in an environment of its own.

    python -m venv trl112
    trl112/bin/pip install torch==2.13.0
    trl112/bin/pip install trl==1.12.0

Reads the job (JSON) on stdin, prints a line of JSON an update: its seconds and what trl logged.
Where the job says `keep` and `keep_at`, the policy is left in keep/STEP, and the score is read as
aif reads it: at an EOS, that is put where a response was cut off.
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
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Teller(TrainerCallback):
    """Prints what is logged, with the seconds since the last time."""

    def on_train_begin(self, args, state, control, **_):
        self.began = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        now = time.perf_counter()
        print(json.dumps({"seconds": now - self.began, **(logs or {})}), flush=True)
        self.began = now


class Keeper(TrainerCallback):
    """Leaves the policy in keep/STEP after some updates."""

    def __init__(self, job):
        self.folder, self.at = job["keep"], job["keep_at"]

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step in self.at:
            model.policy.save_pretrained(f"{self.folder}/{state.global_step}")


def score_at_eos(reward_model, eos_id):
    """trl's get_reward, but that of the reward model ends every response with an EOS."""
    theirs = ppo_trainer.get_reward

    def get_reward(model, query_responses, pad_token_id, context_length):
        if model is not reward_model:
            return theirs(model, query_responses, pad_token_id, context_length)
        ids_BT = torch.nn.functional.pad(query_responses, (0, 1), value=pad_token_id)
        for row in ids_BT:
            end = context_length + int((row[context_length:] != pad_token_id).sum())
            if row[end - 1] != eos_id:
                row[end] = eos_id
        # A column of pads more: trl finds a response's end by the pad after it.
        ids_BT = torch.nn.functional.pad(ids_BT, (0, 1), value=pad_token_id)
        return theirs(model, ids_BT, pad_token_id, context_length)

    return get_reward


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
    if "keep" in job:
        trainer.add_callback(Keeper(job))
        ppo_trainer.get_reward = score_at_eos(trainer.reward_model, tokenizer.eos_token_id)
    trainer.train()


if __name__ == "__main__":
    main()
