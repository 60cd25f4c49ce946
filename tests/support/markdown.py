"""The documents as tests read them: their texts, sections and fenced blocks.

A ```console block holds commands for this machine: one a line, or `$ command` with the output below
it ("..." stands for lines left out). A block with title="FILE" is the text of that file. What can
not run here (a provider, a GPU) is ```sh or ```py.
"""

import re
from dataclasses import dataclass

from tests.conftest import ROOT

README = "README.md"
DOCUMENTS = [README] + [
    f"{folder}/README.md" for folder in ("aif", "constitutions", "prompts", "runs", "tests/bench")
]
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
