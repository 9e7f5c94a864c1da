"""Which pictures are learnt from, which choose the best epoch, and which test it."""
import copy
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from timm_miil._checks import nearest
from timm_miil.data import (
    TREE_FILE, ClassTree, ImageStream, LabelledImages, MultiLabelRecords, SparseTargets, find_format, fixed_per_class,
    has_split, labelled_per_class, mix_seed, open_split, positives_only, random_per_sample, read_class_tree,
    with_ancestors)
from timm_miil.data.records import UnreadPicture, UnreadStream
from timm_miil.train._verification_settings import check_pairs
from timm_miil.train._zero_shot_settings import ZeroShotSettings
from timm_miil.train.recipe import DataSettings, PartialSettings, Recipe

__all__ = ['Splits', 'forget_labels', 'hold_out', 'prepare_splits', 'read_splits', 'with_labels']

_logger = logging.getLogger(__name__)

VAL_DRAW, MAX_VAL_DRAW = 1, 2  # so that a draw is not that of an epoch

_Images = TypeVar('_Images', bound=LabelledImages)


@dataclass(frozen=True, eq=False)
class Splits:
    """Pictures to learn from, to choose the best epoch by, and to test once, if there are such.

    Args:
        train: To learn from.
        val: To choose the best epoch by.
        test: To test once.
        tree: The tree over the labels, or the file of it, which is read where a task asks for it; its classes are
            matched to the labels by name.
        unseen_labels: Labels that were held out of training and validation.
    """
    train: LabelledImages | ImageStream
    val: LabelledImages | ImageStream
    test: LabelledImages | ImageStream | None = None
    tree: ClassTree | Path | None = None
    unseen_labels: tuple[str, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels to learn, equal in `train` and `val`; after `hold_out` those of `test` are more.

        Of the task 'verification' each split has its own.
        """
        return self.train.label_names


def read_splits(
        data_dir: str | Path, settings: DataSettings = DataSettings(), *, seed: int = 0, own_labels: bool = False,
) -> Splits:
    """Open a data set's splits; where there is none to validate, a part of the training pictures serves.

    Args:
        data_dir: Folder of the data set, of any format of `timm_miil.data.list_formats()`.
        settings: Names of the splits and how to read them.
        seed: Decides which pictures validate, where that is drawn.
        own_labels: Whether each split has labels of its own, as identities are for the task 'verification'. Where there
            is no split to validate, a part of the labels is drawn, with all their pictures.

    Raises:
        CheckpointError: If the tree is asked for and its file is none.
        FileNotFoundError: If the folder, a split or a file is missing.
        ValueError: If a file is wrong, a split has labels that the training pictures lack, a label is not in the tree,
            or a stream would have to be parted.
    """
    options = {name: value for name, value in settings.args.items() if name != 'ignore_unknown_labels'}
    form = find_format(data_dir, **options) if settings.format == 'auto' else settings.format

    def read(split: str, labels: Sequence[str] | str | None) -> LabelledImages | ImageStream:
        return open_split(data_dir, split, format=form, labels=labels, **settings.args)

    def has(split: str) -> bool:
        return has_split(data_dir, split, form, **options)

    train = read(settings.train, settings.labels or None)
    known = None if own_labels else train.label_names
    # By name: a split need not show each label, and has them in an order of its own.
    others = {}
    if settings.val != DataSettings.val or has(settings.val):
        others['val'] = read(settings.val, known)
    # What the best epoch is chosen by tests nothing.
    test = settings.test or 'test'
    if test != settings.val and (settings.test or has(test)):
        others['test'] = read(test, known)
    if 'val' not in others:
        draw = _part_labels if own_labels else _part
        train, others['val'] = draw(_readable(train, f'data.val = {settings.val!r} is no split, and'), settings, seed)
    for name, source in others.items():
        _log_shared(train, source, name)
    if settings.max_val:
        others['val'] = _drawn(others['val'], settings.max_val, seed)
    path = Path(settings.tree) if settings.tree else Path(data_dir) / TREE_FILE
    splits = Splits(train, others['val'], others.get('test'), path if settings.tree or path.is_file() else None)
    return _with_ancestors(splits) if settings.ancestors else splits


def hold_out(splits: Splits, unseen_labels: Sequence[str], *, keep_pictures: bool = False) -> Splits:
    """Splits for zero-shot recognition: nothing of an unseen label is learnt.

    Args:
        splits: Pictures of all labels.
        unseen_labels: Labels to hold out.
        keep_pictures: Whether pictures that show one stay, without that label; else they are left out.

    Returns:
        Training and validation without the columns of these labels and, unless they are kept, without the pictures that
        show one. The test keeps all pictures and all labels.

    Raises:
        ValueError: If a label is unknown or given twice, no label, training or validation picture is left, or the
            pictures are a stream.
    """
    for label in unseen_labels:
        if label not in splits.label_names or unseen_labels.count(label) > 1:
            raise ValueError(
                f'unseen_labels must be distinct labels of the data, got {label!r}; '
                f'{nearest(label, splits.label_names)}')
    kept = {}
    for split, source in {'train': splits.train, 'val': splits.val}.items():
        images = _readable(source, 'unseen_labels are given, and')
        shows = (images.with_labels(unseen_labels).targets == 1).any(1)
        rows = (~shows | keep_pictures).nonzero().squeeze(1)
        seen = [label for label in images.label_names if label not in unseen_labels]
        kept[split] = images.select(rows).with_labels(seen)
        if 0 in kept[split].labels.shape:
            raise ValueError(
                f'unseen_labels must leave pictures and labels, got {len(unseen_labels)} of {len(images.label_names)} '
                f'labels, which leave {len(rows)} pictures in {split}; hold out fewer labels.')
    return dataclasses.replace(
        splits, train=kept['train'], val=kept['val'], unseen_labels=tuple(unseen_labels))


def forget_labels(images: _Images, settings: PartialSettings, *, seed: int) -> _Images:
    """The same pictures with some of their labels unknown, as the partial-label paper simulates it.

    Args:
        images: Pictures to learn from.
        settings: What is forgotten.
        seed: Of the draw.
    """
    targets = images.targets
    if settings.scheme == 'fixed_per_class':
        targets = fixed_per_class(targets, settings.num_per_class, seed=seed)
    elif settings.scheme == 'labelled_per_class':
        targets = labelled_per_class(targets, settings.num_per_class, seed=seed)
    elif settings.scheme == 'positives_only':
        targets = positives_only(targets, settings.drop_prob, seed=seed)
    else:
        targets = random_per_sample(targets, settings.drop_prob, seed=seed)
    other = copy.copy(images)
    other.labels = SparseTargets.from_dense(targets)
    return other


def with_labels(images: _Images, labels: Sequence[str]) -> _Images:
    """All pictures, with the columns of these labels of theirs."""
    return images.with_labels(labels)


def prepare_splits(recipe: Recipe, data: str | Path | Splits) -> Splits:
    """The pictures of a run: read if need be, without the labels that the recipe holds out or forgets.

    Raises:
        CheckpointError: If the tree's file is none.
        FileNotFoundError: If a folder, a split or a file is missing.
        ValueError: If the data are wrong or do not suit the recipe.
    """
    is_verification = recipe.verification is not None
    splits = data if isinstance(data, Splits) else read_splits(
        data, recipe.data, seed=recipe.seed, own_labels=is_verification)
    if not is_verification and splits.train.label_names != splits.val.label_names:
        raise ValueError(
            f'the labels of train and val must be equal, in the same order, got {len(splits.train.label_names)} and '
            f'{len(splits.val.label_names)}, {_difference(splits.val.label_names, splits.train.label_names)}.')
    zero_shot = recipe.zero_shot or ZeroShotSettings()
    if unseen := recipe.unseen_labels or zero_shot.unseen_labels():
        splits = hold_out(splits, unseen, keep_pictures=zero_shot.keep_pictures)
    if recipe.partial is not None:
        train = forget_labels(_readable(splits.train, 'partial is given, and'), recipe.partial, seed=recipe.seed)
        if not bool((train.targets != -1).any()):
            raise ValueError('partial must leave labels that are known, got none of them; let it forget fewer.')
        splits = dataclasses.replace(splits, train=train)
    if not recipe.is_exclusive and not recipe.embeds and not _has_ranking(splits.val):
        _logger.warning(
            'no label is known to be present in some of the pictures to validate and absent in others: there is no '
            'mAP, and the last epoch is kept.')
    if recipe.is_exclusive:
        kept = {
            split: _single(
                getattr(splits, split), split, recipe.task,
                is_optional=split == 'train' and recipe.dual_head is not None)
            for split in ('train', 'val', 'test')}
        splits = dataclasses.replace(splits, **kept)
    if recipe.verification is not None and (counts := splits.val.label_counts()) is not None:
        check_pairs(counts[0], recipe.verification)
    if recipe.task == 'semantic':
        splits = dataclasses.replace(splits, tree=_read_tree(splits, "task 'semantic'"))
    return splits


def _log_shared(train: LabelledImages | ImageStream, other: LabelledImages | ImageStream, split: str) -> None:
    """Warn of files that are learnt from and measured on."""
    if isinstance(train, MultiLabelRecords) and isinstance(other, MultiLabelRecords):
        paths = set(other.image_paths.raw())
        shared = [path for path in train.image_paths.raw() if path in paths]
        if shared:
            _logger.warning(
                '%d of the %d pictures of %s are learnt from too, such as %r.', len(shared), len(other), split,
                os.fsdecode(shared[0]))


def _has_ranking(source: LabelledImages | ImageStream) -> bool:
    """Whether pictures can be ranked by a label, as far as that is known."""
    counts = source.label_counts()
    return counts is None or bool(((counts[0] > 0) & (counts[1] > 0)).any())


def _part(images: LabelledImages, settings: DataSettings, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """The pictures to learn from and those to validate, each in the order they had."""
    count = round(settings.val_fraction * len(images))
    if not 0 < count < len(images):
        raise ValueError(
            f'data.val_fraction must leave pictures to learn from and to validate, got {settings.val_fraction} of '
            f'{len(images)} pictures.')
    generator = torch.Generator().manual_seed(mix_seed(seed, VAL_DRAW, len(images)))
    order = torch.randperm(len(images), generator=generator)
    return images.select(order[count:].sort().values), images.select(order[:count].sort().values)


def _part_labels(images: LabelledImages, settings: DataSettings, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """The labels to learn from and those to validate, with all pictures that show one, each in the order they had."""
    count = round(settings.val_fraction * len(images.label_names))
    if not 0 < count < len(images.label_names):
        raise ValueError(
            f'data.val_fraction must leave labels to learn from and to validate, got {settings.val_fraction} of '
            f'{len(images.label_names)} labels.')
    generator = torch.Generator().manual_seed(mix_seed(seed, VAL_DRAW, len(images.label_names)))
    order = torch.randperm(len(images.label_names), generator=generator)
    parts = []
    for places in (order[count:], order[:count]):
        part = images.with_labels([images.label_names[place] for place in places.sort().values.tolist()])
        parts.append(part.select((part.targets == 1).any(1).nonzero().squeeze(1)))
    return parts[0], parts[1]


def _drawn(source: LabelledImages | ImageStream, count: int, seed: int) -> LabelledImages:
    """So many of the pictures, in the order they had."""
    images = _readable(source, 'data.max_val is given, and')
    if len(images) <= count:
        return images
    generator = torch.Generator().manual_seed(mix_seed(seed, MAX_VAL_DRAW, len(images)))
    return images.select(torch.randperm(len(images), generator=generator)[:count].sort().values)


def _with_ancestors(splits: Splits) -> Splits:
    tree = _read_tree(splits, 'data.ancestors')
    test = None if splits.test is None else with_ancestors(splits.test, tree)
    return Splits(with_ancestors(splits.train, tree), with_ancestors(splits.val, tree), test, tree)


def _read_tree(splits: Splits, who: str) -> ClassTree:
    """The tree over the labels, in their order."""
    if splits.tree is None:
        raise ValueError(
            f'{who} needs a tree over the labels: put a file {TREE_FILE} into the data folder, name one by data.tree, '
            f'or make one by timm_miil.data.ClassTree and write_class_tree.')
    if isinstance(splits.tree, ClassTree):
        return splits.tree.ordered_as(splits.label_names)
    if not splits.tree.is_file():
        raise FileNotFoundError(f'there is no file {str(splits.tree)!r} of the tree that {who} needs; see data.tree.')
    tree = read_class_tree(splits.tree)
    try:
        return tree.ordered_as(splits.label_names)
    except ValueError as error:
        raise ValueError(f'{splits.tree} must be a tree over the labels of the data: {error}') from error


def _readable(source: LabelledImages | ImageStream, why: str) -> LabelledImages:
    """The source, if its pictures can be read in any order."""
    if isinstance(source, ImageStream):
        raise ValueError(
            f'{why} {type(source).__name__} is a stream, whose pictures cannot be chosen; write another stream, or '
            f'read the pictures from files.')
    return source


class _SingleLabelStream(UnreadStream):
    """A stream whose pictures show one label each, which is found out as it goes."""

    def __init__(self, source: ImageStream, split: str, task: str) -> None:
        super().__init__(source.label_names, source.num_images)
        self.source, self.split, self.task = source, split, task

    def label_counts(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return self.source.label_counts()

    def iterate_unread(
            self, *, seed: int | None, epoch: int, process: int, num_processes: int,
    ) -> Iterator[UnreadPicture]:
        for read, targets, name in self.source.iterate_unread(
                seed=seed, epoch=epoch, process=process, num_processes=num_processes):
            count = int((targets == 1).sum())
            if count != 1:
                raise ValueError(_not_single(self.task, count, self.split, name))
            yield read, targets, name


def _single(
        source: LabelledImages | ImageStream | None, split: str, task: str, *, is_optional: bool = False) -> Any:
    """The source; of a stream, one that raises ValueError when it comes to a picture without exactly one label.

    Where it is optional, all that is known of a picture that can be chosen may be nothing.
    """
    if isinstance(source, ImageStream):
        return _SingleLabelStream(source, split, task)
    if source is not None:
        _check_single(source, split, task, is_optional)
    return source


def _check_single(source: LabelledImages, split: str, task: str, is_optional: bool) -> None:
    labels = source.labels
    shown = int((labels.values == 1).sum())
    rows = torch.from_numpy(labels.starts[1:] - labels.starts[:-1])
    if labels.fill == 0 and bool((rows == 1).all()) and shown == len(labels):
        return
    targets = source.targets
    counts = (targets == 1).sum(1)
    is_wrong = counts != 1
    if is_optional:
        is_wrong &= (targets != -1).any(1)
    wrong = is_wrong.nonzero().squeeze(1)
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            _not_single(task, int(counts[first]), split, source.image_name(first), f', and {len(wrong)} such pictures'))


def _not_single(task: str, count: int, split: str, name: str, more: str = '') -> str:
    return (
        f"task {task!r} needs exactly one present label a picture, got {count} in {split}, picture {name!r}"
        f"{more}; take task 'multi_label'.")


def _difference(labels: Sequence[str], others: Sequence[str]) -> str:
    """How two lists of labels differ, in words."""
    only, lacking = sorted(set(labels) - set(others)), sorted(set(others) - set(labels))
    if only or lacking:
        return f'such as {(only or lacking)[0]!r}, which only one has'
    return 'in another order'
