"""From answers to labels: what is asked, what an answer says, and what all of them come to."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from aif.config.settings import LabelSettings, LLMSettings
from aif.constitution.file import Constitution
from aif.errors import InputError
from aif.judge.aggregate import aggregate_verdicts
from aif.judge.judge import Judge
from aif.llm import Answer
from aif.stats.odds import log_odds, probability
from aif.store.records import Comparison, Label

HI = [{"role": "user", "content": "Hi"}]
EXAMPLE = {"text": "Hello!", "verdict": True}


def principle(name: str = "kind", **more) -> dict:
    return {"id": name, "compare": f"Which is {name}?", "grade": f"Is it {name}?"} | more


def constitution(*principles: dict, **more) -> Constitution:
    return Constitution.model_validate(
        {"name": "x", "principle": list(principles) or [principle()]} | more
    )


def judge_of(rules: Constitution | None = None, protocol="pairwise", model=None, **label) -> Judge:
    settings = LLMSettings.model_validate({"model": "openai:x"} | (model or {}))
    return Judge(rules or constitution(), settings, LabelSettings(protocol=protocol, **label))


def comparison(first="x", second="y", prompt="Hi") -> Comparison:
    return Comparison.of([{"role": "user", "content": prompt}], first, second)


def labelled(judge: Judge, row: Comparison, answer, quorum=1.0) -> Label:
    """The label when `answer(call, comparison)` says what the model replies."""
    verdicts = []
    for call in judge.calls_for(row):
        reply = replace(answer(call, row), key=call.id)
        verdicts.append(judge.verdict(call, row, judge.journal_row(reply)))
    return aggregate_verdicts(row, verdicts, judge.constitution, judge.protocol, quorum)


def odds(judge: Judge, value: float) -> Answer:
    """An answer whose first option has this log-odds."""
    first, second = judge.options
    low = -math.log1p(math.exp(value)) if value < 30 else -value
    return Answer("", logprobs={first: low + value, second: low})


def fault(kind: str) -> Answer:
    return Answer("", fault=kind)


def text(*texts: str, finish="stop") -> Answer:
    return Answer("", texts=texts, finish=finish)


ODDS = st.floats(-20, 20)
PROTOCOLS = pytest.mark.parametrize("protocol", ["pairwise", "pointwise"])


# ---- what the log-probabilities come to


@given(ODDS, ODDS)
def test_pairwise_is_half_the_difference_of_log_odds(ab, ba):
    judge = judge_of()
    log_odds_of_a = {"ab": ab, "ba": ba}
    label = labelled(judge, comparison(), lambda call, _: odds(judge, log_odds_of_a[call.order]))
    assert label.p_first == pytest.approx(1 / (1 + math.exp(-(ab - ba) / 2)), abs=1e-8)
    assert label.n_verdicts == 2


@given(ODDS, ODDS)
def test_pointwise_is_the_difference_of_log_odds(a, b):
    judge = judge_of(protocol="pointwise")
    log_odds_of_yes = {"a": a, "b": b}
    label = labelled(judge, comparison(), lambda call, _: odds(judge, log_odds_of_yes[call.order]))
    assert label.p_first == pytest.approx(probability(a - b), abs=1e-8)
    assert label.order_agreement is None


@given(st.floats(-9, 9), st.floats(-9, 9))
def test_a_constant_liking_for_a_position_cancels(bias, strength):
    judge = judge_of()

    def biased(call, _):
        return odds(judge, bias + (strength if call.order == "ab" else -strength))

    label = labelled(judge, comparison(), biased)
    assert label.p_first == pytest.approx(probability(strength), abs=1e-8)
    even = labelled(judge, comparison(), lambda *_: odds(judge, bias))
    assert even.p_first == 0.5  # exactly, so that no rounding makes it a preference


@given(st.integers(0, 40))
def test_even_extremes_are_exactly_even(size):
    judge = judge_of()
    assert labelled(judge, comparison(), lambda *_: odds(judge, 30 + size)).p_first == 0.5


RULES = [{"combine": "mean-logit"}, {"combine": "veto"}, {"combine": "lexicographic"}]


@PROTOCOLS
@pytest.mark.parametrize("rule", RULES, ids=str)
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_swapping_the_responses_flips_the_label(protocol, rule, data):
    """For any judge of texts, position-biased or not: p becomes 1 - p."""
    judge = judge_of(
        constitution(principle("a", weight=2.0), principle("b"), **rule), protocol=protocol
    )
    near = st.sampled_from([log_odds(0.1), log_odds(0.9), log_odds(0.6), 0.0])
    shown = {}

    def answer(call, row):
        texts = tuple(row.first if which == "a" else row.second for which in call.order)
        key = (call.principle.id, texts)
        if key not in shown:
            shown[key] = data.draw(ODDS | near)
        return odds(judge, shown[key])

    one = labelled(judge, comparison("x", "y"), answer)
    other = labelled(judge, comparison("y", "x"), answer)
    assert one.p_first + other.p_first == pytest.approx(1, abs=1e-12)
    assert one.order_agreement == other.order_agreement
    for name, p in one.by_principle.items():
        assert p + other.by_principle[name] == pytest.approx(1, abs=1e-12)


@given(st.floats(-50, 50))
def test_log_odds_are_symmetric_and_inverted_by_probability(value):
    p = probability(value)
    assert log_odds(1 - p) == pytest.approx(-log_odds(p), abs=1e-12)
    assert probability(log_odds(p)) == pytest.approx(p, abs=1e-15)
    assert -30 <= log_odds(p) <= 30
    assert (log_odds(0), log_odds(1)) == (-30, 30)


def test_extreme_log_probabilities_stay_numbers():
    judge = judge_of()
    label = labelled(judge, comparison(), lambda *_: Answer("", logprobs={"A": 0.0, "B": -9999.0}))
    assert label.p_first == 0.5
    for bad in (math.nan, -math.inf, math.inf):
        reply = Answer("", logprobs={"A": bad, "B": -0.1})
        assert judge.read(reply) == (None, "malformed")
        assert judge.journal_row(reply)["logprobs"] is None


# ---- parsed text


@pytest.mark.parametrize(
    ("texts", "p"), [(["A"], 0.75), (["B"], 0.25), (["A", "A", "B"], 0.625), (["A", "?"], 0.75)]
)
def test_k_of_n_texts_are_a_krichevsky_trofimov_estimate(texts, p):
    assert judge_of().read(text(*texts)) == (p, None)


def test_log_probabilities_come_before_the_text():
    judge = judge_of()
    p, _ = judge.read(replace(odds(judge, 3.0), texts=("B",)))
    assert p == pytest.approx(probability(3))


# ---- faults are never numbers

FAULTY = {
    "unparsed": [text("???"), text("both"), text("A and B are equal"), text("C")],
    "empty": [text(""), text(" \n"), text()],
    "refused": [
        text("I'm sorry, I can't judge this."),
        text("As an AI I do not choose."),
        text("???", "I'm sorry, I can't judge this."),
    ],
    "truncated": [text("Let us look at both", finish="length")],
    "backend": [fault("backend")],
    "timeout": [fault("timeout")],
    "malformed": [fault("malformed"), Answer("", logprobs={"A": math.nan, "B": math.nan})],
}
CASES = [(kind, answer) for kind, answers in FAULTY.items() for answer in answers]


@pytest.mark.parametrize(("kind", "answer"), CASES)
def test_an_answer_without_a_verdict_is_null_with_its_fault(kind, answer):
    judge = judge_of()
    row = comparison()
    (call, _) = judge.calls_for(row)
    verdict = judge.verdict(call, row, judge.journal_row(replace(answer, key=call.id)))
    assert (verdict.p_first, verdict.fault) == (None, kind)
    label = labelled(judge, row, lambda *_: answer)
    assert (label.p_first, label.fault, label.n_verdicts) == (None, kind, 0)
    assert label.by_principle == {"kind": None}
    assert label.order_agreement is None


@PROTOCOLS
@pytest.mark.parametrize("which", [0, 1])
def test_one_order_alone_is_no_label(protocol, which):
    judge = judge_of(protocol=protocol)

    def half(call, _):
        return fault("refused") if call.order == judge.orders[which] else odds(judge, 5)

    label = labelled(judge, comparison(), half)
    assert (label.p_first, label.fault, label.n_verdicts) == (None, "refused", 1)


def test_identical_responses_are_asked_nothing():
    judge = judge_of()
    same = comparison("x", "x")
    assert judge.calls_for(same) == []
    label = aggregate_verdicts(same, [], judge.constitution, "pairwise")
    assert (label.p_first, label.fault) == (None, "identical")


def test_quorum_is_of_weight_and_the_commonest_fault_is_named():
    judge = judge_of(constitution(principle("a", weight=3.0), principle("b"), principle("c")))

    def answer(call, _):
        kinds = {"b": "timeout", "c": "refused" if call.order == "ab" else "timeout"}
        name = call.principle.id
        return fault(kinds[name]) if name in kinds else odds(judge, 2 if call.order == "ab" else -2)

    assert labelled(judge, comparison(), answer, quorum=0.6).p_first == pytest.approx(
        probability(2)
    )
    strict = labelled(judge, comparison(), answer, quorum=0.61)
    assert (strict.p_first, strict.fault, strict.n_verdicts) == (None, "timeout", 2)


# ---- rules of combination


def combined(strengths: dict[str, float], **rule) -> float:
    """p_first when each principle finds this log-odds for the first response."""
    weights = {"a": 3.0}
    rules = constitution(*(principle(n, weight=weights.get(n, 1.0)) for n in strengths), **rule)
    judge = judge_of(rules)

    def answer(call, _):
        value = strengths[call.principle.id]
        return odds(judge, value if call.order == "ab" else -value)

    return log_odds(labelled(judge, comparison(), answer).p_first)


def test_mean_logit_weighs():
    assert combined({"a": 1.0, "b": -2.0}) == pytest.approx((3 * 1 - 2) / 4)


def test_principles_that_balance_are_exactly_even():
    assert combined({"a": 2.0, "b": -6.0}) == 0.0  # 3 x 2 against 6, less the rounding


def test_veto_overrules_unless_it_is_mutual():
    veto = {"combine": "veto", "veto": 0.1}
    assert combined({"a": 2.0, "b": -3.0, "c": -4.0}, **veto) == pytest.approx(-4)  # strongest
    assert combined({"a": -2.0, "b": 3.0}, **veto) == pytest.approx(3)
    assert combined({"a": 1.0, "b": -2.0}, **veto) == pytest.approx(0.25)  # nobody's veto
    assert combined({"a": 3.0, "b": -3.0}, **veto) == pytest.approx(1.5)  # both are vetoed
    at = log_odds(0.1)
    assert combined({"a": 1.0, "b": at}, **veto) == pytest.approx(at)
    assert combined({"a": -1.0, "b": -at}, **veto) == pytest.approx(-at)


def test_lexicographic_is_the_first_that_is_clear():
    rule = {"combine": "lexicographic", "margin": 0.2}
    assert combined({"a": 0.1, "b": -2.0, "c": 3.0}, **rule) == pytest.approx(-2)
    assert combined({"a": -0.9, "b": 5.0}, **rule) == pytest.approx(-0.9)
    assert combined({"a": 0.4, "b": -0.4}, **rule) == pytest.approx(0.2)  # none is: the mean


@pytest.mark.parametrize(
    ("ab", "ba", "agreement"), [(2, -1, 1.0), (2, 1, 0.0), (-2, 1, 1.0), (0, 1, 0.0), (0, 0, 1.0)]
)
def test_order_agreement_is_about_the_winner(ab, ba, agreement):
    judge = judge_of()
    log_odds_of_a = {"ab": ab, "ba": ba}
    label = labelled(judge, comparison(), lambda call, _: odds(judge, log_odds_of_a[call.order]))
    assert label.order_agreement == agreement


# ---- one principle a comparison, by weight

ROWS = [comparison(f"x{n}", f"y{n}") for n in range(3000)]


def drawn(*principles: dict, seed: int = 0) -> list[str]:
    judge = judge_of(constitution(*principles, principles="sample"), seed=seed)
    return [judge.principles_for(row)[0].id for row in ROWS]


def test_sampling_is_by_weight_and_seed():
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    principles = [principle(name, weight=weight) for name, weight in weights.items()]
    picks = drawn(*principles)
    expected = [len(ROWS) * weight / 8 for weight in weights.values()]
    assert stats.chisquare([picks.count(name) for name in weights], expected).pvalue > 0.001
    assert drawn(*principles) == picks
    assert drawn(*principles, seed=1) != picks
    judge = judge_of(constitution(*principles, principles="sample"))
    assert {call.principle.id for call in judge.calls_for(ROWS[0])} == {picks[0]}


def test_an_edit_moves_no_draw_between_two_others():
    before = drawn(principle("a"), principle("b"), principle("c"))
    assert drawn(principle("a", compare="Which?"), principle("b"), principle("c")) == before
    assert drawn(principle("c"), principle("a"), principle("b")) == before
    added = drawn(principle("a"), principle("b"), principle("c"), principle("d"))
    assert all(new in (old, "d") for old, new in zip(before, added, strict=True))
    heavier = drawn(principle("a", weight=2.0), principle("b"), principle("c"))
    assert all(new in (old, "a") for old, new in zip(before, heavier, strict=True))
    gone = drawn(principle("b"), principle("c"))
    assert all(new == old for old, new in zip(before, gone, strict=True) if old != "a")


# ---- ids


def ids(
    protocol="pointwise", *, row=None, model=None, label=None, **constitution_keys
) -> list[str]:
    rules = constitution(**constitution_keys)
    judge = judge_of(rules, protocol, model, **(label or {}))
    return [call.id for call in judge.calls_for(row or comparison())]


@pytest.mark.parametrize(
    "change",
    [
        {"preamble": "Be strict."},
        {"principle": [principle(grade="Is it warm?")]},
        {"principle": [principle(example=[EXAMPLE])]},
        {"principle": [principle(example=[EXAMPLE | {"verdict": False}])]},
        {"principle": [principle(example=[EXAMPLE | {"prompt": "Hi"}])]},
        {"model": {"model": "openai:y"}},
        {"model": {"base_url": "http://other/v1"}},
        {"model": {"temperature": 0.5}},
        {"model": {"samples": 3}},
        {"model": {"logprobs": False}},
        {"model": {"max_tokens": 5}},
        {"model": {"dtype": "float32"}},
        {"model": {"form": "text"}},
        {"protocol": "pairwise"},
        {"row": comparison("x2", "y2")},
        {"row": comparison(prompt="Bye")},
    ],
    ids=str,
)
def test_what_an_answer_depends_on_changes_its_id(change):
    assert not set(ids()) & set(ids(**change))


def test_a_template_changes_the_ids(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ response }} {{ question }}")
    one = ids(label={"template": str(file)})
    file.write_text("{{ response }}! {{ question }}")
    assert not set(one) & (set(ids()) | set(ids(label={"template": str(file)})))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "y"},
        {"description": "another"},
        {"combine": "veto"},
        {"principle": [principle(weight=2.0)]},
        {"principle": [principle() | {"id": "renamed"}]},
        {"principle": [principle(compare="Which is warmer?")]},  # not what pointwise asks
        {"principle": [principle(critique="Say.", revision="Rewrite.")]},
        {"model": {"concurrency": 3}},
        {"model": {"timeout_s": 1.0}},
        {"model": {"attempts": 2}},
        {"model": {"max_wait_s": 1.0}},
        {"model": {"api_key_env": "OTHER"}},
        {"model": {"check_model": False}},
        {"model": {"device": "cpu"}},
        {"label": {"seed": 3}},
        {"label": {"quorum": 0.5}},
        {"label": {"max_fault_rate": 0.5}},
        {"label": {"limit": 3}},
    ],
    ids=str,
)
def test_what_an_answer_does_not_depend_on_leaves_its_id(change):
    assert ids(**change) == ids()


@pytest.mark.parametrize(
    ("rule", "clamp", "refused"),
    [
        ({"combine": "veto"}, None, True),  # `reasoned` keeps to 0.4 to 0.6, and a veto needs 0.9
        ({"combine": "veto"}, [0.0, 1.0], False),
        ({"combine": "veto", "veto": 0.4}, None, False),
        ({"combine": "lexicographic"}, None, False),
        ({"combine": "lexicographic", "margin": 0.2}, None, True),
        ({"combine": "lexicographic", "margin": 0.2}, [0.3, 0.6], False),
        ({}, None, False),
    ],
)
def test_bounds_that_a_rule_never_sees_beyond_are_refused(rule, clamp, refused):
    if not refused:
        judge_of(constitution(**rule), "reasoned", clamp=clamp)
        return
    with pytest.raises(InputError, match=r"clamp: got \[0.4, 0.6\], expected bounds that reach 0"):
        judge_of(constitution(**rule), "reasoned", clamp=clamp)


def test_examples_do_not_matter_to_pairwise_and_secrets_to_nobody():
    assert ids("pairwise", principle=[principle(example=[EXAMPLE])]) == ids("pairwise")
    keys = [ids(model={"base_url": f"http://user:{key}@host/v1?k={key}"}) for key in "ab"]
    assert keys[0] == keys[1] == ids(model={"base_url": "http://host/v1"})


def test_a_grade_that_comparisons_share_is_one_call():
    judge = judge_of(protocol="pointwise")
    rows = [comparison("x", "y"), comparison("x", "z"), comparison("z", "y")]
    calls = [call for row in rows for call in judge.calls_for(row)]
    assert len(calls) == 6
    assert len({call.id for call in calls}) == 3
    pairwise = [call for row in rows for call in judge_of().calls_for(row)]
    assert len({call.id for call in pairwise}) == 6
    swapped = [call.id for call in judge_of().calls_for(comparison("y", "x"))]
    assert swapped == [call.id for call in judge_of().calls_for(comparison("x", "y"))][::-1]


# ---- what is asked


@PROTOCOLS
@pytest.mark.parametrize("form", ["chat", "text"])
def test_the_static_part_comes_first_and_the_question_last(protocol, form):
    rules = constitution(
        principle(example=[EXAMPLE]), principle("warm", example=[EXAMPLE]), preamble="Be fair."
    )
    judge = judge_of(rules, protocol, {"form": form})
    row = comparison("first text", "second text", "the prompt")
    for call in judge.calls_for(row):
        ask = judge.ask(call, row)
        parts = [m["content"] for m in ask.messages] if form == "chat" else [ask.text]
        prompt = "\n".join(parts)
        judged = prompt.index("first text" if call.order.startswith("a") else "second text")
        assert prompt.startswith("Be fair.")
        if protocol == "pointwise":
            assert prompt.index("Hello!") < judged
        assert judged < prompt.rindex(call.principle.question(protocol))
        assert len(prompt) - prompt.rindex(call.principle.question(protocol)) < 80
        assert ask.options == judge.options
        assert (ask.messages is None) == (form == "text")


@pytest.mark.parametrize("form", ["chat", "text"])
def test_the_questions_of_a_comparison_share_all_before_them(form):
    """So that a server with a prefix cache reads the two responses once."""
    judge = judge_of(constitution(principle("a"), principle("b")), model={"form": form})
    row = comparison("first text", "second text")
    asks = [judge.ask(call, row) for call in judge.calls_for(row) if call.order == "ab"]
    one, other = ([m["content"] for m in a.messages] if form == "chat" else [a.text] for a in asks)
    assert one[:-1] == other[:-1]
    shared = one[-1].partition("Which is a?")[0]
    assert "second text" in shared
    assert other[-1].startswith(shared)


def test_a_call_is_reproducible():
    judge = judge_of(model={"temperature": 1.0, "samples": 4, "logprobs": False})
    row = comparison()
    one, other = (judge.ask(call, row) for call in judge.calls_for(row))
    assert one == judge.ask(judge.calls_for(row)[0], row)
    assert one.seed != other.seed
    assert (one.samples, one.temperature, one.max_tokens) == (4, 1.0, 16)
    assert judge_of().ask(judge.calls_for(row)[0], row).max_tokens == 1


def test_auto_is_what_the_model_can_do():
    small, large = LLMSettings(), LLMSettings(model="openai:x")
    auto = LabelSettings()
    assert (
        Judge(constitution(), small, auto).protocol,
        Judge(constitution(), small, auto).form,
    ) == (
        "pointwise",
        "text",
    )
    assert (
        Judge(constitution(), large, auto).protocol,
        Judge(constitution(), large, auto).form,
    ) == (
        "pairwise",
        "chat",
    )
