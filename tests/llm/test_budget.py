"""A budget holds: by the server's own count, with many calls in flight, faults, kills, batches."""

import json
import random
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aif.cli.verbs import app
from aif.config.price import Price, dollars
from aif.config.settings import LLMSettings, Settings, load_settings
from aif.llm import Answer, Ask
from aif.llm.budget import RESERVED, Meter, Spending, most_tokens, spent_in
from aif.run import Run
from tests.conftest import aif_here, read_jsonl, write_constitution, write_jsonl
from tests.support.batch_server import batches
from tests.support.clock import wait_for
from tests.support.server import serving

PRICE = "1.5/6"
QUICK = ["--quiet", "--price", PRICE]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def billed(server) -> float:
    """Dollars, by what the server was sent and did not refuse."""
    used = server.stats()["billed"]
    return Price.of(PRICE).cost(used.get("prompt_tokens", 0), used.get("completion_tokens", 0))


def state(job) -> dict:
    return json.loads((job.run / "label.json").read_text())


def here(job, *more: object) -> int:
    """`aif label` in this process, with the exit code it ends in."""
    return job.label_here(*QUICK, *more).exit_code


@pytest.fixture(scope="module")
def cost(tmp_path_factory) -> float:
    """What labelling 60 comparisons costs."""
    return 60 * 2 * Price.of(PRICE).cost(245, 1)


# ---- tokens


@pytest.mark.parametrize(("protocol", "calls"), [("pointwise", 3), ("pairwise", 6)])
def test_the_tokens_of_a_labelling_are_those_of_its_calls(make_job, protocol, calls):
    """Three comparisons of three responses share their grades."""
    with serving() as server:
        job = make_job(1, server.base_url)
        both = (("x", "y"), ("x", "z"), ("y", "z"))
        rows = ({"prompt": "?", "response_a": a, "response_b": b} for a, b in both)
        write_jsonl(job.pairs, rows)
        write_constitution(job.constitution, {"kind": "Which?"}, kind='grade = "Is it kind?"')
        assert here(job, "--protocol", protocol) == 0
        assert server.stats()["requests"] == calls
        tokens = state(job)["tokens"]
        assert {"total_tokens": sum(tokens.values()), **tokens} == server.stats()["billed"]


# ---- prices


def test_a_price_is_two_numbers():
    assert Price.of("0.15/0.60") == Price(0.15, 0.6)
    assert Price.of("2/10").cost(1_000_000, 500_000) == 7
    for bad in ("0.15", "a/b", "-1/2", "1/2/3", "nan/1", "1e3/1", "", "1 / 2", "\u0661/1"):
        with pytest.raises(ValueError, match="as 0"):
            Price.of(bad)
    assert [dollars(x) for x in (0, 1234.5, 0.5, 0.000123456)] == [
        "$0.00", "$1,234.50", "$0.500", "$0.000123",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--budget", "5"], "price: got nothing, expected --price"),
        (["--price", "cheap"], "judge.price: got 'cheap', expected dollars a million"),
        (["--price", PRICE, "--budget", "0"], "label.budget: got 0.0, expected greater than 0"),
        (["--price", PRICE, "--budget", "nan"], "label.budget: got nan"),
    ],
)
@pytest.mark.parametrize("verb", ["label", "plan"])
def test_what_makes_no_sense_is_one_line(make_job, verb, more, named):
    job = make_job(2, "http://127.0.0.1:9/v1")
    result = CliRunner().invoke(app, [verb, *job.arguments(*more)[1:]])
    assert result.exit_code == 1
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not job.run.exists()


def test_a_price_is_of_one_model(tmp_path):
    (tmp_path / "run.toml").write_text(f'[judge]\nmodel = "openai:a"\nprice = "{PRICE}"\n')
    path = tmp_path / "run.toml"
    assert load_settings(path, {"judge.model": "openai:a"}).judge.price == PRICE
    assert load_settings(path, {"judge.model": "openai:b"}).judge.price is None
    settings = load_settings(path, {"judge.model": "openai:b", "judge.price": "3/4"})
    assert settings.judge.price == "3/4"
    assert settings.judge.of_model("runs/x/sft").price is None


def test_no_prompt_has_more_tokens_than_is_said():
    ask = Ask("k", messages=[{"role": "user", "content": "\u05d0\U0001f600\ud800x"}])
    assert most_tokens(ask) >= 2 + 4 + 3 + 1 + 4


# ---- plan


