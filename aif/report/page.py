"""The page itself: one file that loads nothing and runs only its own script.

Its Content-Security-Policy allows the style and the script that are in it, by their sha256, and
nothing else: no attribute and no address. Texts reach the page through autoescape, or as JSON that
the script shows by textContent.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

FILES = ("page.css", "items.js", "page.js")
ABSENT = "\N{EN DASH}"  # for a number that is not known


def render(content: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The page as ASCII HTML; `data` is what its script reads."""
    files = resources.files("aif.report")
    style, *scripts = ((files / name).read_text("ascii") for name in FILES)
    script = "\n".join(scripts)
    environment = Environment(
        loader=PackageLoader("aif", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "count": count, "share": share, "cell": cell}
    page = environment.get_template("page.html.jinja").render(
        content,
        style=Markup(style),
        script=Markup(script),
        policy=policy(style, script),
        data=Markup(in_script(data)),
    )
    # Character references in the text; style, script and data are ASCII already.
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def policy(style: str, script: str) -> str:
    """The Content-Security-Policy that allows this style and this script, and nothing else."""
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    ]
    return (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        "base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


_IN_SCRIPT = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def in_script(data: Any) -> str:
    """JSON that can stand inside a <script>: ASCII without markup."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.translate(_IN_SCRIPT)


def figure(value: float | None) -> str:
    """A measured number with three significant digits."""
    if value is None:
        return ABSENT
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".removesuffix(".")
    return text.replace("-", "\N{MINUS SIGN}")


def count(value: int | None) -> str:
    """A number of things."""
    return ABSENT if value is None else f"{value:,}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    return ABSENT if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def cell(value: Any) -> str:
    """A cell of the table under a chart."""
    if isinstance(value, int):
        return count(value)
    return figure(value) if value is None or isinstance(value, float) else str(value)
