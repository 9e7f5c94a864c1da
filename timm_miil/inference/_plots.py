"""Plots of a report, drawn by matplotlib as SVG that stands inside a page.

Colours are the page's own: what is drawn in one of `_COLOURS` comes out as a CSS variable, so that a plot is readable
on light pages and on dark ones. Names of labels never pass through matplotlib, which would read formulas in them and
measure letters that its font lacks: it sets a placeholder, and the page's own text takes its place.
"""
import dataclasses
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from timm_miil._extras import require
from timm_miil.inference._html import escape
from timm_miil.inference._report_numbers import ThresholdCurve
from timm_miil.metrics import ReliabilityCurve

__all__ = [
    'NUM_SERIES', 'Line', 'plot_bars', 'plot_heatmap', 'plot_lines', 'plot_reliability', 'plot_scatter',
    'plot_thresholds', 'shorten',
]

NUM_SERIES = 5
# Plots stand two or three side by side.
WIDTH_IN, NARROW_IN, HEIGHT_IN = 5.2, 3.7, 3.1
BAR_IN, CELL_IN = 0.19, 0.31
# How much larger or smaller than drawn a plot is shown, in pixels of the page over points.
MAX_ZOOM, MIN_ZOOM = 1.55, 0.9
NAME_CHARS, CELL_NAME_CHARS = 19, 16

_INK, _MUTED, _LINE = '#000003', '#000001', '#000002'     # not black, which SVG leaves unsaid
_SERIES = tuple(f'#0000a{number}' for number in range(1, NUM_SERIES + 1))
_COLOURS = {_INK: '--ink', _MUTED: '--muted', _LINE: '--line'} | {
    colour: f'--s{number}' for number, colour in enumerate(_SERIES, start=1)}
