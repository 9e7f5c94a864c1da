"""What the labels of a data set look like: how often each is present, absent and unknown, and which come together."""
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from timm_miil._checks import nearest, shown
from timm_miil.data._files import few
from timm_miil.data.records import ImageStream, LabelledImages
from timm_miil.data.targets import SparseTargets

__all__ = ['LabelStatistics', 'label_statistics', 'source_statistics']

SHOWN_LABELS = 50
SHOWN_PAIRS = 10
NAME_CHARS = 40


@dataclass(frozen=True, eq=False)
class LabelStatistics:
    """Counts over the N pictures of a data set with C labels.

    Args:
        label_names: C names.
        num_images: N.
        present: Pictures that show each label, shape (C,), int64.
        absent: Pictures that do not show it, shape (C,), int64.
        unknown: Pictures of which this is not known, shape (C,), int64.
        labels_per_image: Pictures that show 0, 1, 2, ... labels, int64; empty for a stream.
        pairs: Pairs of columns that are present together in a picture, the commonest first, shape (P, 2), int64; none
            for a stream.
        pair_counts: Pictures of each pair, shape (P,), int64.
    """
    label_names: tuple[str, ...]
    num_images: int
    present: Tensor
    absent: Tensor
    unknown: Tensor
    labels_per_image: Tensor
    pairs: Tensor
    pair_counts: Tensor

    @property
    def prevalence(self) -> Tensor:
        """Share of the pictures that show each label among those where it is known; NaN if none, (C,), float64."""
        return self.present.double() / (self.present + self.absent)

    @property
    def never_present(self) -> tuple[str, ...]:
        """Labels that no picture shows."""
        return tuple(name for name, count in zip(self.label_names, self.present.tolist()) if not count)

    @property
    def mean_labels(self) -> float:
        """Mean number of labels that a picture shows; NaN without pictures."""
        return int(self.present.sum()) / self.num_images if self.num_images else float('nan')

    def co_occurrence(self, names: Sequence[str] | None = None) -> Tensor:
        """How many pictures show two labels, or on the diagonal one.

        Args:
            names: K labels; None for all.

        Returns:
            Counts, symmetric, shape (K, K), int64.

        Raises:
            ValueError: If a name is unknown.
        """
        column_of = {name: column for column, name in enumerate(self.label_names)}
        names = self.label_names if names is None else names
        for name in names:
            if name not in column_of:
                raise ValueError(f'unknown label {shown(name)}; {nearest(name, self.label_names)}')
        columns = torch.tensor([column_of[name] for name in names], dtype=torch.int64)
        place = torch.full((len(self.label_names),), -1)
        place[columns] = torch.arange(len(columns))
        first, second = place[self.pairs].unbind(1)
        kept = (first >= 0) & (second >= 0)
        counts = torch.diag(self.present[columns])
        counts[first[kept], second[kept]] = self.pair_counts[kept]
        counts[second[kept], first[kept]] = self.pair_counts[kept]
        return counts

    def to_text(self, *, num_labels: int = SHOWN_LABELS) -> str:
        """A report for people: a table of the labels, the commonest first, and the commonest pairs.

        Args:
            num_labels: Rows of the table; with more labels the commonest and rarest halves are shown.
        """
        known = int((self.present + self.absent).sum())
        total = self.num_images * len(self.label_names)
        lines = [
            f'{self.num_images} pictures, {len(self.label_names)} labels, {self.mean_labels:.2f} labels a picture, '
            f'{100 * known / total if total else 100:.1f} % of all known']
        if never := self.never_present:
            lines.append(f'never present: {few(map(_cut, never), len(never))}')
        order = torch.argsort(self.present, descending=True, stable=True).tolist()
        left_out = len(order) - num_labels
        rows = order if left_out <= 0 else order[:num_labels - num_labels // 2] + order[len(order) - num_labels // 2:]
        names = [_cut(self.label_names[column]) for column in rows]
        width = max(map(len, [*names, 'label']))
        lines += ['', f'{"label":{width}}  {"present":>9}  {"absent":>9}  {"unknown":>9}  {"prevalence":>10}']
        prevalence = self.prevalence.tolist()
        for place, (name, column) in enumerate(zip(names, rows)):
            if left_out > 0 and place == num_labels - num_labels // 2:
                lines.append(f'... {left_out} labels in between')
            share = '-' if prevalence[column] != prevalence[column] else f'{100 * prevalence[column]:.2f} %'
            lines.append(
                f'{name:{width}}  {int(self.present[column]):>9}  {int(self.absent[column]):>9}  '
                f'{int(self.unknown[column]):>9}  {share:>10}')
        if len(self.pairs):
            lines += ['', 'most often together']
            for (first, second), count in zip(self.pairs[:SHOWN_PAIRS].tolist(), self.pair_counts.tolist()):
                lines.append(f'{count:>9}  {_cut(self.label_names[first])} + {_cut(self.label_names[second])}')
        return '\n'.join(lines) + '\n'

    def to_csv(self) -> str:
        """The counts of all labels, in the order of the columns, with a header; a prevalence that is NaN is empty."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['label', 'present', 'absent', 'unknown', 'prevalence'])
        counts = zip(self.present.tolist(), self.absent.tolist(), self.unknown.tolist(), self.prevalence.tolist())
        for name, (*numbers, share) in zip(self.label_names, counts):
            writer.writerow([name, *numbers, share if share == share else ''])
        return file.getvalue()


def label_statistics(labels: SparseTargets, label_names: Sequence[str]) -> LabelStatistics:
    """Count the labels of a data set, in memory that grows with its present labels and not with pictures times labels.

    Args:
        labels: 1 for present, 0 for absent, -1 for unknown, of N pictures and C labels.
        label_names: C names.

    Raises:
        ValueError: If there is not one name a column.
    """
    if labels.num_classes != len(label_names):
        raise ValueError(
            f'label_names must have one name a column, got {len(label_names)} names for {labels.num_classes} columns.')
    present, absent, unknown = labels.counts()
    rows, columns, values = labels.entries()
    rows, columns = rows[values == 1], columns[values == 1].astype(np.int64)
    per_image = np.bincount(rows, minlength=len(labels))
    # Columns ascend within a row: entry i and the one `step` later are a pair if they are of one row.
    keys, counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for step in range(1, int(per_image.max(initial=0))):
        together = rows[step:] == rows[:-step]
        new, times = np.unique((columns[:-step] * labels.num_classes + columns[step:])[together], return_counts=True)
        keys, where = np.unique(np.concatenate([keys, new]), return_inverse=True)
        counts = np.bincount(where, weights=np.concatenate([counts, times]), minlength=len(keys)).astype(np.int64)
    order = np.argsort(-counts, kind='stable')
    pairs = np.stack([keys // max(labels.num_classes, 1), keys % max(labels.num_classes, 1)], axis=1)
    return LabelStatistics(
        tuple(label_names), len(labels), present, absent, unknown,
        torch.from_numpy(np.bincount(per_image)), torch.from_numpy(pairs[order]), torch.from_numpy(counts[order]))


def source_statistics(source: LabelledImages | ImageStream) -> LabelStatistics:
    """Count the labels of a data set as it was opened; of a stream what it knows without being read.

    Raises:
        ValueError: If it is a stream that knows nothing.
    """
    if isinstance(source, LabelledImages):
        return label_statistics(source.labels, source.label_names)
    counts = source.label_counts()
    if counts is None:
        raise ValueError(
            f'{type(source).__name__} is a stream that tells its labels only when all its pictures are read; open the '
            f'data without streaming.')
    nothing = torch.empty(0, dtype=torch.int64)
    return LabelStatistics(
        source.label_names, source.num_images, *counts, nothing, nothing.reshape(0, 2), nothing)


def _cut(name: str) -> str:
    return name if len(name) <= NAME_CHARS else f'{name[:NAME_CHARS - 3]}...'
