"""What the documents name exists: verbs, options, files, links, settings, keys, exit codes."""

import re
import shlex
import tomllib
from typing import Any

import pytest
import typer

from aif.cli.verbs import app
from aif.config.settings import LoraSettings, PolicySettings, Settings
from aif.config.versions import RENAMED
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
from tests.conftest import ROOT
from tests.support.markdown import DOCUMENTS, FENCE, README, TEXTS, blocks, section
from tests.test_house import FLOORS

every_document = pytest.mark.parametrize("document", DOCUMENTS)
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


def options(command: Any) -> set[str]:
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
        if words and words[0] in getattr(command, "commands", {}):
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


def test_every_verb_prints_json():
    for command in COMMAND.commands.values():
        for verb in getattr(command, "commands", {"": command}).values():
            assert "--json" in options(verb)


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
    if document == "runs/README.md":  # it alone has the old names
        known |= {tuple(old.split(".")) for old in RENAMED.values()}
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


def test_ratios_of_the_readme_are_measured():
    rows = re.findall(r"\| ([\d.]+) \| `(tests/bench/\w+\.py)` \|", TEXTS[README])
    assert len(rows) == 5
    for ratio, script in rows:
        (there,) = re.findall(
            rf"^python {script}.*?(?=^## )",
            TEXTS["tests/bench/README.md"],
            re.MULTILINE | re.DOTALL,
        )
        assert ratio in there, script


def test_the_readme_is_short():
    assert len(TEXTS[README].splitlines()) <= 200
    assert len(TEXTS[README].encode()) < 16_000
