"""Semantic softmax: a softmax over the classes of each level of a tree, instead of one over all classes.

Ridnik et al., "ImageNet-21K Pretraining for the Masses", arXiv:2104.10972; checked against the published code.

Deviations: trees that lack a level, evaluation mode and half precision work (the original raised, returned 0, and lost
digits), and the teacher gets no gradient.
"""
import copy
import math

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from timm_miil._checks import (
    check_choice, check_floating, check_indices, check_ndim, check_range, check_same_length, check_same_shape)
from timm_miil.losses._padded_levels import fits, padded_grad, padded_losses
from timm_miil.losses._precision import can_read, is_eager, is_plain, widen
from timm_miil.losses._reduce import ROW_REDUCTIONS, reduce
from timm_miil.losses.hierarchy import SemanticHierarchy

__all__ = [
    'SemanticDistillationLoss', 'SemanticSoftmaxLoss', 'semantic_distillation_loss', 'semantic_softmax_loss']

_CLASSES_A_CONFIDENCE = 20  # the teacher's confidence is the probability of its n / 20 best classes, rounded up


def semantic_softmax_loss(
        logits: Tensor,
        targets: Tensor,
        hierarchy: SemanticHierarchy,
        *,
        smoothing: float = 0.2,
        reduction: str = 'mean',
) -> Tensor:
    """Cross-entropy over the classes of each level, weighted against the levels that most samples reach.

    A sample of semantic targets t (see `SemanticHierarchy`) costs, over the levels j that its class reaches,

        sum_j F_j (-(1 - e) log p_j[t_j] - e / n_j sum_i log p_j[i])    with p_j = softmax(logits of level j)

    where n_j is the size of the level, F_j its factor and e the smoothing.

    Args:
        logits: Raw scores, shape (B, K); any floating dtype, computed in float32 or wider.
        targets: Class indices in [0, K), shape (B,), of an integer dtype. Values are checked in host memory; elsewhere
            the device refuses them in its own words.
        hierarchy: The tree over the K classes, on the device of the logits. One that `is_level_ordered` saves the time
            of bringing logits into level order.
        smoothing: Label smoothing e within a level, in [0, 1); 0.2 in the published script.
        reduction: 'mean' over the batch, samples that do not reach a level included (the original's), 'sum', or 'none'.

    Returns:
        A scalar, or shape (B,) when reduction is 'none'; float32, or float64 for float64 logits. At least 0. A class
        that lies above every level costs 0, and so does an empty batch.

    Raises:
        TypeError: If logits are not floating-point, targets not integers, hierarchy no SemanticHierarchy, or smoothing
            no number.
        ValueError: If shapes do not fit, a target in host memory is out of range, or a setting is.

    Example:
        >>> hierarchy = SemanticHierarchy.from_class_tree([[0], [1], [2, 0], [3, 0], [4, 2, 0]])
        >>> semantic_softmax_loss(torch.zeros(2, 5), torch.tensor([1, 4]), hierarchy)     # log 2, (1 + 5 / 3) log 2
        tensor(1.2708)
    """
    _check_settings(hierarchy, smoothing, reduction)
    _check_logits(hierarchy, logits=logits)
    check_ndim(1, targets=targets)
    check_same_length(logits=logits, targets=targets)
    check_indices(targets=targets, num_classes=hierarchy.num_classes, read=can_read(targets))
    sizes = hierarchy.level_sizes
    loss, _ = _LevelLosses.apply(
        _in_level_order(logits, hierarchy), hierarchy(targets), (*sizes, hierarchy.num_classes - sum(sizes)),
        hierarchy.level_factors, smoothing)
    return reduce(loss, reduction)


