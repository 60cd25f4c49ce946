"""`aif evaluate`: who is compared on what, what is measured, what it costs, and how it resumes."""

from __future__ import annotations

import importlib.util
import json
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("sacrebleu")

from typer.testing import CliRunner

from aif.cli.evaluate import evaluate_lines
from aif.cli.verbs import app
from aif.config.settings import Settings
from aif.config.toml import checked
from aif.data.readers import read_questions
from aif.errors import JudgeStopped
from aif.evaluation.evaluate import evaluate
from aif.evaluation.policies import chosen
from aif.evaluation.schema import Evaluation
from aif.llm import Answer
from aif.llm.scripted import ScriptedLLM, words
from aif.run import Run
from aif.store import checkpoint
from aif.store.records import Prompt
from tests.conftest import AIF, read_jsonl, write_jsonl
from tests.support.clock import wait_for
from tests.support.schema import missing
from tests.support.server import serving
from tests.support.tiny import Said
from tests.test_house import LABEL

POLICY = {
    "name", "model", "responses", "faults", "gold", "score", "kl", "words", "distinct_1",
    "distinct_2", "self_bleu", "refusal_rate", "rating",
}  # fmt: skip
MATCH = {
    "first", "second", "n", "wins", "ties", "losses", "null", "win_rate", "soft_win_rate",
    "length_controlled", "by_principle",
}  # fmt: skip
WHOLE = {
    "run", "judge", "constitution", "constitution_digest", "protocol", "prompts", "against", "seed",
    "policies", "matches", "human",
}  # fmt: skip


class Place:
    """A folder with prompts, two scripted policies and a judge to whom `good` is yes."""

    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "run"
        rows = [
            {"id": f"q{n}", "prompt": f"Question {n}", "response": f"good reference {n}"}
            for n in range(6)
        ]
        rows[0]["harmful"], rows[1]["harmful"] = True, False
        del rows[5]["response"]
        self.prompts = write_jsonl(folder / "prompts.jsonl", rows)
        self.constitution = folder / "c.toml"
        self.constitution.write_text(
            'name = "mine"\n'
            '[[principle]]\nid = "kind"\ncompare = "Kinder?"\ngrade = "Is it kind?"\n'
            '[[principle]]\nid = "wise"\ncompare = "Wiser?"\ngrade = "Is it wise?"\n'
        )
        self.warm = self.policy(
            "warm",
            {"match": "Question 0", "text": "I'm sorry, I can't help with that."},
            {"match": "Question 3", "text": "the same words"},
            {"match": "Question 4", "fault": "timeout"},
            {"text": "good and long and warm words"},
        )
        self.cold = self.policy(
            "cold", {"match": "Question 3", "text": "the same words"}, {"text": "bad words"}
        )
        self.judge = self.policy(
            "judge",
            {"match": r"\]\n[^\n]*good", "logprobs": {"Yes": -0.1, "No": -2.1}},
            {"logprobs": {"Yes": -3.0, "No": -1.0}},
        )

    def policy(self, name: str, *rules: dict) -> str:
        return f"scripted:{write_jsonl(self.folder / f'{name}.jsonl', rules)}"

    def arguments(self, *more: object) -> list[str]:
        arguments = ["evaluate", self.run, "--prompts", self.prompts, "--judge", self.judge]
        arguments += ["--constitution", self.constitution, *more]
        return [str(part) for part in arguments]

    def evaluate(self, *more: object, protocol: str = "pointwise"):
        two = [] if "--policy" in more else ["--policy", self.warm, "--against", self.cold]
        arguments = self.arguments(*two, *more, "--set", f"label.protocol={protocol}")
        return CliRunner().invoke(app, arguments)

    def state(self) -> dict:
        return json.loads((self.run / "evaluate.json").read_text())

    def of(self, name: str) -> dict:
        return next(policy for policy in self.state()["policies"] if policy["name"] == name)

    def calls(self) -> int:
        """All calls that were ever made."""
        return sum(len(read_jsonl(path)) for path in self.run.glob("evaluation/*/journal/*.jsonl"))


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def one_line(result) -> str:
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("aif: ")]
    assert "a fault of aif" not in line
    return line


