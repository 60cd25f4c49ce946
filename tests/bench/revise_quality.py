"""What critique, revision and SFT on the revisions do to the bundled model's responses.

    python tests/bench/revise_quality.py                     # revisions only
    python tests/bench/revise_quality.py --sft               # and SFT, on prompts held out

Two measures, before and after each round: the judge's mean grade (log-odds of yes, mean over the
constitution's principles) and VADER's compound sentiment (Hutto & Gilbert 2014), which neither the
reviser, the judge nor training sees. Intervals are 95 % bootstraps over prompts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from aif.config.settings import load_settings
from aif.config.toml import parse_set
from aif.judge.panel import judge_of
from aif.llm import open_llm
from aif.progress import Progress
from aif.run import Run
from aif.stages.filter import filter as keep
from aif.stages.respond import respond
from aif.stages.revise import revise
from aif.store.records import Comparison, Kept, Message, Prompt, Response, Revision

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Text:
    """A response as it stands, and the prompt that it answers."""

    prompt: list[Message]
    text: str


def main() -> None:
    options = arguments()
    folder = options.out or Path(tempfile.mkdtemp(prefix="revise-quality-"))
    lines = (ROOT / "prompts/everyday.jsonl").read_text("utf-8").splitlines()
    run = opened(folder / "run", options, lines[: options.prompts])
    with Progress() as progress:
        print(json.dumps(respond(run, progress)["faults"]), "faults of respond")
        summary = revise(run, progress)
        kept = keep(run, progress)
    print(f"revisions by round {summary['revisions_by_round']} of {summary['responses']}")
    print(f"faults {summary['revision_faults']}")
    print(f"kept by round { {k: round(v['kept_rate'], 3) for k, v in kept['by_round'].items()} }")
    rows = [("before", states(run, 0))]
    for number in range(1, options.rounds + 1):
        rows.append((f"round {number}", states(run, number)))
    rows.append(("last kept", states(run, options.rounds, kept_only=True)))
    report(run, rows)
    if options.show:
        samples(run, options.show)
    if options.sft:
        held_out(run, folder, options, lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="keep the runs here; a second call resumes")
    parser.add_argument("--constitution", default=str(ROOT / "constitutions/warm.toml"))
    parser.add_argument("--form", default="auto", help="chat or text; auto: text, for this model")
    parser.add_argument("--template", help="another template")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--reviser-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="print so many chains")
    parser.add_argument("--sft", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def opened(path: Path, options: argparse.Namespace, prompts: list[str], **more: Any) -> Run:
    """A run on these prompts by the bundled model, under the options' settings."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "given.jsonl").write_text("\n".join(prompts) + "\n", "utf-8")
    policy = {"max_tokens": options.tokens, "temperature": options.temperature}
    given = {
        "policy": policy,
        "reviser": policy | {"form": options.form, "max_tokens": options.reviser_tokens},
        "respond": {"prompts": str(path / "given.jsonl"), "samples": options.samples},
        "respond.seed": options.seed,
        "revise": {"rounds": options.rounds, "template": options.template, "seed": options.seed},
        "label.constitution": options.constitution,
    }
    given |= dict(map(parse_set, options.set))
    return Run(path, load_settings(path / "run.toml", given | more))


def states(run: Run, after: int, kept_only: bool = False) -> list[Text]:
    """Every response as it stands after a round: the last good (or kept) revision until then."""
    prompts = {prompt.id: prompt.messages for prompt in run.read("prompts.jsonl", Prompt)}
    kept = {row.revision_id for row in run.read("kept.jsonl", Kept) if row.kept}
    texts = {
        row.id: Text(prompts[row.prompt_id], row.text)
        for row in run.read("responses.jsonl", Response)
        if row.text
    }
    for row in run.read("revisions.jsonl", Revision):
        if row.revision and row.round <= after and (row.id in kept or not kept_only):
            texts[row.response_id].text = row.revision
    return list(texts.values())


def report(run: Run, rows: Sequence[tuple[str, list[Text]]]) -> None:
    """A table of both measures, a line a state."""
    vader = SentimentIntensityAnalyzer()
    print(f"{'':12}{'judge log-odds':>26}{'VADER':>26}{'words':>8}")
    grade_of = grades(run, [text for _, texts in rows for text in texts])
    for name, texts in rows:
        graded = [grade_of[text.text] for text in texts]
        feeling = [vader.polarity_scores(text.text)["compound"] for text in texts]
        words = np.mean([len(text.text.split()) for text in texts])
        told = "".join(f"{interval(texts, values):>26}" for values in (graded, feeling))
        print(f"{name:12}{told}{words:8.1f}")


def grades(run: Run, texts: list[Text]) -> dict[str, float]:
    """Text -> the judge's grade of it: log-odds of yes, mean over the principles.

    The bundled judge reads a response alone, without its prompt, so a text has one grade.
    """
    asks, owner = {}, {}
    with open_llm(run.settings.judge) as llm:
        judge = judge_of(run.settings)
        for text in texts:
            comparison = Comparison.of(text.prompt, text.text, "")
            for call in judge.calls_for(comparison):
                if call.order == "a":
                    asks[call.id], owner[call.id] = judge.ask(call, comparison), text.text
        found: dict[str, list[float]] = {text.text: [] for text in texts}
        for answer in llm.answer(asks.values()):
            log_odds = answer.logprobs["Yes"] - answer.logprobs["No"]
            found[owner[answer.key]].append(log_odds)
    return {text: float(np.mean(values)) for text, values in found.items()}


def interval(texts: list[Text], values: list[float]) -> str:
    """Mean and 95 % bootstrap over prompts, whose samples are not independent."""
    by_prompt: dict[str, list[float]] = {}
    for text, value in zip(texts, values, strict=True):
        by_prompt.setdefault(json.dumps(text.prompt), []).append(value)
    means = [float(np.mean(group)) for group in by_prompt.values()]
    found = bootstrap([means], np.mean, rng=np.random.default_rng(0)).confidence_interval
    return f"{np.mean(means):.3f} ({found.low:.3f} to {found.high:.3f})"


def samples(run: Run, number: int) -> None:
    """Some chains in full."""
    rows = list(run.read("revisions.jsonl", Revision))
    for response in list(run.read("responses.jsonl", Response))[:number]:
        print(f"\n--- {response.text!r}")
        for row in (row for row in rows if row.response_id == response.id):
            print(f"  {row.round} {row.principle_id} {row.fault or ''}")
            print(f"    critique: {row.critique!r}\n    revision: {row.revision!r}")


def held_out(run: Run, folder: Path, options: argparse.Namespace, lines: list[str]) -> None:
    """SFT on the revisions, then both models on prompts that no stage saw."""
    from aif.train.sft import sft

    with Progress() as progress:
        print(json.dumps({k: v for k, v in sft(run, progress).items() if k != "inputs"}))
        rows = []
        prompts = lines[-options.held_out :]
        for name, model in (("base", None), ("after SFT", str(run.path / "sft"))):
            more = {"policy.model": model} if model else {}
            new = opened(folder / name.replace(" ", "-"), options, prompts, **more)
            respond(new, progress)
            new.write("kept.jsonl", [])
            new.write("revisions.jsonl", [])
            rows.append((name, states(new, 0)))
    report(run, rows)


if __name__ == "__main__":
    main()
