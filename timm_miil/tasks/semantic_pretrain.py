"""Pretraining on classes of a tree: semantic softmax, with a teacher or without.

Ridnik et al., "ImageNet-21K Pretraining for the Masses", arXiv:2104.10972; the losses are checked against its published
code.

Deviation: the teacher's term is averaged over the batch as the loss is, where the published function, which no script
of theirs uses, sums; its weight so does not depend on the batch size.
"""
import torch
from torch import Tensor, nn

from timm_miil._checks import check_choice
from timm_miil.losses import SemanticSoftmaxLoss, semantic_distillation_loss
from timm_miil.tasks._with_teacher import WithTeacher, check_answer
from timm_miil.tasks.single_label import SingleLabelTask
from timm_miil.tasks.teacher import Teacher

__all__ = ['SemanticPretrainTask']


class SemanticPretrainTask(WithTeacher, SingleLabelTask):
    """One class of a tree for each picture, each level of the tree with a softmax of its own.

    loss = criterion, or with a teacher task_loss_weight * criterion + distill_loss_weight * semantic distillation. Both
    are of a picture: averaged over the batch, or summed where the criterion sums.

    A batch of pictures (B, I, H, W) and float targets (B, C) gives {'loss': scalar, 'output': logits (B, C)}, with a
    teacher also 'task_loss' and 'kd_loss', detached and not weighted. A row of the targets is 1 at its class and 0
    elsewhere; of a distribution the most probable class is taken, as the tree has no mixed classes. EMA, evaluator, DDP
    and checkpoint state are timm's, of the student alone; `compile` compiles the teacher too.

    Args:
        model: Network to train.
        criterion: Semantic softmax, which brings the tree: `SemanticSoftmaxLoss(hierarchy, smoothing=0.2)` is the
            paper's.
        teacher: Who it learns from besides. A cache of it must keep all logits: of a few, most levels have none.
        task_loss_weight: Weight of the criterion where there is a teacher, at least 0.
        distill_loss_weight: Weight of the teacher's term, at least 0; no source tells one.
        device: As of `SingleLabelTask`; the teacher is moved by the caller.

    Raises:
        TypeError: If criterion is no `SemanticSoftmaxLoss`, teacher no `Teacher`, or a weight no number.
        ValueError: If a weight is out of range, both are 0, the criterion does not reduce, or the teacher's cache keeps
            a few logits; in `forward`, if targets are not float or not (B, C), or logits and tree or teacher are not of
            as many classes.

    Example:
        >>> from timm_miil.losses import SemanticHierarchy
        >>> hierarchy = SemanticHierarchy.from_class_tree([[0], [1], [2, 0], [3, 0], [4, 2, 0]])
        >>> task = SemanticPretrainTask(nn.Linear(4, 5), SemanticSoftmaxLoss(hierarchy))
        >>> task(torch.rand(2, 4), torch.eye(5)[[1, 4]])['output'].shape
        torch.Size([2, 5])
    """

    criterion: SemanticSoftmaxLoss

    def __init__(
            self,
            model: nn.Module,
            criterion: SemanticSoftmaxLoss,
            *,
            teacher: Teacher | None = None,
            task_loss_weight: float = 1.0,
            distill_loss_weight: float = 1.0,
            device: torch.device | None = None,
    ) -> None:
        if not isinstance(criterion, SemanticSoftmaxLoss):
            raise TypeError(
                f'criterion must be a SemanticSoftmaxLoss, got {type(criterion).__name__}; make one by '
                f'SemanticSoftmaxLoss(hierarchy), and the hierarchy by SemanticHierarchy.from_tree_file(path).')
        check_choice(reduction=criterion.reduction, choices=('mean', 'sum'))
        super().__init__(model, criterion, soft_targets=False, device=device)
        self.teacher = None
        if teacher is not None:
            self.hold_teacher(teacher, task_loss_weight=task_loss_weight, distill_loss_weight=distill_loss_weight)
            cache = teacher.cache
            if cache is not None and cache.topk < cache.num_classes:
                raise ValueError(
                    f"the teacher's cache must keep all logits, as each level of the tree has a softmax of its own, "
                    f'got topk {cache.topk} of {cache.num_classes} classes; open it with topk={cache.num_classes}, or '
                    f'do without.')

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a batch, as the class says."""
        teacher_logits = None if self.teacher is None else self.teacher(input)
        result = super().forward(input, target)
        if teacher_logits is None:
            return result
        check_answer(result['output'], teacher_logits)
        kd_loss = semantic_distillation_loss(
            result['output'], teacher_logits, self.criterion.hierarchy, reduction=self.criterion.reduction)
        return self.combined(result, kd_loss)