def planned(job, *more: object) -> dict:
    arguments = ["plan", *job.arguments(*more, "--json")[1:]]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_plan_says_what_it_will_cost_and_has_cost(make_job):
    with serving() as server:
        job = make_job(10, server.base_url)
        estimate = planned(job, "--price", PRICE, "--budget", 20, "--rate", 2)
        assert estimate["dollars"]["about"] == pytest.approx(
            Price.of(PRICE).cost(estimate["prompt_tokens"], 20)
        )
        assert (estimate["calls"], estimate["seconds"], estimate["dollars_paid"]) == (20, 10, 0)
        assert here(job, "--limit", 4) == 0
        first = billed(server)
        again = planned(job, "--price", PRICE, "--budget", 20)
        assert again["calls"] == 12
        assert again["dollars_paid"] == pytest.approx(first)
        assert again["calls_per_s"] == state(job)["calls_per_s"] > 0
        assert again["seconds"] == pytest.approx(12 / again["calls_per_s"])
        assert planned(job, "--set", "judge.samples=2")["seconds"] is None  # another judge
        assert here(job) == 0
        assert billed(server) - first <= again["dollars"]["at_most"]
        done = planned(job, "--price", PRICE)
        assert done["dollars"] == {"about": 0, "at_most": 0}
        assert done["dollars_paid"] == pytest.approx(billed(server))
        assert done["calls_per_s"] is not None


def test_plan_tells_how_far_the_budget_goes(make_job):
    job = make_job(10, "http://127.0.0.1:9/v1")
    estimate = planned(job, "--price", PRICE)["dollars"]

    def coverage(budget: float) -> str:
        arguments = job.arguments("--price", PRICE, "--budget", f"{budget:.6f}")[1:]
        return CliRunner().invoke(app, ["plan", *arguments]).stdout.splitlines()[-1]

    assert coverage(estimate["at_most"] + 1e-6).endswith("covers all of it")
    assert coverage(estimate["about"] + 1e-6).endswith("is likely to cover it")
    assert coverage(estimate["about"] / 2).endswith("covers about 50% of it")


def test_plan_prices_what_is_sampled_before(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"prompt {n}"} for n in range(3)])
    (tmp_path / "c.toml").write_text(
        'name = "c"\n[[principle]]\nid = "k"\ncompare = "Kinder?"\ncritique = "Say how it is cold."'
        '\nrevision = "Rewrite it."\n'
    )
    tables = {
        "policy": {"model": "openai:p", "base_url": "http://127.0.0.1:9/v1", "max_tokens": 50,
                   "price": PRICE},
        "judge": {"model": "openai:j", "base_url": "http://127.0.0.1:9/v1"},
        "respond": {"prompts": str(tmp_path / "p.jsonl"), "samples": 2},
        "revise": {"constitution": str(tmp_path / "c.toml"), "rounds": 1},
        "pipeline": {"stages": ["respond", "revise", "compare", "label"], "budget": 10.0},
    }  # fmt: skip
    tables["judge"]["price"] = PRICE
    from aif.planning import plan

    estimate = plan(Run(tmp_path / "run", Settings.model_validate(tables)))
    cost = estimate["dollars_of_sampling"]
    assert set(cost) == {"respond", "revise"}
    assert estimate["sampling"] == {"respond": 6, "revise": 12}
    generated = Price.of(PRICE).cost(0, 50)
    assert cost["respond"]["about"] > 6 * generated
    assert cost["revise"]["about"] > 12 * generated + 6 * Price.of(PRICE).cost(150, 0)
    budget = estimate["budgets"][0]
    every = cost["respond"]["about"] + cost["revise"]["about"] + estimate["dollars"]["about"]
    assert (budget["setting"], budget["about"]) == ("pipeline.budget", pytest.approx(every))
    tables["revise"]["limit"] = 2
    estimate = plan(Run(tmp_path / "run", Settings.model_validate(tables)))
    assert estimate["sampling"] == {"respond": 6, "revise": 4}


# ---- the stop


def test_a_spent_budget_stops_and_a_larger_one_goes_on(make_job):
    with serving(latency_ms=20) as server:
        job = make_job(60, server.base_url, concurrency=64)
        whole = job.fresh("whole")
        assert here(whole) == 0
        cost = billed(server)
        server.reset()
        result = job.label("--price", PRICE, "--budget", f"{0.4 * cost:.9f}")
        assert result.returncode == 4
        assert 0.8 * 0.4 * cost < billed(server) <= 0.4 * cost
        labelling = state(job)
        assert f"{labelling['labels']} of 60 comparisons are labelled" in result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith(f"aif: {job.run}: the budget is")
        assert labelling["labels"] + labelling["unfinished"] == 60
        assert labelling["labels"] >= 18  # comparison by comparison
        assert labelling["verdicts"] - 2 * labelling["labels"] <= 1
        assert labelling["cost"] == pytest.approx(billed(server))
        every = whole.labels.splitlines()
        assert set(job.labels.splitlines()) < set(every)
        # The budget is kept in run.toml, and what is spent counts for whoever comes next.
        assert here(job) == 4
        assert billed(server) == pytest.approx(labelling["cost"])
        assert here(job, "--budget", f"{0.7 * cost:.9f}") == 4
        assert 0.6 * cost < billed(server) <= 0.7 * cost
        assert here(job, "--budget", 100) == 0
        assert job.labels.splitlines() == every
        stats = server.stats()
        assert (stats["requests"], stats["duplicates"]) == (120, 0)


