"""Plots as SVG that stands in a page: matplotlib draws them, the page's style gives their colours.

Text, axes and lines are drawn in colours that mean something to `_in_page` alone, which puts the
page's own in their place, so that one plot serves a light, a dark and a printed page.
"""

import hashlib
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from qmoe.errors import ConfigError

INK = "#0a0b0c"
LINES = ("#0d0e01", "#0d0e02", "#0d0e03", "#0d0e04")
WIDTH = 3.9  # inches, in which text of 8 points is readable on a telephone
RC = {
    "font.size": 8, "font.family": "sans-serif", "svg.fonttype": "none", "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
}  # fmt: skip


def check_can_plot() -> None:
    """Raises ConfigError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "report: its plots need matplotlib, which is not installed; run "
            "pip install 'qmoe[report]'"
        ) from error


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    alt: str,
    legend: str,
    limits: tuple[float, float] | None = None,
) -> str:
    """Values [layers, experts] as colours; NaN is left empty. rows: names of the layers. alt: what
    the plot shows, for those who cannot see it. limits: of two colours that part at 0; without it
    one scale goes from 0 to the largest value."""
    height = min(4.5, 1.3 + 0.12 * len(rows))
    with _figure(height) as (figure, axes):
        low, high = limits or (0.0, float(np.nanmax(values, initial=0)))
        image = axes.imshow(
            values, aspect="auto", cmap="RdBu_r" if limits else "viridis",
            interpolation="none", vmin=low, vmax=high or 1.0,
        )  # fmt: skip
        _name_rows(axes, rows)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.set_label(legend)
        bar.outline.set_visible(False)
        return _in_page(figure, alt)


def lines(
    series: Mapping[str, Sequence[float | None]], rows: Sequence[str], alt: str, unit: str
) -> str:
    """One line per name over the layers; None is a gap."""
    marks = ("o", "s", "^", "D")
    with _figure(2.3) as (figure, axes):
        for (name, values), colour, mark in zip(series.items(), LINES, marks, strict=False):
            given = [np.nan if v is None else v for v in values]
            axes.plot(given, color=colour, marker=mark, markersize=3, linewidth=1.4, label=name)
        every = max(1, -(-len(rows) // 12))
        axes.set_xticks(range(0, len(rows), every), rows[::every])
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)
        axes.grid(axis="y", alpha=0.25, color=INK, linewidth=0.4)
        if len(series) > 1:
            axes.legend(frameon=False, loc="best", fontsize=8)
        return _in_page(figure, alt)


def ranked(values: Sequence[float], least: int, alt: str) -> str:
    """Tokens of all experts, the rarest first, on a scale of powers of ten, beside the number under
    which an expert borrows."""
    with _figure(2.3) as (figure, axes):
        axes.plot(np.maximum(np.sort(values), 0.5), color=LINES[0], linewidth=1.6)
        axes.axhline(max(least, 0.5), color=LINES[1], linewidth=1.2, linestyle="--")
        axes.annotate(f"{least} tokens", (len(values) - 1, max(least, 0.5)), (0, 3), ha="right",
                      color=LINES[1], textcoords="offset points")  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel("experts of all layers, the rarest first")
        axes.set_ylabel("calibration tokens")
        return _in_page(figure, alt)


def curve(
    line: Sequence[tuple[float, float]], points: Mapping[str, tuple[float, float]], alt: str
) -> str:
    """KL by bits on average: a predicted line, and measured points by name, on a scale of powers of
    ten, from which values of 0 are left out."""
    with _figure(2.6) as (figure, axes):
        shown = [(x, y) for x, y in line if y > 0]
        axes.plot(*zip(*shown, strict=True), color=LINES[0], linewidth=1.4, label="predicted")
        for (name, at), colour, mark in zip(points.items(), LINES[1:], "osD", strict=False):
            axes.plot(*at, mark, color=colour, markersize=5, label=f"{name}, measured")
        axes.set_yscale("log")
        axes.set_xlabel("bits of a quantized weight on average")
        axes.set_ylabel("KL, nats per token")
        axes.grid(axis="y", alpha=0.25, color=INK, linewidth=0.4)
        axes.legend(frameon=False, loc="best", fontsize=8)
        return _in_page(figure, alt)


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, Any]]:
    """A figure with one pair of axes, in the settings above."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure((WIDTH, height), layout="constrained")
        axes = figure.subplots()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        yield figure, axes


def _name_rows(axes: Any, rows: Sequence[str]) -> None:
    every = max(1, -(-len(rows) // 16))
    axes.set_yticks(range(0, len(rows), every), rows[::every])


def _in_page(figure: Any, alt: str) -> str:
    """The figure as an SVG element in the colours of the page, without ids but those it refers to
    itself, whose names follow from what is drawn."""
    import matplotlib

    with io.StringIO() as out, matplotlib.rc_context({"svg.hashsalt": alt}):
        figure.savefig(out, format="svg", metadata={"Date": None})
        svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    prefix = f"p{hashlib.sha256(alt.encode()).hexdigest()[:8]}-"
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}", svg)
    for i, colour in enumerate(LINES, 1):
        svg = svg.replace(colour, f"var(--line-{i})")
    svg = svg.replace(INK, "currentColor")
    head, _, rest = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(alt)}">{rest}'
