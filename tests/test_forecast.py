"""What `aif run` expects to take, from the settings and a speed."""

import pytest

pytest.importorskip("torch")

from aif import forecast
from aif.cli.run import forecast_lines
from aif.config.settings import load_settings
from aif.errors import TooSlow
from aif.models import speed
from aif.models.speed import Speed
from aif.pipeline import steps
from aif.progress import Progress
from aif.run import Run
from tests.conftest import ROOT, aif
from tests.support.toy import save_toy

QUIET = Progress(quiet=True)


@pytest.fixture
def demo(monkeypatch):
    """The demo's settings; its files are named from the top of the checkout."""
    monkeypatch.chdir(ROOT)

    def make(path, name="demo", **changes):
        return Run(path / "run", load_settings(ROOT / "runs" / name / "run.toml", changes))

    return make


def expected(monkeypatch, run, read=1000.0, written=1000.0, learned=1000.0):
    monkeypatch.setattr(speed, "measure", lambda *_: Speed(read, written, learned))
    return forecast.forecast(run, steps(run), QUIET)


def test_every_stage_of_the_demo_has_a_forecast(tmp_path, demo, monkeypatch):
    seconds = expected(monkeypatch, demo(tmp_path))
    assert list(seconds) == [step.name for step in steps(demo(tmp_path))]
    assert all(value >= forecast.STARTUP_S for value in seconds.values())
    # 128 prompts, a response each of at most 32 tokens; then four each of the tuned policy.
    read = seconds["respond"] - forecast.STARTUP_S - 128 * 32 / 1000
    assert 2 < read < 10
    assert seconds["resample"] - seconds["respond"] == pytest.approx(128 * 3 * 32 / 1000)


def test_a_speed_counts_for_what_it_is_the_speed_of(tmp_path, demo, monkeypatch):
    run = demo(tmp_path)
    base = expected(monkeypatch, run)
    learning = expected(monkeypatch, run, learned=100.0)
    changed = {name for name in base if learning[name] > base[name]}
    assert changed == {"sft", "reward", "ppo"}
    writing = expected(monkeypatch, run, written=100.0)
    changed = {name for name in base if writing[name] > base[name]}
    assert changed == {"respond", "revise", "resample", "ppo", "evaluate"}


def test_the_small_demo_is_a_fifth_of_the_demo(tmp_path, demo, monkeypatch):
    monkeypatch.setattr(forecast, "STARTUP_S", 0.0)
    whole, small = (
        sum(expected(monkeypatch, demo(tmp_path, name)).values()) for name in ("demo", "demo-small")
    )
    assert small < whole / 5
    names = [[step.name for step in steps(demo(tmp_path, n))] for n in ("demo", "demo-small")]
    assert names[0] == names[1]


def test_a_served_model_has_no_forecast(tmp_path, demo, monkeypatch):
    run = demo(tmp_path, **{"judge.model": "openai:some-model"})
    seconds = expected(monkeypatch, run)
    assert [name for name, value in seconds.items() if value is None] == [
        "filter", "label", "evaluate",
    ]  # fmt: skip
    (line,) = forecast_lines(seconds)
    assert line.endswith("; not known for filter, label, evaluate")


def test_too_slow_a_run_is_refused(tmp_path, demo, monkeypatch):
    seconds = expected(monkeypatch, demo(tmp_path), 10, 10, 10)
    forecast.check_time(seconds, None, "aif run RUN")
    with pytest.raises(TooSlow, match=r"more than --within 20 \(minutes\); `aif run RUN` starts"):
        forecast.check_time(seconds, 20, "aif run RUN")


def test_a_model_is_timed(tmp_path):
    model = str(save_toy(tmp_path / "toy"))
    measured = speed.measure(model, "float32", "cpu")
    assert min(measured.read, measured.written, measured.learned) > 0


def test_a_large_model_is_cut_and_its_speed_scaled(tmp_path, monkeypatch):
    config = speed.load_config(str(save_toy(tmp_path / "toy", num_hidden_layers=8)))
    weights = speed._weights(config)
    monkeypatch.setattr(speed, "MOST_WEIGHTS", weights / 2)
    small = speed._cut(config)
    assert (small.num_hidden_layers, config.num_hidden_layers) == (4, 8)
    assert speed._weights(small) < weights


def test_the_command_refuses_and_does_nothing(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    text = (ROOT / "runs/demo-small/run.toml").read_text()
    model = save_toy(tmp_path / "toy")
    (folder / "run.toml").write_text(text.replace('"smollm2-135m"', f'"{model}"'))
    done = aif("run", folder, "--within", "0.001", cwd=ROOT)
    assert done.returncode == 5, done.stderr
    assert "more than --within 0.001 (minutes)" in done.stderr.splitlines()[-1]
    assert [path.name for path in folder.iterdir()] == ["run.toml"]


def test_a_run_with_its_own_pairs_has_a_forecast_of_its_labelling(tmp_path, demo, monkeypatch):
    """How much the other stages have to learn from is not known from its settings."""
    changes = {"label.pairs": "prompts/example-pairs.jsonl", "pipeline.stages": ["label", "reward"]}
    run = demo(tmp_path, **changes)
    respond = run.settings.respond.model_copy(update={"prompts": None})
    own = Run(run.path, run.settings.model_copy(update={"respond": respond}))
    seconds = expected(monkeypatch, own)
    assert seconds["label"] > forecast.STARTUP_S
    assert seconds["reward"] is None


def test_a_served_live_judge_has_no_forecast_of_ppo(tmp_path, demo, monkeypatch):
    changes = {"judge.model": "openai:some-model", "ppo.reward": {"judge": 1.0}}
    assert expected(monkeypatch, demo(tmp_path, **changes))["ppo"] is None


def test_what_is_wrong_is_left_to_the_stage_to_report(tmp_path, demo, monkeypatch):
    run = demo(tmp_path, **{"evaluate.prompts": str(tmp_path / "nowhere.jsonl")})
    seconds = expected(monkeypatch, run)
    assert seconds["evaluate"] is None
    assert seconds["ppo"] is not None


def test_a_model_that_cannot_be_timed_does_not_stop_the_run(tmp_path, demo, monkeypatch):
    def fails(*model):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(speed, "measure", fails)
    run = demo(tmp_path)
    seconds = forecast.forecast(run, steps(run), QUIET)
    assert seconds["respond"] is None
    assert seconds["compare"] == forecast.STARTUP_S
