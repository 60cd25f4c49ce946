"""Labels in other trainers' shapes."""

from pathlib import Path

import pytest

from aif.config.settings import Settings
from aif.data.readers import read_pairs
from aif.errors import AifError, InputError
from aif.run import Run
from aif.stages.export import export
from aif.store.records import Comparison, Label, as_row
from tests.conftest import read_jsonl, write_jsonl

ASKED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
ROWS = [Comparison.of(ASKED, f"first {n}", f"second {n}") for n in range(6)]
P_FIRST = [0.9, 0.2, 0.5, None, None]  # the last comparison has no label at all


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "run", Settings())
    made.path.mkdir()
    made.write("comparisons.jsonl", ROWS)
    labels = [
        Label.null(row.id, f"fault{n % 2}") if p is None else Label(row.id, p, None, 2, None)
        for n, (row, p) in enumerate(zip(ROWS, P_FIRST, strict=False))
    ]
    write_jsonl(made.path / "labels.jsonl", map(as_row, labels))
    return made


LEFT_OUT = {"even": 1, "fault1": 1, "fault0": 1, "not labelled": 1}


def test_trl_rows_load_as_a_conversational_preference_dataset(run):
    summary = export(run, "trl", None)
    assert (summary["rows"], summary["left_out"]) == (2, LEFT_OUT)
    datasets = pytest.importorskip("datasets")
    cache = str(run.path / "cache")
    table = datasets.load_dataset(
        "json", data_files=summary["file"], split="train", cache_dir=cache
    )
    assert set(table.column_names) == {"prompt", "chosen", "rejected", "p_chosen"}
    row = table[0]
    assert row["prompt"] == ASKED
    assert row["chosen"] == [{"role": "assistant", "content": "first 0"}]
    assert row["rejected"] == [{"role": "assistant", "content": "second 0"}]
    assert row["p_chosen"] == 0.9
    assert table[1]["chosen"][0]["content"] == "second 1"
    assert table[1]["p_chosen"] == 0.8


def test_trl_itself_takes_the_rows(run):
    utils = pytest.importorskip("trl.data_utils")
    for row in read_jsonl(Path(export(run, "trl", None)["file"])):
        assert utils.is_conversational(row)
        assert set(utils.maybe_extract_prompt(row)) >= {"prompt", "chosen", "rejected"}


def test_hh_rows_are_whole_dialogues_that_read_back(run):
    summary = export(run, "hh", None)
    first, _ = read_jsonl(Path(summary["file"]))
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: "
    assert first == {"chosen": dialogue + "first 0", "rejected": dialogue + "second 0"}
    back = list(read_pairs(summary["file"]))
    assert [pair.comparison.prompt for pair in back] == [ASKED, ASKED]
    for pair, best in zip(back, ("first 0", "second 1"), strict=True):
        chosen = pair.comparison.first if pair.human.p_first else pair.comparison.second
        assert chosen == best


def test_a_dataset_folder_loads_from_disk(run):
    datasets = pytest.importorskip("datasets")
    summary = export(run, "dataset", None)
    table = datasets.load_from_disk(summary["file"])
    assert (len(table), summary["rows"]) == (2, 2)
    assert table[1]["chosen"] == [{"role": "assistant", "content": "second 1"}]


def test_where_it_goes_and_what_is_refused(run, tmp_path):
    target = tmp_path / "a" / "b.jsonl"
    assert export(run, "trl", target)["file"] == str(target)
    assert len(target.read_text().splitlines()) == 2
    with pytest.raises(InputError, match=r"--format: got 'csv', expected trl, hh or dataset"):
        export(run, "csv", None)
    with pytest.raises(AifError, match="could not be written") as error:
        export(run, "trl", target / "below a file")
    assert "\n" not in str(error.value)
    (run.path / "labels.jsonl").unlink()
    with pytest.raises(InputError, match=r"labels\.jsonl: got no such file"):
        export(run, "trl", None)


def test_a_labelling_that_was_cut_off_is_not_exported(tmp_path):
    run = Run(tmp_path / "cut", Settings())
    run.path.mkdir()
    run.write("labels.jsonl", [])
    run.write_state("label", {"in_progress": True})
    with pytest.raises(AifError, match="cut off"):
        export(run, "trl", None)
