"""Several judges of a run, and calls that are made only where cheaper ones leave it open."""

import hashlib
import json
import math
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aif.cli.verbs import app
from aif.errors import JudgeStopped
from aif.llm import open_llm
from aif.llm.scripted import ScriptedLLM
from aif.store.records import Comparison
from tests.conftest import read_jsonl, scripted_rules, write_constitution, write_jsonl
from tests.support.server import serving

PAIRS = 12
PLAIN = {
    "labels": "41f6f0ac9b96b359",
    "verdicts": "adfba5e3f7b8774f",
}  # as before there were panels


def rules(**by_digits: tuple[float, float]) -> list[dict]:
    """A judge whose log-odds for A are these where a left response or a right one stands there and
    its number ends in one of the digits: `_135=(left, right)`."""
    return [
        {
            "match": rf"response A \w+\]\n{side} \d*[{digits.strip('_')}]\n",
            "logprobs": {"A": -1 + min(odds, 0), "B": -1 - max(odds, 0)},
        }
        for digits, both in by_digits.items()
        for side, odds in zip(("left", "right"), both, strict=True)
    ]


def cli(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Place:
    """A folder with pairs, a constitution of two principles and scripted judges a, b and c."""

    def __init__(self, folder: Path):
        self.run = Path("run")
        rows = [
            {"prompt": f"prompt {n}", "response_a": f"left {n}", "response_b": f"right {n}"}
            for n in range(PAIRS)
        ]
        write_jsonl(Path("pairs.jsonl"), rows)
        questions = {"kind": "Which is kinder?", "warm": "Which is warmer?"}
        write_constitution(Path("c.toml"), questions, warm="weight = 2.0")
        self.write("rules", scripted_rules())
        self.write("a", rules(_135=(1.0, 0.2), _0=(2.0, -3.0), _246789=(-2.0, 0.4)))
        self.write("b", rules(_02468=(1.5, -1.0), _13579=(-0.5, 1.3)))
        self.write("c", rules(_0123456789=(0.9, -0.4)))

    def write(self, judge: str, answers: list[dict]) -> None:
        write_jsonl(Path(f"{judge}.jsonl"), answers)

    def arguments(self, judges: str, *more: object, run: object = None) -> list[object]:
        named = [part for name in judges.split() for part in ("--judge", f"scripted:{name}.jsonl")]
        files = ["--pairs", "pairs.jsonl", "--constitution", "c.toml"]
        return ["--out", run or self.run, *files, *named, *more]

    def label(self, judges: str, *more: object, run: object = None) -> dict:
        arguments = self.arguments(judges, "--json", "--max-fault-rate", "1", *more, run=run)
        result = cli("label", *arguments)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    def plan(self, judges: str, *more: object) -> dict:
        result = cli("plan", *self.arguments(judges, "--json", *more))
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    def labels(self, run: object = None) -> dict[str, dict]:
        rows = read_jsonl(Path(run or self.run) / "labels.jsonl")
        return {row["comparison_id"]: row for row in rows}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


# ---- several judges


def test_one_judge_is_as_before_there_were_panels(place):
    place.label("rules")
    for name, digest in PLAIN.items():
        sha256 = hashlib.sha256((place.run / f"{name}.jsonl").read_bytes()).hexdigest()
        assert sha256[:16] == digest
    assert "panel" not in (place.run / "run.toml").read_text()
    assert not {"panel", "consensus", "judges"} & set(
        json.loads((place.run / "label.json").read_text())
    )


def test_every_judge_is_kept_and_heard(place):
    alone = {}
    for name in "abc":
        place.label(name, run=f"{name}-alone")
        alone[f"scripted:{name}.jsonl"] = place.labels(f"{name}-alone")
    done = place.label("a b c")
    assert done["calls_made"] == 3 * PAIRS * 4
    assert {n: counts["labels"] for n, counts in done["judges"].items()} == dict.fromkeys(
        alone, PAIRS
    )
    for key, row in place.labels().items():
        assert row["by_judge"] == {name: rows[key]["p_first"] for name, rows in alone.items()}
        assert row["n_verdicts"] == 12
    verdicts = read_jsonl(place.run / "verdicts.jsonl")
    assert [row["judge"] for row in verdicts[:12]] == [name for name in alone for _ in range(4)]
    assert tomllib.loads((place.run / "run.toml").read_text())["panel"] == [
        {"model": "scripted:b.jsonl"}, {"model": "scripted:c.jsonl"}
    ]  # fmt: skip


def test_another_judge_costs_its_own_calls_and_serves_nobody_elses(place):
    assert place.label("a b")["calls_made"] == 2 * PAIRS * 4
    both = place.labels()
    assert place.label("a b c")["calls_made"] == PAIRS * 4  # one more
    dropped = place.label("b c")
    assert (dropped["calls_made"], dropped["calls_kept"]) == (0, 2 * PAIRS * 4)
    place.write("d", [{"logprobs": {"A": -0.01, "B": -5}}])
    assert place.label("a d")["calls_made"] == PAIRS * 4  # another in place of b
    swapped = place.labels()
    for key, row in swapped.items():
        assert row["by_judge"]["scripted:a.jsonl"] == both[key]["by_judge"]["scripted:a.jsonl"]
        assert row["by_judge"]["scripted:d.jsonl"] == 0.5
    assert place.label("b a")["calls_made"] == 0  # nor does their order count
    assert {key: row["p_first"] for key, row in place.labels().items()} == {
        key: row["p_first"] for key, row in both.items()
    }


@pytest.mark.parametrize("rule", ["majority", "unanimous"])
def test_a_rule_costs_no_call_and_tells_its_nulls(place, rule):
    place.label("a b c")
    result = cli("label", *place.arguments("a b c", "--consensus", rule))
    assert "0 calls made" in result.stdout
    assert "consensus changed" in result.stderr
    rows = place.labels().values()
    if rule == "unanimous":
        open_ones = [row for row in rows if row["fault"] == "no_consensus"]
        assert 0 < len(open_ones) < PAIRS
        assert f"{len(open_ones)} labels are null as the judges do not all" in result.stdout
    for row in rows:
        sides = {(p > 0.5) - (p < 0.5) for p in row["by_judge"].values()}
        assert (row["p_first"] is None) == (len(sides) > 1) or rule == "majority"


def test_weights_are_given_or_an_audits(place):
    place.label("a b")
    both = place.labels()
    heavy = place.label("a b", "--set", 'label.judge_weights={"scripted:b.jsonl"=1e9}')
    assert heavy["calls_made"] == 0
    for key, row in place.labels().items():
        assert row["p_first"] == pytest.approx(both[key]["by_judge"]["scripted:b.jsonl"], abs=1e-6)
    weights = {"scripted:a.jsonl": 0, "scripted:b.jsonl": 2}
    Path("audit.json").write_text(json.dumps({"weights": weights}))
    place.label("a b", "--set", "label.weights_from=audit.json")
    for key, row in place.labels().items():
        assert row["p_first"] == both[key]["by_judge"]["scripted:b.jsonl"]
    used = json.loads((place.run / "label.json").read_text())
    assert used["consensus"] == {"rule": "mean", "weights": weights}
    weights = 'label.judge_weights={"scripted:a.jsonl"=1, "scripted:b.jsonl"=0}'
    place.label("a b", "--set", "label.weights_from=audit.json", "--set", weights)
    for key, row in place.labels().items():
        assert row["p_first"] == both[key]["by_judge"]["scripted:a.jsonl"]


def test_a_judge_that_only_fails_is_told_and_the_quorum_decides(place):
    place.write("broken", [{"fault": "refused"}])
    place.label("a broken")
    assert {row["fault"] for row in place.labels().values()} == {"refused"}
    assert place.plan("a broken")["calls_after_fault"] == PAIRS * 4
    assert place.label("a", "--set", "label.quorum=0.5")["labels_null"] == {}
    again = place.label("a broken", "--set", "label.quorum=0.5")
    assert again["calls_made"] == PAIRS * 4  # what failed is asked again, and nothing else
    assert again["judges"]["scripted:broken.jsonl"] == {"labels": PAIRS, "null": PAIRS}
    assert all(row["p_first"] is not None for row in place.labels().values())


class Watched:
    """`open_llm`, which keeps who was open while somebody answered, and may have one stop."""

    def __init__(self, stop_after: int | None = None):
        self.open: list[str] = []
        self.crowd: set[tuple[str, ...]] = set()
        self.calls, self.stop_after = 0, stop_after

    def __call__(self, settings):
        watched, llm = self, open_llm(settings)

        class One(ScriptedLLM):
            def __enter__(self):
                watched.open.append(settings.model)
                return self

            def __exit__(self, *error):
                watched.open.remove(settings.model)

            def answer(self, asks):
                for answer in llm.answer(asks):
                    if watched.calls == watched.stop_after:
                        raise JudgeStopped("gone")
                    watched.calls += 1
                    watched.crowd.add(tuple(watched.open))
                    yield answer

        return One(None)


def test_one_judge_at_a_time_has_its_model_open(place, monkeypatch):
    watched = Watched()
    monkeypatch.setattr("aif.judge.calls.open_llm", watched)
    place.label("a b c")
    assert watched.crowd == {(f"scripted:{name}.jsonl",) for name in "abc"}
    assert not watched.open


def test_a_second_judge_that_is_gone_leaves_what_the_first_said(place):
    nobody = 'panel=[{model="openai:test-model", base_url="http://127.0.0.1:9/v1", attempts=1}]'
    rows = [
        {"prompt": f"prompt {n}", "response_a": f"left {n}", "response_b": f"right {n}"}
        for n in range(60)
    ]
    write_jsonl(Path("pairs.jsonl"), rows)
    result = cli("label", *place.arguments("a", "--set", nobody))
    assert result.exit_code == 1
    (line,) = [row for row in result.stderr.splitlines() if row.startswith("aif: ")]
    assert line.startswith("aif: openai:test-model: the last 100 calls failed")
    assert "the same command resumes" in line
    assert place.label("a", run="run")["calls_made"] == 0  # all 240 of the first were kept
    with serving() as server:
        there = nobody.replace("http://127.0.0.1:9/v1", server.base_url)
        done = place.label("a", "--set", there)
    assert (done["calls_made"], done["calls_kept"]) == (240, 240)
    assert done["unfinished"] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--judge", "scripted:a.jsonl"], "scripted:a.jsonl twice, expected judges that differ"),
        (["--judge", "scripted:gone.jsonl"], "gone.jsonl: got no such file"),
        (["--set", 'label.judge_weights={"x"=1.0}'], "judge_weights: got 'x', expected one of "),
        (["--set", 'label.judge_weights={"scripted:a.jsonl"=0.0}'], "got 0 for all"),
        (["--set", "label.weights_from=no.json"], "no.json: got no such JSON"),
        (["--set", "label.weights_from=odd.json"], "odd.json: weights: got"),
        (["--set", "label.weights_from=bare.json"], "nothing for scripted:a.jsonl"),
        (["--consensus", "loudest"], "label.consensus: got 'loudest'"),
        (["--set", "panel=[{modle='x'}]"], "panel.0.modle: got an unknown key"),
        (["--set", "label.escalate_below=0.2", "--set", "label.escalate=panel"], "of one judge"),
        (["--set", "label.escalate_below=0.2", "--protocol", "pointwise"], "of single responses"),
        (
            [
                *("--judge", "scripted:b.jsonl"),
                *("--set", 'label.judge_weights={"scripted:a.jsonl"=0}'),
                *("--set", "label.escalate_below=0.2", "--set", "label.escalate=panel"),
            ],
            "got 0 for scripted:a.jsonl, expected more",
        ),
    ],
)
def test_a_slip_is_one_line_before_any_call(place, more, message):
    Path("odd.json").write_text('{"weights": {"scripted:a.jsonl": "much"}}')
    Path("bare.json").write_text('{"weights": {"other": 1}}')
    write_constitution(Path("c.toml"), {"kind": "Kinder?"}, kind='grade = "Is it kind?"')
    result = cli("label", *place.arguments("a", *more))
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not place.run.exists()


