"""The documents' commands run as shown, in their order, and their examples are read.

On a tiny model in place of the bundled one (tests/support/documents.py). ```python blocks run too,
and a block with title="FILE" is written to that file. See tests/support/markdown.py.
"""

import json
import re

import pytest

from aif.constitution.file import load
from aif.data.human import read_items
from aif.data.readers import read_dialogues, read_pairs, read_prompts, read_rated
from tests.conftest import ROOT, write_jsonl
from tests.support.documents import Shell, checkout
from tests.support.markdown import DOCUMENTS, README, TEXTS, blocks, commands, section, steps
from tests.support.server import serving

EDITED = "principle 'good-cheer' was edited"
PANEL = (
    "aif label --out runs/first --set "
    """'panel=[{model="openai:MODEL", base_url="http://localhost:8000/v1"}]' --"""
)
# What commands print whose output is not shown: (start of the command, parts of the output). The
# longest start counts.
PRINTS = {
    README: [
        ("aif constitution diff", ["pointwise, as text: good-cheer (every comparison)"]),
        ("aif diff", [EDITED, "12 comparisons in both", "runs/first/diff.jsonl"]),
        ("aif label --out runs/first --judge openai:", ["judge changed"]),
        ("aif label --out runs/first", ["0 calls made, 96 kept"]),
    ],
    "constitutions/README.md": [
        ("aif constitution check mine.toml", ["1 principles, ok"]),
        ("aif label", ["2 labels (0 null), 4 calls made"]),
        ("aif constitution show", ["hhh: ", "real-need"]),
        ("aif constitution diff", [EDITED, "cue: 'Cheerful' -> 'Happy'"]),
    ],
    "prompts/README.md": [("aif label", ["2 labels (0 null), 16 calls made"])],
    "runs/README.md": [
        ("aif plan --out runs/demo", ["resample: 512 calls at most"]),
        ("aif run  runs/demo", ["wins are against sft", "report.html"]),
        ("aif run  runs/demo --from", ["reward: data, settings or model have changed"]),
        ("aif status runs/demo", ["ppo wins"]),
        ("aif label --out runs/first --judge openai:", ["judge changed"]),
        ("aif label --out runs/first", ["0 calls made, 96 kept"]),
        (PANEL + "consensus", ["judge 'openai:test-model' joined", "openai:test-model: 12 labels"]),
        (PANEL + "set", ["0 calls made", "got more than the cheap pass"]),
        ("aif audit runs/first", ["12 pairs, 12 with a choice of people", "first/audit.json"]),
        ("aif audit --pairs", ["canary order", "runs/audit/audit.json"]),
        ("aif diff runs/first", [EDITED, "12 comparisons in both", "runs/first/diff.jsonl"]),
        ("aif diff runs/before", [EDITED, "12 comparisons in both", "runs/first/diff.jsonl"]),
        ("aif respond runs/sl ", ["30 responses to 30 prompts"]),
        ("aif revise", ["of 30 responses (by round: "]),
        ("aif filter", ["revisions kept"]),
        ("aif sft", ["runs/sl/sft"]),
        ("aif respond runs/sl-after", ["10 responses to 5 prompts (0 faults)"]),
        ("aif reward", ["runs/first/reward"]),
        ("aif score", ["12 pairs scored"]),
        ("aif ppo", ["2 steps of ppo on ", "held out, scores: ", "runs/first/ppo"]),
        ("aif evaluate", ["wins are against base", "runs/first/evaluate.json"]),
        ("aif report", ["runs/first/report.html"]),
    ],
}


# The demo is made to be watched: here it has fewer prompts and steps.
SMALL = " --set respond.limit=12 --set revise.limit=4 --set ppo.max_steps=1 --set evaluate.limit=6"


@pytest.fixture
def shell(tmp_path, tiny_cache):
    return Shell(checkout(tmp_path / "checkout"), tiny_cache)


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


def run_through(document: str, shell: Shell, server) -> dict[str, str]:
    """Run every block of a document in its order; the outputs by command."""
    outputs = {}
    for block in blocks(TEXTS[document]):
        if block.title:
            (shell.folder / block.title).write_text(block.text)
        if block.kind == "python":
            (shell.folder / "block.py").write_text(block.text)
            outputs[block.text] = shell("python block.py")
        for command, shown in steps(block) if block.kind == "console" else ():
            there = command.replace("http://localhost:8000/v1", server.base_url)
            there += SMALL if re.match("aif run +runs/demo", command) else ""
            output = shell(there.replace("openai:MODEL", "openai:test-model"))
            missing = not_printed(shown, output.splitlines())
            assert not missing, f"{command}\nprinted\n{output}\nand not {missing!r}"
            if not shown:
                check_printed(document, command, output)
            outputs[command] = output
    return outputs