_STYLE = {
    'svg.fonttype': 'none', 'svg.hashsalt': 'timm-miil', 'font.size': 8.5, 'lines.linewidth': 1.6,
    'figure.facecolor': 'none', 'axes.facecolor': 'none', 'axes.edgecolor': _LINE, 'axes.labelcolor': _MUTED,
    'axes.grid': True, 'axes.axisbelow': True, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.spines.left': False, 'grid.color': _LINE, 'grid.linewidth': 0.6, 'text.color': _INK,
    'xtick.color': _LINE, 'ytick.color': _LINE, 'xtick.labelcolor': _MUTED, 'ytick.labelcolor': _MUTED,
    'ytick.major.size': 0.0, 'xtick.major.size': 3.0,
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a plot: its points, its name in the legend, and whether it is broken or has dots."""

    x: Sequence[float]
    y: Sequence[float]
    name: str
    is_dashed: bool = False
    has_dots: bool = False


def plot_lines(
        lines: Sequence[Line], *, x_label: str, y_label: str = '', is_unit: bool = False) -> str:
    """Lines in the colours 1, 2, ...; the legend is the page's.

    Both axes of a unit plot go from 0 to 1; else x is counted and the plot narrow.
    """
    def draw(figure: Any) -> None:
        axes = _axes(figure)
        for line, colour in zip(lines, _SERIES):
            axes.plot(
                line.x, line.y, color=colour, linestyle=(0, (4, 2)) if line.is_dashed else '-',
                marker='o' if line.has_dots else None, markersize=3)
        axes.set(xlabel=x_label, ylabel=y_label)
        if is_unit:
            axes.set(xlim=(0, 1.01), ylim=(0, 1.02))
        else:
            axes.margins(x=0.03)
            axes.xaxis.set_major_locator(require('matplotlib.ticker').MaxNLocator(integer=True))

    width = WIDTH_IN if is_unit else NARROW_IN
    return _svg((width, HEIGHT_IN), draw, ' over '.join(filter(None, (y_label, x_label))))


def plot_thresholds(curve: ThresholdCurve, chosen: Sequence[float] | None) -> str:
    """Precision, recall and F1 over one threshold for all, colours 1 to 3, and mean F1, colour 1 broken.

    Above them stands where the chosen thresholds of the classes are.
    """
    def draw(figure: Any) -> None:
        axes = _axes(figure, 0.0, 1.0 if chosen is None else 0.82)
        precision, recall, f1 = curve.overall.tolist()
        x = curve.thresholds.tolist()
        axes.plot(x, precision, color=_SERIES[1])
        axes.plot(x, recall, color=_SERIES[2])
        axes.plot(x, curve.mean_f1.tolist(), color=_SERIES[0], linestyle=(0, (4, 2)))
        axes.plot(x, f1, color=_SERIES[0])
        axes.plot([curve.best], [max(f1)], color=_SERIES[0], marker='o', markersize=5)
        axes.set(xlabel='threshold', xlim=(0, 1), ylim=(0, 1.02))
        if chosen is not None:
            above = _axes(figure, 0.86, 1.0, sharex=axes)
            above.hist(list(chosen), bins=[step / 50 for step in range(51)], color=_SERIES[3])
            above.set_axis_off()

    return _svg((WIDTH_IN, HEIGHT_IN * 1.15), draw, 'precision, recall and F1 over the threshold')


def plot_bars(names: Sequence[str], values: Sequence[float], notes: Sequence[str]) -> str:
    """A horizontal bar a name, of a value in [0, 1], with a note to its right, from top to bottom."""
    height = BAR_IN * len(names) + 0.35

    def draw(figure: Any) -> None:
        axes = figure.add_axes((0.38, 0.25 / height, 0.37, 1 - 0.35 / height))
        places = range(len(names))
        axes.barh(places, [1.0] * len(names), height=0.62, color=_LINE, alpha=0.45)
        axes.barh(places, values, height=0.62, color=_SERIES[0])
        axes.set_yticks(places, [_placeholder(place) for place in places])
        axes.tick_params(axis='y', labelcolor=_INK)
        axes.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), xticks=(0, 0.5, 1))
        axes.grid(axis='y', visible=False)
        axes.spines.bottom.set_visible(False)
        for place, note in zip(places, notes):
            axes.text(1.03, place, note, va='center_baseline', color=_MUTED)

    return _svg((NARROW_IN, height), draw, 'average precision of labels', [shorten(name, NAME_CHARS) for name in names])


def plot_scatter(x: Sequence[float], y: Sequence[float], *, x_label: str, y_label: str) -> str:
    """Points over a logarithmic axis, colour 1."""
    def draw(figure: Any) -> None:
        axes = _axes(figure)
        axes.scatter(x, y, s=14, color=_SERIES[0], alpha=0.55, linewidths=0)
        axes.set(xlabel=x_label, ylabel=y_label, xscale='log', ylim=(-0.02, 1.02))
        axes.grid(which='minor', visible=False)
        low, high = min(x) / 1.3, max(x) * 1.3
        axes.set_xlim(low, high)
        ticks = [factor * 10 ** power for power in range(10) for factor in (1, 2, 5)]
        shown = [tick for tick in ticks if low <= tick <= high] or [min(x)]
        shown = shown[::-(-len(shown) // 6)]
        axes.set_xticks(shown, [f'{tick:,.0f}' for tick in shown])
        axes.minorticks_off()

    return _svg((NARROW_IN, HEIGHT_IN), draw, f'{y_label} over {x_label}')


def plot_reliability(curve: ReliabilityCurve) -> str:
    """Frequency over confidence, colour 1, the diagonal of a calibrated model, and the number of labels below."""
    def draw(figure: Any) -> None:
        axes = _axes(figure, 0.3, 1.0)
        below = _axes(figure, 0.0, 0.24, sharex=axes)
        is_filled = curve.count > 0
        confidence, frequency = curve.confidence[is_filled].tolist(), curve.frequency[is_filled].tolist()
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.plot(confidence, frequency, color=_SERIES[0], marker='o', markersize=4)
        axes.set(ylabel='frequency', xlim=(0, 1), ylim=(0, 1.02))
        axes.tick_params(axis='x', labelbottom=False)
        width = 1.0 / len(curve.count)
        centers = [(number + 0.5) * width for number in range(len(curve.count))]
        below.bar(centers, [max(count, 0.5) for count in curve.count.tolist()], width * 0.8, color=_SERIES[3])
        below.set(xlabel='confidence', ylabel='labels', yscale='log', ylim=(0.6, max(10, int(curve.count.max())) * 1.5))
        below.minorticks_off()

    return _svg((WIDTH_IN, HEIGHT_IN * 1.15), draw, 'frequency over confidence')


def plot_heatmap(rows: Sequence[str], columns: Sequence[str], values: Tensor) -> str:
    """Values in [0, 1] as cells (R, K), the stronger the darker, with two digits; NaN stays empty."""
    left, top, right = 1.25, 0.95, 0.85     # the names stand above at an angle
    width, height = left + CELL_IN * len(columns) + right, top + CELL_IN * len(rows) + 0.1

    def draw(figure: Any) -> None:
        axes = figure.add_axes((left / width, 0.1 / height, 1 - (left + right) / width, 1 - (top + 0.1) / height))
        rectangle = require('matplotlib.patches').Rectangle
        for row, cells in enumerate(values.tolist()):
            for column, value in enumerate(cells):
                if value == value:
                    axes.add_patch(rectangle(
                        (column - 0.47, row - 0.47), 0.94, 0.94, color=_SERIES[1], alpha=0.04 + 0.76 * value,
                        linewidth=0))
                    axes.text(
                        column, row, f'{value:.2f}'.lstrip('0') if value < 0.995 else '1', ha='center',
                        va='center_baseline', fontsize=7.5)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.xaxis.tick_top()
        axes.set_xticks(
            range(len(columns)), [_placeholder(len(rows) + number) for number in range(len(columns))], rotation=40,
            ha='left', rotation_mode='anchor')
        axes.set_yticks(range(len(rows)), [_placeholder(number) for number in range(len(rows))])
        axes.tick_params(labelcolor=_INK, length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    names = [shorten(name, CELL_NAME_CHARS) for name in (*rows, *columns)]
    return _svg((width, height), draw, 'mean confidence of absent labels', names)


def shorten(name: str, length: int) -> str:
    """The name on one line, its end cut off where it is longer."""
    name = ' '.join(name.split())
    return name if len(name) <= length else f'{name[:length - 1].rstrip()}\u2026'


def _axes(figure: Any, low: float = 0.0, high: float = 1.0, **options: Any) -> Any:
    """Axes that leave room for the words left of and below them, or a part of their height."""
    width, height = figure.get_size_inches()
    left, bottom = 0.58 / width, 0.44 / height
    room = 0.99 - bottom
    return figure.add_axes((left, bottom + low * room, 0.98 - left, (high - low) * room), **options)


def _placeholder(number: int) -> str:
    return f'@{number}@'


def _svg(size: tuple[float, float], draw: Callable[[Any], None], title: str, texts: Sequence[str] = ()) -> str:
    """Draw a figure of a size in inches as an element of a page."""
    matplotlib = require('matplotlib')
    file = io.StringIO()
    # A person's own settings of matplotlib are neither used nor lost.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = require('matplotlib.figure').Figure(figsize=size)
        draw(figure)
        figure.savefig(file, format='svg', metadata={'Date': None})
    return _inline(file.getvalue(), size, title, texts)


def _inline(svg: str, size: tuple[float, float], title: str, texts: Sequence[str]) -> str:
    """What matplotlib writes as a file, made fit for a page that holds several."""
    body = svg[svg.index('>', svg.index('<svg')) + 1:]
    body = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->', '', body, flags=re.DOTALL)
    body = re.sub(r'font-family: [^;"]*;? ?', '', body)
    used = set(re.findall(r'(?:url\(|href=")#(\w+)', body))
    body = re.sub(r' id="(\w[\w.]*)"', lambda match: match[0] if match[1] in used else '', body)
    # Another plot of the page has the same names.
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    body = re.sub(r'( id="|url\(#|xlink:href="#)(\w+)', rf'\g<1>p{own}\2', body).replace('xlink:href', 'href')
    body = re.sub(r'#0000[0-9a-f]{2}', lambda match: f'var({_COLOURS[match[0]]})', body)
    body = re.sub(r'@(\d+)@', lambda match: escape(texts[int(match[1])]), body)
    body = re.sub(r'\s*\n\s*', '\n', body)
    width, height = (72.0 * side for side in size)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'style="max-width:{MAX_ZOOM * width:.0f}px;min-width:{MIN_ZOOM * width:.0f}px">')
    return f'{head}<title>{escape(title)}</title>{body}'
