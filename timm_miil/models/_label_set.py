"""Networks whose labels are names or embeddings, free at run time, and what timm keeps of the label set."""
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_miil._checks import check_choice, shown
from timm_miil._timm import update_model_args
from timm_miil.heads.attach import POOLS
from timm_miil.heads.text import embed_characters, note_equal
from timm_miil.models._headed import HeadedClassifier, create_headed, fit_stems
from timm_miil.models._loading import unwrap

__all__ = ['LabelSetClassifier', 'checkpoint_filter_fn', 'create_label_set']

LabelSetT = TypeVar('LabelSetT', bound='LabelSetClassifier')


class LabelSetClassifier(HeadedClassifier):
    """A timm backbone and a head with `set_queries`.

    `num_classes` is the number of labels of the current set, 0 when there is none. The label set is not among the
    weights: one weight file serves every label set. Labels given by name are an argument of the model, so that a saved
    folder has them; embeddings given by `set_queries` are set again by whoever loads it.

    Args:
        backbone: Name of a registered model, optionally with a tag.
        head: Builds the head: called with in_features, num_classes, device and dtype.
        labels: Names of the labels, in the order of the logits; None or empty for a label set that comes later, by
            `set_labels` or `set_queries`.
        num_classes: None or the number of labels; 0 for pooled features without a head.
        text_dim: Length of a label's embedding.
        **kwargs: Passed to `HeadedClassifier`.

    Raises:
        TypeError: If labels is no list of names, or a size of the head is not an int.
        ValueError: If the backbone is unknown or its features cannot carry a head, num_classes is not the number of
            labels, or a setting is out of range.
    """

    def __init__(
            self,
            backbone: str,
            head: Callable[..., nn.Module],
            labels: Sequence[str] | None,
            num_classes: int | None,
            text_dim: int,
            **kwargs: Any,
    ) -> None:
        if labels is not None:
            _check_kind(labels)
        elif num_classes:
            raise ValueError(
                f'num_classes={num_classes} names no labels; pass labels=[...], or leave num_classes out and call '
                f'set_labels(names) or set_queries(embeddings).')
        if labels and num_classes and num_classes != len(labels):
            raise ValueError(f'num_classes={num_classes} contradicts the {len(labels)} labels; leave num_classes out.')
        has_head = num_classes != 0 or labels is not None and not labels  # see _note_labels
        super().__init__(backbone, int(has_head), head, **kwargs)
        self.has_head, self.num_classes = has_head, 0
        self.text_dim = text_dim
        self.labels: tuple[str, ...] | None = None
        if labels and has_head:
            self.set_labels(labels)

    @torch.jit.ignore
    def set_labels(self, labels: Sequence[str]) -> None:
        """Choose the label set by name; the names are embedded by their characters, see `embed_characters`.

        Of names that are embedded alike, such as 'cat' and 'Cat', a warning is logged.

        Args:
            labels: Names, in the order of the logits.

        Raises:
            TypeError: If labels is no list of names.
            ValueError: If it is empty, or a name occurs twice or cannot be embedded.
        """
        _check_kind(labels)
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(
                f'labels must be one or more different names, got {len(set(labels))} different names among '
                f'{len(labels)}.')
        embeddings = embed_characters(labels, self.text_dim)
        note_equal(labels, embeddings)
        self.set_queries(embeddings)
        self.labels = tuple(labels)
        self._note_labels()

    @torch.jit.ignore
    def set_queries(self, embeddings: Tensor) -> None:
        """Choose the label set by embeddings of any source; it has no names then.

        Args:
            embeddings: One row a label, shape (K, text_dim), any floating dtype and device.

        Raises:
            TypeError: If embeddings is not a tensor of a floating dtype.
            ValueError: If the shape is another, or a value is not finite.
        """
        head: Any = self.head if self.has_head else self._new_head(1).train(self.training)
        head.set_queries(embeddings)
        self.head, self.has_head = head, True
        self.num_classes, self.labels = len(embeddings), None
        self._note_labels()

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Remove the head, or change the pooling, in place.

        Args:
            num_classes: 0 removes the head; the number of labels keeps it.
            global_pool: New pooling, 'avg' or ''; None keeps it.

        Raises:
            ValueError: If num_classes is another number, or global_pool is unknown.
        """
        if num_classes not in (0, self.num_classes):
            raise ValueError(
                f'a zero-shot head takes labels, not a number of classes, got num_classes={num_classes}; call '
                f'set_labels(names) or set_queries(embeddings).')
        if num_classes == 0:
            super().reset_classifier(0, global_pool)
            self.has_head, self.labels = False, None
            self._note_labels()
        elif global_pool is not None:
            check_choice(global_pool=global_pool, choices=POOLS)
            self.global_pool = global_pool

    def forward_head(self, x: Tensor | list[Tensor] | dict[str, Tensor], pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of unpooled features.

        Args:
            x: What `forward_features` gave.
            pre_logits: Give the pooled features (B, num_features) instead, as a model without a head does.

        Raises:
            RuntimeError: If there is a head and no label set yet.
        """
        if pre_logits or not self.has_head:
            return self._pool(x)
        return self._classify(x)

    def _note_labels(self) -> None:
        """Keep timm's records of the model in step with the label set."""
        # Empty labels stand for a head whose label set comes later, in a saved folder too.
        update_model_args(self, labels=list(self.labels or ()) if self.has_head else None)
        cfg: dict[str, Any] = getattr(self, 'pretrained_cfg', {})  # not there before timm's builder is done
        cfg.update(num_classes=self.num_classes, label_names=self.labels, label_descriptions=None)


def _check_kind(labels: Sequence[str]) -> None:
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise TypeError(f'labels must be a list of names, got {type(labels).__name__} {shown(labels)}.')


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: LabelSetClassifier) -> dict[str, Tensor]:
    """Bring a checkpoint to the model's names; no weight depends on the labels.

    Args:
        state_dict: What was read from the file, wrappers included.
        model: The network to load into.

    Raises:
        CheckpointError: If anything is missing, unknown or of another shape.
    """
    state_dict = unwrap(state_dict)
    model.pretrained_cfg['num_classes'] = model.num_classes  # timm drops the classifier when this differs
    if not model.has_head:
        state_dict = {key: tensor for key, tensor in state_dict.items() if not key.startswith('head.')}
    return fit_stems(state_dict, model)


def create_label_set(
        model_class: Callable[..., LabelSetT],
        variant: str,
        pretrained: bool,
        *,
        labels: Sequence[str] | None = None,
        num_classes: int | None = None,
        **kwargs: Any,
) -> LabelSetT:
    """Build a registered network, as `create_headed` does; saved labels yield to the caller's.

    Raises:
        CheckpointError: If the weights cannot be read or do not fit.
    """
    saved = kwargs.get('pretrained_model_args') or {}  # timm puts the arguments of a saved folder under the caller's
    if saved.get('num_classes'):
        if num_classes == 0:
            labels = None
        elif num_classes == saved['num_classes'] and labels != saved.get('labels'):
            num_classes = None  # it belongs to the saved labels
    elif labels is not None and saved.get('labels') == []:
        num_classes = None  # of a head that had no labels yet
    model = create_headed(
        model_class, variant, pretrained, checkpoint_filter_fn, labels=labels, num_classes=num_classes, **kwargs)
    if isinstance(model, LabelSetClassifier):  # timm wraps it for features_only
        model._note_labels()
    return model
