"""Training on positive and unlabelled labels only, with mixed pictures as a regulariser (PU-MLC).

Yuan et al., "Positive Label Is All You Need for Multi-Label Classification", arXiv:2306.16016. Pairs, share and weight
of the mixed pictures are those of the published code, github.com/TAKELAMAG/PU-MLC.

Deviation: pictures and mixed pictures go through the network as one batch, where the published code runs it twice with
its batch norms fixed.
"""
import torch
from torch import Tensor, nn
from torch.distributions import Beta

from timm_miil._checks import check_choice, check_range
from timm_miil.losses import PUMultiLabelLoss, pu_mixup_consistency
from timm_miil.tasks.multi_label import MultiLabelTask

__all__ = ['PositiveUnlabeledTask']


class PositiveUnlabeledTask(MultiLabelTask):
    """PU-MLC: a label that is not known to be present is unlabelled, whatever stands there.

    loss = criterion + consistency_weight * consistency. The second half of a batch, x', is mixed with the first half in
    a random order, x, as lam x + (1 - lam) x' with one lam ~ Beta(mixup_alpha, mixup_alpha) a batch, and the network's
    probabilities on the mixed pictures shall be the mixed ones (`pu_mixup_consistency`). Both terms are summed over the
    classes, or averaged, as the criterion is.

    A batch of pictures (B, I, H, W) and float targets (B, C) of 1, 0 and -1 gives {'loss': scalar, 'output': logits
    (B, C)}. Pictures are mixed in training mode only, of an odd batch all but one. What is random is drawn from torch's
    global generator.

    Args:
        model: Network to train.
        criterion: A `PUMultiLabelLoss`; None for its defaults.
        consistency_weight: Weight of the consistency, at least 0; 0 mixes nothing.
        mixup_alpha: Both parameters of the distribution of lam, above 0.
        threshold: As of `MultiLabelTask`.
        device: As of `MultiLabelTask`.

    Raises:
        TypeError: If criterion is another loss.
        ValueError: If a setting is out of range, or the criterion does not reduce; in `forward`, if targets are not
            float or not (B, C).

    Example:
        >>> task = PositiveUnlabeledTask(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
        >>> task(torch.rand(4, 3, 2, 2), torch.eye(4)[:, :3])['output'].shape
        torch.Size([4, 3])
    """

    criterion: PUMultiLabelLoss

    def __init__(
            self,
            model: nn.Module,
            criterion: PUMultiLabelLoss | None = None,
            *,
            consistency_weight: float = 1.0,
            mixup_alpha: float = 0.3,
            threshold: float = 0.5,
            device: torch.device | None = None,
    ) -> None:
        criterion = PUMultiLabelLoss() if criterion is None else criterion
        if not isinstance(criterion, PUMultiLabelLoss):
            raise TypeError(
                f'criterion must be a PUMultiLabelLoss, got {type(criterion).__name__}; train with another loss by '
                f'MultiLabelTask.')
        check_choice(reduction=criterion.reduction, choices=('mean', 'sum'))
        check_range(low=0.0, high=float('inf'), consistency_weight=consistency_weight)
        check_range(low=1e-3, high=1e3, mixup_alpha=mixup_alpha)
        super().__init__(model, criterion, threshold=threshold, device=device)
        self.consistency_weight = consistency_weight
        self.mixup_alpha = mixup_alpha

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a batch, as the class says."""
        half = len(input) // 2
        if not (self.training and self.consistency_weight and half):
            return super().forward(input, target)
        if target.ndim != 2 or not target.is_floating_point():
            raise ValueError(f'target must be float of shape (B, C), got {target.dtype} {tuple(target.shape)}.')
        lam = float(Beta(self.mixup_alpha, self.mixup_alpha).sample())
        first, second = torch.randperm(half).to(input.device), slice(len(input) - half, None)
        mixed = lam * input[first] + (1.0 - lam) * input[second]
        output, mixed_output = self.trainable_module(torch.cat([input, mixed])).tensor_split([len(input)])
        consistency = pu_mixup_consistency(
            mixed_output, output[first], target[first], output[second], target[second], lam=lam,
            reduction='batchmean' if self.criterion.reduction == 'sum' else 'mean')
        loss = self.criterion(output, target) + self.consistency_weight * consistency
        return {'loss': loss, 'output': output}
