"""Looking through the shards of another program once, to index them."""
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from timm_miil._checks import shown
from timm_miil.data._labels import LabelColumns
from timm_miil.data._processes import run_jobs
from timm_miil.data._shard_index import PLAIN_NAME, LabelCounts, Shard, ShardIndex, hash_file
from timm_miil.data._shard_tar import list_samples, parse_labels, read_span

__all__ = ['scan_shards']


@dataclass
class _Tally:
    """How often labels are given a value, and how often they are left to the rest of a sample."""
    given: Counter[tuple[str, int]] = field(default_factory=Counter)
    given_beside: Counter[tuple[str, int]] = field(default_factory=Counter)  # by the fill of the sample
    fills: Counter[int] = field(default_factory=Counter)

    def add(self, other: '_Tally') -> None:
        self.given.update(other.given)
        self.given_beside.update(other.given_beside)
        self.fills.update(other.fills)

    def counts(self, name: str) -> LabelCounts:
        rest = {fill: count - self.given_beside[name, fill] for fill, count in self.fills.items()}
        present, absent, unknown = (self.given[name, value] + rest.get(value, 0) for value in (1, 0, -1))
        return LabelCounts(name, present, absent, unknown)


def scan_shards(
        files: Sequence[Path], split: str, *, labels: Sequence[str] | None, workers: int,
        on_progress: Callable[[int, int], None] | None,
) -> ShardIndex:
    """The index of tar files in one folder; `timm_miil.data.shards.index_shards` says what they must be."""
    for path in files:
        if not PLAIN_NAME.fullmatch(path.name):
            raise ValueError(f'{path} must have a plain name of letters, digits and _ - . @ + =; rename it.')
    columns, total = LabelColumns(labels, ignore_unknown=None), _Tally()
    shards: dict[int, Shard] = {}
    for number, (shard, tally) in run_jobs((partial(_scan, path, labels) for path in files), workers):
        shards[number] = shard
        total.add(tally)
        for name, _ in tally.given:
            columns.find(name, shard.file)
        if on_progress is not None:
            on_progress(len(shards), len(files))
    label_names, _ = columns.finish(files[0].parent)
    return ShardIndex(
        split, '', tuple(map(total.counts, label_names)), tuple(shards[number] for number in range(len(files))))


def _scan(path: Path, labels: Sequence[str] | None) -> tuple[Shard, _Tally]:
    tally, where = _Tally(), str(path)
    try:
        with open(path, 'rb') as file:
            samples = list_samples(file)
            for sample in samples:
                where = f'{path}, {sample.key}'
                found = parse_labels(read_span(file, sample.labels), sample.labels_suffix, labels)
                tally.fills[found.fill] += 1
                tally.given.update(found.listed.items())
                tally.given_beside.update((name, found.fill) for name in found.listed)
    except ValueError as error:
        raise ValueError(f'{where}: {error}.') from error
    if not samples:
        raise ValueError(f'{path} has no pictures; leave it out, {shown(path.name)} is no shard.')
    return Shard(path.name, len(samples), path.stat().st_size, hash_file(path)), tally
