"""How a checkpoint under a model's names is brought to it: whole, but for other classes and input channels."""
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from timm_miil.models._loading import check_fit, explain_checkpoint_errors
from timm_miil.models._pretrained_file import keep_in

__all__ = ['COUNTER', 'class_count', 'create_published', 'fill_counters', 'fit_published']

COUNTER = 'num_batches_tracked'


def fill_counters(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors, and zeros for the counters of BatchNorm that old layers did not have."""
    missing = [key for key in model.state_dict() if key.endswith(COUNTER) and key not in state_dict]
    return {**state_dict, **{key: torch.zeros((), dtype=torch.int64) for key in missing}}


def class_count(state_dict: Mapping[str, Tensor], classifier: str) -> int:
    """Rows of a classifier; 0 where there is none."""
    weight = state_dict.get(f'{classifier}.weight')
    return 0 if weight is None or weight.ndim == 0 else weight.shape[0]


def fit_published(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring tensors under the model's names to its classes; timm loads the result.

    A file of as many classes as the model loads whole. A model that was asked for other classes than its
    configuration's keeps its own fresh classifier. Other input channels are left to timm.

    Args:
        state_dict: Tensors under the model's names.
        model: The network to load into, as timm's builder made it.

    Raises:
        CheckpointError: If anything is missing, unknown or of another shape.
    """
    source: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    classifiers = _all(source['classifier'])
    num_classes = int(getattr(model, 'num_classes', 0))  # a features network has none
    in_file = class_count(state_dict, classifiers[0])
    tensors = fill_counters(state_dict, model)
    if in_file == num_classes and in_file:
        source['num_classes'] = in_file  # the file decides: timm drops the classifier when this differs
    elif num_classes != source['num_classes']:
        prefixes = tuple(f'{name}.' for name in classifiers)
        fresh = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(prefixes)}
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefixes)} | fresh
    stems = frozenset[str]()
    if model.in_chans != source['input_size'][0]:
        stems = frozenset(f'{name}.weight' for name in _all(source['first_conv']))
    check_fit(tensors, model, free=stems)
    return tensors


def _all(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def create_published(
        model_class: Callable[..., nn.Module],
        variant: str,
        pretrained: bool,
        filter_fn: Callable[[Mapping[str, Any], nn.Module], dict[str, Tensor]],
        **kwargs: Any,
) -> Any:
    """Build a registered network, by timm's builder and with our errors for its file.

    Raises:
        CheckpointError: If the weights cannot be read or do not fit.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    kwargs = keep_in(cfg, kwargs)
    with explain_checkpoint_errors(cfg.to_dict() if pretrained else {}, kwargs.get('cache_dir')):
        return build_model_with_cfg(model_class, variant, pretrained, pretrained_filter_fn=filter_fn, **kwargs)