# --- what is measured


def test_everything_is_in_its_place(place):
    result = place.evaluate()
    assert result.exit_code == 0, result.stderr
    state = place.state()
    assert set(state) == WHOLE
    assert [policy["name"] for policy in state["policies"]] == [place.cold, place.warm]
    for policy in state["policies"]:
        assert set(policy) == POLICY | {"refusal_rate_harmful", "over_refusal_rate"}
        assert (policy["score"], policy["kl"]) == (None, None), "no reward model, no weights"
    (match,) = state["matches"]
    assert set(match) == MATCH
    assert (
        (match["first"], match["second"])
        == (place.warm, place.cold)
        == (place.warm, state["against"])
    )
    assert (state["judge"], state["constitution"]) == (place.judge, "mine")
    assert (state["protocol"], state["prompts"], state["seed"]) == ("pointwise", 6, 0)
    assert state["run"] == str(place.run)
    rows = read_jsonl(place.run / "evaluation.jsonl")
    assert len(rows) == 12
    assert set(rows[0]) == {
        "policy", "prompt_id", "response", "fault", "words", "refusal", "score", "gold", "kl",
    }  # fmt: skip


def test_a_match_by_hand(place):
    """Of six: three won, one refusal that is as bad as the other's answer, one of the same words,
    and one without a response."""
    place.evaluate()
    (match,) = place.state()["matches"]
    counts = [match[name] for name in ("n", "wins", "ties", "losses", "null")]
    assert counts == [5, 3, 2, 0, 1]
    assert match["win_rate"]["mean"] == pytest.approx(0.8)
    sure = 1 / (1 + 2.718281828**-4)  # a difference of two grades
    assert match["soft_win_rate"]["mean"] == pytest.approx((3 * sure + 2 * 0.5) / 5)
    assert match["by_principle"] == {"kind": pytest.approx(0.8), "wise": pytest.approx(0.8)}
    assert place.of(place.warm)["faults"] == {"timeout": 1}
    assert place.of(place.warm)["responses"] == 5
    warm, cold = (place.of(name)["rating"] for name in (place.warm, place.cold))
    assert warm["mean"] == pytest.approx(-cold["mean"])
    assert warm["mean"] > 50


def test_gold_is_the_mean_grade_and_the_same_words_are_graded_too(place):
    place.evaluate()
    assert place.of(place.warm)["gold"]["mean"] == pytest.approx((3 * 2 - 2 * 2) / 5)
    assert place.of(place.warm)["gold"]["n"] == 5
    assert place.of(place.cold)["gold"]["mean"] == pytest.approx(-2)
    # Eleven responses to six prompts, one text of which both gave, graded once a principle.
    assert len(read_jsonl(place.run / "evaluation/matches/journal/label.jsonl")) == 2 * 10


def test_texts_are_counted(place):
    place.evaluate()
    warm, cold = place.of(place.warm), place.of(place.cold)
    assert cold["words"]["mean"] == pytest.approx((5 * 2 + 3) / 6)
    assert cold["distinct_1"] == pytest.approx(4 / 13)
    assert cold["self_bleu"] > warm["self_bleu"] > 0
    assert warm["refusal_rate"]["mean"] == pytest.approx(1 / 5)
    assert warm["refusal_rate_harmful"] | {"low": 0} == {"mean": 1, "low": 0, "high": 1, "n": 1}
    assert (warm["over_refusal_rate"]["mean"], warm["over_refusal_rate"]["n"]) == (0, 4)


