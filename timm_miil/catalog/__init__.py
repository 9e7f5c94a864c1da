"""Every fact that someone could cite: papers, published weights with their metrics, label sets.

The facts stand in TOML files beside this module; the functions here read them at first use, strictly, and
hand out immutable records. Standard library only: neither torch nor timm is needed to look something up.

Example:
    >>> from timm_miil import catalog
    >>> entry = catalog.weight('mldecoder_tresnet_l.miil_coco_448')
    >>> entry.input_size, entry.metrics[0].value, catalog.paper(entry.paper).arxiv
    ((3, 448, 448), 90.1, '2111.12933')
    >>> catalog.label_set('coco_80').labels[:3]
    ('person', 'bicycle', 'car')
"""
import fnmatch
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from timm_miil._checks import nearest
from timm_miil._errors import CatalogError
from timm_miil.catalog import _reader
from timm_miil.catalog._records import (
    HEADS, METRICS, PROBLEM_TYPES, DataSet, LabelSet, Metric, Paper, TimmFacts, Unsettled, Weights,
)
from timm_miil.catalog._timm_cfg import can_register, timm_cfg

__all__ = [
    'HEADS', 'METRICS', 'PROBLEM_TYPES', 'CatalogError', 'DataSet', 'LabelSet', 'Metric', 'Paper', 'TimmFacts',
    'Unsettled', 'Weights', 'data_set', 'data_sets', 'families', 'find', 'label_set', 'label_sets', 'named_by_authors',
    'paper', 'papers', 'pretrained_cfgs', 'weight', 'weights', 'weights_of',
]

_ROOT = Path(__file__).parent.parent
_Record = TypeVar('_Record')


@functools.cache
def papers() -> Mapping[str, Paper]:
    """All papers by id, read-only.

    Raises:
        CatalogError: If the data file is wrong.
    """
    return _reader.read_papers(_ROOT)


@functools.cache
def data_sets() -> Mapping[str, DataSet]:
    """All data sets by name, read-only.

    Raises:
        CatalogError: If the data file is wrong.
    """
    return _reader.read_data_sets(_ROOT)


@functools.cache
def label_sets() -> Mapping[str, LabelSet]:
    """All label sets by name, read-only.

    Raises:
        CatalogError: If a data file is wrong.
    """
    return _reader.read_label_sets(_ROOT)


@functools.cache
def weights() -> Mapping[str, Weights]:
    """All weights by 'architecture.tag', read-only.

    Raises:
        CatalogError: If a data file is wrong.
    """
    return _reader.read_all_weights(_ROOT, papers(), label_sets())


@functools.cache
def weights_of(family: str) -> Mapping[str, Weights]:
    """The weights of one family by 'architecture.tag', read-only; no other family's file is opened.

    Raises:
        CatalogError: If there is no such family, or a data file is wrong.
    """
    if family not in families():
        raise CatalogError(f'unknown family {family!r}; {nearest(family, families())}')
    return _reader.read_family(_ROOT, family, papers(), label_sets())


@functools.cache
def families() -> tuple[str, ...]:
    """Names of the families, one a file of weights, sorted."""
    return _reader.family_names(_ROOT)


def paper(id: str) -> Paper:
    """The paper with this id.

    Raises:
        CatalogError: If there is none; the message names the nearest.
    """
    return _lookup(papers(), id, 'paper')


def data_set(name: str) -> DataSet:
    """The data set with this name.

    Raises:
        CatalogError: If there is none; the message names the nearest.
    """
    return _lookup(data_sets(), name, 'data set')


def label_set(name: str) -> LabelSet:
    """The label set with this name.

    Raises:
        CatalogError: If there is none; the message names the nearest.
    """
    return _lookup(label_sets(), name, 'label set')


def weight(name: str) -> Weights:
    """The weights with this 'architecture.tag'.

    Raises:
        CatalogError: If there are none; the message names the nearest, and the architecture that the authors call so.
    """
    called = named_by_authors(name)
    if name not in weights() and called:
        names = [entry.name for entry in weights().values() if entry.architecture in called]
        raise CatalogError(
            f"unknown weights {name!r}; that is the authors' name of {' and '.join(called)}, whose weights are "
            f'{", ".join(names)}.')
    return _lookup(weights(), name, 'weights')


def named_by_authors(name: str) -> tuple[str, ...]:
    """The architectures that the authors of their weights call by this name, where it is not the architecture's own.

    Raises:
        CatalogError: If a data file is wrong.

    Example:
        >>> named_by_authors('ofa_flops_595m_s')
        ('miil_ofa_595m',)
    """
    return tuple(dict.fromkeys(
        entry.architecture for entry in weights().values() if entry.source_architecture == name))


def find(pattern: str) -> tuple[Weights, ...]:
    """The weights whose name matches a shell pattern such as '*coco*', in the order of the files.

    Raises:
        CatalogError: If a data file is wrong.
    """
    return tuple(entry for name, entry in weights().items() if fnmatch.fnmatchcase(name, pattern))


def pretrained_cfgs(family: str) -> dict[str, dict[str, object]]:
    """Keyword arguments of timm's `PretrainedCfg` by 'architecture.tag', fresh at every call.

    Left out are weights that timm has under the very name, for a name registered twice hides the first;
    weights that no network of the timm kind can hold; and weights whose class count or preprocessing is not
    known, where timm would put ImageNet-1k's. The environment variable TIMM_MIIL_HUB_NAMESPACE replaces the
    namespace of Hub ids, and where none is known the id is the namespace and the name.

    Args:
        family: Name of a family, as listed by `families`.

    Raises:
        CatalogError: If there is no such family, or a data file is wrong.
        ValueError: If TIMM_MIIL_HUB_NAMESPACE is no namespace.
    """
    return {
        name: timm_cfg(
            entry,
            root=_ROOT,
            paper=paper(entry.paper),
            label_set=label_set(entry.labels) if entry.labels else None,
        )
        for name, entry in weights_of(family).items() if can_register(entry)
    }


def _lookup(records: Mapping[str, _Record], name: str, what: str) -> _Record:
    if name not in records:
        raise CatalogError(f'unknown {what} {name!r}; {nearest(name, records)}')
    return records[name]
