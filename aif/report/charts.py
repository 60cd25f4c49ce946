"""The report's charts: plain data in, a `Chart` out, drawn by matplotlib.

They are small: their size is that of a page 400 pixels wide. The legend and the table of the
numbers are HTML, beside the picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from aif.data.visible import visible
from aif.report.svg import COLOUR, inline
from aif.stats.schema import Calibration, Estimate, Rate

WIDTH, HEIGHT = 340, 190  # of a chart, in CSS pixels
SERIES = ("c1", "c2", "c3", "c4", "c5")
MOST_POINTS, MOST_ROWS = 400, 40  # of a line, and of the table under it
FEW = 12  # points that are each drawn as a dot, too
Points = Sequence[tuple[float, float | None]]  # None: there is no number, and no line


@dataclass(frozen=True)
class Chart:
    """A picture of the page, with its legend and its numbers as a table."""

    name: str
    title: str
    svg: Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    legend: Sequence[tuple[str, str]] = ()  # (class of the swatch, what it stands for)
    note: str = ""


@dataclass(frozen=True)
class Dot:
    """A row of a forest plot; `low` and `high` may be unknown."""

    label: str
    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    mark: float | None = None  # a number to compare with, drawn as a tick

    @classmethod
    def of(cls, label: str, share: Estimate | Rate | None, mark: float | None = None) -> Dot | None:
        """A mean or a share as a row; None where there is none."""
        if isinstance(share, Rate):
            low, high = share.interval or (None, None)
            share = Estimate(mean=share.accuracy, low=low, high=high, n=share.n)
        if share is None or share.mean is None:
            return None
        return cls(label, share.mean, share.low, share.high, share.n, mark)


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's defaults, not the user's, so that a chart is always the same."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "text.parse_math": False,  # a $ in a name is a $
                "font.size": 11, "axes.labelsize": 11, "xtick.labelsize": 10.5,
                "ytick.labelsize": 10.5, "text.color": COLOUR["ink"],
                "axes.labelcolor": COLOUR["muted"], "axes.edgecolor": COLOUR["rule"],
                "xtick.labelcolor": COLOUR["muted"], "ytick.labelcolor": COLOUR["muted"],
                "xtick.major.size": 0, "ytick.major.size": 0, "axes.linewidth": 1,
                "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
                "axes.grid": True, "axes.grid.axis": "y", "grid.color": COLOUR["rule"],
                "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.xmargin": 0.03,
                "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
            }
        )  # fmt: skip
        yield


def _axes(width: float = WIDTH, height: float = HEIGHT, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots(rows, sharex=True)
    for one in axes if rows > 1 else [axes]:
        one.patch.set_visible(False)
    return figure, axes


def histogram(name: str, title: str, values: Sequence[float], null: int) -> Chart:
    """Probabilities in twenty bins from 0 to 1. Nulls are only counted."""
    bins = [0] * 20
    for value in values:
        bins[min(int(value * 20), 19)] += 1
    rows = [(f"{n / 20:.2f} to {(n + 1) / 20:.2f}", count) for n, count in enumerate(bins)]
    with _style():
        figure, axes = _axes(width=300, height=120)
        sure = [not 6 <= n < 14 for n in range(20)]
        colours = [COLOUR["c1"] if one else COLOUR["soft"] for one in sure]
        axes.bar([n / 20 + 0.025 for n in range(20)], bins, width=0.042, color=colours)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.3, 0.5, 0.7, 1], ["0", "0.3", "0.5", "0.7", "1"])
        axes.locator_params(axis="y", nbins=3, integer=True)
        desc = f"{sum(bins):,} labels, {null:,} null"
        svg = inline(figure, name, f"Distribution of p_first, {title}", desc)
    return Chart(name, title, svg, ("p_first", "labels"), rows, note=desc)


def lines(name: str, title: str, series: Mapping[str, Points]) -> Chart:
    """Lines over steps, with a gap where there is no number."""
    changes = []
    for label, points in series.items():
        (first, before), *_, (last, after) = [p for p in points if p[1] is not None] * 2
        changes.append(f"{label} from {before:.3g} at step {first:g} to {after:.3g} at {last:g}")
    with _style():
        figure, axes = _axes()
        for (_, points), role in zip(series.items(), SERIES, strict=False):
            x, y = zip(*thinned(points, MOST_POINTS), strict=True)
            drawn = [math.nan if value is None else value for value in y]
            marker = "o" if len(x) <= FEW else None
            axes.plot(x, drawn, color=COLOUR[role], marker=marker, markersize=4.5)
        axes.set_xlabel("step")
        axes.locator_params(axis="both", nbins=5)
        svg = inline(figure, name, title, "; ".join(changes) + ".")
    legend = list(zip(SERIES, series, strict=False)) if len(series) > 1 else ()
    longest = max(map(len, series.values()))
    note = f"{MOST_POINTS} of {longest:,} points drawn" if longest > MOST_POINTS else ""
    return Chart(name, title, svg, ("step", *series), _side_by_side(series), legend, note)


def thinned(points: Points, most: int) -> Points:
    """At most `most` of the points, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(n * (len(points) - 1) / (most - 1))] for n in range(most)]