def test_a_server_that_filters_is_a_refusal(place):
    filtered = place.policy(
        "filtered", {"match": "Question 2", "fault": "refused"}, {"text": "Yes."}
    )
    place.evaluate("--policy", filtered, "--against", place.cold)
    row = place.of(filtered)
    assert (row["responses"], row["faults"]) == (5, {"refused": 1})
    assert row["refusal_rate"]["mean"] == pytest.approx(1 / 6)


def test_without_marks_there_is_no_over_refusal(place):
    write_jsonl(place.prompts, [{"prompt": f"Question {n}"} for n in range(3)])
    place.evaluate()
    assert set(place.of(place.warm)) == POLICY


def test_a_judge_that_compares_is_asked_in_both_orders_and_gives_no_grades(place):
    place.judge = place.policy(
        "judge",
        {"match": r"response A \w+\]\n[^\n]*good", "logprobs": {"A": -0.2, "B": -1.2}},
        {"logprobs": {"A": -0.7, "B": -0.7}},
    )
    result = place.evaluate(protocol="pairwise")
    assert result.exit_code == 0, result.stderr
    rows = read_jsonl(place.run / "evaluation/matches/verdicts.jsonl")
    assert Counter(row["order"] for row in rows) == {"ab": 8, "ba": 8}
    assert place.of(place.warm)["gold"] is None
    (match,) = place.state()["matches"]
    assert (match["wins"], match["ties"]) == (3, 2)


def test_the_prompts_own_responses_are_a_policy(place):
    place.evaluate("--policy", "reference", "--policy", place.cold, "--against", place.cold)
    row = place.of("reference")
    assert (row["responses"], row["faults"], row["kl"]) == (5, {}, None)
    (match,) = place.state()["matches"]
    assert (match["wins"], match["null"]) == (5, 1)


def test_each_meets_each_where_that_is_wanted(place):
    three = ["--policy", place.warm, "--policy", "reference", "--against", place.cold]
    place.evaluate(*three)
    star = [(m["first"], m["second"]) for m in place.state()["matches"]]
    assert star == [(place.warm, place.cold), ("reference", place.cold)]
    before = place.calls()
    place.evaluate(*three, "--set", "evaluate.all_pairs=true")
    pairs = [(m["first"], m["second"]) for m in place.state()["matches"]]
    assert pairs == [*star, (place.warm, "reference")]
    assert place.calls() == before + 1, "grades are those of before; the timeout is asked again"


def test_a_margin_makes_ties_and_costs_nothing(place):
    place.evaluate()
    before = place.calls()
    place.evaluate("--set", "evaluate.tie_margin=0.49")
    (match,) = place.state()["matches"]
    assert (match["wins"], match["ties"]) == (0, 5)
    assert place.calls() == before + 1, "the timeout"


def test_a_policy_by_itself_is_measured_without_a_match(place):
    place.evaluate("--policy", place.cold, "--against", place.cold)
    assert place.state()["matches"] == []
    assert place.of(place.cold)["gold"]["mean"] == pytest.approx(-2)
    assert place.of(place.cold)["rating"] == {"mean": None, "low": None, "high": None}


def test_people_are_agreed_with_or_not(place):
    pairs = write_jsonl(
        place.folder / "human.jsonl",
        [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(3)]
        + [{"prompt": "p", "chosen": "bad", "rejected": "good"}],
    )
    result = place.evaluate("--human", pairs)
    human = place.state()["human"]
    assert (human["file"], human["pairs"], human["reward"]) == (str(pairs), 4, None)
    assert (human["judge"]["mean"], human["judge"]["n"]) == (pytest.approx(0.75), 4)
    assert "of 4 choices of people the judge agrees with 75%" in result.stdout
    nobody = write_jsonl(
        place.folder / "no.jsonl", [{"prompt": "p", "response_a": "x", "response_b": "y"}]
    )
    assert "got no choices, expected chosen and rejected" in one_line(
        place.evaluate("--human", nobody)
    )


# --- which prompts