def test_two_judges_of_one_model_are_told_apart(place):
    panel = 'panel=[{model="scripted:a.jsonl", temperature=1.0}]'
    place.label("a", "--set", panel)
    names = {"scripted:a.jsonl", "scripted:a.jsonl#2"}
    assert {row["judge"] for row in read_jsonl(place.run / "verdicts.jsonl")} == names
    assert all(set(row["by_judge"]) == names for row in place.labels().values())


def test_a_judge_that_run_toml_has_is_asked_as_it_says_there(place):
    panel = 'panel=[{model="scripted:b.jsonl", temperature=0.5, base_url="http://u:k@h/v1?k=1"}]'
    assert place.label("a", "--set", panel)["calls_made"] == 2 * PAIRS * 4
    kept = tomllib.loads((place.run / "run.toml").read_text())
    assert kept["panel"][0]["base_url"] == "http://h/v1"
    for judges in ("b", "a b", "b a", ""):
        assert place.label(judges)["calls_made"] == 0
    assert len(place.labels()) == PAIRS


def test_a_diff_takes_the_answers_of_a_panel(place):
    pytest.importorskip("sklearn")
    place.label("a b c")
    same = cli("diff", place.run, "--json")
    assert json.loads(same.stdout)["all"]["moved"] == 0
    less = cli("diff", place.run, "--judge", "scripted:a.jsonl", "--json")
    summary = json.loads(less.stdout)
    assert summary["all"]["n"] == PAIRS
    assert {"judge 'scripted:b.jsonl' left", "judge 'scripted:c.jsonl' left"} <= set(
        summary["differences"]
    )


