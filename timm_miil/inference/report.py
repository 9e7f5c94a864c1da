"""A report of a model on labelled pictures: one HTML page with numbers, plots and its worst mistakes."""
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from timm_miil._atomic import write_file
from timm_miil._checks import check_choice, check_class_settings, check_labels, check_ndim, check_same_shape
from timm_miil._errors import ImageError
from timm_miil.data import LabelledImages
from timm_miil.inference._html import card, definitions, escape, figure, page, picture, section, table, tiles
from timm_miil.inference._measure import ranked
from timm_miil.inference._plots import (
    NUM_SERIES, Line, plot_bars, plot_heatmap, plot_lines, plot_reliability, plot_scatter, plot_thresholds, shorten)
from timm_miil.inference._report_numbers import (
    Pair, Study, WrongLabel, WrongPicture, confusions, precision_recall, study, worst_pictures)
from timm_miil.inference.load import ACTIVATIONS, Activation, check_label_names

__all__ = ['write_report']

# Bars of a column of the plot of classes; of more than twice as many classes the best and the worst are shown.
BARS = 20
SCATTER_POINTS = 1500
# A class of fewer pictures has a curve of a few steps.
MIN_CURVE_SUPPORT = 5
PAIRS, HEATMAP_PAIRS, HEATMAP_LABELS = 12, 24, 12
PICTURES = 24
NAME_CHARS = 40
DEFAULT_THRESHOLD = 0.5
# Columns of a training run that are drawn: by words in their names, one panel each.
PANELS = (('Loss', ('loss',)), ('Metrics', ('map', 'top1', 'top5', 'f1', 'acc', 'metric')), ('Learning rate', ('lr',)))


def write_report(
        path: str | os.PathLike[str],
        *,
        logits: Tensor,
        targets: Tensor,
        label_names: Sequence[str],
        title: str,
        facts: Mapping[str, object],
        epochs: Sequence[Mapping[str, object]] = (),
        source: LabelledImages | None = None,
        thresholds: Sequence[float] | None = None,
        temperatures: Sequence[float] | None = None,
        activation: Activation = 'sigmoid',
) -> None:
    """Write what a model does on labelled pictures as one HTML file that needs nothing else.

    It shows the course of the training, average precision of the classes, precision over recall of the best and worst,
    precision and recall over the threshold, labels that are taken for one another, calibration, the pictures with the
    worst mistakes, and a table of all classes. Unknown labels are left out everywhere. The file takes its name when it
    is complete; equal arguments give equal bytes. Needs `pip install "timm-miil[train]"`. While plots are drawn,
    matplotlib's settings are replaced in the whole process.

    Args:
        path: The file; one of that name is replaced.
        logits: Raw scores of N pictures and C classes, finite, shape (N, C).
        targets: 1 for present, 0 for absent, -1 for unknown, shape (N, C).
        label_names: One name a class, in the order of the columns.
        title: What is reported, for people.
        facts: What else they want to know, such as the name of the model and of the data.
        epochs: Numbers of each epoch by name, such as 'epoch', 'lr', 'train_loss' and 'val_map'; none leaves out the
            curves. Values that are no numbers are passed over.
        source: The N pictures, from which those with the worst mistakes are shown; None leaves them out.
        thresholds: Least confidence of each class, in [0, 1]; None for 0.5.
        temperatures: What the logits of each class are divided by before the sigmoid, in [0.01, 100]; None for 1.
        activation: 'sigmoid' for independent classes, 'softmax' for classes that exclude one another.

    Raises:
        ImportError: If matplotlib is not installed, with the pip line.
        OSError: If the file cannot be written.
        TypeError: If a threshold or temperature is no number, or label_names is no list of strings.
        ValueError: If shapes do not fit, there is no picture, a score is not finite, a target is another, a threshold
            or temperature is out of range, or there are temperatures with 'softmax'.
    """
    logits, targets = logits.detach().cpu(), targets.detach().cpu()
    _check(logits, targets, label_names, source, thresholds, temperatures, activation)
    chosen = [DEFAULT_THRESHOLD] * len(label_names) if thresholds is None else thresholds
    found = study(logits, targets, activation=activation, thresholds=chosen, temperatures=temperatures)
    writer = _Writer(logits, targets, tuple(label_names), chosen, temperatures, activation, found)
    parts = [
        definitions(facts), writer.headline(), _training(epochs), writer.classes(), writer.precision_over_recall(),
        writer.decisions(thresholds), writer.confused(), writer.calibration(),
        '' if source is None else writer.mistakes(source), writer.all_classes()]
    write_file(path, page(title, '\n'.join(filter(None, parts))))


