"""`aif report`: what is on the page, what is not, and that nothing on it can act."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aif.config.settings import Settings
from aif.config.toml import checked
from aif.data.visible import cleaned, visible
from aif.errors import AifError
from aif.progress import Progress
from aif.report import report
from aif.report.browser import browser_data, draw
from aif.report.judge_stats import judge_rows, survey
from aif.report.sections import MOST_PRINCIPLES
from aif.report.tiles import tiles
from aif.run import Run
from aif.store.records import Comparison, HumanChoice, Label, Verdict
from tests.conftest import aif_here, read_jsonl, write_jsonl
from tests.support.full_run import FAULTY, full_run, labelled_run

PARTS = ("ran", "funnel", "judge", "labels", "reward", "training", "kl", "evaluation", "browse")
HINTS = ("reward RUN", "sft RUN, aif reward RUN or aif ppo RUN", "ppo RUN", "evaluate RUN")
VOID = {"meta", "input", "link", "br", "hr", "img"}


class Parsed(HTMLParser):
    """A page's elements, with its texts; wrongly nested tags are an error."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.held: list[tuple[str, str]] = []  # (tag, text directly in it)
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open:
            self.held.append((self.open[-1], data))

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]

    def text(self) -> str:
        return " ".join(
            " ".join(text for tag, text in self.held if tag not in ("script", "style")).split()
        )


def written(run: Run) -> str:
    return (run.path / "report.html").read_text("ascii")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def tile_names(page: str) -> list[str]:
    tiles = re.search(r'<dl class="tiles">(.*?)</dl>', page, re.DOTALL)[1]
    return re.findall("<dt>(.*?)</dt>", tiles)


