"""Pictures of what was measured and one page with them, from the files of results alone.

Accuracy against speed (`pareto.py`; accuracies and their origin from the catalogue), the head's share of the whole
network (`head.py`), and what losses cost by the number of labels (`losses.py`). `results/*.png`, and
`results/page.html`, which needs no network.
"""
import argparse
import base64
import csv
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pareto import IMAGE_SIZE, published_accuracies
from run import RESULTS

from timm_miil import catalog

COLOURS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000', '#7f7f7f'  # of Okabe and Ito
MARKERS = 'osD^vPX*'
STYLE = '''
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1.5rem 0; } figcaption { font-size: .9rem; }
img { width: 100%; min-width: 36rem; background: #fff; border-radius: 4px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .6rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
'''
Row = dict[str, str]


@dataclass(frozen=True)
class Picture:
    """A picture, what it shows in words, and the figures it is made of."""

    name: str
    title: str
    caption: str
    figure: Figure
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    source: Row


@dataclass(frozen=True)
class Point:
    """A published network of ImageNet-1K: its speed here and its accuracy as published."""

    weights: str
    speed: float
    accuracy: float
    origin: str


def main() -> None:
    """Draw all that there are files for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--results', type=Path, default=RESULTS)
    folder = parser.parse_args().results
    pictures = [
        *(draw_speeds(path) for path in sorted(folder.glob('pareto-*.csv'))),
        *(draw_shares(path) for path in sorted(folder.glob('head-share-*.csv'))),
        *(draw_losses(path) for path in sorted(folder.glob('losses-*.csv')))]
    if not pictures:
        parser.error(f'there are no pareto-*.csv, head-share-*.csv or losses-*.csv in {folder}.')
    for picture in pictures:
        (folder / f'{picture.name}.png').write_bytes(as_png(picture.figure))
    has_gpu = any(folder.glob('pareto-nvidia-*.csv'))
    (folder / 'page.html').write_text(as_page(pictures, has_gpu=has_gpu), encoding='utf-8')


def read(path: Path, *columns: str) -> list[Row]:
    """Rows of a file of results that must have these columns and a row at least."""
    with path.open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    missing = [column for column in columns if not rows or column not in rows[0]]
    if missing:
        raise ValueError(f'{path.name} must have rows with {", ".join(missing)}; measure again.')
    return rows


# -- accuracy against speed ------------------------------------------------------------------------------------


def speed_points(rows: Iterable[Row]) -> list[Point]:
    """The published weights of each network that was measured."""
    accuracies = published_accuracies()
    return [
        Point(name, float(row['images_per_second']), accuracy, origin)
        for row in rows if row['status'] == 'ok' for name, accuracy, origin in accuracies.get(row['model'], ())]


def pareto(points: Sequence[Point]) -> list[Point]:
    """Points that no other is at least as fast and as accurate as, and better in one; the fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (-each.speed, -each.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def draw_speeds(path: Path) -> Picture:
    """Accuracy against speed, with the front."""
    rows = read(path, 'model', 'variant', 'precision', 'layout', 'mode', 'status', 'images_per_second', 'batch_size')
    points = sorted(speed_points(rows), key=lambda point: -point.speed)
    front = pareto(points)
    figure, axes = new_axes('images per second (log)', 'ImageNet-1K top-1, % (as published)')
    axes.set_xscale('log')
    axes.plot([p.speed for p in front], [p.accuracy for p in front], color=COLOURS[7], linestyle='--', zorder=1)
    families = list(dict.fromkeys(catalog.weight(point.weights).family for point in points))
    for index, family in enumerate(families):
        members = [point for point in points if catalog.weight(point.weights).family == family]
        axes.scatter(
            [p.speed for p in members], [p.accuracy for p in members], label=family, zorder=2,
            color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)],
            alpha=[1.0 if point in front else 0.45 for point in members])
    axes.legend(loc='lower left', fontsize=8, frameon=False)
    axes.margins(x=0.1, y=0.1)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_formatter('{x:g}')
    axes.tick_params(axis='x', which='minor', labelsize=7)
    name_points(axes, front)
    where, form = device(rows[0]), next((row for row in rows if row['status'] == 'ok'), rows[0])
    how = f'{" ".join(form[key] for key in ("variant", "precision", "layout", "mode"))}, batch {form["batch_size"]}'
    return Picture(
        path.stem, f'Accuracy against speed, {where}',
        f'Published networks at {IMAGE_SIZE} pixels, {how}, which took turns on {where}. The dashed line joins those '
        f'that no other is as fast and as accurate as; only they are named, the others are pale.', figure,
        ('weights', 'images/s', 'top-1', 'origin', 'on the front'),
        tuple((p.weights, f'{p.speed:.4g}', f'{p.accuracy:.1f}', p.origin, 'yes' if p in front else '')
              for p in points), rows[0])


