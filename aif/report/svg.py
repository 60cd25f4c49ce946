"""A matplotlib figure as SVG for a page: without a style of its own, without foreign names.

Colours are drawn as placeholders and become classes (`f-ink` fills, `s-ink` strokes), so that the
page's style sheet decides them, light and dark. matplotlib's style attributes become presentation
attributes, which a Content-Security-Policy without 'unsafe-inline' lets pass.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from typing import Any

from markupsafe import Markup

from aif.data.visible import visible

ROLES = ("ink", "muted", "rule", "paper", "soft", "c1", "c2", "c3", "c4", "c5")
COLOUR = {role: f"#0000{number:02x}" for number, role in enumerate(ROLES, 1)}
_ROLE = {colour: role for role, colour in COLOUR.items()}
_DROPPED = {"metadata", "style"}
_PAINT = {"fill": "f", "stroke": "s"}


def inline(figure: Any, name: str, title: str, desc: str) -> Markup:
    """The figure as an <svg role="img"> with a title and a description for screen readers.

    `name` begins each id in it, so no other figure may have it.
    """
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    _strip(root)
    _rename(root, name)
    for part in root.iter():
        _restyle(part)
    size = root.get("viewBox", "").split()[2:]
    root.attrib = {
        "viewBox": root.get("viewBox", ""), "width": size[0], "height": size[1], "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
    }  # fmt: skip
    for tag, text in (("desc", desc), ("title", title)):
        element = ET.Element(tag, {"id": f"{name}-{tag}"})
        element.text = visible(text)
        root.insert(0, element)
    return Markup(ET.tostring(root, encoding="unicode", short_empty_elements=False))


def _strip(part: ET.Element) -> None:
    """Drop namespaces (HTML knows the names in an <svg>) and everything that is not drawn."""
    part.tag = part.tag.rpartition("}")[2]
    part.attrib = {key.rpartition("}")[2]: value for key, value in part.attrib.items()}
    part.tail = None
    if part.tag != "text" and part.text and not part.text.strip():
        part.text = None
    for child in list(part):
        if child.tag.rpartition("}")[2] in _DROPPED:
            part.remove(child)
        else:
            _strip(child)


def _rename(root: ET.Element, name: str) -> None:
    """Keep only the ids that are referred to, under names that begin with `name`."""
    names: dict[str, str] = {}
    for part in root.iter():
        for key in ("href", "clip-path"):
            if key in part.attrib:
                old = part.attrib[key].removeprefix("url(").removesuffix(")").removeprefix("#")
                new = names.setdefault(old, f"{name}-{len(names)}")
                part.attrib[key] = f"#{new}" if key == "href" else f"url(#{new})"
    for part in root.iter():
        old = part.attrib.pop("id", None)
        if old in names:
            part.attrib["id"] = names[old]


def _restyle(part: ET.Element) -> None:
    classes = []
    for declaration in filter(None, part.attrib.pop("style", "").split(";")):
        key, _, value = (piece.strip() for piece in declaration.partition(":"))
        if key in _PAINT and value.startswith("#"):
            classes.append(f"{_PAINT[key]}-{_ROLE[value]}")  # KeyError: a colour of no role
        elif key != "font-family":
            part.attrib[key] = value
    if classes:
        part.attrib["class"] = " ".join(classes)
    if "d" in part.attrib:
        part.attrib["d"] = " ".join(part.attrib["d"].split())
    if part.attrib.get("transform", "").startswith("rotate(-0 "):
        del part.attrib["transform"]
