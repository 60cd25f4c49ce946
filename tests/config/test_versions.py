"""Settings of version 0.1 go on working: their names, and the digests that they are in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from aif.cli.verbs import app
from aif.config import versions
from aif.config.settings import Settings, SFTSettings, load_settings
from aif.config.versions import RENAMED, for_digest
from aif.constitution.file import TABLE, Constitution, Example, Principle
from aif.errors import InputError
from aif.store.records import content_id
from tests.conftest import write_jsonl

OLD_KEYS = (Path(__file__).parent / "settings-0.1.txt").read_text().split()
SHOTS = "respond.shots is now called respond.few_shot; the old name still works\n"
FULL = {
    "respond": {"few_shot": "solved.jsonl", "sft_samples": 4},
    "reviser": {"model": "scripted:r.jsonl"},
    "panel": [{"model": "scripted:a"}, {"model": "scripted:b", "price": "1/2"}],
    "sft": {"lora": {"rank": 4}, "data": {"revisions": 0.5}},
    "reward": {"require_audit": {"agreement": 0.7}, "curve": [0.5]},
}


def keys(model: type[BaseModel], table: str = "") -> Iterator[str]:
    """TABLE.KEY of every setting, tables within tables too."""
    for name, field in model.model_fields.items():
        key = f"{table}.{name}".removeprefix(".")
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        yield from keys(inner[0], key) if inner else [key]


def test_every_change_of_a_setting_is_written_down():
    """A new key has to stand in ADDED, and a renamed one in RENAMED, or old runs are made anew."""
    every = {*keys(Settings), *keys(Constitution, TABLE)}
    now = {RENAMED.get(key, key) for key in every} - set(versions.ADDED)
    assert now == set(OLD_KEYS)
    assert set(RENAMED) | set(versions.ADDED) <= every


@pytest.mark.parametrize("mode", ["python", "json"])
@pytest.mark.parametrize("settings", [Settings(), Settings.model_validate(FULL)])
def test_a_digest_counts_settings_as_version_0_1_dumped_them(settings, mode):
    expected = settings.model_dump(mode=mode)
    respond = expected["respond"]
    respond["shots"], respond["resamples"] = respond.pop("few_shot"), respond.pop("sft_samples")
    assert content_id(for_digest(settings, mode=mode)) == content_id(expected)
    digest = content_id(for_digest(settings.sft, "sft", mode))
    assert digest == content_id(settings.sft.model_dump(mode=mode))


class LaterSFT(SFTSettings):
    """A version with one more setting."""

    sharpness: float = 1.0


class Later(Settings):
    sft: LaterSFT = LaterSFT()


def test_a_later_setting_counts_where_it_differs_from_its_default(monkeypatch):
    before = for_digest(SFTSettings(), "sft")
    assert for_digest(LaterSFT(), "sft") == before | {"sharpness": 1.0}
    monkeypatch.setattr(versions, "ADDED", {"sft.sharpness"})
    assert for_digest(LaterSFT(), "sft") == before
    assert for_digest(LaterSFT(sharpness=2.0), "sft") == before | {"sharpness": 2.0}
    assert for_digest(Later()) == for_digest(Settings())


def test_training_digests_leave_a_later_setting_out(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    from aif.train.resume import digest_of

    def digest(settings):
        return digest_of("sft", settings, str(tmp_path), "data")

    assert digest(LaterSFT()) != digest(SFTSettings())
    monkeypatch.setattr(versions, "ADDED", {"sft.sharpness"})
    assert digest(LaterSFT()) == digest(SFTSettings())
    assert digest(LaterSFT(sharpness=2.0)) != digest(SFTSettings())


CONSTITUTION = {
    "name": "warm",
    "description": "For a test.",
    "preamble": "You judge.",
    "principles": "sample",
    "combine": "veto",
    "veto": 0.2,
    "margin": 0.05,
    "principle": [
        {
            "id": "kindness",
            "weight": 2,
            "critique": "Criticise it.",
            "revision": "Rewrite it.",
            "compare": "Which is kinder?",
            "grade": "Is it kind?",
            "cue": "Kind",
            "example": [{"prompt": "Hi", "text": "Hello!", "verdict": True}],
            "revised": [{"prompt": "a", "response": "b", "critique": "c", "revision": "d"}],
        },
        {
            "id": "truth",
            "grade": "Is it true?",
            "example": [{"text": "Yes.", "verdict": True}],
        },
    ],
}
DIGESTS = [
    "a8499f9a2907c11a",
    "b93d94ae87aebe7d",
    "88346e732728244f",
    "0fd7b6ef97345e8b",
    "0fd7b6ef97345e8b",
]


class LaterExample(Example):
    tone: str | None = None


class LaterPrinciple(Principle):
    example: list[LaterExample] = Field([])
    sharpness: float = 1.0


class LaterConstitution(Constitution):
    draws: int = 1
    principle: list[LaterPrinciple]


NEW_KEYS = {f"{TABLE}.{key}" for key in ("draws", "principle.sharpness", "principle.example.tone")}


def digests(kind: type[Constitution], **keys) -> list[str]:
    """The digest of the whole, and of each principle in each way to put it."""
    constitution = kind.model_validate(CONSTITUTION | keys)
    ways = [("pointwise", "text"), ("pointwise", "chat")]
    return [constitution.digest(), *(p.digest(*w) for p in constitution.principle for w in ways)]


def test_the_digests_of_a_constitution_are_those_of_version_0_1():
    assert [digest[:16] for digest in digests(Constitution)] == DIGESTS
    loaded = Constitution.model_validate(CONSTITUTION)
    assert loaded.digest() == content_id(loaded.model_dump())


def test_a_later_key_of_a_constitution_counts_where_it_differs_from_its_default(monkeypatch):
    before = digests(Constitution)
    assert digests(LaterConstitution)[0] != before[0]
    monkeypatch.setattr(versions, "ADDED", NEW_KEYS)
    assert digests(LaterConstitution) == before
    assert digests(LaterConstitution, draws=2)[0] != before[0]


def test_an_old_name_in_run_toml_works_and_is_warned_about_once(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text("[respond]\nshots = 'solved.jsonl'\nresamples = 4\n")
    respond = load_settings(path, {"respond.samples": 3}).respond
    assert (respond.few_shot, respond.sft_samples, respond.samples) == ("solved.jsonl", 4, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 2
    assert f"{path}: {SHOTS}" in err
    assert load_settings(path, {"respond.few_shot": "new.jsonl"}).respond.few_shot == "new.jsonl"


@pytest.mark.parametrize("overrides", [{"respond.shots": "x"}, {"respond": {"shots": "x"}}])
def test_an_old_name_on_the_command_line_works_and_is_warned_of_once(tmp_path, capsys, overrides):
    assert load_settings(tmp_path / "none", overrides).respond.few_shot == "x"
    assert capsys.readouterr().err == f"command line: {SHOTS}"


def test_a_new_name_is_not_warned_about(tmp_path, capsys):
    load_settings(tmp_path / "none", {"respond.few_shot": "x", "respond.shots": None})
    assert capsys.readouterr().err == ""


def test_old_and_new_at_once_are_an_error(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[respond]\nshots = 'a'\nfew_shot = 'b'\n")
    both = "respond.shots: got both it and respond.few_shot, expected respond.few_shot alone"
    with pytest.raises(InputError) as error:
        load_settings(path, {})
    assert str(error.value) == f"{path}: {both}"
    with pytest.raises(InputError) as error:
        load_settings(tmp_path / "none", {"respond.shots": "a", "respond.few_shot": "b"})
    assert str(error.value) == f"command line: {both}"


def test_the_old_flag_works_and_help_has_the_new_one_alone(tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "2 + 2?"}])
    gone = tmp_path / "gone.jsonl"
    command = ["respond", str(tmp_path / "run"), "--prompts", str(prompts)]
    command += ["--policy", "scripted:none.jsonl"]
    for flag, warned in (("--shots", True), ("--few-shot", False)):
        done = CliRunner().invoke(app, [*command, flag, str(gone)])
        assert done.exit_code == 1
        assert (SHOTS in done.stderr) == warned
    text = CliRunner().invoke(app, ["respond", "--help"]).output
    assert "--few-shot" in text
    assert "--shots" not in text