def _side_by_side(series: Mapping[str, Points]) -> list[tuple[Any, ...]]:
    """A row for each x (but no more than MOST_ROWS) with every line's y."""
    of = {label: dict(points) for label, points in series.items()}
    steps = sorted({x for points in series.values() for x, _ in points})
    rows = thinned([(step, 0.0) for step in steps], MOST_ROWS)
    return [(f"{x:g}", *(of[label].get(x) for label in series)) for x, _ in rows]


def forest(
    name: str,
    title: str,
    rows: Iterable[Dot | None],
    x: str,
    line: float | None = 0.5,
    mark: str = "",
) -> Chart | None:
    """A dot with its interval in each row; None without dots. `line` is where nothing is won or
    lost, `mark` the name of the dots' marks."""
    dots = [dot for dot in rows if dot]
    if not dots:
        return None
    desc = "; ".join(f"{dot.label} {_estimate(dot)}" for dot in dots)
    with _style():
        figure, axes = _axes(height=46 + 26 * len(dots))
        if line is not None:
            axes.axvline(line, color=COLOUR["muted"], linewidth=1, linestyle=(0, (3, 3)))
        for row, dot in enumerate(reversed(dots)):
            if dot.low is not None and dot.high is not None:
                axes.plot([dot.low, dot.high], [row, row], color=COLOUR["c1"], linewidth=2.4)
            axes.plot([dot.mean], [row], "o", color=COLOUR["c1"], markersize=7)
            if dot.mark is not None:
                axes.plot([dot.mark] * 2, [row - 0.3, row + 0.3], color=COLOUR["c2"], linewidth=2)
        axes.set_yticks(range(len(dots)), [_short(dot.label) for dot in reversed(dots)])
        for label in axes.get_yticklabels():
            label.set_color(COLOUR["ink"])
        axes.set_ylim(-0.6, len(dots) - 0.4)
        axes.set_xlabel(x)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        svg = inline(figure, name, title, desc + ".")
    columns = ["what", x, "from", "to", "of"] + ([mark] if mark else [])
    table = [
        [dot.label, dot.mean, dot.low, dot.high, dot.n] + ([dot.mark] if mark else [])
        for dot in dots
    ]
    legend = [("c1", "with 95 % interval"), ("c2", mark)] if mark else []
    return Chart(name, title, svg, columns, table, legend)


def _estimate(dot: Dot) -> str:
    if dot.low is None or dot.high is None:
        return f"{dot.mean:.3g}"
    return f"{dot.mean:.3g} ({dot.low:.3g} to {dot.high:.3g})"