def test_prompts_are_by_default_those_that_ppo_held_out(place):
    place.run.mkdir()
    talks = [[{"role": "user", "content": f"Question {n}"}] for n in range(3)]
    rows = [
        {"step": step, "prompt_id": Prompt.of(talk).id, "prompt": talk, "response": "r"}
        for step in (0, 5)
        for talk in (talks if step else talks[:2])
    ]
    write_jsonl(place.run / "ppo-samples.jsonl", rows)
    run = Run(place.run, settings_of(place))
    evaluate(run, Said())
    assert {row["prompt_id"] for row in read_jsonl(place.run / "evaluation.jsonl")} == {
        row["prompt_id"] for row in rows[:2]
    }


def settings_of(place: Place, **evaluation) -> Settings:
    tables = {
        "judge": {"model": place.judge},
        "label": {"constitution": str(place.constitution), "protocol": "pointwise"},
        "evaluate": {"policies": [place.warm], "against": place.cold} | evaluation,
    }
    return checked(Settings, tables, "test")


def test_a_limit_is_of_the_prompts_and_each_is_asked_once(place):
    rows = read_jsonl(place.prompts)
    write_jsonl(place.prompts, [rows[1], rows[1], *rows])
    place.evaluate("--limit", 4)
    assert place.state()["prompts"] == 2
    place.evaluate()
    assert place.state()["prompts"] == 6, "a limit is of one command"
    limited = place.evaluate("--set", "label.limit=1", "--json")
    assert json.loads(limited.stdout)["matches"][0]["n"] == 5, "that is a limit of other labels"


def test_marks_and_responses_of_prompts_in_many_shapes(tmp_path):
    rows = [
        {"prompt": "a", "answer": 18},
        {
            "prompt": "b",
            "completion": [{"role": "assistant", "content": "said"}],
            "kind": "harmful",
        },
        {"chosen": "\n\nHuman: c\n\nAssistant: yes", "rejected": "x", "kind": "benign"},
        {"prompt": "d", "response": " ", "harmful": False},
        {"prompt": "e", "response": None},
    ]
    questions = list(read_questions(str(write_jsonl(tmp_path / "p.jsonl", rows))))
    assert [q.prompt.messages[-1]["content"] for q in questions] == list("abcde")
    assert [q.response for q in questions] == [None, "said", "yes", None, None]
    assert [q.harmful for q in questions] == [None, True, False, False, None]


# --- which policies


def made(run: Run, *names: str) -> None:
    """Folders that look like trained models."""
    for name in names:
        (run.path / name).mkdir(parents=True)
        checkpoint.seal(run.path / name, {})


def named(run: Run, **evaluation) -> tuple[list[tuple[str, str, int]], str]:
    tables = {"policy": {"model": "scripted:base"}, "evaluate": evaluation}
    run.settings = checked(Settings, tables, "test")
    policies, against = chosen(run)
    return [(p.name, p.model, p.best_of) for p in policies], against.name


def test_by_default_all_that_a_run_has_is_compared(tmp_path):
    run = Run(tmp_path, Settings())
    assert named(run) == ([("base", "scripted:base", 1)], "base")
    made(run, "ppo", "10/ppo", "2/ppo")
    (tmp_path / "3/ppo").mkdir(parents=True)  # not complete
    every, against = named(run)
    assert [name for name, _, _ in every] == ["base", "ppo", "2/ppo", "10/ppo"]
    assert against == "base"
    made(run, "sft", "reward")
    every, against = named(run)
    assert every == [
        ("base", "scripted:base", 1),
        ("sft", f"{tmp_path}/sft", 1),
        ("best-of-4", f"{tmp_path}/sft", 4),
        ("ppo", f"{tmp_path}/ppo", 1),
        ("2/ppo", f"{tmp_path}/2/ppo", 1),
        ("10/ppo", f"{tmp_path}/10/ppo", 1),
    ]
    assert against == "sft"


