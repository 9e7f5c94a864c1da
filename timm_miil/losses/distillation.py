"""Knowledge distillation from a teacher's logits, for exclusive and for independent labels.

Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531. The objective and the settings of
`supervised_distillation_loss` are those of Ridnik et al., "Solving ImageNet: a Unified Scheme for Training any
Backbone to Top Results" (USI), arXiv:2204.03475, checked against its published code.

Deviations: half precision is computed in float32, and `renormalize` divides the shift of the means by the
teacher's deviation, which the published code leaves out.
"""
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_miil._checks import (
    check_choice, check_floating, check_indices, check_ndim, check_same_shape, check_values)
from timm_miil.losses._precision import can_read, widen
from timm_miil.losses._reduce import REDUCTIONS, reduce
from timm_miil.losses._settings import check_temperature, check_weights

__all__ = [
    'DistillationLoss', 'MultiLabelDistillationLoss', 'ProbabilityDistillationLoss', 'SupervisedDistillationLoss',
    'distillation_loss', 'multilabel_distillation_loss', 'probability_distillation_loss', 'renormalize',
    'supervised_distillation_loss',
]


def distillation_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        temperature: float = 1.0,
        reduction: str = 'batchmean',
) -> Tensor:
    """Divergence of the student's class distribution from the teacher's.

    With p = softmax(teacher_logits / T) and q = softmax(student_logits / T), an element is T^2 p log(p / q), and a
    row sums to T^2 KL(p || q), at least 0. The factor T^2 keeps the size of the gradient whatever T is
    (arXiv:1503.02531, section 2). The teacher gets no gradient.

    Args:
        student_logits: Raw scores, shape (B, C); any floating dtype, computed in float32 or wider.
        teacher_logits: Raw scores of the teacher on the same pictures, shape (B, C); any floating dtype.
        temperature: Softens both distributions (T), in [0.001, 1000].
        reduction: 'batchmean' (sum / B, the divergence a row), 'sum', 'mean' over B * C or 'none'; the words of
            `torch.nn.functional.kl_div`.

    Returns:
        A scalar, or shape (B, C) when reduction is 'none', whose single elements may be negative. Float32, or
        float64 if an input is. An empty batch gives 0.

    Raises:
        TypeError: If a tensor is not floating-point.
        ValueError: If the shapes differ or are not (B, C), or a setting is out of range.

    Example:
        >>> import torch
        >>> distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
        tensor(0.3278)
    """
    _check_settings(temperature, reduction)
    _check_logits(student_logits, teacher_logits)
    log_q = F.log_softmax(widen(student_logits) / temperature, dim=1)
    log_p = F.log_softmax(widen(teacher_logits.detach()) / temperature, dim=1)
    loss = F.kl_div(log_q, log_p, reduction='none', log_target=True)
    return reduce(loss, reduction) * temperature ** 2


def multilabel_distillation_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        temperature: float = 1.0,
        reduction: str = 'batchmean',
) -> Tensor:
    """Divergence of the student's probability of each label from the teacher's, label by label.

    With p = sigmoid(teacher_logits / T) and q = sigmoid(student_logits / T), an element is
    T^2 (p log(p / q) + (1 - p) log((1 - p) / (1 - q))), at least 0. It is `distillation_loss` over the two classes
    present and absent of each label, the usual form for labels that do not exclude one another; no one paper's. The
    teacher gets no gradient.

    Args:
        student_logits: Raw scores, shape (B, C); any floating dtype, computed in float32 or wider.
        teacher_logits: Raw scores of the teacher on the same pictures, shape (B, C); any floating dtype.
        temperature: Softens all probabilities (T), in [0.001, 1000].
        reduction: 'batchmean' (sum over the labels / B), 'sum', 'mean' over B * C or 'none'.

    Returns:
        A scalar, or shape (B, C) when reduction is 'none'. Float32, or float64 if an input is. An empty batch
        gives 0.

    Raises:
        TypeError: If a tensor is not floating-point.
        ValueError: If the shapes differ or are not (B, C), or a setting is out of range.

    Example:
        >>> import torch
        >>> multilabel_distillation_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]]), reduction='none')
        tensor([[0.3278, 0.0000]])
    """
    _check_settings(temperature, reduction)
    _check_logits(student_logits, teacher_logits)
    student, teacher = widen(student_logits) / temperature, widen(teacher_logits.detach()) / temperature
    # sigmoid(-x), not 1 - sigmoid(x), and logsigmoid: exact at both ends.
    loss = (
        teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
        + teacher.neg().sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student)))
    return reduce(loss, reduction) * temperature ** 2