# ---- more calls only where it is open

ORDERS = ("--set", "label.escalate=orders", "--set")
PANEL = ("--set", "label.escalate=panel", "--set")
BOTH = pytest.mark.parametrize(("judges", "by"), [("a", ORDERS), ("a b", ORDERS), ("a b c", PANEL)])


def below(threshold: float) -> str:
    return f"label.escalate_below={threshold}"


@BOTH
def test_the_cheap_pass_alone_and_the_full_protocol_are_its_ends(place, judges, by):
    place.label(judges, run="full")
    full = 4 * PAIRS * len(judges.split())
    cheap = place.label(judges, *by, below(0), run="cheap")
    each = 4 * PAIRS if by is PANEL else full // 2
    assert cheap["calls_made"] == each
    assert cheap["escalated"] == {"comparisons": 0, "calls": each, "calls_of_all": full}
    every = place.label(judges, *by, below(1), run="every")
    assert every["escalated"] == {"comparisons": PAIRS, "calls": full, "calls_of_all": full}
    assert place.labels("every") == place.labels("full")


@BOTH
def test_more_is_asked_where_the_cheap_pass_is_close_and_nowhere_else(place, judges, by):
    place.label(judges, *by, below(0), run="cheap")
    cheap = place.labels("cheap")
    margins = sorted(abs(2 * row["p_first"] - 1) for row in cheap.values())
    threshold = (margins[PAIRS // 2] + margins[PAIRS // 2 - 1]) / 2
    result = cli("label", *place.arguments(judges, *by, below(threshold)))
    place.label(judges, run="full")
    full = place.labels("full")
    open_ones = 0
    for key, row in place.labels().items():
        is_open = abs(2 * cheap[key]["p_first"] - 1) < threshold
        open_ones += is_open
        assert row == (full if is_open else cheap)[key]
    assert 0 < open_ones < PAIRS
    assert f"{open_ones} comparisons got more than the cheap pass" in result.stdout
    ids = [row["id"] for row in read_jsonl(place.run / "verdicts.jsonl")]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("margin", [0.2, 0.4, 0.6, 0.8])
def test_a_margin_that_is_the_threshold_is_not_open(place, margin):
    for side in ("left", "right"):
        sure, other = math.log((1 + margin) / 2), math.log((1 - margin) / 2)
        first = {"match": rf"response A \w+\]\n{side}", "logprobs": {"A": sure, "B": other}}
        place.write(side, [first, {"logprobs": {"A": other, "B": sure}}])
        done = place.label(f"{side} b", *PANEL, below(margin))
        assert done["escalated"]["comparisons"] == 0


def test_another_threshold_costs_only_what_is_new(place):
    made = [place.label("a b", *PANEL, below(t))["calls_made"] for t in (0, 0.2, 0.5, 0.9, 1)]
    assert sum(made) == 2 * 4 * PAIRS
    assert made[0] == 4 * PAIRS
    assert place.label("a b", *PANEL, below(0.2))["calls_made"] == 0
    assert place.label("a b")["calls_made"] == 0


@BOTH
def test_cut_short_anywhere_it_ends_the_same_and_pays_once(place, judges, by, monkeypatch):
    straight = place.label(judges, *by, below(0.4), run="straight")
    assert 0 < straight["escalated"]["comparisons"] < PAIRS
    calls = 0
    while True:
        watched = Watched(stop_after=19)
        monkeypatch.setattr("aif.judge.calls.open_llm", watched)
        result = cli("label", *place.arguments(judges, *by, below(0.4)))
        calls += watched.calls
        if result.exit_code == 0:
            break
        assert "gone" in result.stderr
    assert calls == straight["calls_made"]
    for name in ("labels.jsonl", "verdicts.jsonl"):
        assert (place.run / name).read_bytes() == (Path("straight") / name).read_bytes()


@BOTH
def test_plan_says_at_least_and_at_most(place, judges, by):
    more = (*by, below(0.4))
    planned = place.plan(judges, *more)
    done = place.label(judges, *more)
    full = done["escalated"]["calls_of_all"]
    assert planned["calls"] < done["calls_made"] < planned["calls"] + planned["calls_perhaps"]
    assert planned["calls"] + planned["calls_perhaps"] == full
    after = place.plan(judges, *more)
    assert (after["calls"], after["calls_perhaps"], after["answers_unused"]) == (0, 0, 0)
    grown = place.plan(judges, *by, below(0.41))
    assert grown["calls_perhaps"] == 0  # what is open is known by now


def test_plan_prices_the_calls_that_may_come(place):
    full = place.plan("a", "--price", "1/2")["dollars"]
    cheap = place.plan("a", "--price", "1/2", *ORDERS, below(0.4))["dollars"]
    assert cheap["about"] < cheap["at_most"] == pytest.approx(full["at_most"])


def test_an_answer_that_is_there_is_no_call_perhaps(place):
    place.label("b")
    planned = place.plan("a b", *PANEL, below(0.4))
    assert (planned["calls"], planned["calls_perhaps"]) == (4 * PAIRS, 0)


def test_a_pair_that_stands_the_other_way_round_is_asked_the_same(place):
    rows = read_jsonl(Path("pairs.jsonl"))
    turned = [r | {"response_a": r["response_b"], "response_b": r["response_a"]} for r in rows]
    place.label("a", *ORDERS, below(0.3))
    first = place.labels()
    write_jsonl(Path("pairs.jsonl"), turned)
    assert place.label("a", *ORDERS, below(0.3))["calls_made"] == 0
    orders = set()
    for row in read_jsonl(place.run / "comparisons.jsonl"):
        twin = Comparison.of(row["prompt"], row["second"], row["first"])
        p = place.labels()[row["id"]]["p_first"]
        assert p + first[twin.id]["p_first"] == pytest.approx(1, abs=1e-12)
    orders = {row["order"] for row in read_jsonl(place.run / "verdicts.jsonl")}
    assert orders == {"ab", "ba"}


def test_one_order_says_nothing_of_the_agreement_of_orders(place):
    place.label("a", *ORDERS, below(0))
    assert {row["order_agreement"] for row in place.labels().values()} == {None}
    assert {row["n_verdicts"] for row in place.labels().values()} == {2}


@pytest.mark.parametrize(("fault", "more"), [("refused", PAIRS * 4), ("backend", 0)])
def test_a_null_is_put_to_the_others_unless_its_server_is_to_blame(place, fault, more):
    place.write("broken", [{"fault": fault}])
    done = place.label("broken a", *PANEL, below(0.2), "--set", "label.quorum=0.5")
    assert done["calls_made"] == PAIRS * 4 + more
    if more:
        assert all(row["p_first"] is not None for row in place.labels().values())


def test_one_order_that_failed_waits_for_the_next_time(place):
    place.write("broken", [{"fault": "refused"}])
    done = place.label("broken", *ORDERS, below(0.2))
    assert done["calls_made"] == PAIRS * 2
    assert done["labels_null"] == {"refused": PAIRS}


REASONED = ("--set", "label.escalate=reasoned", "--set")


@pytest.mark.parametrize("judges", ["a", "a b"])
def test_reasons_are_asked_for_where_it_is_open_and_then_decide(place, judges):
    both = judges.split()
    for name in both:
        answers = read_jsonl(Path(f"{name}.jsonl"))
        lead = {
            "match": r"response B \w+\]\nright \d*[02468]\n.*Verdict:",
            "text": "So.\nVerdict: B",
        }
        place.write(name, [lead, {"match": "Verdict:", "text": "So.\nVerdict: A"}, *answers])
    place.label(judges, run="cheap")
    place.label(judges, "--protocol", "reasoned", run="full")
    done = place.label(judges, *REASONED, below(0.3))
    open_ones = 0
    for key, row in place.labels().items():
        cheap = place.labels("cheap")[key]
        is_open = abs(2 * cheap["p_first"] - 1) < 0.3
        open_ones += is_open
        expected = place.labels("full")[key] if is_open else cheap
        assert (row["p_first"], row["by_principle"]) == (
            expected["p_first"], expected["by_principle"]
        )  # fmt: skip
    assert 0 < open_ones < PAIRS
    calls = 4 * len(both) * (PAIRS + open_ones)
    assert done["calls_made"] == calls
    full = 4 * len(both) * PAIRS
    assert done["escalated"] == {"comparisons": open_ones, "calls": calls, "calls_of_all": full}
    names = {f"scripted:{name}.jsonl{more}" for name in both for more in ("", ", reasoned")}
    assert {row["judge"] for row in read_jsonl(place.run / "verdicts.jsonl")} == names
    assert place.plan(judges, *REASONED, below(0.3))["calls"] == 0
    again = place.label(judges, *REASONED, below(0.3), "--protocol", "pairwise")
    assert again["calls_made"] == 0


def test_reasons_weigh_as_much_as_their_judge(place):
    for name, digits in (("a", "02468"), ("b", "13579")):
        second = rf"response B \w+\]\nright \d*[{digits}]\n.*Verdict:"
        place.write(
            name,
            [
                {"match": second, "text": "So.\nVerdict: B"},
                {"match": "Verdict:", "text": "So.\nVerdict: A"},
                *read_jsonl(Path(f"{name}.jsonl")),
            ],
        )
    place.label("b", "--protocol", "reasoned", run="alone")
    weights = 'label.judge_weights={"scripted:a.jsonl"=0}'
    place.label("a b", *REASONED, below(1), "--set", weights)
    together, alone = ({k: row["p_first"] for k, row in place.labels(run).items()}
                    for run in (place.run, "alone"))  # fmt: skip
    assert together == alone


def test_reasons_on_top_of_reasons_are_refused(place):
    result = cli("label", *place.arguments("a", *REASONED, below(0.3), "--protocol", "reasoned"))
    assert "of judges that reason at once" in result.stderr