FAULTS = [
    {"kind": "hang", "p": 0.03, "times": 1},
    {"kind": "cut", "p": 0.1},
    {"kind": "reset", "p": 0.05},
    {"kind": "html", "p": 0.05},
    {"kind": "no_usage", "p": 0.1},
    {"kind": "wrong_model", "p": 0.05},
    {"kind": "503", "p": 0.1},
    {"kind": "400", "p": 0.05},
]


def test_what_was_paid_for_and_never_seen_counts(make_job):
    with serving(latency_ms=5, faults=FAULTS) as server:
        job = make_job(60, server.base_url, concurrency=64)
        patience = ["--set", "judge.timeout_s=0.5", "--set", "judge.max_wait_s=0.05"]
        patience += ["--set", "judge.attempts=3", "--max-fault-rate", 1]
        for budget in (0.008, 0.02):
            assert here(job, *patience, "--budget", budget) == 4
            assert billed(server) <= budget
        spent = spent_in(job.journal, load_settings(job.run / "run.toml", {"judge.price": PRICE}))
        assert billed(server) < spent <= 0.02
        server.set_faults()
        assert here(job, *patience, "--budget", 1) == 0
        refused = [row for row in read_jsonl(job.journal) if row["fault"] == "rejected"]
        assert min(row["cost"] for row in refused) == 0


@pytest.mark.slow
def test_killed_again_and_again_it_stays_below(make_job):
    draw = random.Random(3)
    budget = 0.06
    with serving(latency_ms=30) as server:
        job = make_job(150, server.base_url, concurrency=16)
        more = [*QUICK, "--budget", str(budget)]
        for _ in range(2):
            process = job.start(*more)
            before = server.stats()["requests"]
            wait_for(lambda before=before: server.stats()["requests"] > before)
            time.sleep(draw.uniform(0, 0.1))
            process.kill()
            process.communicate()
        assert billed(server) < budget
        unseen = server.stats()["answered"] - len(job.journal.read_bytes().splitlines())
        assert here(job, "--budget", budget) == 4
        assert unseen > 0  # some of what was billed nobody has seen
        assert billed(server) <= budget
        settings = load_settings(job.run / "run.toml", {})
        assert billed(server) < spent_in(job.journal, settings) <= budget


class Estimating:
    def count_tokens(self, asks):
        return len(asks), False


class Resumable(Estimating):
    def resume_with(self, session):
        pass


def test_an_interrupted_run_gives_back_what_it_did_not_ask(make_job):
    """By the reservations: those that were read ahead and not handed out are not lost."""
    model = LLMSettings(model="openai:m", price=PRICE, concurrency=8)
    asks = [Ask(f"{n:064x}", text="x", max_tokens=1) for n in range(20)]
    job = make_job(1)
    job.run.mkdir()
    tables = {"label": {"budget": 1.0}, "judge": model.model_dump()}
    run = Run(job.run, Settings.model_validate(tables))
    with run.journal("label") as journal:
        with Meter.of(run, "label", model).opened(Estimating(), journal) as meter:
            granted = meter.granted(iter(asks))
            for _ in range(3):
                next(granted)
            granted.close()
        most = Price.of(PRICE).cost(most_tokens(asks[0]), 1)
        spending = Spending.read(job.journal, None)
        assert (spending.paid, spending.missing) == (0, pytest.approx(3 * most))
        with meter.opened(Estimating(), journal):  # another process: they will not come now
            assert Spending.read(job.journal, None).lost == pytest.approx(3 * most)
        assert Spending.read(job.journal, None).missing == 0


def granted(
    folder: Path, budget: float, *asks: Ask, llm: type = Estimating
) -> Iterator[tuple[Meter, Ask]]:
    """Those of the asks that a labelling is granted, one at a time."""
    model = LLMSettings(model="openai:m", price=PRICE, concurrency=1)
    tables = {"label": {"budget": budget}, "judge": model.model_dump()}
    run = Run(folder, Settings.model_validate(tables))
    with run.journal("label") as journal:
        meter = Meter.of(run, "label", model)
        with meter.opened(llm(), journal), closing(meter.granted(iter(asks))) as fitting:
            for ask in fitting:
                yield meter, ask


