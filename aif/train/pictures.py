"""Pictures of a reward model's report card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK, GREY = "#22577a", "#9aa5b1"
COLOURS = (INK, "#e07a5f", "#38a3a5", "#f2cc8f", GREY)


def calibration_picture(card: Mapping[str, Any], path: Path) -> Path:
    """Confidence against how often the label agrees, one line for each kind of label."""
    figure, axes = _axes("confidence in the higher score", "share of labels that agree")
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    for (name, told), colour in zip(
        (("ai", "AI labels"), ("human", "people")), COLOURS, strict=False
    ):
        if name in card:
            found = card[name]["calibration"]
            x, y, n = zip(
                *((b["confidence"], b["accuracy"], b["n"]) for b in found["bins"]), strict=True
            )
            axes.plot(x, y, color=colour, label=f"{told}, ECE {found['ece']:.3f}")
            axes.scatter(x, y, s=[12 + 200 * count / sum(n) for count in n], color=colour)
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(-0.02, 1.02)
    return _saved(figure, axes, path)


def scores_picture(scores: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """The spread of scores of each kind of text: 5 to 95 %, the middle half, the median."""
    figure, axes = _axes("score", "")
    for row, found in enumerate(reversed(scores.values())):
        low, first, middle, third, high = found["quantiles"]
        axes.plot([low, high], [row, row], color=GREY, linewidth=2, solid_capstyle="butt")
        axes.plot([first, third], [row, row], color=INK, linewidth=9, solid_capstyle="butt")
        axes.plot([middle], [row], color="white", marker="|", markersize=9)
    axes.set_yticks(
        range(len(scores)), [f"{name} ({scores[name]['n']})" for name in reversed(scores)]
    )
    axes.set_ylim(-0.7, len(scores) - 0.3)
    return _saved(figure, axes, path, legend=False)


def curve_picture(curve: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Held-out accuracy against the number of comparisons learned from."""
    figure, axes = _axes("comparisons learned from", "held-out accuracy")
    x, y = [point["pairs"] for point in curve], [point["accuracy"] for point in curve]
    low, high = zip(*(point["interval"] for point in curve), strict=True)
    axes.fill_between(x, low, high, color=INK, alpha=0.15, linewidth=0)
    axes.plot(x, y, color=INK, marker="o")
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{n:,}" for n in x])
    axes.minorticks_off()
    return _saved(figure, axes, path, legend=False)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eceff1", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _saved(figure: Any, axes: Any, path: Path, legend: bool = True) -> Path:
    if legend:
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
