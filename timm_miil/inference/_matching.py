"""Labels of a model and of data, matched by name."""
import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from timm_miil._checks import nearest, shown

__all__ = ['Matching', 'find_identifiers', 'match_labels']

NAMED_AT_MOST = 3


@dataclasses.dataclass(frozen=True)
class Matching:
    """The labels that a model and data have both.

    Attributes:
        names: Their names, in the order of the model's classes, as the data have them.
        columns: Which of the model's classes each of them is.
        only_model: The model's names that the data lack.
        only_data: The data's names that the model lacks.
    """

    names: tuple[str, ...]
    columns: tuple[int, ...]
    only_model: tuple[str, ...]
    only_data: tuple[str, ...]


def match_labels(
        model_names: Sequence[str], data_names: Sequence[str], *, identifiers: Sequence[str] | None = None,
        common: bool = False) -> Matching:
    """Match labels by name.

    Args:
        model_names: Names of the model's classes.
        data_names: Different names of the data's labels.
        identifiers: Other names of the model's classes, such as 'n01440764'; taken where more of the data's names are
            among them.
        common: Whether the labels that both have suffice.

    Raises:
        ValueError: If there is no common label, a common one names two classes of the model, or one side has more and
            `common` is not set.
    """
    wanted = set(data_names)
    if identifiers is not None and len(wanted.intersection(identifiers)) > len(wanted.intersection(model_names)):
        model_names = identifiers
    known = set(model_names)
    found = [(name, column) for column, name in enumerate(model_names) if name in wanted]
    matching = Matching(
        names=tuple(name for name, _ in found), columns=tuple(column for _, column in found),
        only_model=tuple(name for name in model_names if name not in wanted),
        only_data=tuple(name for name in data_names if name not in known))
    if not found:
        raise ValueError(
            f'the model and the data have no label in common: the model has {_few(model_names)}, the data '
            f'{_few(data_names)}; name the labels of the data as the model does.')
    name, count = Counter(matching.names).most_common(1)[0]
    if count > 1:
        raise ValueError(f'the model has {count} classes of the name {shown(name)}, which the data have once.')
    if not common and (matching.only_model or matching.only_data):
        raise ValueError(f'{_difference(matching, len(model_names), len(data_names))}')
    return matching


def find_identifiers(model: nn.Module) -> tuple[str, ...] | None:
    """Identifiers of a model's classes, beside the names for people that `find_label_names` gives; None if unknown.

    They are the `label_names` of its configuration, or of timm's own ImageNet weights the WordNet synsets.
    """
    cfg, num_classes = cast(dict[str, Any], model.pretrained_cfg), cast(int, model.num_classes)
    names = cfg.get('label_names')
    if not names:
        is_timms = not cfg.get('source') or str(cfg.get('hf_hub_id')).startswith('timm/')
        subset = infer_imagenet_subset(model) if is_timms else None
        names = ImageNetInfo(subset).label_names() if subset else None
    if isinstance(names, Sequence) and not isinstance(names, str) and len(names) == num_classes:
        return tuple(map(str, names))
    return None


def _difference(matching: Matching, num_model: int, num_data: int) -> str:
    parts = []
    if matching.only_model:
        parts.append(f'the data lack {len(matching.only_model)} of the {num_model} of the model '
                     f'({_few(matching.only_model)})')
    if matching.only_data:
        first = matching.only_data[0]
        parts.append(f'the model lacks {len(matching.only_data)} of the {num_data} of the data '
                     f'({_few(matching.only_data)}); for {shown(first)}, '
                     f'{nearest(first, [*matching.names, *matching.only_model]).removesuffix(".")}')
    return (
        f'the labels of model and data differ: {"; ".join(parts)}. Name them alike, or measure the '
        f'{len(matching.names)} that both have: common=True, --common.')


def _few(names: Sequence[str]) -> str:
    more = f' and {len(names) - NAMED_AT_MOST} more' if len(names) > NAMED_AT_MOST else ''
    return ', '.join(map(shown, names[:NAMED_AT_MOST])) + more