def probability_distillation_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        reduction: str = 'mean',
) -> Tensor:
    """Squared distance of the two class distributions (KD-MSE): (softmax(z_s) - softmax(z_t))^2 an element.

    One of the objectives in the published code of classifier sharing (arXiv:2201.06945), checked against it.

    Args:
        student_logits: Raw scores z_s, shape (B, C); any floating dtype, computed in float32 or wider.
        teacher_logits: Raw scores z_t of the teacher, shape (B, C). They get no gradient.
        reduction: 'mean' over B * C (the published one), 'batchmean' (sum / B), 'sum' or 'none'.

    Returns:
        A scalar, or shape (B, C) when reduction is 'none'. Float32, or float64 if an input is.

    Raises:
        TypeError: If a tensor is not floating-point.
        ValueError: If the shapes differ or are not (B, C), or reduction is unknown.

    Example:
        >>> import torch
        >>> probability_distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
        tensor(0.1450)
    """
    check_choice(reduction=reduction, choices=REDUCTIONS)
    _check_logits(student_logits, teacher_logits)
    gap = widen(student_logits).softmax(dim=1) - widen(teacher_logits.detach()).softmax(dim=1)
    return reduce(gap.square(), reduction)


def supervised_distillation_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Tensor,
        *,
        task_loss_weight: float = 1.0,
        distill_loss_weight: float = 5.0,
        temperature: float = 1.0,
) -> Tensor:
    """Cross-entropy with the labels plus divergence from the teacher, each with its weight.

    task_loss_weight * CE(student_logits, targets) + distill_loss_weight * `distillation_loss`, both averaged over the
    batch. The defaults are USI's, whose "KD only" is `task_loss_weight=0`. The weights are named and mean as in
    timm's `LogitDistillationTask`.

    Args:
        student_logits: Raw scores, shape (B, C); any floating dtype, computed in float32 or wider.
        teacher_logits: Raw scores of the teacher on the same, equally mixed pictures, shape (B, C).
        targets: Class indices, shape (B,), or class probabilities, shape (B, C), as mixup and label smoothing make.
            Values are checked in host memory; elsewhere the caller vouches for them.
        task_loss_weight: Weight of the cross-entropy, at least 0.
        distill_loss_weight: Weight of the divergence (alpha_kd), at least 0.
        temperature: Softens the distributions of the divergence only, in [0.001, 1000].

    Returns:
        A scalar; float32, or float64 if an input is. An empty batch gives 0.

    Raises:
        TypeError: If the logits are not floating-point, or targets of shape (B,) not of an integer dtype.
        ValueError: If the shapes do not fit, a setting is out of range, or targets in host memory are not in
            [0, C) or [0, 1].

    Example:
        >>> import torch
        >>> logits, targets = torch.tensor([[0.0, 0.0]]), torch.tensor([0])
        >>> supervised_distillation_loss(logits, logits, targets)
        tensor(0.6931)
    """
    check_weights(task_loss_weight=task_loss_weight, distill_loss_weight=distill_loss_weight)
    loss = distill_loss_weight * distillation_loss(student_logits, teacher_logits, temperature=temperature)
    return loss + task_loss_weight * _cross_entropy(widen(student_logits), targets)


