"""Write labels in the formats of other trainers.

    trl      {"prompt": [...], "chosen": [...], "rejected": [...], "p_chosen": 0.93}
    hh       {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "..."}
    dataset  the trl rows as a folder for `datasets.load_from_disk`

Null labels and ties (p = 0.5) have no direction: they are left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aif.errors import AifError, InputError
from aif.run import Run
from aif.store import jsonl
from aif.store.records import Comparison, Message

SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}


def export(run: Run, format: str, to: Path | None) -> dict[str, Any]:
    """Write a run's labels to `to` (default: export/ in the run); returns the file and counts."""
    name = {"trl": "trl.jsonl", "hh": "hh.jsonl", "dataset": "dataset"}.get(format)
    if name is None:
        raise InputError("export", "--format", got=repr(format), expected="trl, hh or dataset")
    run.require_labels()
    target = to or run.file("export") / name
    left_out: Counter[str] = Counter()
    rows = (trl_row(*choice) for choice in choices(run, left_out))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if format == "dataset":
            written = _save_dataset(list(rows), target)
        else:
            shape: Callable[[dict], dict] = hh_row if format == "hh" else dict
            written = jsonl.write(target, map(shape, rows))
    except OSError as error:
        raise AifError(f"{target}: could not be written: {error.strerror}") from error
    return {"file": str(target), "rows": written, "left_out": dict(left_out)}


def choices(run: Run, left_out: Counter[str]) -> Iterator[tuple[list[Message], str, str, float]]:
    """(prompt, chosen, rejected, p of chosen) of every label with a direction. Counts the others in
    `left_out`."""
    labels = run.labels()
    for comparison in run.read("comparisons.jsonl", Comparison):
        label = labels.get(comparison.id)
        if label is None:
            left_out["not labelled"] += 1
        elif label.p_first is None:
            left_out[label.fault or "fault"] += 1
        elif label.p_first == 0.5:
            left_out["even"] += 1
        else:
            texts = (comparison.first, comparison.second)
            chosen, rejected = texts if label.p_first > 0.5 else texts[::-1]
            yield comparison.prompt, chosen, rejected, max(label.p_first, 1 - label.p_first)


def trl_row(prompt: list[Message], chosen: str, rejected: str, p: float) -> dict[str, Any]:
    """A row in TRL's conversational preference format, and the soft label."""
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "p_chosen": p,
    }


def hh_row(row: dict[str, Any]) -> dict[str, str]:
    """A TRL row in the text format of hh-rlhf."""
    turns = "".join(f"\n\n{SPEAKERS[m['role']]}: {m['content']}" for m in row["prompt"])
    return {
        side: f"{turns}\n\nAssistant: {row[side][0]['content']}" for side in ("chosen", "rejected")
    }


def _save_dataset(rows: list[dict[str, Any]], target: Path) -> int:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(target))
    return len(rows)
