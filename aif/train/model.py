"""Loading a model to train, and saving it in the format of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from transformers.utils import is_flash_attn_2_available

from aif.config.settings import BUNDLED, LoraSettings, SFTSettings, TrainSettings
from aif.errors import InputError, shown
from aif.models.load import bundled_folder, load_model, torch_dtype, usable_device
from aif.store import fingerprint
from aif.store.checkpoint import seal

Loader = Callable[[str, str, str], Any]  # (name, dtype, device) -> model
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def load_for_training(name: str, settings: TrainSettings, load: Loader = load_model) -> Any:
    """The model of that name on its device, ready for `Trainer`. With `lora` only its adapters
    learn. `load(name, dtype, device)` loads it.

    Weights that learn are float32, and matrix products bfloat16 if the hardware has them
    (autocast): a bfloat16 weight has 8 bits and loses an update smaller than its 256th. Weights
    that adapters leave frozen lose nothing, and are loaded in the type of the products.
    """
    place = usable_device(settings.device)
    kind = torch_dtype(settings.dtype, place)
    frozen = str(kind).removeprefix("torch.") if settings.lora else "float32"
    model = load(name, frozen, settings.device)
    if place.type == "cuda" and kind == torch.bfloat16 and is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if settings.lora:
        transformers.set_seed(settings.seed)
        model = _with_adapters(model, settings.lora)
        if settings.gradient_checkpointing:
            model.enable_input_require_grads()
    return model.train()


def _with_adapters(model: Any, lora: LoraSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            "lora", "targets", got=shown(lora.targets),
            expected=f"names of the model's linear layers ({shown(str(error), 160)})",
        ) from error  # fmt: skip
    ends = ("lm_head", "embed_tokens")
    tied = [name for name in adapted.targeted_module_names if name.rpartition(".")[2] in ends]
    if tied and model.config.get_text_config().tie_word_embeddings:
        # The two share one weight: a merged adapter of one would also change the other.
        raise InputError(
            "lora", "targets", got=shown(tied[0]), expected="layers without a tied weight"
        )
    return adapted


def inner(model: Any) -> Any:
    """The transformers model itself, adapters or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def forward_is(model: Any, loss: Callable[..., torch.Tensor]) -> Iterator[None]:
    """In the `with`, `model(**batch)` returns `loss(model, **batch)`, the summed loss of a batch.

    So all that wraps the model (autocast, adapters, data parallelism) also wraps the loss.
    """
    model.forward = MethodType(loss, model)
    try:
        yield
    finally:
        vars(model).pop("forward", None)


def learning_rate(settings: TrainSettings) -> float:
    """The learning rate of the settings, or else the default of full fine-tuning or of LoRA."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    return settings.LORA_RATE if settings.lora else settings.FULL_RATE


def packs(model: Any, settings: SFTSettings) -> bool:
    """Whether sequences are packed without padding.

    By default they are if attention itself skips what lies between sequences (flash attention).
    Under sdpa a packed row costs the square of all its tokens; padding by length costs less.
    """
    if settings.packing is not None:
        return settings.packing
    config = inner(model).config.get_text_config()
    isolated = set(getattr(config, "layer_types", None) or ATTENTION) <= ATTENTION
    return isolated and (config._attn_implementation or "").startswith("flash")


def micro_batch(model: Any, settings: TrainSettings) -> tuple[int, int]:
    """(the most positions of a micro-batch, its fixed cost in positions).

    On a CPU a micro-batch costs the weights' cast to bfloat16 and the gradients' cast back, about
    64 positions; on a GPU it costs the launch of its kernels, as much as thousands.
    """
    most, call = (2048, 64) if inner(model).device.type == "cpu" else (16_384, 2048)
    return settings.micro_tokens or most, call


def model_identity(name: str) -> Any:
    """The identity of a model beyond its name: the digest of its files, or a hub id's commit."""
    digest = fingerprint.of_model(str(bundled_folder()) if name == BUNDLED else name)
    return digest or (name, transformers.AutoConfig.from_pretrained(name)._commit_hash)


def without_dropout(model: Any) -> None:
    """Turn dropout off permanently, so that two scores differ only by their responses."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def generation_ends(model: Any, ends: set[int]) -> None:
    """Make generation stop at `ends` too, the tokens that end a response."""
    eos = model.generation_config.eos_token_id
    every = ends | set(eos if isinstance(eos, list) else [eos]) - {None}
    model.generation_config.eos_token_id = (
        sorted(every) if len(every) > 1 else next(iter(every), None)
    )


def save(
    folder: Path,
    model: Any,
    tokenizer: Any,
    name: str,
    about: dict[str, Any],
    load: Loader = load_model,
    finish: Callable[[Any], None] = lambda model: None,
) -> None:
    """Save `model` in `folder`, whole or not at all: float32 safetensors and the tokenizer.

    Adapters go to `folder`/adapter, and are merged in float32 into `name`, the model that they were
    trained on. `finish` may change the model's configuration last.
    """
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    if inner(model) is not model:
        from peft import PeftModel

        model.save_pretrained(new / "adapter")
        base = load(name, "float32", "cpu")
        model = PeftModel.from_pretrained(base, new / "adapter").merge_and_unload()
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    finish(model)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    seal(new, about)
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
