"""Supervised training where each picture has exactly one label."""
import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

__all__ = ['SingleLabelTask']


class SingleLabelTask(ClassificationTask):
    """timm's classification task for labels that are given as a table, as those of several labels are.

    A batch of pictures (B, 3, H, W) and float targets (B, C) gives {'loss': scalar, 'output': logits (B, C)}. A row of
    the targets is 1 at its label and 0 elsewhere, or a distribution, as Mixup makes it.

    Args:
        model: Network to train.
        criterion: Maps logits (B, C) to a scalar, against distributions (B, C) if `soft_targets`, else against class
            indices (B,); cross-entropy unless another is given.
        soft_targets: What the criterion takes. One of class indices gets the most probable class.
        device: Where the task's own tensors live; the model is moved by the caller.

    Raises:
        ValueError: In `forward`, if targets are not float or not (B, C).

    Example:
        >>> task = SingleLabelTask(nn.Linear(4, 3))
        >>> task(torch.rand(2, 4), torch.eye(3)[:2])['output'].shape
        torch.Size([2, 3])
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: nn.Module | None = None,
            *,
            soft_targets: bool = True,
            device: torch.device | None = None,
    ) -> None:
        super().__init__(model, criterion or nn.CrossEntropyLoss(), device=device, verbose=False)
        self.soft_targets = soft_targets or criterion is None

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a batch, as the class says."""
        return super().forward(input, self.criterion_target(target))

    def criterion_target(self, target: Tensor) -> Tensor:
        """What the criterion takes of a batch's targets (B, C); raise ValueError unless they are such."""
        if target.ndim != 2 or not target.is_floating_point():
            raise ValueError(
                f'target must be float of shape (B, C), one column a class, got {target.dtype} {tuple(target.shape)}; '
                f'class indices become such by torch.nn.functional.one_hot(target, C).float().')
        return target if self.soft_targets else target.argmax(1)