class DistillationLoss(nn.Module):
    """Distillation between exclusive classes; see `distillation_loss` for the mathematics and the arguments."""

    def __init__(self, temperature: float = 1.0, *, reduction: str = 'batchmean') -> None:
        super().__init__()
        _check_settings(temperature, reduction)
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Loss of the student's logits (B, C) against the teacher's (B, C)."""
        return distillation_loss(
            student_logits, teacher_logits, temperature=self.temperature, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return f'temperature={self.temperature}, reduction={self.reduction!r}'


class MultiLabelDistillationLoss(nn.Module):
    """Distillation of independent labels; see `multilabel_distillation_loss` for the mathematics and the arguments."""

    def __init__(self, temperature: float = 1.0, *, reduction: str = 'batchmean') -> None:
        super().__init__()
        _check_settings(temperature, reduction)
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Loss of the student's logits (B, C) against the teacher's (B, C)."""
        return multilabel_distillation_loss(
            student_logits, teacher_logits, temperature=self.temperature, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return f'temperature={self.temperature}, reduction={self.reduction!r}'


class ProbabilityDistillationLoss(nn.Module):
    """KD-MSE with a fixed reduction; see `probability_distillation_loss` for the mathematics and the arguments."""

    def __init__(self, *, reduction: str = 'mean') -> None:
        super().__init__()
        check_choice(reduction=reduction, choices=REDUCTIONS)
        self.reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Loss of the student's logits (B, C) against the teacher's (B, C)."""
        return probability_distillation_loss(student_logits, teacher_logits, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return f'reduction={self.reduction!r}'


class SupervisedDistillationLoss(nn.Module):
    """Labels and teacher together; see `supervised_distillation_loss` for the mathematics and the arguments."""

    def __init__(
            self,
            *,
            task_loss_weight: float = 1.0,
            distill_loss_weight: float = 5.0,
            temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_weights(task_loss_weight=task_loss_weight, distill_loss_weight=distill_loss_weight)
        check_temperature(temperature)
        self.task_loss_weight = task_loss_weight
        self.distill_loss_weight = distill_loss_weight
        self.temperature = temperature

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of the student's logits (B, C) against the teacher's (B, C) and targets (B,) or (B, C)."""
        return supervised_distillation_loss(
            student_logits, teacher_logits, targets, task_loss_weight=self.task_loss_weight,
            distill_loss_weight=self.distill_loss_weight, temperature=self.temperature)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return (
            f'task_loss_weight={self.task_loss_weight}, distill_loss_weight={self.distill_loss_weight}, '
            f'temperature={self.temperature}')


def renormalize(
        images: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        teacher_mean: Sequence[float],
        teacher_std: Sequence[float],
) -> Tensor:
    """Images normalised for the student, as the teacher wants them.

    (images * std + mean - teacher_mean) / teacher_std. Equal statistics give the images themselves.

    Args:
        images: Normalised with mean and std, shape (..., C, H, W); any floating dtype.
        mean: The student's means, one a channel, in the unit of pixels in [0, 1].
        std: The student's standard deviations, one a channel, above 0.
        teacher_mean: The teacher's means, one a channel.
        teacher_std: The teacher's standard deviations, one a channel, above 0.

    Returns:
        Shape and dtype of images; computed in float32 or wider.

    Raises:
        TypeError: If images are not floating-point.
        ValueError: If a statistic has not one number a channel, or a standard deviation is not above 0.

    Example:
        >>> import torch
        >>> renormalize(torch.zeros(1, 1, 1, 1), mean=[0.5], std=[0.5], teacher_mean=[0.0], teacher_std=[1.0])
        tensor([[[[0.5000]]]])
    """
    check_floating(images=images)
    channels = images.shape[-3] if images.ndim >= 3 else 0
    for name, numbers in {'mean': mean, 'std': std, 'teacher_mean': teacher_mean, 'teacher_std': teacher_std}.items():
        if len(numbers) != channels or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f'{name} must have one finite number for each channel of images, got {list(numbers)} for shape '
                f'{tuple(images.shape)}, which is read as (..., C, H, W).')
        if name.endswith('std') and min(numbers) <= 0:
            raise ValueError(f'{name} must be above 0, got {list(numbers)}.')
    if list(mean) == list(teacher_mean) and list(std) == list(teacher_std):
        return images
    wide = widen(images)
    scale = [own / theirs for own, theirs in zip(std, teacher_std)]
    shift = [(own - theirs) / by for own, theirs, by in zip(mean, teacher_mean, teacher_std)]
    # Not by new_tensor, which waits until an accelerator has done all that it was given before.
    factor, addend = (
        torch.tensor(numbers, dtype=wide.dtype).to(wide.device, non_blocking=True).view(-1, 1, 1)
        for numbers in (scale, shift))
    return (wide * factor + addend).to(images.dtype)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum_j target_j log softmax(logits)_j; 0 for an empty batch."""
    if targets.ndim == 1:
        check_indices(targets=targets, num_classes=logits.shape[1], read=can_read(targets))
        targets = targets.long()
    else:
        check_ndim(2, targets=targets)
        if can_read(targets):
            check_values(targets=targets, low=0.0, high=1.0, hint='class indices have shape (B,)')
        targets = targets.detach().to(logits.dtype)
    if targets.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(
            f'targets must be class indices of shape {tuple(logits.shape[:1])} or probabilities of shape '
            f'{tuple(logits.shape)}, got shape {tuple(targets.shape)}.')
    return reduce(F.cross_entropy(logits, targets, reduction='none'), 'mean')


def _check_settings(temperature: float, reduction: str) -> None:
    check_temperature(temperature)
    check_choice(reduction=reduction, choices=REDUCTIONS)


def _check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    check_floating(student_logits=student_logits, teacher_logits=teacher_logits)
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    check_ndim(2, student_logits=student_logits)
