"""The documents: their commands run as shown, and what they name exists.

A ```console block holds commands for this machine: one a line, or `$ command` with the output below
it ("..." stands for lines left out). They run in the document's order, on a tiny model in place of
the bundled one. ```python blocks run too. A block with title="FILE" is written to that file. What
cannot run here (a provider, a GPU) is ```sh or ```py, and its verbs and options are checked.
"""

import json
import re
import shlex
import tomllib
from dataclasses import dataclass

import click
import pytest
import typer

from aif.cli.verbs import app
from aif.config.settings import LoraSettings, PolicySettings, Settings
from aif.constitution.file import load
from aif.data.human import read_items
from aif.data.readers import read_dialogues, read_pairs, read_prompts, read_rated
from aif.errors import AifError
from aif.store.records import (
    Comparison,
    HumanChoice,
    Kept,
    Label,
    Prompt,
    Response,
    Revision,
    Verdict,
    Vote,
)
from tests.conftest import ROOT, write_jsonl
from tests.support.documents import Shell, checkout
from tests.support.server import serving
from tests.test_house import FLOORS

README = "README.md"
DOCUMENTS = [README] + [
    f"{folder}/README.md" for folder in ("aif", "constitutions", "prompts", "runs", "tests/bench")
]
every_document = pytest.mark.parametrize("document", DOCUMENTS)
TEXTS = {name: (ROOT / name).read_text("utf-8") for name in DOCUMENTS}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is to be written to, and its text."""

    kind: str
    title: str
    text: str


FENCE = re.compile(r'^```(\w*)(?: title="(.*?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[Block]:
    return [Block(*parts) for parts in FENCE.findall(text)]


def steps(block: Block) -> list[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines of output shown below it."""
    lines = block.text.splitlines()
    if not any(line.startswith("$ ") for line in lines):
        return [(line, []) for line in lines]
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def commands(document: str) -> list[str]:
    """Every command of a document that runs."""
    console = (block for block in blocks(TEXTS[document]) if block.kind == "console")
    return [command for block in console for command, _ in steps(block)]


def section(document: str, title: str) -> str:
    """The text under a heading, with that of the headings below it."""
    _, level, rest = re.split(rf"^(#+) {title}\n", TEXTS[document], maxsplit=1, flags=re.MULTILINE)
    return re.split(rf"^#{{1,{len(level)}}} (?=[A-Z`])", rest, maxsplit=1, flags=re.MULTILINE)[0]


# ---- What they show runs ---------------------------------------------------------------------

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
SMALL = " --set respond.limit=24 --set ppo.max_steps=2"


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


@every_document
def test_every_expected_output_has_its_command(document):
    starts = [start for start, _ in PRINTS.get(document, ())]
    every = commands(document)
    for start in starts:
        assert any(command.startswith(start) for command in every), start
    assert bool(every) == (document in PRINTS), "a document with commands has expected outputs"


# ---- Examples of files -----------------------------------------------------------------------


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


# ---- What they name exists -------------------------------------------------------------------

COMMAND = typer.main.get_command(app)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
ANY = {"VERB", "..."}


def named_commands(document: str) -> list[str]:
    """Every line of a fence and every inline code that calls aif."""
    text = TEXTS[document]
    lines = [line for block in blocks(text) for line in block.text.splitlines()]
    inline = CODE.findall(FENCE.sub("", text).replace("\n", " "))
    called = [re.search(r"(?:^|\s|\$ )(?:aif|--module aif) +([a-z].*)", line) for line in lines]
    called += [re.match(r"(?:aif|.*--module aif) +(.+)", code) for code in inline]
    return [found[1].partition("  #")[0] for found in called if found]


def options(command: click.Command) -> set[str]:
    return {name for one in command.params for name in (*one.opts, *one.secondary_opts)}


@every_document
def test_verbs_and_options_exist(document):
    for line in named_commands(document):
        words = line.split()
        if words[0] in ANY:
            continue
        if block_is_tree(line):
            continue
        assert words[0] in COMMAND.commands, line
        command = COMMAND.commands[words.pop(0)]
        if isinstance(command, click.Group) and words and words[0] in command.commands:
            command = command.commands[words[0]]
        for option in re.findall(r"(?<!\S)(--[a-z][a-z-]*)", line):
            assert option in options(command) | {"--help"}, f"{option} in {line}"


def block_is_tree(line: str) -> bool:
    """`aif label: id, ...` is a note beside a file, not a command."""
    return bool(re.match(r"[a-z]+( or aif [a-z]+)?[:;]", line)) or line.startswith("report draws")


@every_document
def test_options_by_themselves_exist(document):
    known = {"--help"}.union(*(options(command) for command in COMMAND.commands.values()))
    for path in (ROOT / "tests/bench").glob("*.py") if document == "tests/bench/README.md" else ():
        known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', path.read_text("utf-8")))
    for code in CODE.findall(FENCE.sub("", TEXTS[document]).replace("\n", " ")):
        if code.startswith("--") and code.split()[0] != "--hf-overrides":
            assert code.split()[0] in known, code


def test_the_readme_lists_every_verb():
    listed = re.findall(r"^\| `aif ([a-z]+)` \|", TEXTS[README], re.MULTILINE)
    assert sorted(listed) == sorted(COMMAND.commands)


