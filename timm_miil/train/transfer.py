"""How well networks transfer: one table over several networks and several data sets.

Nayman et al., arXiv:2204.09134, compare networks so: by what they reach on data that they were not trained on, beside
how diverse what they have learnt is. The aggregate over data sets is the mean of log-odds.
"""
import csv
import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import create_model, is_model, list_models
from torch import Tensor

from timm_miil._checks import nearest, shown
from timm_miil.metrics import (
    cka_redundancy, effective_rank, filter_diversity, mean_log_odds, nc1, participation_ratio)
from timm_miil.train.engine import train
from timm_miil.train.linear_probe import embed_pictures, linear_probe, probe_metric
from timm_miil.train.recipe import Recipe
from timm_miil.train.splits import Splits

__all__ = ['Transfer', 'TransferTable', 'transfer_table']


@dataclass(frozen=True)
class Transfer:
    """A network on a data set.

    Args:
        model: The network's name.
        data: The data set's.
        metric: 'top1' where each picture has one label, 'map' elsewhere.
        value: What the network reaches on the test pictures, percent.
        num_pictures: How many those are.
        effective_rank: Of their embeddings before the network learnt this data set; so are the next three, see
            `timm_miil.metrics`.
        participation_ratio: In how many directions they spread.
        cka_redundancy: How much one half of the channels tells of the other.
        nc1: Variation within over between classes; NaN where pictures have several labels.
    """
    model: str
    data: str
    metric: str
    value: float
    num_pictures: int
    effective_rank: float
    participation_ratio: float
    cka_redundancy: float
    nc1: float


@dataclass(frozen=True)
class TransferTable:
    """Networks on data sets.

    Args:
        rows: Each network on each data set.
        filter_diversity: Of each network, by name, before it learnt any of the data sets.
    """
    rows: tuple[Transfer, ...]
    filter_diversity: Mapping[str, float]

    def mean_log_odds(self) -> dict[str, float]:
        """By network: the mean over the data sets of log(p / (1 - p)), see `timm_miil.metrics.mean_log_odds`."""
        found = {}
        for model in self.filter_diversity:
            rows = [row for row in self.rows if row.model == model]
            found[model] = mean_log_odds(
                [row.value / 100.0 for row in rows], num_pictures=[row.num_pictures for row in rows])
        return found

    def to_csv(self) -> str:
        """A row for each network on each data set, with the figures of the network in each of its rows."""
        text, odds = io.StringIO(), self.mean_log_odds()
        rows = [
            dataclasses.asdict(row) | {
                'filter_diversity': self.filter_diversity[row.model], 'mean_log_odds': odds[row.model]}
            for row in self.rows]
        writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def transfer_table(
        models: Sequence[str],
        data_sets: Mapping[str, Splits],
        *,
        recipe: Recipe | None = None,
        shots: int = 0,
        draws: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        workers: int = 0,
        device: torch.device | str = 'cpu',
        on_row: Callable[[Transfer], None] | None = None,
) -> TransferTable:
    """Let each network learn each data set, and measure both how well and from what.

    Args:
        models: Names as of `timm.create_model`, whose weights are loaded, or model folders.
        data_sets: Pictures by name: it is learnt from `train` and measured on `test`, or on `val` where there is none.
        recipe: Fine-tune by it, with each of the networks in place of its own. None fits a linear classifier to the
            frozen network's embeddings, see `linear_probe`.
        shots: For a linear classifier, pictures of each class to learn from; 0 takes all.
        draws: They are drawn so often, and the mean counts.
        seed: Of the draws.
        batch_size: Pictures at a time.
        workers: Processes that read pictures.
        device: Where the networks run.
        on_row: Called with each row when it is there.

    Raises:
        ImportError: If scikit-learn is not installed, for a linear classifier.
        OSError: If weights or pictures cannot be read.
        TypeError: If a network does not give embeddings by timm's contract.
        ValueError: If there is no model or no data set, one is named twice, or data and settings do not fit.
    """
    if not models or not data_sets:
        raise ValueError(f'models and data_sets must not be empty, got {len(models)} and {len(data_sets)}.')
    if len(set(models)) < len(models):
        raise ValueError(f'models must be named once each, got {shown(list(models))}.')
    if recipe is not None and (shots or draws != 1):
        raise ValueError('shots and draws are for a linear classifier; leave them out with a recipe.')
    rows: list[Transfer] = []
    diversity: dict[str, float] = {}
    reading: dict[str, Any] = {'batch_size': batch_size, 'workers': workers}
    for name in models:
        place = _place(name)
        network = create_model(place, pretrained=True).to(device)
        diversity[name] = filter_diversity(network)
        for data, splits in data_sets.items():
            features, targets = embed_pictures(network, splits.val if splits.test is None else splits.test, **reading)
            if recipe is None:
                known, labels = embed_pictures(network, splits.train, **reading)
                metric = probe_metric(torch.cat([labels, targets]))
                value = linear_probe(known, labels, features, targets, shots=shots, draws=draws, seed=seed)
            else:
                metric, value = _fine_tune(recipe, place, splits, device)
            rows.append(Transfer(
                name, data, metric, value, len(features), effective_rank(features), participation_ratio(features),
                cka_redundancy(features), _collapse(features, targets)))
            if on_row is not None:
                on_row(rows[-1])
    return TransferTable(tuple(rows), diversity)


def _place(name: str) -> str:
    """The name under which timm finds a network."""
    if Path(name).is_dir():
        return f'local-dir:{name}'
    if ':' not in name and not is_model(name):
        raise ValueError(
            f'models must be timm models or model folders, got {shown(name)}, which is neither; '
            f'{nearest(name, list_models())}')
    return name


def _fine_tune(recipe: Recipe, place: str, splits: Splits, device: torch.device | str) -> tuple[str, float]:
    model = dataclasses.replace(recipe.model, name=place, args={}, pretrained=True)
    result = train(dataclasses.replace(recipe, model=model), splits, device=device)
    figures = result.test_metrics or result.val_metrics
    return result.metric, figures[result.metric]


def _collapse(features: Tensor, targets: Tensor) -> float:
    label = targets.argmax(1)
    return nc1(features, label) if probe_metric(targets) == 'top1' and len(label.unique()) > 1 else math.nan
