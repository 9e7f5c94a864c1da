"""Entries of the catalogue in the words of timm's pretrained configurations."""
import os
import re
from pathlib import Path

from timm_miil.catalog._records import LabelSet, Paper, Weights

__all__ = ['HUB_NAMESPACE_VARIABLE', 'can_register', 'timm_cfg']

HUB_NAMESPACE_VARIABLE = 'TIMM_MIIL_HUB_NAMESPACE'


def can_register(entry: Weights) -> bool:
    """Whether timm lacks these weights, can hold them, and gets all the facts that it would else make up."""
    needed = (entry.num_classes, entry.mean, entry.std, entry.interpolation, entry.crop_pct, entry.crop_mode)
    return entry.timm_tag is None and entry.timm.loadable and None not in needed


def timm_cfg(entry: Weights, *, root: Path, paper: Paper, label_set: LabelSet | None) -> dict[str, object]:
    """Keyword arguments of timm's `PretrainedCfg` for one entry; facts the entry lacks are left out.

    Args:
        entry: The entry.
        root: Folder that `entry.file` is relative to.
        paper: The paper it cites.
        label_set: Its label set, or None.

    Raises:
        ValueError: If the environment variable `HUB_NAMESPACE_VARIABLE` is no namespace.
    """
    stride, (_, height, width) = entry.timm.pool_stride, entry.input_size
    cfg = {
        'url': entry.url,
        'file': entry.file and str(root / entry.file),
        'hf_hub_id': _hub_id(entry),
        'input_size': entry.input_size,
        'fixed_input_size': entry.timm.fixed_input_size,
        'interpolation': entry.interpolation,
        'crop_pct': entry.crop_pct,
        'crop_mode': entry.crop_mode,
        'mean': entry.mean,
        'std': entry.std,
        'num_classes': entry.num_classes,
        'label_names': label_set and label_set.labels,
        # Rounded up, as padded convolutions do.
        'pool_size': stride and (-(-height // stride), -(-width // stride)),
        'first_conv': _one_or_all(entry.timm.first_conv),
        'classifier': _one_or_all(entry.timm.classifier),
        'license': entry.licence and entry.licence.lower(),
        'origin_url': entry.source_repo and f'https://github.com/{entry.source_repo}',
        'paper_name': paper.title,
        'paper_ids': paper.arxiv and f'arXiv:{paper.arxiv}',
    }
    return {key: value for key, value in cfg.items() if value is not None}


def _one_or_all(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """timm's form: the name itself when there is one, a tuple when there are several."""
    return names[0] if len(names) == 1 else names or None


def _hub_id(entry: Weights) -> str | None:
    """The repository with the weights; in the namespace of the environment, but for what timm or this package has."""
    namespace = os.environ.get(HUB_NAMESPACE_VARIABLE)
    if not namespace or entry.timm_tag or entry.file:
        return entry.hf_hub_id
    if not re.fullmatch(r'[\w.-]+', namespace):
        raise ValueError(
            f'{HUB_NAMESPACE_VARIABLE} must name a user or an organisation on the Hub, got {namespace!r}.')
    _, _, repository = (entry.hf_hub_id or f'/{entry.name}').partition('/')
    return f'{namespace}/{repository}'