class _Writer:
    """The parts of the page that show scores."""

    def __init__(
            self, logits: Tensor, targets: Tensor, names: tuple[str, ...], thresholds: Sequence[float],
            temperatures: Sequence[float] | None, activation: Activation, found: Study) -> None:
        self.logits, self.targets, self.names = logits, targets, names
        self.thresholds, self.temperatures, self.activation, self.found = thresholds, temperatures, activation, found
        self.precision = found.measures.average_precision.per_class
        self.support = found.measures.average_precision.support
        # Best first; equal ones by their pictures. Classes without an AP stand apart.
        keys = list(zip(self.precision.nan_to_num(-1.0).tolist(), self.support.tolist()))
        order = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
        self.order = [column for column in order if not math.isnan(self.precision[column])]
        self.without = [column for column in order if math.isnan(self.precision[column])]

    def headline(self) -> str:
        measures = self.found.measures
        ranking, f1 = measures.average_precision, measures.f1
        numbers = [('mAP', _percent(ranking.mean))]
        if self.without:
            numbers.append(('mAP, classes without one as 0', _percent(ranking.mean_with_zeros)))
        if measures.top1 is not None:
            numbers.append(('top-1', _percent(measures.top1)))
        if measures.top5 is not None:
            numbers.append(('top-5', _percent(measures.top5)))
        numbers += [
            ('F1 of all labels (OF1)', _percent(f1.overall_f1)), ('mean F1 of classes (CF1)', _percent(f1.class_f1)),
            ('calibration error', _percent(measures.calibration_error)), ('pictures', f'{len(self.logits):,}'),
            ('labels', f'{len(self.names):,}')]
        if unknown := int((self.targets == -1).sum()):
            numbers.append(('of all labels unknown', _percent(unknown / self.targets.numel())))
        return tiles(numbers)

    def classes(self) -> str:
        if not self.order:
            return ''
        if len(self.order) > 2 * BARS:
            groups = {f'The {BARS} best': self.order[:BARS], f'The {BARS} worst': self.order[-BARS:]}
        elif len(self.order) > 8:
            half = -(-len(self.order) // 2)
            groups = {'The better half': self.order[:half], 'The other half': self.order[half:]}
        else:
            groups = {'All classes': self.order}
        panels = [
            figure(title, plot_bars(
                [self.names[column] for column in columns], [float(self.precision[column]) for column in columns],
                [f'{100 * float(self.precision[column]):.1f}  of {int(self.support[column]):,}' for column in columns]))
            for title, columns in groups.items()]
        if len(self.order) > 8:
            shown = self.order[::-(-len(self.order) // SCATTER_POINTS)]
            panels.append(figure('Do classes with more pictures do better?', plot_scatter(
                self.support[shown].tolist(), self.precision[shown].tolist(), x_label='pictures of the class',
                y_label='average precision')))
        words = 'Average precision of each class in percent, and in how many pictures it is present.'
        if self.without:
            words += f' {len(self.without)} classes without a known positive or without a known negative have none.'
        return section('Classes', words, f'<div class="grid">{"".join(panels)}</div>')

    def precision_over_recall(self) -> str:
        eligible = [column for column in self.order if self.support[column] >= MIN_CURVE_SUPPORT] or self.order
        if not eligible:
            return ''
        num_best = min(NUM_SERIES, -(-len(eligible) // 2))
        groups = {'Best': eligible[:num_best], 'Worst': eligible[num_best:][-NUM_SERIES:]}
        panels, scores = [], ranked(self.logits, self.activation)
        for title, columns in groups.items():
            lines = []
            for column in columns:
                recall, precision = precision_recall(scores[:, column], self.targets[:, column])
                lines.append(Line(recall.tolist(), precision.tolist(), self._with_precision(column)))
            if lines:
                svg = plot_lines(lines, x_label='recall', y_label='precision', is_unit=True)
                panels.append(figure(title, svg, _legend(lines)))
        words = f'Of the best and the worst classes that are in at least {MIN_CURVE_SUPPORT} pictures.'
        return section('Precision and recall', words, f'<div class="grid">{"".join(panels)}</div>')

    def decisions(self, thresholds: Sequence[float] | None) -> str:
        if self.activation == 'softmax':
            return ''
        f1, curve = self.found.measures.f1, self.found.curve
        legend = [
            ('F1 of all labels (dot: its best)', 1, False), ('mean F1 of classes', 1, True), ('precision', 2, False),
            ('recall', 3, False)]
        if thresholds is not None:
            legend.append(('above: thresholds in use', 4, False))
        best = int(curve.overall[2].argmax())
        name = 'the thresholds in use' if thresholds is not None else f'{DEFAULT_THRESHOLD} for all'
        rows = [
            (name, *map(_percent, (f1.overall_precision, f1.overall_recall, f1.overall_f1, f1.class_f1))),
            (f'{curve.best:.3f} for all, the best here',
             *map(_percent, [*curve.overall[:, best].tolist(), float(curve.mean_f1[best])]))]
        head = ('threshold', 'precision', 'recall', 'F1', 'mean F1')
        content = figure('One threshold for all classes', plot_thresholds(curve, thresholds), legend)
        content += card('What they lead to', table(head, rows))
        words = (
            'Which labels are predicted depends on the least confidence asked for. A threshold chosen on these very '
            'pictures does a little worse on others.')
        return section('Thresholds', words, f'<div class="grid">{content}</div>')

    def confused(self) -> str:
        found = confusions(
            self.logits, self.targets, self.found, activation=self.activation, temperatures=self.temperatures,
            num_pairs=HEATMAP_PAIRS)
        if not found.pairs:
            return ''
        present = sorted(_first(pair.present for pair in found.pairs))
        absent = sorted(_first(pair.absent for pair in found.pairs))
        column_of = {int(label): column for column, label in enumerate(found.columns)}
        values = found.confidence[present][:, [column_of[label] for label in absent]]
        svg = plot_heatmap([self.names[x] for x in present], [self.names[x] for x in absent], values)
        rows = [self._pair_row(pair) for pair in found.pairs[:PAIRS]]
        head = ('is there', 'is not there', 'confidence', 'elsewhere', 'pictures')
        content = card('Mean confidence of absent labels (above) where others are present (left)', svg)
        content += card('The most striking pairs', table(head, rows, num_words=2))
        words = (
            'How sure the model is of a label that is absent, in pictures where another one is present, against all '
            'other pictures where it is absent.')
        return section('Labels taken for one another', words, f'<div class="grid">{content}</div>')

    def calibration(self) -> str:
        measures = self.found.measures
        curve = measures.reliability
        content = figure('How often labels of a confidence are there', plot_reliability(curve))
        edges = [number / len(curve.count) for number in range(len(curve.count) + 1)]
        rows = [
            (f'{low:.2f} to {high:.2f}', f'{count:,}', f'{mean:.3f}', f'{share:.3f}', f'{mean - share:+.3f}')
            for low, high, count, mean, share in zip(
                edges, edges[1:], curve.count.tolist(), curve.confidence.tolist(), curve.frequency.tolist()) if count]
        content += card('The bins', table(('confidence', 'labels', 'mean', 'are there', 'too sure by'), rows))
        words = (
            'Below the diagonal the model is surer than right. The bars count the labels of each confidence, on a '
            f'logarithmic scale. The expected calibration error is {_percent(measures.calibration_error)} percent.')
        return section('Calibration', words, f'<div class="grid">{content}</div>')

    def mistakes(self, source: LabelledImages) -> str:
        worst = worst_pictures(
            self.logits, self.targets, self.found, activation=self.activation, thresholds=self.thresholds,
            temperatures=self.temperatures, num_pictures=PICTURES)
        if not worst:
            return section('The most wrong pictures', 'There are none: every known label is decided rightly.', '')
        cards = ''.join(self._mistake(source, wrong) for wrong in worst)
        words = (
            'The pictures with the most confident mistakes, each with its wrong labels and how confident the model '
            'is of them. Some show a mistake of the annotation.')
        return section('The most wrong pictures', words, f'<div class="pictures">{cards}</div>')

    def all_classes(self) -> str:
        f1 = self.found.measures.f1
        unknown = (len(self.targets) - self.support - self.found.measures.average_precision.num_negatives).tolist()
        head = ['label', 'AP', 'present', 'precision', 'recall', 'F1', 'threshold']
        columns = [f1.precision.tolist(), f1.recall.tolist(), f1.f1.tolist(), list(self.thresholds)]
        rows = [
            [self.names[x], _percent(float(self.precision[x])), f'{int(self.support[x]):,}',
             *(_percent(values[x]) for values in columns[:-1]), f'{columns[-1][x]:.3f}']
            for x in self.order + self.without]
        if any(unknown):
            head.append('unknown')
            for row, x in zip(rows, self.order + self.without):
                row.append(f'{unknown[x]:,}')
        words = 'Precision, recall and F1 in percent at the threshold of the class.'
        return section('All classes', words, f'<div class="scroll">{table(head, rows)}</div>')

    def _with_precision(self, column: int) -> str:
        return f'{shorten(self.names[column], NAME_CHARS)} ({_percent(float(self.precision[column]))})'

    def _pair_row(self, pair: Pair) -> tuple[str, ...]:
        return (
            *(shorten(self.names[column], NAME_CHARS) for column in (pair.present, pair.absent)),
            f'{pair.confidence:.2f}', f'{pair.elsewhere:.2f}', f'{pair.num_pictures:,}')

    def _mistake(self, source: LabelledImages, wrong: WrongPicture) -> str:
        name = source.image_name(wrong.row)
        try:
            shown = picture(source.load_image(wrong.row), name)
        except ImageError:  # gone or damaged since it was measured
            shown = '<div class="none">cannot be read</div>'
        labels = ''.join(self._wrong_label(label) for label in wrong.wrong)
        short = '/'.join(name.replace('\\', '/').split('/')[-2:])
        title = f'<div class="name" title="{escape(name)}">{escape(short)}</div>'
        return f'<div class="card">{shown}{labels}{title}</div>\n'

    def _wrong_label(self, label: WrongLabel) -> str:
        kind = 'missed' if label.is_present else 'false'
        return f'<div class="{kind}">{kind} {escape(self.names[label.column])} {label.confidence:.3f}</div>'


def _training(epochs: Sequence[Mapping[str, object]]) -> str:
    """Curves of what the epochs measured; nothing without epochs."""
    names = dict.fromkeys(name for row in epochs for name in row)
    panels = []
    for title, words in PANELS:
        lines = []
        for name in names:
            if name != 'epoch' and any(word in name.lower().split('_') for word in words):
                points = {
                    _number(row.get('epoch'), number): value for number, row in enumerate(epochs, start=1)
                    for value in [_number(row.get(name), math.nan)] if math.isfinite(value)}
                if points:
                    lines.append(Line(list(points), list(points.values()), name, has_dots=len(points) < 30))
        for start in range(0, len(lines), NUM_SERIES):
            part = lines[start:start + NUM_SERIES]
            panels.append(figure(title, plot_lines(part, x_label='epoch'), _legend(part)))
    if not panels:
        return ''
    return section('Training', 'What each epoch gave.', f'<div class="grid">{"".join(panels)}</div>')


def _legend(lines: Sequence[Line]) -> list[tuple[str, int, bool]]:
    return [(line.name, colour, line.is_dashed) for colour, line in enumerate(lines, start=1)]


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def _first(labels: Iterator[int]) -> list[int]:
    return list(dict.fromkeys(labels))[:HEATMAP_LABELS]


def _percent(fraction: float) -> str:
    return '\u2013' if math.isnan(fraction) else f'{100 * fraction:.1f}'


def _check(
        logits: Tensor, targets: Tensor, label_names: Sequence[str], source: LabelledImages | None,
        thresholds: Sequence[float] | None, temperatures: Sequence[float] | None, activation: Activation) -> None:
    check_ndim(2, logits=logits, targets=targets)
    check_same_shape(logits=logits, targets=targets)
    check_labels(targets=targets)
    check_choice(activation=activation, choices=ACTIVATIONS)
    check_label_names(label_names)
    num_pictures, num_classes = logits.shape
    if len(label_names) != num_classes:
        raise ValueError(f'label_names must have one name a class, got {len(label_names)} for {num_classes} classes.')
    if not num_pictures:
        raise ValueError('logits must be of at least one picture, got none.')
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f'logits must be finite, got {int((~logits.isfinite()).sum())} values that are not.')
    if source is not None and len(source) != num_pictures:
        raise ValueError(
            f'source must be the pictures of logits, got {len(source)} pictures for {num_pictures} rows; select those '
            f'that were measured.')
    check_class_settings(num_classes=num_classes, thresholds=thresholds, temperatures=temperatures)
    if temperatures is not None and activation != 'sigmoid':
        raise ValueError(f"temperatures are for the activation 'sigmoid', got {activation!r}.")
