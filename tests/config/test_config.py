"""Settings: where they come from, which one wins, and what is refused."""

import json
import shutil
import tomllib

import pytest
import typer
from typer.testing import CliRunner

from aif.config.settings import LLMSettings, Settings, load_settings, without_secrets
from aif.config.toml import parse_set
from aif.errors import InputError
from aif.run import Run


def settings(tmp_path, toml: str = "", **overrides):
    path = tmp_path / "run.toml"
    path.write_text(toml, "utf-8")
    return load_settings(path, {key.replace("__", "."): value for key, value in overrides.items()})


def test_defaults_then_file_then_command_line(tmp_path):
    assert load_settings(tmp_path / "none.toml", {}) == Settings()
    toml = "[judge]\nconcurrency = 3\nmodel = 'openai:file'\n"
    merged = settings(tmp_path, toml, judge__model="openai:flag", label__seed=None)
    assert (merged.judge.model, merged.judge.concurrency) == ("openai:flag", 3)
    assert (merged.judge.attempts, merged.label.seed) == (6, 0)


def test_set_wins_over_a_flag(tmp_path, monkeypatch):
    from aif.cli.options import Console, RunFolder, limit, open_run, seed, verb

    app = typer.Typer()

    @verb(app, seed("label"), limit("label"))
    def show(run: RunFolder, settings: dict, console: Console) -> None:
        label = open_run(run, settings).settings.label
        console.show({"seed": label.seed, "limit": label.limit}, lambda summary: [])

    arguments = [str(tmp_path / "r"), "--seed=1", "--limit=5", "--set=label.seed=2", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert json.loads(result.stdout) == {"seed": 2, "limit": 5}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("a.b=5", 5),
        ("a.b=0.5", 0.5),
        ("a.b=true", True),
        ("a.b='5'", "5"),
        ("a.b=http://x/v1?k=1", "http://x/v1?k=1"),
        ("a.b=2024.jsonl", "2024.jsonl"),
        ("a.b=", ""),
        (" a.b =x", "x"),
    ],
)
def test_set_takes_a_toml_value_or_text(argument, value):
    key, parsed = parse_set(argument)
    assert (key, parsed, type(parsed)) == ("a.b", value, type(value))


@pytest.mark.parametrize("argument", ["label.seed", "=5", " =5"])
def test_set_without_key_and_value_is_refused(argument):
    with pytest.raises(InputError, match=r"--set: got .*, expected table\.key=value"):
        parse_set(argument)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[jugde]\n", "jugde: got an unknown key, expected judge perhaps"),
        ("[judge]\nmodle = 'x'", "judge.modle: got an unknown key, expected model perhaps"),
        ("[label]\nseed = '1'", "label.seed: got '1', expected a valid integer"),
        ("[label]\nseed = 1.0", "label.seed: got 1.0, expected a valid integer"),
        ("[label]\nquorum = 0", "label.quorum: got 0, expected greater than 0"),
        ("[label]\nprotocol = 'both'", "label.protocol: got 'both', expected 'auto', 'pairwise'"),
        ("[judge]\nmodel = ''", "judge.model: got '', expected at least 1 character"),
        ("[judge]\nlogprobs = 1", "judge.logprobs: got 1, expected a valid boolean"),
        ("[judge]\ntimeout_s = 0", "judge.timeout_s: got 0, expected greater than 0"),
        ("judge = 3", "judge: got 3, expected a table"),
        ("[judge\n", "got bad TOML"),
    ],
)
def test_an_error_in_run_toml_names_it(tmp_path, toml, message):
    with pytest.raises(InputError) as error:
        settings(tmp_path, toml, label__limit=1)
    assert str(error.value).startswith(f"{tmp_path}/run.toml: {message}")


def test_an_error_on_the_command_line_names_that(tmp_path):
    for key, message in [
        ("label.limt", "command line: label.limt: got an unknown key, expected limit perhaps"),
        ("label.limit.x", "command line: label.limit"),
        ("label.limit", "command line: label.limit: got 0, expected greater than or equal to 1"),
    ]:
        with pytest.raises(InputError) as error:
            load_settings(tmp_path / "run.toml", {key: 0})
        assert str(error.value).startswith(message)


def test_a_partial_policy_table_keeps_its_own_temperature(tmp_path):
    merged = settings(tmp_path, "[policy]\nmax_tokens = 9\n[judge]\nmax_tokens = 9\n")
    assert (merged.policy.temperature, merged.judge.temperature) == (1.0, 0.0)
    assert settings(tmp_path, policy__max_tokens=9).policy.temperature == 1.0


SECRET_URL = "https://user:hunter2@host:8000/v1?api_key=hunter2#hunter2"


def test_urls_lose_their_secrets():
    assert without_secrets(SECRET_URL) == "https://host:8000/v1"
    assert without_secrets(None) is None
    assert "hunter2" not in str(LLMSettings(base_url=SECRET_URL).identity())


def test_run_toml_holds_what_differs_and_no_secret(tmp_path):
    overrides = {"judge.base_url": SECRET_URL, "label.seed": 4, "policy.max_tokens": 9}
    run = Run(tmp_path / "r", load_settings(tmp_path / "none", overrides))
    run.path.mkdir()
    run.keep_settings()
    text = (run.path / "run.toml").read_text()
    assert "hunter2" not in text
    assert tomllib.loads(text) == {
        "judge": {"base_url": "https://host:8000/v1"},
        "label": {"seed": 4},
        "policy": {"max_tokens": 9},
    }
    assert load_settings(run.path / "run.toml", {}).label.seed == 4


def test_run_toml_is_the_users_and_never_overwritten(tmp_path):
    run = Run(tmp_path, load_settings(tmp_path / "none", {"label.seed": 4}))
    (tmp_path / "run.toml").write_text("# mine\n")
    run.keep_settings()
    assert (tmp_path / "run.toml").read_text() == "# mine\n"


def test_a_limit_is_of_one_command_and_not_kept():
    tables = Settings.model_validate({"label": {"limit": 4, "seed": 3}}).to_keep()
    assert tables == {"label": {"seed": 3}}


def test_a_model_folder_counts_by_its_files_and_others_by_name(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    settings = LLMSettings(model=str(folder))
    first = settings.identity()
    assert "weights" not in LLMSettings(model="openai:m").identity()
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    assert LLMSettings(model=str(moved)).identity() == first
    by_vllm = [LLMSettings(model=f"vllm:{place}").identity() for place in (folder, moved)]
    assert by_vllm[0] == by_vllm[1] != first
    (folder / "notes.txt").write_text("no part of the model")
    assert settings.identity() == first
    (folder / "model.safetensors").write_bytes(b"two")
    assert settings.identity() != first
    (folder / "model.safetensors").write_bytes(b"one")
    assert settings.identity() == first