def not_printed(shown: list[str], printed: list[str]) -> str | None:
    """The first shown line that the output lacks, in its order; "..." stands for any lines."""
    at, skips = 0, True  # progress may come first
    for line in shown:
        if line == "...":
            skips = True
            continue
        while skips and at < len(printed) and printed[at] != line:
            at += 1
        if at == len(printed) or printed[at] != line:
            return line
        at, skips = at + 1, False
    return None


def check_printed(document: str, command: str, output: str) -> None:
    starting = [pair for pair in PRINTS[document] if command.startswith(pair[0])]
    for part in max(starting, key=lambda pair: len(pair[0]))[1] if starting else ():
        assert part in output, f"{command}\nprinted\n{output}\nand not {part!r}"


@pytest.mark.timeout(900)
def test_the_readme_runs(shell, server):
    run_through(README, shell, server)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_runs_document_runs(shell, server):
    """After the README's commands, as it says."""
    run_through(README, shell, server)
    outputs = run_through("runs/README.md", shell, server)
    (again,) = (text for command, text in outputs.items() if "--from reward" in command)
    assert re.findall(r"\[\d/\d\] (\w+)", again) == [
        "reward", "ppo", "evaluate", "report"
    ]  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("document", ["constitutions/README.md", "prompts/README.md"])
def test_a_document_runs(document, shell, server):
    run_through(document, shell, server)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_expected_output_has_its_command(document):
    starts = [start for start, _ in PRINTS.get(document, ())]
    every = commands(document)
    for start in starts:
        assert any(command.startswith(start) for command in every), start
    assert bool(every) == (document in PRINTS), "a document with commands has expected outputs"


NUMBERS = {1: "one", 4: "four", 8: "eight", 16: "sixteen", 64: "64"}


def test_constitutions_have_as_many_principles_and_examples_as_their_table_says():
    text = TEXTS["constitutions/README.md"]
    for path in (ROOT / "constitutions").glob("*.toml"):
        constitution = load(path)
        (row,) = re.findall(rf"^\| `constitutions/{path.name}` \|(.*)", text, re.MULTILINE)
        principles, examples = constitution.principle, constitution.principle[0].example
        if len(principles) in NUMBERS:
            assert f"{NUMBERS[len(principles)]} principle" in row.lower()
        if examples:
            assert f"{NUMBERS[len(examples)]} examples" in row


def test_constitutions_shown_are_whole(tmp_path):
    shown = [block for block in blocks(TEXTS["constitutions/README.md"]) if block.kind == "toml"]
    assert shown
    for block in shown:
        path = tmp_path / block.title
        path.write_text(block.text)
        constitution = load(path)
    keys = set(type(constitution).model_fields) - {"principle"}
    principle = type(constitution.principle[0])
    for key in keys | set(principle.model_fields):
        assert re.search(rf"^#? ?\[*(?:principle\.)?{key}\b", block.text, re.MULTILINE), key


READERS = {
    "Prompts": read_prompts,
    "Pairs": read_pairs,
    "People's choices": lambda source: read_items(source, None, ()),
    "Demonstrations": read_dialogues,
    "Grades of single responses": read_rated,
}


@pytest.mark.parametrize("title", READERS)
def test_rows_shown_are_read(title, tmp_path):
    shown = [b for b in blocks(section("prompts/README.md", title)) if b.kind == "jsonl"]
    assert shown
    for block in shown:
        for line in block.text.splitlines():
            rows = list(READERS[title](str(write_jsonl(tmp_path / "x.jsonl", [json.loads(line)]))))
            assert rows, line


def test_every_file_of_prompts_and_every_template_is_listed():
    text = TEXTS["prompts/README.md"]
    for path in (ROOT / "prompts").rglob("*"):
        if path.suffix in (".jsonl", ".jinja"):
            assert f"`{path.relative_to(ROOT)}`" in text
    for path in (ROOT / "constitutions").glob("*.toml"):
        assert f"`constitutions/{path.name}`" in TEXTS["constitutions/README.md"]