def test_policies_by_name(tmp_path):
    run, other = Run(tmp_path / "run", Settings()), Run(tmp_path / "other", Settings())
    made(run, "sft", "2/ppo", "reward")
    made(other, "ppo")
    (other.path / "run.toml").write_text('[policy]\nmodel = "scripted:theirs"\n')
    names = [
        "2/ppo",
        "best-of-16",
        f"{other.path}:ppo",
        f"{other.path}:base",
        "openai:m",
        "openai:ppo",
    ]
    policies, against = named(run, policies=[*names, "2/ppo"], against="openai:m")
    assert against == "openai:m"
    assert policies == [
        ("2/ppo", f"{run.path}/2/ppo", 1),
        ("best-of-16", f"{run.path}/sft", 16),
        (names[2], f"{other.path}/ppo", 1),
        (names[3], "scripted:theirs", 1),
        ("openai:m", "openai:m", 1),
        ("openai:ppo", "openai:ppo", 1),
    ]
    policies, _ = named(run, policies=["2/ppo"])
    assert [name for name, _, _ in policies] == ["sft", "2/ppo"], "whom it is held against is asked"


def test_what_ppo_started_from_is_what_the_best_is_taken_of(tmp_path):
    run = Run(tmp_path, Settings())
    made(run, "sft", "reward")
    run.write_state("ppo", {"from": "scripted:another"})
    policies, _ = named(run, policies=["best-of-2"], against="base")
    assert ("best-of-2", "scripted:another", 2) in policies


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ppo", "/run/ppo, which is not there or not complete, expected `aif ppo` before it"),
        ("2/sft", "/run/2/sft, which is not there or not complete, expected `aif sft` before it"),
        ("best-of-1", "got best-of-1, expected best-of-2 to best-of-1000"),
        ("best-of-4", "/run/reward, expected `aif reward` before it"),
        ("nowhere:ppo", "expected a run folder before the colon, and 'nowhere' is none"),
        ("gpt:4", "expected openai:NAME, scripted:FILE"),
        ("scripted:nowhere.jsonl", "nowhere.jsonl: got no such file"),
    ],
)
def test_a_wrong_name_is_one_line_before_anybody_is_asked(place, name, message):
    assert message in one_line(
        place.evaluate("--policy", place.warm, "--policy", name, "--against", place.cold)
    )
    assert not place.run.exists() or place.calls() == 0


def test_missing_things_are_one_line(place):
    place.run.mkdir()
    nothing = ["evaluate", str(place.run), "--judge", place.judge]
    nothing += ["--set", f"policy.model={place.warm}"]
    result = CliRunner().invoke(app, nothing)
    assert "label: constitution: got nothing, expected --constitution FILE" in one_line(result)
    result = CliRunner().invoke(app, [*nothing, "--constitution", str(place.constitution)])
    assert (
        "got nothing, and no prompts that `aif ppo` held out, expected --prompts FILE"
        in one_line(result)
    )
    result = CliRunner().invoke(
        app, [*nothing, "--constitution", str(place.constitution), "--policy", "reference"]
    )
    assert "policies: got reference, without a file, expected --prompts FILE" in one_line(result)
    place.prompts.write_text("")
    assert "got no prompts at all, expected at least one" in one_line(place.evaluate())
    place.prompts.write_text('{"prompt": "x", "harmful": "yes"}\n')
    assert "prompts.jsonl:1: harmful: got 'yes', expected true or false" in one_line(
        place.evaluate()
    )
    place.judge = "scripted:none.jsonl"
    assert "none.jsonl: got no such file" in one_line(place.evaluate())
    place.run = place.folder / "absent"
    result = CliRunner().invoke(app, ["evaluate", str(place.run)])
    assert "absent: got no such folder, expected a run folder" in one_line(result)