class SemanticSoftmaxLoss(nn.Module):
    """Semantic softmax with fixed settings; see `semantic_softmax_loss` for the mathematics and the arguments.

    It keeps a copy of the hierarchy, which moves with it from device to device.
    """

    def __init__(
            self,
            hierarchy: SemanticHierarchy,
            *,
            smoothing: float = 0.2,
            reduction: str = 'mean',
    ) -> None:
        super().__init__()
        _check_settings(hierarchy, smoothing, reduction)
        self.hierarchy = copy.deepcopy(hierarchy)
        self.smoothing = smoothing
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of logits (B, K) against class indices (B,)."""
        return semantic_softmax_loss(
            logits, targets, self.hierarchy, smoothing=self.smoothing, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return f'smoothing={self.smoothing}, reduction={self.reduction!r}'


def semantic_distillation_loss(
        logits: Tensor,
        teacher_logits: Tensor,
        hierarchy: SemanticHierarchy,
        *,
        reduction: str = 'sum',
) -> Tensor:
    """Squared distance of the probabilities in each level, weighted by the teacher's confidence there.

    With a and b the softmax of student and teacher over the n classes of a level, a sample costs the sum over levels of
    w |a - b|^2, where w is the sum of the ceil(n / 20) largest entries of b. No temperature, no factors. Checked
    against the published code, which has no script that uses it: its weight beside another loss is not known.

    Args:
        logits: Raw scores of the student, shape (B, K); any floating dtype, computed in float32 or wider.
        teacher_logits: Raw scores of the teacher, shape (B, K); they get no gradient.
        hierarchy: The tree over the K classes, on the device of the logits.
        reduction: 'sum' (the original's), 'mean' over the batch, or 'none'.

    Returns:
        A scalar, or shape (B,) when reduction is 'none'; float32, or float64 if either is float64. At least 0; an empty
        batch gives 0.

    Raises:
        TypeError: If either is not floating-point, or hierarchy is no SemanticHierarchy.
        ValueError: If shapes do not fit, or the reduction is unknown.

    Example:
        >>> hierarchy = SemanticHierarchy.from_class_tree([[0], [1], [2, 0]])
        >>> semantic_distillation_loss(torch.zeros(1, 3), torch.tensor([[20.0, -20.0, 0.0]]), hierarchy)
        tensor(0.5000)
    """
    _check_hierarchy(hierarchy)
    check_choice(reduction=reduction, choices=ROW_REDUCTIONS)
    _check_logits(hierarchy, logits=logits, teacher_logits=teacher_logits)
    check_same_shape(logits=logits, teacher_logits=teacher_logits)
    levels = hierarchy.split_levels(_in_level_order(logits, hierarchy))
    teacher_levels = hierarchy.split_levels(_in_level_order(teacher_logits.detach(), hierarchy))
    loss = widen(logits).new_zeros(len(logits))
    for student, teacher in zip(levels, teacher_levels):
        student_prob, teacher_prob = widen(student).softmax(dim=1), widen(teacher).softmax(dim=1)
        count = -(-teacher.shape[1] // _CLASSES_A_CONFIDENCE)
        confidence = teacher_prob.topk(count, dim=1, sorted=False).values.sum(dim=1)
        loss = loss + confidence * (student_prob - teacher_prob).square().sum(dim=1)
    return reduce(loss, reduction)


class SemanticDistillationLoss(nn.Module):
    """Semantic distillation with fixed settings; see `semantic_distillation_loss`.

    It keeps a copy of the hierarchy, which moves with it from device to device.
    """

    def __init__(self, hierarchy: SemanticHierarchy, *, reduction: str = 'sum') -> None:
        super().__init__()
        _check_hierarchy(hierarchy)
        check_choice(reduction=reduction, choices=ROW_REDUCTIONS)
        self.hierarchy = copy.deepcopy(hierarchy)
        self.reduction = reduction

    def forward(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Loss of the student's logits (B, K) against the teacher's (B, K)."""
        return semantic_distillation_loss(logits, teacher_logits, self.hierarchy, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return f'reduction={self.reduction!r}'


def _in_level_order(logits: Tensor, hierarchy: SemanticHierarchy) -> Tensor:
    if hierarchy.is_level_ordered:
        return logits
    ordered: Tensor = _LevelOrder.apply(logits, hierarchy.level_order, hierarchy.level_rank)
    return ordered


class _LevelOrder(torch.autograd.Function):
    """Columns in another order; the gradient is a permutation too, where that of index_select is a sum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, order: Tensor, rank: Tensor) -> Tensor:
        # A compiler repeats a gather in each pass over a level, but a scatter is written once. Without one, gathers are
        # the faster on a processor, except of half precision.
        if is_eager() and logits.dtype.itemsize >= 4:
            return logits.index_select(1, order)
        return torch.empty_like(logits).index_copy(1, rank, logits)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        order, rank = ctx.saved_tensors                             # type: ignore[attr-defined]
        return _LevelOrder.apply(grad, rank, order), None, None


class _LevelLosses(torch.autograd.Function):
    """Loss of each row (B,), and log-sum-exp of its levels (B, J), of scores in level order.

    With p and s the softmax and the smoothed target of a level, the gradients are F (p - s) and p; the second output is
    there for the first one's gradient to have a gradient. In host memory a level is computed for the rows that reach it
    alone, about half of them in the benchmark; elsewhere, where to know them is to wait, the others are masked, and
    without a compiler levels are computed at once.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
            scores: Tensor,
            semantic_targets: Tensor,
            sizes: tuple[int, ...],
            factors: tuple[float, ...],
            smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        if can_read(scores):
            return _host_losses(scores, semantic_targets, sizes, factors, smoothing)
        if is_plain(scores) and fits(sizes):
            return padded_losses(scores, semantic_targets, sizes, factors, smoothing)
        loss, log_sums = widen(scores).new_zeros(len(scores)), []
        for level, target, factor in zip(scores.split(sizes, dim=1), semantic_targets.unbind(dim=1), factors):
            level_loss, log_sum = _level_loss(level, target.clamp(min=0), smoothing)
            loss = loss + torch.where(target >= 0, factor * level_loss, 0.0)
            log_sums.append(log_sum)
        return loss, torch.stack(log_sums, dim=1)

    @staticmethod
    def setup_context(
            ctx: FunctionCtx,
            inputs: tuple[Tensor, Tensor, tuple[int, ...], tuple[float, ...], float],
            output: tuple[Tensor, Tensor],
    ) -> None:
        scores, semantic_targets, *settings = inputs
        ctx.settings = settings                                     # type: ignore[attr-defined]
        ctx.save_for_backward(scores, semantic_targets, output[1])

    @staticmethod
    def backward(
            ctx: FunctionCtx, grad_loss: Tensor, grad_log_sums: Tensor,
    ) -> tuple[Tensor, None, None, None, None]:
        scores, semantic_targets, log_sums = ctx.saved_tensors      # type: ignore[attr-defined]
        sizes, factors, smoothing = ctx.settings                    # type: ignore[attr-defined]
        weights = grad_loss[:, None]
        if not torch.is_grad_enabled() and (can_read(scores) or (is_plain(scores) and fits(sizes))):
            function = _host_grad if can_read(scores) else padded_grad
            grad = function(scores, semantic_targets, log_sums, grad_loss, grad_log_sums, sizes, factors, smoothing)
            return grad, None, None, None, None
        *levels, unused = scores.split(sizes, dim=1)
        columns = zip(levels, semantic_targets.unbind(1), log_sums.split(1, 1), grad_log_sums.split(1, 1), factors)
        grads = [
            _level_grad(level, target, log_sum, factor * weights, pull, smoothing)
            for level, target, log_sum, pull, factor in columns]
        return torch.cat([*grads, torch.zeros_like(unused)], dim=1), None, None, None, None


def _host_losses(
        scores: Tensor, semantic_targets: Tensor, sizes: tuple[int, ...], factors: tuple[float, ...], smoothing: float,
) -> tuple[Tensor, Tensor]:
    order, counts = _deepest_first(semantic_targets)
    targets = semantic_targets[order]
    loss = widen(scores).new_zeros(len(scores))
    log_sums = loss.new_full(targets.shape, math.inf)       # a probability of 0 where it is not computed
    for number, (level, count, factor) in enumerate(zip(scores.split(sizes, dim=1), counts, factors)):
        level_loss, log_sum = _level_loss(level.index_select(0, order[:count]), targets[:count, number], smoothing)
        loss[:count].add_(level_loss, alpha=factor)
        log_sums[:count, number] = log_sum
    back = order.argsort()
    return loss[back], log_sums[back]


def _host_grad(
        scores: Tensor, semantic_targets: Tensor, log_sums: Tensor, grad_loss: Tensor, pulls: Tensor,
        sizes: tuple[int, ...], factors: tuple[float, ...], smoothing: float,
) -> Tensor:
    """As `_level_grad` for each level, in place, for the rows that reach it."""
    order, counts = _deepest_first(semantic_targets)
    targets, log_sums, weights, pulls = (
        value[order] for value in (semantic_targets, log_sums, grad_loss[:, None], pulls))
    grad = scores.new_zeros(scores.shape)
    columns = zip(scores.split(sizes, dim=1), grad.split(sizes, dim=1), counts, factors)
    for number, (level, level_grad, count, factor) in enumerate(columns):
        rows, column = order[:count], slice(number, number + 1)
        weight = factor * weights[:count]
        prob = widen(level.index_select(0, rows)).sub_(log_sums[:count, column]).exp_()
        torch.addcmul(weight * (-smoothing / level.shape[1]), prob, weight + pulls[:count, column], out=prob)
        prob.scatter_add_(1, targets[:count, column], weight * (smoothing - 1))
        level_grad.index_copy_(0, rows, prob.to(grad.dtype))
    return grad


def _deepest_first(semantic_targets: Tensor) -> tuple[Tensor, list[int]]:
    """Rows by the number of levels they reach, and how many reach each level: who reaches one has reached all above."""
    reached = semantic_targets >= 0
    return reached.sum(dim=1).argsort(descending=True), reached.sum(dim=0).tolist()


def _level_loss(level: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """-sum_i s_i log p_i of each row, and log sum_i exp(x_i); s is 1 - e at the target plus e / n everywhere."""
    level = widen(level)
    peak = level.amax(dim=1, keepdim=True)
    level = level - peak
    linear = (1 - smoothing) * level.gather(1, target[:, None]).squeeze(1)
    linear = linear + smoothing / level.shape[1] * level.sum(dim=1)
    log_sum = level.exp_().sum(dim=1).log()
    return log_sum - linear, log_sum + peak.squeeze(1)


def _level_grad(
        level: Tensor, target: Tensor, log_sum: Tensor, weight: Tensor, pull: Tensor, smoothing: float,
) -> Tensor:
    """w (p - s) + v p of each row: w is the gradient of its loss where it has a target, v of its log-sum-exp."""
    weight = torch.where(target[:, None] >= 0, weight, 0.0)
    # Compared and not scattered: the compiler fuses it.
    is_target = torch.arange(level.shape[1], device=level.device, dtype=torch.int32) == target[:, None].int()
    prob = (widen(level) - log_sum).exp()
    smoothed = (1 - smoothing) * is_target.to(prob.dtype) + smoothing / level.shape[1]
    return (prob * (weight + pull) - weight * smoothed).to(level.dtype)


def _check_settings(hierarchy: SemanticHierarchy, smoothing: float, reduction: str) -> None:
    _check_hierarchy(hierarchy)
    check_range(smoothing=smoothing, low=0.0, high=1.0)
    check_choice(reduction=reduction, choices=ROW_REDUCTIONS)


def _check_hierarchy(hierarchy: SemanticHierarchy) -> None:
    if not isinstance(hierarchy, SemanticHierarchy):
        raise TypeError(
            f'hierarchy must be a SemanticHierarchy, got {type(hierarchy).__name__}; make one with '
            f'SemanticHierarchy.from_class_tree or .from_parents.')


def _check_logits(hierarchy: SemanticHierarchy, **named: Tensor) -> None:
    check_floating(**named)
    check_ndim(2, **named)
    for name, tensor in named.items():
        if tensor.shape[1] != hierarchy.num_classes:
            raise ValueError(
                f'{name} must have a column for each of the {hierarchy.num_classes} classes of the hierarchy, got '
                f'shape {tuple(tensor.shape)}.')
