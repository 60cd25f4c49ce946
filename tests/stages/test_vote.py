"""Majority votes over hand-written responses."""

import itertools
import json

import pytest

from aif.config.settings import load_settings
from aif.data import final_answer
from aif.errors import InputError
from aif.progress import Progress
from aif.run import Run
from aif.stages.vote import vote
from aif.store.records import FAULTS, Prompt, as_row
from tests.conftest import read_jsonl, write_jsonl

PROMPT = Prompt.of([{"role": "user", "content": "9 * 2?"}])
OTHER = Prompt.of([{"role": "user", "content": "1 + 1?"}])


class Poll:
    """A run folder with responses; each is a text, or a dict of what else its row says."""

    def __init__(self, folder):
        self.folder = folder
        self.run = folder / "run"
        self.run.mkdir()
        self.ids = (f"{number:064x}" for number in itertools.count(1))

    def rows(self, prompt, *answers):
        for sample, one in enumerate(answers):
            row = {"text": one} if isinstance(one, str) else one
            yield {
                "id": next(self.ids),
                "prompt_id": prompt.id,
                "policy": "p",
                "sample": sample,
                "text": None,
                "finish": "stop",
                "fault": None,
                "usage": {},
            } | row

    def write(self, *rows, prompts=(PROMPT, OTHER)):
        write_jsonl(self.run / "prompts.jsonl", map(as_row, prompts))
        write_jsonl(self.run / "responses.jsonl", rows)

    def vote(self, *answers, **settings):
        """Votes on responses to PROMPT (or on what is written already); the one row."""
        if answers:
            self.write(*self.rows(PROMPT, *answers))
        self.count(**settings)
        (row,) = self.votes()
        return row

    def count(self, **settings):
        values = {key.replace("__", "."): value for key, value in settings.items()}
        run = Run(self.run, load_settings(self.folder / "none.toml", values))
        self.summary = vote(run, Progress(quiet=True))
        return self.summary

    def votes(self):
        return read_jsonl(self.run / "votes.jsonl")


@pytest.fixture
def poll(tmp_path):
    return Poll(tmp_path)


def numbers(row):
    """The kept responses by their number, from 1."""
    return [int(name, 16) for name in row["response_ids"]]


def says(answer, work=""):
    return f"{work} So the answer is {answer}."


def test_the_answer_of_most_responses_wins(poll):
    row = poll.vote(says("18"), says("17", "a"), says("18 eggs", "b"), "18.0", "I give up")
    assert row == {
        "prompt_id": PROMPT.id,
        "answer": "18",
        "fault": None,
        "share": 0.6,
        "responses": 5,
        "answered": 4,
        "response_ids": [f"{n:064x}" for n in (1, 3, 4)],
    }


def test_a_tie_has_no_winner(poll):
    row = poll.vote(says("18"), says("17"), says("17", "a"), says("18", "b"), says("3"))
    assert (row["answer"], row["fault"], row["response_ids"]) == (None, "tied", [])
    assert (row["share"], row["answered"]) == (0.4, 5)
    assert poll.summary["faults"] == {"tied": 1}
    assert poll.summary["mean_share"] is None


def test_one_answer_among_many_texts_wins(poll):
    row = poll.vote("no idea", "none", says("5"))
    assert (row["answer"], row["share"], numbers(row)) == ("5", 1 / 3, [3])


def test_no_answer_at_all_is_unparsed(poll):
    row = poll.vote("I give up.", "Me too.")
    assert (row["answer"], row["fault"], row["share"]) == (None, "unparsed", 0)
    assert (row["responses"], row["answered"]) == (2, 0)


@pytest.mark.parametrize(("min_share", "fault"), [(0.0, None), (0.5, None), (0.51, "unsure")])
def test_min_share_is_of_all_responses(poll, min_share, fault):
    answers = (says("18"), says("18", "a"), "I give up", "I give up, too")
    row = poll.vote(*answers, vote__min_share=min_share)
    assert (row["fault"], row["share"]) == (fault, 0.5)
    assert (row["answer"], numbers(row)) == ((None, []) if fault else ("18", [1, 2]))


def test_a_fault_does_not_vote_but_counts(poll):
    bad = {"fault": "refused", "text": says("17")}
    row = poll.vote(says("18"), bad, bad, {"fault": "backend"})
    assert (row["answer"], row["share"], row["responses"], row["answered"]) == ("18", 0.25, 4, 1)
    assert poll.vote(bad, bad)["fault"] == "unparsed"


def test_the_same_text_votes_twice_and_is_kept_once(poll):
    twice = says("18")
    row = poll.vote(twice, twice, says("17", "a"), says("17", "b"), twice)
    assert (row["answer"], row["share"], numbers(row)) == ("18", 0.6, [1])


def test_per_prompt_keeps_the_first_samples(poll):
    answers = [says("18", str(n)) for n in range(5)]
    rows = list(poll.rows(PROMPT, says("3"), *answers))
    poll.write(*reversed(rows))
    row = poll.vote(vote__per_prompt=2)
    assert numbers(row) == [2, 3]
    assert poll.summary["responses_kept"] == 2
    assert row["share"] == 5 / 6


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 1", None),  # the beginning of 18, who knows
        ("The answer is 3.", None),  # of 3.14
        ("The answer is New Yo", None),
        ("The answer is 18. Let me check by mul", "18"),
        ("The answer is 18.\nThe answer is 1", "18"),
    ],
)
def test_half_a_sentence_does_not_vote(poll, text, answer):
    assert poll.vote({"text": text, "finish": "length"})["answer"] == answer