def test_what_is_not_installed_is_named_before_anything_is_asked(place, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = one_line(place.evaluate())
    assert "needs scipy, scikit-learn, sacrebleu: pip install 'aif[report]'" in line


# --- what it costs


def test_a_second_time_nothing_is_asked_but_what_failed(place):
    place.evaluate()
    before, state = place.calls(), (place.run / "evaluate.json").read_bytes()
    place.policy("judge", {"fault": "backend"})  # would fail if it were asked
    assert place.evaluate().exit_code == 0
    assert place.calls() == before + 1, "the timeout"
    assert (place.run / "evaluate.json").read_bytes() == state


def test_another_policy_costs_its_own_responses_and_grades(place):
    place.evaluate()
    before = place.calls()
    third = place.policy("third", {"text": "good third words"})
    place.evaluate("--policy", place.warm, "--policy", third, "--against", place.cold)
    assert place.calls() == before + 1 + 6 + 2 * 6, "the timeout, its responses, their grades"
    assert len(place.state()["matches"]) == 2


def test_calls_that_fail_are_nulls_that_are_counted_and_told(place):
    place.policy(
        "judge",
        {"match": "good and.*wise", "text": "I could not say."},
        {"match": r"\]\n[^\n]*good", "logprobs": {"Yes": -0.1, "No": -2.1}},
        {"logprobs": {"Yes": -3.0, "No": -1.0}},
    )
    result = place.evaluate()
    (match,) = place.state()["matches"]
    assert (match["n"], match["null"]) == (2, 4)
    assert place.of(place.warm)["gold"]["n"] == 2
    assert result.exit_code == 3
    assert "unparsed" in result.stderr
    missing = next(line for line in result.stdout.splitlines() if "no result" in line)
    assert missing == (
        f"no response: {place.warm} 1 timeout; no result: {place.warm} v. {place.cold} 4; "
        "failed calls of the judge: 6 unparsed"
    )


# --- stopped and gone on with


class Counting:
    """All models in one: they answer by what they are asked, and may be gone after some calls."""

    def __init__(self, monkeypatch):
        self.calls: list[str] = []
        self.gone_after = 10**9
        for module in ("evaluation.evaluate", "stages.respond", "judge.calls", "judge.live"):
            monkeypatch.setattr(f"aif.{module}.open_llm", self.opened)

    def opened(self, settings):
        return ScriptedLLM(lambda ask: self.reply(settings.model, ask))

    def reply(self, model: str, ask) -> Answer:
        if len(self.calls) >= self.gone_after:
            raise JudgeStopped("the model is gone")
        self.calls.append(ask.key)
        draw = random.Random(f"{model} {words(ask)} {ask.seed if not ask.options else ''}")
        if ask.options:
            return Answer("", logprobs={option: -draw.random() for option in ask.options})
        text = " ".join(draw.choice("abcdefg") for _ in range(draw.randrange(1, 4)))
        return Answer("", (text,), "stop")


def stopping_run(path: Path, place: Place) -> Run:
    settings = settings_of(
        place, prompts=str(place.prompts), policies=["scripted:a", "scripted:b"],
        against="scripted:c", all_pairs=True, resamples=100,
    )  # fmt: skip
    path.mkdir()
    return Run(path, settings)


def test_stopped_at_any_call_it_goes_on_with_what_is_missing(place, monkeypatch):
    models = Counting(monkeypatch)
    straight = stopping_run(place.folder / "straight", place)
    evaluate(straight, Said())
    every = Counter(models.calls)
    assert max(every.values()) == 1
    assert len(every) > 3 * 6 + 2 * 3 * 4
    whole = (straight.path / "evaluate.json").read_text()
    for stop_after in (0, 1, 7, 17, 18, 19, 30, len(every) - 1):
        run = stopping_run(place.folder / f"stopped{stop_after}", place)
        models.calls.clear()
        models.gone_after = stop_after
        with pytest.raises(JudgeStopped, match="the model is gone"):
            evaluate(run, Said())
        assert not (run.path / "evaluate.json").exists()
        models.gone_after = 10**9
        evaluate(run, Said())
        assert Counter(models.calls) == every
        state = (run.path / "evaluate.json").read_text().replace(str(run.path), str(straight.path))
        assert state == whole
        assert (run.path / "evaluation.jsonl").read_bytes() == (
            straight.path / "evaluation.jsonl"
        ).read_bytes()


@pytest.mark.slow
def test_killed_it_asks_nobody_twice_and_ends_the_same(place):
    with serving(latency_ms=30) as server:
        place.judge = "openai:test-model"
        killed = place.arguments("--policy", "reference", "--against", place.cold)
        for setting in (f"judge.base_url={server.base_url}", "judge.concurrency=2",
                        "label.protocol=pointwise", "evaluate.resamples=100"):  # fmt: skip
            killed += ["--set", setting]
        quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        process = subprocess.Popen([*AIF, *killed], **quiet)
        journal = place.run / "evaluation/matches/journal/label.jsonl"
        wait_for(lambda: journal.exists() and len(journal.read_bytes().splitlines()) >= 3)
        assert process.poll() is None, "it was done before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (place.run / "evaluate.json").exists()
        answers = len(journal.read_bytes().splitlines())
        requests = server.stats()["requests"]
        result = CliRunner().invoke(app, killed)
        assert result.exit_code == 0, result.stderr
        after = server.stats()["requests"]
        straight = place.folder / "straight"
        clean = [str(straight) if part == str(place.run) else part for part in killed]
        server.reset()
        assert CliRunner().invoke(app, clean).exit_code == 0
        every = server.stats()["requests"]
    assert after - requests == every - answers, "what was durable is not asked again"
    state = (place.run / "evaluate.json").read_text().replace(str(place.run), str(straight))
    assert state == (straight / "evaluate.json").read_text()


def test_models_behind_a_server_never_load_torch(place):
    arguments = place.arguments("--policy", place.warm, "--against", place.cold)
    arguments += ["--set", "label.protocol=pointwise"]
    command = [sys.executable, "-c", LABEL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.partition("LOADED")[2].split())
    assert "sklearn" in loaded or "scipy" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "trl", "matplotlib"}