def _short(label: str, most: int = 22) -> str:
    """A label that fits beside a chart; the table has the whole label."""
    label = visible(label)
    return label if len(label) <= most else label[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def calibration(
    name: str,
    title: str,
    kinds: Iterable[tuple[str, Calibration | None]],
    axes_names: tuple[str, str] = ("confidence in the higher score", "share of labels that agree"),
) -> Chart | None:
    """Confidence and the share that agrees, of as many kinds of labels as there are colours,
    against the diagonal; None where no kind has bins."""
    bins = {
        label if calibration.ece is None else f"{label}, ECE {calibration.ece:.3f}": [
            (bin.confidence, bin.accuracy, bin.n) for bin in calibration.bins
        ]
        for label, calibration in kinds
        if calibration and calibration.bins
    }
    bins = dict(list(bins.items())[: len(SERIES)])
    if not bins:
        return None
    rows = [(kind, f"{x:.3f}", y, n) for kind, points in bins.items() for x, y, n in points]
    desc = "; ".join(f"{kind}: {x} confident, {y:.3f} agree" for kind, x, y, _ in rows)
    with _style():
        figure, axes = _axes(height=230)
        axes.plot([0.5, 1], [0.5, 1], color=COLOUR["muted"], linewidth=1, linestyle=(0, (3, 3)))
        for points, role in zip(bins.values(), SERIES, strict=False):
            x, y, n = zip(*points, strict=True)
            axes.plot(x, y, color=COLOUR[role])
            axes.scatter(x, y, s=[14 + 160 * count / sum(n) for count in n], color=COLOUR[role])
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(min(0.4, *(y for points in bins.values() for _, y, _ in points)) - 0.02, 1.02)
        axes.set_xlabel(axes_names[0])
        axes.set_ylabel(axes_names[1])
        svg = inline(figure, name, title, desc + ".")
    columns = ("labels", "confidence", "agree", "of")
    legend = list(zip(SERIES, bins, strict=False))
    return Chart(name, title, svg, columns, rows, legend, "Larger dots hold more pairs.")


def spreads(name: str, title: str, kinds: Mapping[str, Any]) -> Chart:
    """5 to 95 %, the middle half and the median of each kind's scores."""
    with _style():
        figure, axes = _axes(height=46 + 30 * len(kinds))
        for row, spread in enumerate(reversed(kinds.values())):
            low, first, middle, third, high = spread.quantiles
            axes.plot([low, high], [row, row], color=COLOUR["muted"], linewidth=1.6)
            axes.plot([first, third], [row, row], color=COLOUR["c1"], linewidth=9,
                      solid_capstyle="butt")  # fmt: skip
            axes.plot([middle] * 2, [row - 0.2, row + 0.2], color=COLOUR["paper"], linewidth=2.2)
        axes.set_yticks(range(len(kinds)), [_short(kind) for kind in reversed(kinds)])
        axes.set_ylim(-0.6, len(kinds) - 0.4)
        axes.set_xlabel("score")
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        rows = [(kind, one.n, one.mean, one.std, *one.quantiles) for kind, one in kinds.items()]
        desc = "; ".join(f"{kind}: median {one.quantiles[2]:.3g}" for kind, one in kinds.items())
        svg = inline(figure, name, title, desc + ".")
    columns = ("texts", "of", "mean", "std", "5 %", "25 %", "median", "75 %", "95 %")
    note = "Line: 5 to 95 %. Box: the middle half, with its median."
    return Chart(name, title, svg, columns, rows, note=note)


def curve(name: str, title: str, points: Sequence[Any]) -> Chart:
    """Accuracy with its interval against the number of comparisons learned from."""
    points = [point for point in points if point.accuracy is not None]
    x = [point.pairs for point in points]
    with _style():
        figure, axes = _axes()
        if all(point.interval for point in points):
            low, high = zip(*(point.interval for point in points), strict=True)
            axes.fill_between(x, low, high, color=COLOUR["c1"], alpha=0.15, linewidth=0)
        axes.plot(x, [point.accuracy for point in points], color=COLOUR["c1"], marker="o")
        axes.set_xlabel("comparisons learned from")
        axes.set_ylabel("held-out accuracy")
        axes.locator_params(axis="both", nbins=5)
        desc = "; ".join(f"{point.accuracy:.3f} of {point.pairs:,}" for point in points)
        svg = inline(figure, name, title, desc + ".")
    rows = [(f"{point.pairs:,}", point.accuracy, *(point.interval or ())) for point in points]
    return Chart(name, title, svg, ("comparisons", "accuracy", "from", "to"), rows)


@dataclass(frozen=True)
class Place:
    """A policy, or a step of its training: its KL, its score and its gold reward."""

    label: str
    kl: float
    proxy: float | None
    gold: float | None
    bound: bool = False  # its KL is an upper bound, as best-of-n's is


def overoptimisation(
    name: str, title: str, path: Sequence[Place], others: Sequence[Place]
) -> Chart:
    """Proxy and gold against KL (Gao, Schulman and Hilton 2022, 2210.10760): `path` are the
    evaluations during a training, joined in their order, `others` single policies."""
    panels = [
        (key, label, role)
        for key, label, role in (("proxy", "score (proxy)", "c1"), ("gold", "gold", "c2"))
        if any(getattr(place, key) is not None for place in (*path, *others))
    ]
    with _style():
        figure, axes = _axes(width=400, height=60 + 150 * len(panels), rows=len(panels))
        for one, (key, label, role) in zip(
            axes if len(panels) > 1 else [axes], panels, strict=True
        ):
            _walk(
                one, [(p.kl, y, p.label) for p in path if (y := getattr(p, key)) is not None], role
            )
            for place in others:
                if (y := getattr(place, key)) is not None:
                    one.plot([place.kl], [y], "D", markersize=7, color=COLOUR["c3"])
                    _tag(one, place.kl, y, _short(place.label), "ink", below=True)
            one.set_ylabel(label)
            one.margins(x=0.09, y=0.22)
            one.locator_params(axis="both", nbins=5)
        one.set_xlabel("KL from the reference, nats a response")
        desc = "; ".join(
            f"{p.label}: KL {p.kl:.3g}, score {_or_none(p.proxy)}, gold {_or_none(p.gold)}"
            for p in (*path, *others)
        )
        svg = inline(figure, name, title, desc + ".")
    rows = [
        (p.label, f"at most {p.kl:.3g}" if p.bound else p.kl, p.proxy, p.gold)
        for p in (*path, *others)
    ]
    legend = [
        (role, f"{key} by step") for key, _, role in panels
        if any(getattr(place, key) is not None for place in path)
    ]  # fmt: skip
    legend += [("c3", "policies of the evaluation")] if others else []
    return Chart(name, title, svg, ("step or policy", "KL", "proxy", "gold"), rows, legend)


def _or_none(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _walk(axes: Any, places: Sequence[tuple[float, float, str]], role: str) -> None:
    """A line through places, with the steps beside the places that have room."""
    if not places:
        return
    x, y, labels = zip(*places, strict=True)
    axes.plot(x, y, color=COLOUR[role], marker="o", markersize=5)
    reach = (max(x) - min(x)) or 1
    last = None
    for n, (here, label) in enumerate(zip(x, labels, strict=True)):
        ends = n in (0, len(x) - 1)
        if last is None or ends or abs(here - last) > 0.09 * reach:
            _tag(axes, here, y[n], label, "muted")
            last = here


def _tag(axes: Any, x: float, y: float, label: str, role: str, below: bool = False) -> None:
    """Write beside a point: policies below, so that they do not overlap the steps above."""
    axes.annotate(
        label, (x, y), xytext=(0, -16 if below else 7), textcoords="offset points",
        ha="center", fontsize=10, color=COLOUR[role],
    )  # fmt: skip