ONE, TWO = (Ask(f"{n:064x}", text="x", max_tokens=9) for n in range(2))
MOST = Price.of(PRICE).cost(most_tokens(ONE), 9)


def test_what_a_repeat_reserved_is_given_back_with_the_answer(tmp_path):
    grants = granted(tmp_path, 2 * MOST, ONE, TWO)
    meter, ask = next(grants)
    assert (ask.may_retry(), ask.may_retry()) == (True, False)
    meter.settled(Answer(ONE.key, usage={"prompt_tokens": 1, "completion_tokens": 1}), {})
    assert [ask.key for _, ask in grants] == [TWO.key]


def test_what_a_server_still_has_stays_reserved_when_nobody_comes_for_it(tmp_path):
    for asks in ([ONE], [TWO, ONE]):
        grants = granted(tmp_path, 3 * MOST, *asks, llm=Resumable)
        next(grants)
        grants.close()
    spending = Spending.read(tmp_path / "journal" / "label.jsonl", None)
    assert set(spending.reserved) == {ONE.key, TWO.key}


def test_every_sample_is_reserved(tmp_path):
    many = replace(ONE, samples=8)
    most = Price.of(PRICE).cost(most_tokens(many), 8 * 9)
    assert not list(granted(tmp_path, 0.99 * most, many))
    assert len(list(granted(tmp_path, 1.01 * most, many))) == 1


def test_what_other_stages_have_spent_is_nothing_to_the_budget_of_labels(tmp_path):
    with Run(tmp_path, Settings()).journal("respond") as journal:
        journal.append({"id": TWO.key, "fault": None, "cost": 5.0})
    assert len(list(granted(tmp_path, MOST, ONE))) == 1


def test_a_torn_reservation_was_never_handed_out(make_job):
    with serving() as server:
        job = make_job(20, server.base_url, concurrency=4)
        assert here(job, "--budget", 0.005) == 4
        path = job.journal.with_suffix(RESERVED)
        spent = Spending.read(job.journal, None).spent
        with path.open("ab") as file:
            file.write(b'{"id":"' + b"0" * 64 + b'","fault":null,"calls":{"ab')
        assert Spending.read(job.journal, None).spent == spent
        assert here(job, "--budget", 1) == 0


def test_without_a_budget_costs_are_kept_and_counted_later(make_job):
    with serving() as server:
        job = make_job(20, server.base_url)
        arguments = job.arguments("--quiet", "--limit", "10")
        assert CliRunner().invoke(app, arguments).exit_code == 0
        assert {row["cost"] for row in read_jsonl(job.journal)} == {None}
        early = billed(server)
        assert not job.journal.with_suffix(RESERVED).exists()
        assert here(job, "--budget", f"{early + 1e-6:.9f}") == 4
        assert billed(server) == early
        assert here(job, "--budget", 1) == 0
        toml = job.run / "run.toml"
        toml.write_text(toml.read_text().replace("[judge]", f'[judge]\nprice = "{PRICE}"'))
        status = json.loads(aif_here("status", job.run, "--json").stdout)
        assert status["stages"]["label"]["cost"] == pytest.approx(billed(server))


def test_a_local_judge_beside_one_that_is_paid_is_free(make_job):
    with serving() as server:
        job = make_job(4, server.base_url)
        rules = write_jsonl(job.folder / "rules.jsonl", [{"logprobs": {"A": -0.1, "B": -2}}])
        job.judge += ["--judge", f"scripted:{rules}"]
        assert here(job, "--budget", 1) == 0
        costs = [row.get("cost") for row in read_jsonl(job.journal)]
        assert (len(costs), costs.count(None)) == (16, 8)


def test_a_local_judge_is_free(make_job):
    job = make_job(4)
    assert job.label_here("--quiet").exit_code == 0
    assert not any("cost" in row for row in read_jsonl(job.journal))
    assert state(job)["cost"] is None


# ---- what belongs together


