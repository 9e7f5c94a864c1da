"""Supervised multi-label training: a model and a loss over independent labels."""
import torch
from timm.task import MultiLabelClassificationTask
from torch import nn

from timm_miil.losses import AsymmetricLoss

__all__ = ['MultiLabelTask']


class MultiLabelTask(MultiLabelClassificationTask):
    """timm's multi-label task with the asymmetric loss unless another is given.

    A batch of pictures (B, 3, H, W) and float targets (B, C) gives {'loss': scalar, 'output': logits (B, C)}. EMA,
    evaluator (exact mAP), compilation and checkpoint state are timm's.

    Args:
        model: Network to train.
        criterion: Maps logits (B, C) and targets (B, C) to a scalar.
        threshold: Probability from which the evaluator's F1 counts a label as present, in (0, 1).
        device: Where the task's own tensors live; the model is moved by the caller.

    Raises:
        ValueError: If threshold is out of range; in `forward`, if targets are not float or not (B, C).
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: nn.Module | None = None,
            *,
            threshold: float = 0.5,
            device: torch.device | None = None,
    ) -> None:
        super().__init__(model, criterion or AsymmetricLoss(), threshold=threshold, device=device, verbose=False)