def test_a_pattern_of_ones_own(poll):
    answers = ("RESULT 7", "RESULT 7 eggs", says("18"))
    row = poll.vote(*answers, vote__answer=r"RESULT (\w+)")
    assert (row["answer"], row["share"], numbers(row)) == ("7", 2 / 3, [1, 2])


@pytest.mark.parametrize("pattern", ["(", "no group", "(two) (groups)", "(" * 5000])
def test_a_bad_pattern_is_one_line(poll, pattern):
    with pytest.raises(InputError) as error:
        poll.vote(says("18"), vote__answer=pattern)
    line = str(error.value)
    assert line.startswith("vote: answer: got ")
    assert "expected a regex with one group" in line
    assert "\n" not in line
    assert len(line) < 300
    assert not (poll.run / "votes.jsonl").exists()


def test_a_pattern_without_end_is_one_line_too(poll, monkeypatch):
    monkeypatch.setattr(final_answer, "PATTERN_S", 0.1)
    with pytest.raises(InputError, match=r"vote: answer: got over .* for response 0000"):
        poll.vote("a" * 60 + "b", vote__answer="((?:a+)+)$")


def test_a_row_a_prompt_in_the_prompts_order(poll):
    stranger = Prompt.of([{"role": "user", "content": "?"}])
    silent = Prompt.of([{"role": "user", "content": "!"}])
    rows = [poll.rows(p, says(a)) for p, a in ((OTHER, 2), (stranger, 5), (PROMPT, 18))]
    poll.write(*itertools.chain(*rows), prompts=(PROMPT, silent, OTHER))
    summary = poll.count()
    votes = [(row["prompt_id"], row["answer"]) for row in poll.votes()]
    assert votes == [(PROMPT.id, "18"), (OTHER.id, "2")]
    assert (summary["prompts"], summary["votes"]) == (3, 2)
    assert set(summary) == {
        "run", "prompts", "votes", "faults", "responses_kept", "mean_share"
    }  # fmt: skip
    assert json.loads((poll.run / "vote.json").read_text()) == summary


def test_no_response_at_all_is_an_error(poll):
    poll.write()
    with pytest.raises(InputError, match=r"responses\.jsonl: got no response"):
        poll.count()


def test_the_same_responses_vote_the_same_again(poll):
    poll.vote(says("18"), says("18", "a"), says("17"))
    before = (poll.run / "votes.jsonl").read_bytes()
    poll.count()
    assert (poll.run / "votes.jsonl").read_bytes() == before


GOLD = {"int": 18, "float": 18.0, "gsm8k": "9 * 2 = <<9*2=18>>18\n#### 18", "text": "18 eggs"}


@pytest.mark.parametrize("gold", GOLD.values(), ids=GOLD)
def test_accuracy_against_the_right_answers(poll, gold):
    file = write_jsonl(
        poll.folder / "prompts.jsonl",
        [
            {"prompt": "9 * 2?", "answer": gold},
            {"prompt": "1 + 1?", "answer": "#### 2"},
            {"prompt": "not of this run", "answer": "1"},
        ],
    )
    poll.write(
        *poll.rows(PROMPT, says("18"), says("18"), says("17"), {"fault": "refused"}),
        *poll.rows(OTHER, says("2"), says("3")),
    )
    summary = poll.count(respond__prompts=str(file))
    assert summary["votes"] == 1
    assert summary["prompts_with_gold"] == 2
    assert summary["accuracy_vote"] == 0.5  # the tie is not right
    assert summary["accuracy_where_voted"] == 1.0
    assert summary["accuracy_single"] == 0.5  # 2 of 4, 1 of 2


def test_the_right_answer_never_bears_on_the_vote(poll):
    answers = (says("17"), says("17", "a"), says("18"))
    rows = []
    for gold in ("17", "18", "b"):
        row = {"prompt": "9 * 2?", "answer": gold}
        file = write_jsonl(poll.folder / f"{gold}.jsonl", [row])
        poll.write(*poll.rows(PROMPT, *answers), prompts=[PROMPT])
        vote = poll.vote(respond__prompts=str(file))
        rows.append({**vote, "response_ids": len(vote["response_ids"])})
    assert rows[0] == rows[1] == rows[2]
    assert poll.summary["accuracy_vote"] == 0


def test_without_right_answers_there_is_no_accuracy(poll):
    poll.write(*poll.rows(PROMPT, says("18")))
    bare = write_jsonl(poll.folder / "bare.jsonl", [{"prompt": "9 * 2?"}])
    for source in (bare, poll.folder / "gone.jsonl"):
        assert not any("accuracy" in key for key in poll.count(respond__prompts=str(source)))


def test_every_fault_of_a_vote_has_its_meaning():
    assert {"tied", "unsure", "unparsed"} <= set(FAULTS)
