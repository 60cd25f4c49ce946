"""Label comparisons with a judge under a constitution.

    pairs -> comparisons.jsonl -> (calls, journal/label.jsonl) -> verdicts.jsonl + labels.jsonl

A call whose id is in the journal is never made again, whatever else changed; a call whose id is not
there is made, whether the run is new, was killed, or had its constitution edited.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from aif import jsonl
from aif.asking import Faults, ask_all
from aif.errors import InputError
from aif.journal import Journal
from aif.judge import Judge
from aif.judging import asks_for, constitution_path, count, judge_of, judged
from aif.llm import open_llm
from aif.pairs import read_pairs, unique
from aif.progress import Progress
from aif.records import Comparison, HumanChoice, as_row, content_id
from aif.run import Run

STAGE = "label"


def label(run: Run, progress: Progress) -> dict[str, Any]:
    """Do what `run.settings` says; returns the summary, which is also kept as label.json.

    Raises Interrupted or JudgeStopped when it ended early; the files are in order all the same.
    Whether the summary has more faults than allowed is `asking.check_faults`' to say.
    """
    path = constitution_path(run)
    with open_llm(run.settings.judge) as llm, run.writing():
        judge = judge_of(run, path, llm.control_tokens)
        data = take_in(run)
        run.keep_settings()
        with run.journal(STAGE) as journal:
            used = facts(judge, path, data)
            work = count(judge, comparisons(run), journal.index)
            for line in [*journal.damage(), *changes(run.state(STAGE), used), work.line()]:
                progress.say(line)
            run.write_state(STAGE, {"run": str(run.path), "in_progress": True} | used)
            progress.start("label", len(work.missing))
            asks = asks_for(judge, comparisons(run), work.missing)
            tally = ask_all(llm, asks, journal, judge.journal_row, progress)
            progress.finish()
            results = write_results(run, judge, journal)
        made = tally.answered + tally.faults.total()
        summary = (
            {"run": str(run.path), "calls_made": made, "calls_kept": work.kept} | results | used
        )
        run.write_state(STAGE, summary)
    if tally.stopped:
        raise tally.stopped
    return summary


def take_in(run: Run) -> dict[str, Any]:
    """Turn `label.pairs` into comparisons.jsonl and human.jsonl, once all of it has been checked.

    Without `label.pairs` the comparisons that an earlier stage left are taken.
    """
    source = run.settings.label.pairs
    if source is None:
        return {"pairs": str(own_comparisons(run))}
    choices: list[HumanChoice] = []
    rows = 0
    digest = hashlib.sha256()

    def fresh() -> Iterator[Comparison]:
        nonlocal rows
        for pair, is_new in unique(islice(read_pairs(source), run.settings.label.limit)):
            rows += 1
            if pair.human:
                choices.append(pair.human)
            if is_new:
                digest.update(pair.comparison.id.encode("ascii"))
                yield pair.comparison

    distinct = run.write("comparisons.jsonl", fresh())
    run.write("human.jsonl", choices)
    if not distinct:
        raise InputError(source, "", got="no pairs at all", expected="at least one")
    return {
        "pairs": source,
        "rows": rows,
        "repeated_rows": rows - distinct,
        "digest": digest.hexdigest(),
    }


def own_comparisons(run: Run) -> Path:
    """The file of comparisons that an earlier stage left; InputError where there is none."""
    path = run.file("comparisons.jsonl")
    if not path.exists():
        raise InputError("label", "pairs", got="nothing", expected="--pairs FILE")
    return path


def comparisons(run: Run) -> Iterator[Comparison]:
    """What is to be judged, a row at a time."""
    return islice(run.read("comparisons.jsonl", Comparison), run.settings.label.limit)


def write_results(run: Run, judge: Judge, journal: Journal) -> dict[str, Any]:
    """Make verdicts.jsonl and labels.jsonl again from the journal; returns what they hold.

    A comparison with a call that was never made has no label row yet.
    """
    totals: Counter[str] = Counter()
    faults = Faults()
    null_labels: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    quorum = run.settings.label.quorum
    with (
        jsonl.replacing(run.file("verdicts.jsonl")) as verdict_file,
        jsonl.replacing(run.file("labels.jsonl")) as label_file,
    ):
        for comparison in comparisons(run):
            verdicts, found = judged(judge, comparison, journal, quorum)
            for verdict, row in verdicts:
                totals["hard_verdicts"] += row["logprobs"] is None and verdict.fault is None
                faults.add(row)
                tokens.update(verdict.usage)
                verdict_file.write(jsonl.dumps(as_row(verdict)) + "\n")
            if found is None:
                totals["unfinished"] += 1
                continue
            null_labels.update([found.fault] if found.fault else [])
            totals["labels"] += 1
            totals["first_wins"] += (found.p_first or 0) > 0.5
            label_file.write(jsonl.dumps(as_row(found)) + "\n")
    return {
        "labels": totals["labels"],
        "labels_null": dict(null_labels),
        "unfinished": totals["unfinished"],
        "first_wins": totals["first_wins"],
        "verdicts": faults.calls,
        "hard_verdicts": totals["hard_verdicts"],
        "tokens": dict(tokens),
        **faults.summary(),
    }


def facts(judge: Judge, constitution: Path, data: dict[str, Any]) -> dict[str, Any]:
    """What a labelling used, so that the next one can say what changed."""
    sampled = judge.constitution.principles == "sample"
    return {
        "data": data,
        "draw": f"one principle, seed {judge.seed}" if sampled else "all principles",
        "judge": judge.model.identity(),
        "protocol": judge.protocol,
        "template": content_id(judge.template.text),
        "constitution": {
            "file": str(constitution),
            "name": judge.constitution.name,
            "digest": judge.constitution.digest(),
            "preamble": content_id(judge.constitution.preamble),
            "principles": {
                p.id: p.digest(judge.protocol, judge.form) for p in judge.constitution.principle
            },
        },
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs from the last labelling in what calls depend on, a line each."""
    if "constitution" not in before:
        return []
    lines = []
    for key in ("judge", "protocol", "template", "draw"):
        if before.get(key) != now[key]:
            lines.append(f"{key} changed{_difference(before.get(key), now[key])}")
    if now["data"] and before["data"].get("digest") != now["data"].get("digest"):
        lines.append("the data changed")
    old, new = before["constitution"], now["constitution"]
    if old["preamble"] != new["preamble"]:
        lines.append("the constitution's preamble changed")
    same_protocol = before.get("protocol") == now["protocol"]  # else each puts another question
    for name in old["principles"] | new["principles"]:
        was, is_now = old["principles"].get(name), new["principles"].get(name)
        if was != is_now and (same_protocol or None in (was, is_now)):
            what = "is new" if was is None else "is gone" if is_now is None else "was edited"
            lines.append(f"principle {name!r} {what}")
    if not lines and old["digest"] != new["digest"]:
        moved = "the draws move with them" if now["draw"].startswith("one") else "no call is needed"
        lines.append(f"only weights or rules of the constitution changed: {moved}")
    return lines


def _difference(before: Any, now: Any) -> str:
    """What changed in a setting, or in a table of them."""
    if not isinstance(now, dict):
        return f": {before} -> {now}" if len(str(now)) < 64 else ""  # a digest tells nothing
    moved = [key for key in now if now[key] != (before or {}).get(key)]
    return ": " + ", ".join(f"{key} {(before or {}).get(key)} -> {now[key]}" for key in moved)