# --- what the report reads


def test_the_state_has_every_key_that_the_report_reads(place):
    place.evaluate()
    # Ratings have no count, and no best-of-n is here, whose KL is a bound.
    assert set(missing(Evaluation, place.state())) == {"Estimate.n", "Estimate.bound"}


# --- what is printed


def test_the_table_fits_sixty_columns(place):
    policies = ("--policy", place.warm, "--policy", "reference")
    result = place.evaluate(*policies, "--against", place.cold)
    lines = result.stdout.splitlines()
    table = lines[2:8]
    assert lines[0] == f"6 prompts, judged by {place.judge}"
    assert lines[1] == f"(pointwise, mine); wins are against {place.cold}"
    assert table[0] == "policy       wins 95 %        gold  score     KL words dist2"
    assert table[1] == place.cold, "a long name has a line of its own"
    assert table[2] == "                -            -2.00      -      -     2  0.43"
    assert table[5].startswith("reference    1.00 ")
    assert all(len(line) <= 60 for line in (table[0], table[2], table[4], table[5]))
    assert lines[-1] == f"{place.run}/evaluate.json"


def test_a_bound_is_told_as_one_and_small_numbers_have_no_sign():
    figures = {"gold": None, "score": {"mean": -0.001}, "words": {"mean": 12.0}, "distinct_2": None}
    kl = {"mean": 0.636, "bound": True}
    summary = {
        "run": "runs/x", "prompts": 2, "judge": "j", "protocol": "pairwise", "constitution": "c",
        "against": "sft", "matches": [], "human": None, "faults": {},
        "policies": [{"name": "best-of-4", "faults": {}, "kl": kl} | figures],
    }  # fmt: skip
    assert evaluate_lines(summary)[3] == (
        "best-of-4       -                -   0.00   <0.6    12     -"
    )


def test_json_is_one_object(place):
    result = place.evaluate("--json")
    assert json.loads(result.stdout)["matches"] == place.state()["matches"]