def name_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write names beside points, to the side where there is room and none over another."""
    figure = axes.figure
    figure.draw_without_rendering()  # now places are known
    last = {True: -1e9, False: -1e9}
    for point in sorted(points, key=lambda each: each.accuracy):
        x, y = axes.transData.transform((point.speed, point.accuracy))
        is_slow = x < axes.transAxes.transform((0.5, 0))[0]
        last[is_slow] = max(y + 6, last[is_slow] + 15)
        axes.annotate(
            point.weights, (point.speed, point.accuracy), (5 if is_slow else -5, (last[is_slow] - y) * 72 / figure.dpi),
            textcoords='offset points', fontsize=8, horizontalalignment='left' if is_slow else 'right')


# -- heads and losses ------------------------------------------------------------------------------------------


def draw_shares(path: Path) -> Picture:
    """The head's time as a part of the network's."""
    rows = read(path, 'model', 'mode', 'dtype', 'num_classes', 'contestant', 'ratio')
    heads = [row for row in rows if row['contestant'] == 'head']
    names = [', '.join([row['model'], f'{row["num_classes"]} classes', row['mode'], row['dtype'], *(
        [row['timed']] if 'timed' in row else [])]) for row in heads]
    shares = [100 * float(row['ratio']) for row in heads]
    figure, axes = new_axes('time of the head, % of the whole network', '')
    axes.barh(names, shares, color=COLOURS[0])
    axes.invert_yaxis()
    axes.tick_params(axis='y', labelsize=8)
    for index, share in enumerate(shares):
        axes.annotate(f'{share:.1f}', (share, index), (3, -3), textcoords='offset points', fontsize=8)
    where = device(rows[0])
    return Picture(
        path.stem, f'What the ML-Decoder head takes of the whole network, {where}',
        f'The time of the head by that of the network with it, on {where}.', figure,
        ('network', 'head, % of the time'),
        tuple((name, f'{share:.1f}') for name, share in zip(names, shares)), rows[0])


def draw_losses(path: Path) -> Picture:
    """The cost of ASL and CSL by the number of labels."""
    rows = read(path, 'loss', 'dtype', 'batch_size', 'num_classes', 'contestant', 'ratio')
    kept = [row for row in rows if row['loss'] in ('asl', 'csl') and row.get('timed', 'queued') == 'queued' and row.get(
        'logits', 'N(-3, 2)') == 'N(-3, 2)']
    if not kept:
        raise ValueError(f'{path.name} must have rows of ASL or CSL; measure again.')
    curves: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in kept:
        size = int(row['batch_size']) * int(row['num_classes'])
        curves.setdefault((row['loss'], row['dtype'], row['contestant']), {})[size] = float(row['ratio'])
    losses = list(dict.fromkeys(loss for loss, _, _ in curves))
    names = list(dict.fromkeys(name for _, _, name in curves))
    figure = Figure(figsize=(8, 4 * len(losses)), layout='constrained')
    for axes, loss in zip(figure.subplots(len(losses), squeeze=False)[:, 0], losses):
        style(axes, 'labels of a batch, pictures x classes (log)', f'{loss.upper()}: time, of BCEWithLogits (log)')
        axes.set_xscale('log')
        axes.set_yscale('log')
        for (of_loss, dtype, name), curve in curves.items():
            if of_loss == loss:
                index = names.index(name) % len(COLOURS)
                axes.plot(
                    *zip(*sorted(curve.items())), color=COLOURS[index], marker=MARKERS[index], markersize=5,
                    label=name if dtype == 'float32' else None, linestyle='-' if dtype == 'float32' else ':')
        axes.yaxis.set_major_formatter('{x:g}')
        axes.legend(loc='upper left', bbox_to_anchor=(1, 1), fontsize=9, frameon=False)
    where = device(rows[0])
    return Picture(
        path.stem, f'What ASL and CSL cost by the number of labels, {where}',
        f'Loss and gradient on {where}, by the time of BCEWithLogits on the same logits; solid in float32, dotted in '
        f'bfloat16.', figure,
        ('loss', 'dtype', 'contestant', 'labels', 'of BCEWithLogits'),
        tuple((loss, dtype, name, f'{size:,}', f'{ratio:.2f}') for (loss, dtype, name), curve in curves.items()
              for size, ratio in sorted(curve.items())), rows[0])


# -- the page --------------------------------------------------------------------------------------------------


def new_axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """One diagram."""
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    style(axes, x_label, y_label)
    return figure, axes


def style(axes: Axes, x_label: str, y_label: str) -> None:
    """Faint lines and no box."""
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3, which='both', linewidth=0.5)
    axes.spines[['top', 'right']].set_visible(False)


def device(row: Row) -> str:
    """The card, or the processor, that a row was measured on."""
    return row.get('gpu') or f'{row.get("cpu", "a CPU")}, {row.get("threads", "?")} thread'


def as_png(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    target = io.BytesIO()
    figure.savefig(target, format='png', dpi=110, metadata={'Software': None})
    return target.getvalue()


def as_page(pictures: Sequence[Picture], *, has_gpu: bool) -> str:
    """One HTML page without anything from elsewhere."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>timm-miil: how fast</title><style>{STYLE}</style><h1>timm-miil: how fast</h1>']
    if not has_gpu:
        parts.append('<p>Throughput has not been measured on a GPU yet; heads and losses have.</p>')
    for picture in pictures:
        image = base64.b64encode(as_png(picture.figure)).decode()
        title, caption = html.escape(picture.title), html.escape(picture.caption)
        parts.append(
            f'<h2>{title}</h2><figure><div class="wide"><img alt="{title}: the table below has the figures." '
            f'src="data:image/png;base64,{image}"></div><figcaption>{caption}</figcaption></figure>'
            f'<details><summary>Figures</summary><div class="wide">{as_table(picture)}</div></details>'
            f'<p>{html.escape(environment_words(picture.source))}</p>')
    return '\n'.join([*parts, '</html>\n'])


def as_table(picture: Picture) -> str:
    """The figures of a picture."""
    head = ''.join(f'<th scope="col">{html.escape(column)}</th>' for column in picture.columns)
    body = ''.join(
        '<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in cells) + '</tr>' for cells in picture.cells)
    return f'<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def environment_words(row: Row) -> str:
    """Where, when and how a file was measured."""
    kept = [f'{key} {row[key]}' for key in ('gpu', 'driver', 'cpu', 'torch', 'timm', 'commit', 'date') if row.get(key)]
    return f'{", ".join(kept)}: {row.get("command", "")}'


if __name__ == '__main__':
    main()