def test_all_judges_and_stages_of_a_run_share_its_budget(make_job):
    with serving() as server:
        job = make_job(30, server.base_url, concurrency=4)
        write_jsonl(job.folder / "p.jsonl", [{"prompt": f"prompt {n}"} for n in range(30)])
        (job.run).mkdir()
        server_of = (
            f'model = "openai:test-model"\nbase_url = "{server.base_url}"\nprice = "{PRICE}"'
        )
        (job.run / "run.toml").write_text(
            f"[policy]\n{server_of}\nmax_tokens = 20\n[judge]\n{server_of}\n"
            f'[respond]\nprompts = "{job.folder}/p.jsonl"\n'
            f'[label]\npairs = "{job.pairs}"\nconstitution = "{job.constitution}"\n'
            '[pipeline]\nstages = ["respond", "label"]\n'
        )

        def run(*more: object) -> int:
            arguments = ["run", str(job.run), "--quiet", *map(str, more)]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code in (0, 4), result.stderr
            return result.exit_code

        assert run("--budget", 0.001) == 4  # within `respond`
        assert 0 < billed(server) <= 0.001
        assert not (job.run / "comparisons.jsonl").exists()
        assert run("--budget", 0.01) == 4  # within `label`
        assert 0.008 < billed(server) <= 0.01
        assert 0 < state(job)["labels"] < 30
        assert run("--budget", 1) == 0
        assert state(job)["labels"] == 30


def test_several_judges_come_to_whole_labels(make_job):
    """Slice by slice: one judge is not asked about everything before the other is asked at all."""
    with serving() as server:
        job = make_job(140, server.base_url)
        job.judge += ["--judge", "openai:another", "--price", PRICE, "--price", "3/12"]
        job.judge += ["--set", f'panel=[{{model="openai:another",base_url="{server.base_url}",'
                      'price="3/12"}]']  # fmt: skip
        assert planned(job)["dollars"]["about"] > 0
        assert job.label_here("--quiet", "--budget", "0.11").exit_code == 4
        labelling = state(job)
        assert 64 <= labelling["labels"] < 140
        assert all(len(row["by_judge"]) == 2 for row in read_jsonl(job.run / "labels.jsonl"))
        dear = Spending.read(job.journal, None).spent
        assert 1.2 * billed(server) < dear <= 0.11  # the other one costs twice as much


def test_cost_is_told(make_job):
    with serving() as server:
        job = make_job(4, server.base_url)
        result = job.label_here("--price", PRICE)
        cost = dollars(billed(server))
        assert f"{cost} for these calls" in result.stdout
        status = CliRunner().invoke(app, ["status", str(job.run)]).stdout
        assert f"{cost} spent" in status
        pytest.importorskip("matplotlib")
        CliRunner().invoke(app, ["report", str(job.run)], catch_exceptions=False)
        page = (job.run / "report.html").read_text()
        assert f"<td>{cost}</td>" in page


# ---- batches


def in_batches(job) -> list[str]:
    job.judge[1] = "openai-batch:m"
    return [*QUICK, "--set", "judge.poll_s=0.01"]


def test_a_batch_is_handed_in_as_far_as_the_budget_goes(make_job, monkeypatch):
    monkeypatch.setattr("aif.llm.batch_api.FIRST_WAIT_S", 0.01)
    with batches() as server:
        job = make_job(30, server.base_url)
        price = Price.of(PRICE)

        def cost() -> float:
            rows = [row for name in server.made for row in server.rows(name)]
            return sum(price.cost(len(json.dumps(r["body"]["messages"])) // 4 + 1, 1) for r in rows)

        assert job.label_here(*in_batches(job), "--budget", "0.01").exit_code == 4
        assert len(server.made) > 1  # what the answers did not take was handed in again
        assert 0.008 < cost() <= 0.01
        assert len(server.custom_ids) == len(set(server.custom_ids))
        assert state(job)["labels"] > 0
        assert job.label_here(*in_batches(job), "--budget", "1").exit_code == 0
        assert (len(server.custom_ids), len(set(server.custom_ids))) == (60, 60)
        assert state(job)["labels"] == 30


def test_what_a_batch_still_has_is_reserved(make_job, monkeypatch):
    """A process that left batches at the server comes back for them, within what it held."""
    monkeypatch.setattr("aif.llm.batch_api.FIRST_WAIT_S", 0.01)
    with batches() as server:
        job = make_job(30, server.base_url)
        server.held = True
        process = job.start(*in_batches(job), "--budget", "0.01")
        wait_for(lambda: server.made)
        first = len(server.custom_ids)
        process.kill()
        process.communicate()
        spending = Spending.read(job.journal, None)
        assert len(spending.reserved) == first
        assert (spending.paid, spending.missing) == (0, 0)
        assert 0.008 < spending.spent <= 0.01
        server.held = False
        assert job.label_here(*in_batches(job), "--budget", "0.01").exit_code == 4
        assert len(server.custom_ids) == len(set(server.custom_ids)) > first
        assert Spending.read(job.journal, None).spent <= 0.01
