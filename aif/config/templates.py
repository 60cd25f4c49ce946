"""Text with holes: Jinja in a sandbox, and judged text made harmless before it goes in.

A template with blocks `system` and `user` makes a chat; one without makes a plain text to continue.
Whatever comes from data (prompts, responses) is passed through `neutralised` and only ever reaches
a template as a variable, so neither `{{ }}` nor a chat's control tokens in it do anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aif.errors import AifError, InputError
from aif.store.records import LONE_SURROGATE, Message

_PACKAGED = Path(__file__).parents[1] / "prompt_templates"  # where a wheel puts them
BUILTIN = _PACKAGED if _PACKAGED.exists() else Path(__file__).parents[2] / "prompts" / "templates"
MAX_TEMPLATE = 100_000  # bytes

# What chat formats use as control tokens. A judge behind HTTP does not tell its tokenizer, so the
# shapes are matched; a local one adds its exact list. Where a shape is also plain writing ([NOTE],
# <b>, <T>), only the names that are known to be tokens count.
_CONTROL = re.compile(
    r"""
    <(?=[|｜][^<>\n]{1,64}[|｜]>             # <|im_end|>, <｜User｜>, <|START_OF_TURN_TOKEN|>
      | /?[a-z]+(?:_[a-z0-9]+)+/?>           # <start_of_turn>, <tool_call>, <extra_id_0>
      | /?(?:s|bos|eos|pad|unk|mask|cls|sep|sp|sop|eop|eod|eot|eoh|eoa|think(?:ing)?
          |filename|reponame|image|audio|video)>
      | /?(?:unused|reserved|extra|0x|fim-|seed:)[\w:-]{1,32}>
      | </?SYS>>                             # <<SYS>>
      | (?:BOS|EOS|PAD|UNK|MASK|CLS|SEP|PRE|SUF|MID|EOT|EOD|ENC|[A-Z]+(?:_[A-Z0-9]+)+)>)
  | \[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|THINK|ARGS
          |CALL_ID|IMG|IMG_BREAK|IMG_END|AUDIO|BEGIN_AUDIO|TRANSCRIBE|PREFIX|SUFFIX|MIDDLE
          |[gs]?MASK|CLS|SEP|PAD|UNK|BOS|EOS|@BOS@|(?:UNUSED|REFERENCE)_[A-Z_]+\d+|unused\d+)\]
      | \|[^\[\]\n]{1,64}\|\])               # [|endofturn|]
  | >(?=>[A-Z_]{3,20}<<)                     # >>QUESTION<<
    """,
    re.VERBOSE,
)


def neutralised(text: str, tokens: Iterable[str] = ()) -> str:
    """`text` with every control token broken by a space after its first character.

    `tokens` are the exact added and special tokens of the judge, where they are known. Lone
    surrogates, which no server accepts, become U+FFFD.
    """
    text = LONE_SURROGATE.sub("\ufffd", text)
    text = _CONTROL.sub(lambda match: match[0] + " ", text)
    for token in tokens:
        if token in text:
            text = text.replace(token, token[0] + " " + token[1:] if len(token) > 1 else " ")
    return text


class Template:
    """A compiled template. `text` is its source, which enters the ids of what it renders."""

    def __init__(self, text: str, where: object):
        self.text = text
        self._where = where
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        try:
            self._compiled = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"{where}:{error.lineno}", "", got=error.message or "", expected="a Jinja template"
            ) from None

    @classmethod
    def named(cls, name: str) -> Template:
        """A built-in template, as `pairwise.chat`."""
        return cls.load(BUILTIN / f"{name}.jinja")

    @classmethod
    def load(cls, path: Path) -> Template:
        try:
            data = path.read_bytes()
            if len(data) > MAX_TEMPLATE:
                raise InputError(
                    path, "", got="a larger file", expected=f"at most {MAX_TEMPLATE:,}"
                )
            return cls(data.decode("utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise InputError(path, "", got=str(reason), expected="a Jinja template") from None

    @cached_property
    def is_chat(self) -> bool:
        return "user" in self._compiled.blocks

    def chat(self, variables: dict[str, Any]) -> list[Message]:
        """Render the blocks as messages; an empty system message is left out."""
        messages = []
        for role in ("system", "user"):
            if self.has(role):
                content = self.block(role, variables)
                if content:
                    messages.append({"role": role, "content": content})
        return messages

    def plain(self, variables: dict[str, Any]) -> str:
        """Render the whole as one text. Trailing space is cut: it would split the next token."""
        return self._guarded(lambda: self._compiled.render(variables)).rstrip()

    def has(self, name: str) -> bool:
        """Whether the template has a block of that name."""
        return name in self._compiled.blocks

    def require(self, *names: str) -> None:
        """Raise InputError unless the template has these blocks."""
        for name in names:
            if not self.has(name):
                raise InputError(
                    self._where, "", got=f"no block {name!r}", expected=f"{{% block {name} %}}"
                )

    def block(self, name: str, variables: dict[str, Any]) -> str:
        """Render one block, stripped."""
        render = self._compiled.blocks[name]
        context = self._compiled.new_context(variables)
        return self._guarded(lambda: "".join(render(context))).strip()

    def _guarded(self, render: Any) -> str:
        try:
            return render()
        except Exception as error:  # a template is a program: it can divide by zero, too
            raise AifError(f"{self._where}: {error}") from None