def test_benchmarks_have_the_options_that_are_shown():
    for block in blocks(TEXTS["tests/bench/README.md"]):
        for line in block.text.splitlines():
            script, *words = [word for word in shlex.split(line) if not word.endswith("python")]
            if script == "make":
                continue
            source = (ROOT / script).read_text("utf-8")
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in source, f"{option} in {line}"


PATH = re.compile(r"(?<![\w./~:-])((?:aif|constitutions|prompts|tests|runs)/[\w./-]*[\w/])")


@every_document
def test_files_named_exist(document):
    """A run folder is there, or a command makes it."""
    every = [command for name in DOCUMENTS for command in named_commands(name)]
    made = {run for line in every for run in re.findall(r"(?<![\w/])runs/[\w-]+", line)}
    made |= {"runs/audit", "runs/other"}  # a default, and a run of somebody's own
    for name in PATH.findall(re.sub(r"\]\(.*?\)", "]", TEXTS[document])):
        run = "/".join(name.split("/")[:2])
        assert (ROOT / name).exists() or run in made or "NAME" in name, name


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return set(map(slug, headings))


@every_document
def test_links_and_anchors_resolve(document):
    text = FENCE.sub("", TEXTS[document])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.resolve().exists(), target
        if anchor:
            assert anchor in anchors(path.read_text("utf-8")), target


def test_a_long_document_lists_its_sections():
    for document in DOCUMENTS:
        for heading in re.findall(r"^## (.*)$", FENCE.sub("", TEXTS[document]), re.MULTILINE):
            assert f"(#{slug(heading)})" in TEXTS[document], f"{document}: {heading}"


KEY = re.compile(
    rf"(?<![\w./\"{{-])({'|'.join(Settings.model_fields)})\.([a-z_0-9]+(?:\.[a-z_]+)?)(?![\w/(])"
)
FILES = {"json", "jsonl", "toml", "py"}


@every_document
def test_settings_named_exist(document):
    known = {(table, key) for table, keys in settings().items() for key in keys}
    known |= {(table, key.partition(".")[0]) for table, key in known}  # sft.lora
    for table, key in KEY.findall(TEXTS[document]):
        if key.partition(".")[0] not in FILES:
            assert (table, key) in known, f"{table}.{key}"


def settings() -> dict[str, dict[str, object]]:
    """Every setting with its default, by table."""
    every = {}
    for name in Settings.model_fields:
        table = getattr(Settings(), name) or (
            Settings().judge if name == "panel" else PolicySettings()
        )
        every[name] = {key: getattr(table, key) for key in type(table).model_fields}
        if "lora" in every[name]:
            del every[name]["lora"]
            every[name] |= {f"lora.{key}": value for key, value in LoraSettings()}
    return every


def test_every_setting_is_in_its_table_with_its_default():
    listed: dict[str, dict[str, str]] = {}
    tables = section("runs/README.md", "Every setting")
    for heading, body in re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", tables, re.M | re.S):
        for key, default in re.findall(r"^\| `([a-z_0-9.]+)` \| (.*?) \|", body, re.MULTILINE):
            of_table = dict(re.findall(r"`\[+(\w+)\]+` `(.*?)`", default))
            first = default.partition(";")[0].strip("`")
            for name in re.findall(r"\[(\w+)\]", heading):
                listed.setdefault(name, {})[key] = of_table.get(name, first)
    for name, keys in settings().items():
        assert listed[name].keys() == keys.keys(), name
        for key, value in keys.items():
            shown = listed[name][key]
            default = None if shown == "none" else tomllib.loads(f"x = {shown}")["x"]
            assert default == value, f"{name}.{key}: the default is {value!r}"


ROWS = {
    "prompts": Prompt, "responses": Response, "votes": Vote, "revisions": Revision, "kept": Kept,
    "comparisons": Comparison, "human": HumanChoice, "verdicts": Verdict, "labels": Label,
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_the_run_folder_shows_every_key(name):
    tree = section("runs/README.md", "The folder").replace("\n│ ", " ")
    (line,) = re.findall(rf"^├── {name}\.jsonl (.*)$", tree, re.MULTILINE)
    for key in ROWS[name].__dataclass_fields__:
        assert re.search(rf"\b{key}\b", line), key


def test_make_targets_exist():
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [name for text in TEXTS.values() for name in re.findall(r"(?m:^|`)make ([\w-]+)", text)]
    assert {"demo", "test", "test-vllm"} <= set(named) <= set(targets.split())


def test_the_readme_has_every_exit_code():
    codes = {0, 2} | {error.exit_code for error in [AifError, *AifError.__subclasses__()]}
    listed = re.findall(r"\b(\d+):", section(README, "Exit codes"))
    assert list(map(int, listed)) == sorted(codes)


def test_the_floors_are_those_of_the_house():
    rows = re.findall(r"^\| (`aif/.*?) \|", section("aif/README.md", "Floors"), re.MULTILINE)
    listed = [" ".join(re.findall(r"aif/(\w+)", row)) for row in rows]
    assert [set(row.split()) for row in reversed(listed)] == [set(f.split()) for f in FLOORS]


def test_the_readme_is_short():
    assert len(TEXTS[README].splitlines()) <= 200
    assert len(TEXTS[README].encode()) < 16_000
