"""What a person sees while a stage works."""

import time

import pytest

from aif import progress
from aif.config.settings import LLMSettings
from aif.progress import Progress
from aif.store.journal import Journal
from tests.support.toy import save_toy


def test_silent_work_is_reported(monkeypatch, capsys):
    """A batch that is sampled for minutes reports no call; the time that it takes is shown."""
    monkeypatch.setattr(progress, "BEAT_S", 0.1)
    with Progress() as shown:
        shown.stage("[1/2] respond", expected_s=100)
        time.sleep(0.3)
        shown.start("respond", 512)
        time.sleep(0.3)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "[1/2] respond, about 100 s"
    assert "[1/2] respond, 0 s of about 100 s" in lines
    assert "respond: 0/512, 0 s of about 100 s" in lines


def test_work_that_reports_gets_no_line_besides(monkeypatch, capsys):
    monkeypatch.setattr(progress, "BEAT_S", 2.0)
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.05)
    with Progress() as shown:
        shown.start("label", 40)
        for done in range(40):
            shown.update(done)
            time.sleep(0.06)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 5
    assert all("left" in line for line in lines)


def test_quiet_says_nothing_and_starts_no_thread(monkeypatch, capsys):
    monkeypatch.setattr(progress, "BEAT_S", 0.05)
    with Progress(quiet=True) as shown:
        shown.stage("label")
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_no_line_comes_after_the_end(monkeypatch, capsys):
    monkeypatch.setattr(progress, "BEAT_S", 0.05)
    with Progress() as shown:
        shown.stage("label")
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_a_batch_that_is_sampled_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    """A slow machine samples a batch for minutes before its first answer."""
    pytest.importorskip("torch")
    from aif.llm import Ask, open_llm
    from aif.llm.dispatch import ask_all
    from aif.models import decode

    monkeypatch.setattr(progress, "BEAT_S", 0.1)
    sample = decode.sample_tokens

    def slowly(*inputs):
        time.sleep(0.1)
        return sample(*inputs)

    monkeypatch.setattr(decode, "sample_tokens", slowly)
    settings = LLMSettings(model=str(save_toy(tmp_path / "toy")), dtype="float32", device="cpu")
    ask = Ask("ab" * 32, text="a b", max_tokens=8, temperature=1.0, seed=0)
    path = tmp_path / "journal.jsonl"
    with Progress() as shown, open_llm(settings) as llm, Journal.open(path) as journal:
        shown.start("respond", 1)
        ask_all(llm, [ask], journal, lambda answer: {"id": answer.key, "fault": None}, shown)
    lines = capsys.readouterr().err.splitlines()
    assert any(
        "respond: 0/1, token " in line and " of 8 of a batch of 1, " in line for line in lines
    )