def empty_run(path) -> Run:
    path.mkdir(exist_ok=True)
    return Run(path, checked(Settings, {}, "test"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    run = full_run(tmp_path_factory.mktemp("full") / "run")
    return run, report(run, Progress(quiet=True)), written(run)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    run = labelled_run(tmp_path_factory.mktemp("bare") / "run")
    for name in ("prompts.jsonl", "responses.jsonl", "human.jsonl"):
        run.file(name).unlink()
    return run, report(run, Progress(quiet=True)), written(run)


def test_a_full_run_has_every_part(full):
    _, summary, page = full
    parsed = Parsed(page)
    assert set(PARTS) <= set(parsed.ids())
    assert 'class="missing"' not in page
    links = [attrs["href"] for tag, attrs in parsed.elements if tag == "a"]
    assert links == ["#main", *(f"#{part}" for part in PARTS)]
    assert summary["parts"] == [
        "funnel", "judging", "reward", "training", "kl", "evaluation", "browser"
    ]  # fmt: skip
    assert summary["browsed"]["comparisons"] == [60, 60]
    assert tile_names(page) == ["Win rate", "Gold", "Score (proxy)", "KL", "Words"]
    assert "ppo against base, 61.2 % to 77.2 %; at equal length 61.0 %" in parsed.text()
    assert "0.500 \N{RIGHTWARDS ARROW} 1.10 base to ppo" in parsed.text()
    for text in ("Longer wins", "Calibration", "Learning curve", "Explained variance of the critic",
                 "5 held-out prompts, by step", "Win rates at equal length", "Elo points",
                 "Agreement with what people chose", "at most 0.636", "69.2"):  # fmt: skip
        assert text in page, text


def test_labels_alone_make_a_report(bare):
    _, _, page = bare
    parsed = Parsed(page)
    assert {"ran", "funnel", "judge", "labels", "browse"} <= set(parsed.ids())
    assert tile_names(page) == ["Labels", "Same winner swapped", "Longer wins", "Confident"]
    assert not {"reward", "training", "kl", "evaluation"} & set(parsed.ids())
    assert re.findall(r'class="missing">[^<]*<code>aif (.*?)</code>', page) == list(HINTS)


def test_the_verb_and_a_run_without_labels(make_job):
    job = make_job(6)
    job.run.mkdir()
    nothing = aif_here("report", job.run)
    assert nothing.returncode == 1
    assert nothing.stderr.splitlines()[-1].endswith("no stage has left its files there")
    assert not (job.run / "report.html").exists()
    assert job.label_here().exit_code == 0
    done = aif_here("report", job.run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{job.run}/report.html"
    status = aif_here("status", job.run).stdout
    assert "  report   report.html\n" in status
    assert status.endswith(f"next: aif export {job.run}\n")
    page = (job.run / "report.html").read_text("ascii")
    assert len(data_of(page)["comparisons"]) == 6
    assert "Which response is kinder?" in Parsed(page).text()


def test_files_that_are_not_as_aif_writes_them(tmp_path):
    run = labelled_run(tmp_path / "run", 6)
    label = read_jsonl(run.path / "labels.jsonl")[0]
    verdict = read_jsonl(run.path / "verdicts.jsonl")[0]
    cases = {
        "labels.jsonl": [
            ('{"comparison_id": "x"', ":1: got "),
            (json.dumps(label | {"p_first": "much"}), ":1: p_first: got 'much'"),
            (
                json.dumps(label | {"by_principle": {"kind": 7}}),
                ": got 7.0, expected a probability",
            ),
            (json.dumps({"p_first": 0.5}), ": got nothing, expected a Label row"),
        ],
        "verdicts.jsonl": [(json.dumps(verdict | {"order": None}), ":1: order: got None")],
        "metrics.jsonl": [('{"stage": "ppo", "step": "a", "name": "x"}', ":1: step: got 'a'")],
        "evaluate.json": [
            ("not json", ": got bad JSON"),
            ("[]", ": got [], expected a JSON object"),
            ('{"matches": [{"win_rate": {"mean": "x"}}]}', ": matches.0.win_rate.mean: got 'x'"),
        ],
        "reward-card.json": [('{"ai": {"calibration": {"bins": [{}]}}}', "ai.calibration.bins.0")],
    }
    for name, damages in cases.items():
        path = run.file(name)
        before = path.read_bytes() if path.exists() else None
        for text, message in damages:
            path.write_text(text + "\n")
            with pytest.raises(AifError) as error:
                report(run, Progress(quiet=True))
            assert str(error.value).startswith(str(path)), text
            assert message in str(error.value), text
            assert "\n" not in str(error.value)
        path.unlink() if before is None else path.write_bytes(before)
    assert not run.file("report.html").exists()


def test_states_with_nothing_in_them_are_no_error(tmp_path):
    run = labelled_run(tmp_path / "run", 6)
    for name in ("label", "sft", "reward", "ppo", "reward-card", "evaluate"):
        run.write_state(name, {"unknown": 1})
    run.write_state("reward", {"digest": "0", "in_progress": True})
    bins = [{"confidence": 0.6, "accuracy": 0.7, "n": 3}]
    run.write_state("reward-card", {"ai": {"calibration": {"bins": bins}}})
    report(run, Progress(quiet=True))
    assert "begun, not done" in written(run)
    assert "Calibration" in written(run)
    assert "ECE" not in written(run)


def test_what_is_missing_is_said_in_one_line(full, monkeypatch):
    run, _, before = full
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AifError, match=r"needs matplotlib: pip install 'aif\[report\]'"):
        report(run, Progress(quiet=True))
    assert written(run) == before


# ---- a page that asks for nothing and runs nothing but its own script


def test_the_page_refers_to_nothing_outside_of_itself(full):
    _, _, page = full
    parsed = Parsed(page)
    for tag, attrs in parsed.elements:
        for name, value in attrs.items():
            assert name != "style", tag
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "srcset", "action", "data", "poster", "formaction"):
                assert value.startswith("#"), (tag, name, value)
    style = next(text for tag, text in parsed.held if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"link", "iframe", "object", "embed", "base"}
    addresses = set(re.findall(r"https?://[^\s\"'<)]*", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    assert str(full[0].path) not in page
    assert "jane" not in page


def test_the_policy_allows_this_style_and_this_script_alone(full):
    _, _, page = full
    parsed = Parsed(page)
    metas = [attrs for tag, attrs in parsed.elements if tag == "meta"]
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    sources = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(scripts) == len(styles) == 1
    for kind, text in (("script-src", scripts[0]), ("style-src", styles[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert sources[kind] == f"'sha256-{digest}'"
    assert sources["default-src"] == sources["base-uri"] == sources["form-action"] == "'none'"
    assert page.index("Content-Security-Policy") < page.index("<style>")
    script = scripts[0]
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
    ):
        assert word not in script


def test_charts_are_inert_and_named(full):
    _, _, page = full
    parsed = Parsed(page)
    ids = parsed.ids()
    assert len(ids) == len(set(ids))
    charts = [attrs for tag, attrs in parsed.elements if tag == "svg" and "role" in attrs]
    assert len(charts) > 20
    for attrs in charts:
        assert attrs["role"] == "img"
        title, desc = attrs["aria-labelledby"].split()
        assert title in ids
        assert desc in ids
    for tag, attrs in parsed.elements:
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids, (tag, attrs)
        if "clip-path" in attrs:
            assert attrs["clip-path"][5:-1] in ids
    assert "#0000" not in page  # no colour but by a class
    assert page.count("<figure>") == page.count("<summary>")  # each with its figures as a table


def test_a_colour_without_a_role_is_an_error():
    from matplotlib.figure import Figure

    from aif.report.svg import inline

    figure = Figure()
    figure.subplots().plot([0, 1], color="#123456")
    with pytest.raises(KeyError):
        inline(figure, "x", "x", "x")


def test_tables_and_headings_are_marked_up(full):
    parsed = Parsed(full[2])
    heads = [attrs for tag, attrs in parsed.elements if tag == "th"]
    assert heads
    assert all(attrs.get("scope") in ("col", "row") for attrs in heads)
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    regions = [attrs for _, attrs in parsed.elements if "scroll" in (attrs.get("class") or "")]
    assert all(attrs["aria-label"] and attrs["tabindex"] == "0" for attrs in regions)


# ---- the same files, the same page; nothing heavy, nobody asked

ALONE = """
import sys
from aif.cli.verbs import main
try:
    main()
except SystemExit as end:
    assert end.code in (0, None), end.code
print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_the_same_files_make_the_same_page(full):
    run, _, before = full
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    command = [sys.executable, "-c", ALONE, "report", str(run.path), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert written(run) == before
    summary, _, loaded = done.stdout.partition("LOADED")
    assert json.loads(summary)["bytes"] == len(before)
    assert not set(loaded.split()) & {"torch", "transformers", "openai", "pandas", "datasets"}


# ---- what is null is counted, and never a number


def test_nulls_are_counted_and_never_drawn(full):
    run, _, page = full
    labels = list(run.read("labels.jsonl", Label))
    null = sum(label.p_first is None for label in labels)
    assert null == -(-60 // FAULTY)
    verdicts = list(run.read("verdicts.jsonl", Verdict))
    whole = judge_rows(survey(run))[0]
    assert len(whole["values"]) == 60 - null
    assert whole["null"] == null
    assert dict(whole["faults"]) == {"unparsed": sum(v.fault is not None for v in verdicts)}
    text = Parsed(page).text()
    assert f"{60 - null} labels, {null} null" in text
    assert f"Labels 60 {60 - null} {null} unparsed" in text
    assert "Responses 61 60 1 empty" in text
    assert "label 48 2 0 24,000 240" in text  # answers, failed, damaged lines, tokens
    assert "evaluate 2 1 0 \N{EN DASH} \N{EN DASH}" in text
    assert "Revisions 24 12 12 truncated" in text
    table = re.search(r"spread-0.*?<tbody>(.*?)</tbody>", page, re.DOTALL)[1]
    assert sum(map(int, re.findall(r"<td>(\d+)</td>", table))) == 60 - null
    variance = page[page.index("<figcaption>Explained variance") :].partition("</table>")[0]
    assert re.search(r'<th scope="row">3</th><td>&#8211;</td>', variance)
    line = re.search(r'<path d="([^"]*)"[^>]*class="s-c1"', variance)[1]
    assert line.count("M") == 2  # it is lifted where there is no number


def test_the_data_is_what_the_files_say(full):
    run, _, page = full
    raw = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert not set("<>&") & set(raw)
    data = json.loads(raw)
    rows = {row.id: row for row in run.read("comparisons.jsonl", Comparison)}
    labels = run.labels()
    assert [item["id"] for item in data["comparisons"]] == list(rows)
    for item in data["comparisons"]:
        row, label = rows[item["id"]], labels[item["id"]]
        assert data["texts"][item["first"]] == row.first
        assert data["texts"][item["prompt"][0][1]] == row.prompt[0]["content"]
        assert item["fault"] == label.fault
        assert (item["p"] is None) == (label.p_first is None)
        for name, p in zip(data["principles"], item["by"], strict=True):
            assert p == pytest.approx(label.by_principle[name], abs=1e-4)
        assert len(item["verdicts"]) == 4
        assert all((v[2] is None) == (v[4] is not None) for v in item["verdicts"])
    answers = [row for item in data["answers"] for row in item["rows"]]
    policies = {row["policy"] for row in answers}
    assert {"tiny, sample 0", "PPO, step 0", "PPO, step 30", "evaluated: ppo"} <= policies
    assert "PPO, step 10" not in policies
    assert len(data["revisions"]) == 12
    assert [r["fault"] for r in data["revisions"][0]["rounds"]] == [None, "truncated"]


def test_the_judges_card_by_hand(tmp_path):
    """Four comparisons: one swap that turns the winner, and a judge who likes what is longer."""
    run = empty_run(tmp_path / "run")
    prompt = [{"role": "user", "content": "?"}]
    pairs = [Comparison.of(prompt, "long long long", f"short {n}") for n in range(4)]
    ps = [(0.9, 0.8), (0.8, 0.4), (0.2, 0.1), (0.5, 0.9)]
    verdicts = [
        Verdict(f"{c.id}{order}", c.id, "kind", order, "j", "A", p, None, {})
        for c, both in zip(pairs, ps, strict=True)
        for order, p in zip(("ab", "ba"), both, strict=True)
    ]
    labels = [Label(c.id, p, None, 2, None, {"kind": p})
              for c, p in zip(pairs, (0.85, 0.6, 0.15, None), strict=True)]  # fmt: skip
    run.write("comparisons.jsonl", pairs)
    run.write("verdicts.jsonl", verdicts)
    run.write("labels.jsonl", labels)
    run.write("human.jsonl", [HumanChoice(pairs[0].id, 1.0), HumanChoice(pairs[1].id, 0.0)])
    whole, kind = judge_rows(survey(run))
    for row in (whole, kind):
        keys = ("longer", "swaps", "shown_first", "human", "confident", "first")
        shares = {key: (row[key]["accuracy"], row[key]["n"]) for key in keys}
        assert shares == {
            "longer": (pytest.approx(2 / 3), 3),
            "swaps": (0.5, 4),  # .8 and .4 turn; even and .9 are not one winner either
            "shown_first": (pytest.approx(4 / 7), 7),  # ab: .9 .8, ba: .4 .1; .5 says nothing
            "human": (0.5, 2),
            "confident": (pytest.approx(2 / 3), 3),
            "first": (pytest.approx(2 / 3), 3),
        }


def test_the_tiles_are_of_the_weights_that_training_ended_with():
    measured = {("ppo", "eval/gold"): [(0, 1.0), (10, 3.0), (20, 2.0)],
                ("ppo", "eval/kl"): [(0, 0.0), (10, 4.0), (20, 9.0)]}  # fmt: skip
    gold, kl = tiles(measured, 10, None, None)
    assert gold["value"] == "1.00 \N{RIGHTWARDS ARROW} 3.00"
    assert kl["value"] == "4.00"
    assert [tile["value"] for tile in tiles(measured, None, None, None)][1] == "9.00"


def test_many_principles_are_all_in_the_table_and_not_all_drawn(tmp_path):
    run = empty_run(tmp_path / "run")
    pair = Comparison.of([{"role": "user", "content": "?"}], "a b", "a")
    by_principle = {f"p{n}": 0.9 for n in range(30)}
    run.write("comparisons.jsonl", [pair])
    run.write("labels.jsonl", [Label(pair.id, 0.9, None, 60, None, by_principle)])
    report(run, Progress(quiet=True))
    text = Parsed(written(run)).text()
    assert "p29 1 0 100.0 % 100.0 % 100.0 %" in text
    assert f"{30 - MOST_PRINCIPLES} more principles stand in the table above." in text
    assert "Distribution of p_first, p0" in text
    assert "Distribution of p_first, p29" not in text


def test_a_shared_grade_is_paid_once(tmp_path):
    run = empty_run(tmp_path / "run")
    rows = [Verdict("same", c, "kind", "a", "j", "Yes", 0.6, None, {"prompt_tokens": 7})
            for c in "xyz"]  # fmt: skip
    run.write("verdicts.jsonl", rows)
    labels = survey(run)
    assert labels.verdicts.paid.tokens == {"prompt_tokens": 7}
    assert labels.verdicts.of().verdicts == 3


# ---- more than fits


def test_what_does_not_fit_is_drawn_by_seed_and_said(tmp_path, monkeypatch):
    run = labelled_run(tmp_path / "run", 60)
    labels = survey(run)
    every = browser_data(run, labels, 0, 20_000_000)
    assert every["counts"]["comparisons"] == [60, 60]
    few = browser_data(run, labels, 0, 20_000)
    kept = [item["id"] for item in few["comparisons"]]
    assert 5 < len(kept) < 40
    assert browser_data(run, labels, 0, 20_000)["comparisons"] == few["comparisons"]
    assert [item["id"] for item in browser_data(run, labels, 1, 20_000)["comparisons"]] != kept
    assert sum(map(len, few["texts"])) < 20_000
    monkeypatch.setattr("aif.report.BUDGET", 20_000)
    report(run, Progress(quiet=True))
    text = Parsed(written(run)).text()
    assert f"This page holds {len(kept)} of 60 comparisons, drawn by seed 0" in text
    assert "Labels 60 51 9 unparsed" in text  # the figures are of all


def test_one_item_too_large_does_not_keep_the_others_out():
    small = {("comparisons", "a"): 10, ("comparisons", "b"): 10}
    sizes = Counter(small | {("comparisons", "large"): 1000})
    assert draw(sizes, 0, 100) == set(small)


# ---- texts of strangers


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("a\x00\x1b[2Jb", "a⟨U+0000⟩⟨U+001B⟩[2Jb"),
        ("lone \ud83d end", "lone ⟨U+D83D⟩ end"),
        ("zero\u200bwidth\ufeff", "zero⟨U+200B⟩width⟨U+FEFF⟩"),
        ("join\u200ded", "join⟨U+200D⟩ed"),
        ("tag \U000e0041", "tag ⟨U+E0041⟩"),
        ("two \U0001f600\ufe0f\ufe00", "two \U0001f600\ufe0f⟨U+FE00⟩"),
        ("a\r\nb\tc\u2028", "a\nb\tc⟨U+2028⟩"),
        # as they should be
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f\u200d\U0001f525", None),
        ("1\ufe0f\u20e3 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", None),
        ("naïve 漢字 \u05e9\u05dc\u05d5\u05dd", None),
    ],
)
def test_what_is_hidden_is_shown(text, shown):
    assert visible(text) == (text if shown is None else shown)


@given(st.text(alphabet=st.characters(codec=None)))
def test_a_visible_text_can_be_written_and_stays_as_it_is(text):
    shown = visible(text)
    shown.encode("utf-8")
    assert visible(shown) == shown
    assert cleaned({text: [text, 1, None]}) == {shown: [shown, 1, None]}


def test_names_and_texts_from_files_are_text_on_the_page(tmp_path):
    run = labelled_run(tmp_path / "run", 9, ["</script><script>alert(1)</script>", "{{7*7}}"])
    name = '"><img src=x onerror=alert(1)> $x^2$ \u202e{{7*7}} \ud800'
    run.write_state("evaluate", {
        "judge": name,
        "policies": [{"name": n, "model": n, "gold": {"mean": 1.0}} for n in (name, "a $x$ b")],
        "matches": [{"first": name, "second": name, "win_rate": {"mean": 0.5}}],
    })  # fmt: skip
    rows = [{"stage": "sft", "step": n, "name": "loss", "value": 1.0} for n in range(2)]
    write_jsonl(run.path / "metrics.jsonl", rows)
    report(run, Progress(quiet=True))
    page = written(run)
    parsed = Parsed(page)
    assert "img" not in {tag for tag, _ in parsed.elements}
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    assert "onerror=alert(1)> $x^2$ ⟨U+202E⟩{{7*7}} ⟨U+D800⟩" in parsed.text()
    assert "\u202e" not in parsed.text()
    assert ">a $x$ b</text>" in page
    assert "</script><script>alert(1)</script>" in data_of(page)["texts"]
