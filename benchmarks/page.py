"""Pictures of what was measured and one page with them, from the files of results alone.

Accuracy against speed (accuracies and their origin from the catalogue), the head's share of the whole network, and what
losses cost by the number of labels. `results/*.png`, and `results/page.html`, which needs no network.
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
from run import RESULTS

from timm_miil import catalog

COLOURS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000', '#7f7f7f'  # of Okabe and Ito
MARKERS = 'osD^vPX*'
STYLE = '''
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1.5rem 0; } figcaption { font-size: .9rem; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
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
    form: str
    origin: str


def main() -> None:
    """Draw all that there are files for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--results', type=Path, default=RESULTS)
    folder = parser.parse_args().results
    pictures = [
        *(draw_speeds(path) for path in sorted(folder.glob('throughput-*.csv'))),
        *(draw_shares(path) for path in sorted(folder.glob('head-share-*.csv'))),
        *(draw_losses(path) for path in sorted(folder.glob('losses-*.csv')))]
    if not pictures:
        parser.error(f'there are no throughput-*.csv, head-share-*.csv or losses-*.csv in {folder}.')
    for picture in pictures:
        (folder / f'{picture.name}.png').write_bytes(as_png(picture.figure))
    has_gpu = any(folder.glob('throughput-nvidia-*.csv'))
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


def published_accuracies() -> dict[str, list[tuple[str, float, str]]]:
    """Architecture -> (name of the weights, top-1 on ImageNet-1K at 224 pixels, origin) of the catalogue."""
    found: dict[str, list[tuple[str, float, str]]] = {}
    for name in catalog.weights():
        weight = catalog.weight(name)
        metric = next((each for each in weight.metrics if each.name == 'top1' and each.setting is None), None)
        if metric and weight.dataset == 'imagenet-1k' and weight.input_size[-2:] == (224, 224):
            found.setdefault(name.split('.')[0], []).append((name, metric.value, metric.origin))
    return found


def speed_points(rows: Iterable[Row]) -> list[Point]:
    """The fastest form of each network that has a published accuracy."""
    fastest: dict[str, Row] = {}
    for row in rows:
        if row['phase'] == 'inference' and row['status'] == 'ok' and row['image_size'] == '224':
            best = fastest.setdefault(row['model'], row)
            if float(row['images_per_second']) > float(best['images_per_second']):
                fastest[row['model']] = row
    accuracies = published_accuracies()
    return [
        Point(name, float(row['images_per_second']), accuracy, ' '.join(
            row[key] for key in ('variant', 'precision', 'layout', 'mode')) + f', batch {row["batch_size"]}', origin)
        for model, row in fastest.items() for name, accuracy, origin in accuracies.get(model, ())]


def pareto(points: Sequence[Point]) -> list[Point]:
    """Points that no other is at least as fast and as accurate as, and better in one; the fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (-each.speed, -each.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def draw_speeds(path: Path) -> Picture:
    """Accuracy against speed, with the front."""
    rows = read(
        path, 'phase', 'model', 'variant', 'precision', 'layout', 'mode', 'status', 'images_per_second', 'image_size',
        'batch_size')
    points = sorted(speed_points(rows), key=lambda point: -point.speed)
    figure, axes = new_axes('images per second (log)', 'ImageNet-1K top-1, % (as published)')
    axes.set_xscale('log')
    front = pareto(points)
    axes.plot([p.speed for p in front], [p.accuracy for p in front], color=COLOURS[7], linestyle='--', zorder=1)
    for point in points:
        on_front = point in front
        axes.scatter(point.speed, point.accuracy, color=COLOURS[0 if on_front else 7], zorder=2)
        if on_front:
            is_slow = point.speed ** 2 < points[0].speed * points[-1].speed  # to the side where there is room
            axes.annotate(
                point.weights, (point.speed, point.accuracy), (5 if is_slow else -5, 5), textcoords='offset points',
                fontsize=7, horizontalalignment='left' if is_slow else 'right')
    axes.margins(x=0.1, y=0.1)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_formatter('{x:g}')
    axes.tick_params(axis='x', which='minor', labelsize=6)
    where = device(rows[0])
    return Picture(
        path.stem.replace('throughput', 'pareto'), f'Accuracy against speed, {where}',
        f'Published networks at 224 pixels in the fastest form that was measured on {where}. The dashed line joins '
        f'those that no other is as fast and as accurate as; only they are named. Networks were measured one after '
        f'another: small differences of speed may be the load of the machine.', figure,
        ('weights', 'images/s', 'top-1', 'origin', 'form', 'on the front'),
        tuple((p.weights, f'{p.speed:.4g}', f'{p.accuracy:.1f}', p.origin, p.form, 'yes' if p in front else '')
              for p in points), rows[0])


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
    axes.tick_params(axis='y', labelsize=7)
    for index, share in enumerate(shares):
        axes.annotate(f'{share:.1f}', (share, index), (3, -3), textcoords='offset points', fontsize=7)
    where = device(rows[0])
    return Picture(
        path.stem, f'What the ML-Decoder head takes of the whole network, {where}',
        f'The time of the head by that of the network with it, on {where}.', figure,
        ('network', 'head, % of the time'),
        tuple((name, f'{share:.1f}') for name, share in zip(names, shares)), rows[0])


def draw_losses(path: Path) -> Picture:
    """The cost of ASL by the number of labels."""
    rows = read(path, 'loss', 'dtype', 'batch_size', 'num_classes', 'contestant', 'ratio')
    kept = [row for row in rows if row['loss'] == 'asl' and row['dtype'] == 'float32' and row.get(
        'timed', 'queued') == 'queued' and row.get('logits', 'N(-3, 2)') == 'N(-3, 2)']
    if not kept:
        raise ValueError(f'{path.name} must have rows of ASL in float32; measure again.')
    curves: dict[str, dict[int, float]] = {}
    for row in kept:
        size = int(row['batch_size']) * int(row['num_classes'])
        curves.setdefault(row['contestant'], {})[size] = float(row['ratio'])
    figure, axes = new_axes('labels of a batch, pictures x classes (log)', 'time, of BCEWithLogits (log)')
    axes.set_xscale('log')
    axes.set_yscale('log')
    for index, (name, curve) in enumerate(curves.items()):
        axes.plot(*zip(*sorted(curve.items())), label=name, color=COLOURS[index % 8], marker=MARKERS[index % 8])
    axes.legend(loc='upper left', bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    where = device(rows[0])
    return Picture(
        path.stem, f'What ASL costs by the number of labels, {where}',
        f'Loss and gradient in float32 on {where}, by the time of BCEWithLogits on the same logits.', figure,
        ('loss', 'labels', 'of BCEWithLogits'),
        tuple((name, f'{size:,}', f'{ratio:.2f}') for name, curve in curves.items()
              for size, ratio in sorted(curve.items())), rows[0])


# -- the page --------------------------------------------------------------------------------------------------


def new_axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """One diagram with faint lines and no box."""
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3, which='both', linewidth=0.5)
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes


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
            f'<h2>{title}</h2><figure><img alt="{title}: the table below has the figures." '
            f'src="data:image/png;base64,{image}"><figcaption>{caption}</figcaption></figure>'
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
