"""Training with labels and a teacher: one label a picture (USI), or several.

Ridnik et al., "Solving ImageNet: a Unified Scheme for Training any Backbone to Top Results" (USI), arXiv:2204.03475:
loss = L_base + 5 KL(teacher || student) at temperature 1, where both see the same, mixed pictures. Checked against the
published code. The form for several labels is the usual one, no one paper's.

Deviations: none but `Teacher`'s.
"""
import torch
from torch import Tensor, nn

from timm_miil._checks import check_choice
from timm_miil.losses import DistillationLoss, MultiLabelDistillationLoss
from timm_miil.tasks._with_teacher import WithTeacher, check_answer, check_averages
from timm_miil.tasks.multi_label import MultiLabelTask
from timm_miil.tasks.single_label import SingleLabelTask
from timm_miil.tasks.teacher import Teacher

__all__ = ['MultiLabelDistillationTask', 'SupervisedDistillationTask']

SCALAR_REDUCTIONS = ('sum', 'mean', 'batchmean')


class SupervisedDistillationTask(WithTeacher, SingleLabelTask):
    """USI: labels and a teacher of exclusive classes.

    loss = task_loss_weight * criterion + distill_loss_weight * T^2 KL(softmax(teacher / T) || softmax(student / T)),
    the divergence averaged over the batch. The defaults are the paper's, for any student. Only the student learns; see
    `Teacher` for what the other does.

    A batch of pictures (B, I, H, W), mixed or not, and float targets (B, C) gives {'loss': scalar, 'output': the
    student's logits (B, C), 'task_loss': the criterion, 'kd_loss': the divergence}, the last two detached and not
    weighted. EMA, evaluator, DDP and checkpoint state are timm's, of the student alone; `compile` compiles both.

    Args:
        model: Student to train.
        teacher: Who it learns from.
        criterion: As of `SingleLabelTask`, averaged over the batch.
        task_loss_weight: Weight of the criterion, at least 0; 0 is the paper's "KD only".
        distill_loss_weight: Weight of the divergence (the paper's alpha_kd), at least 0.
        temperature: Softens both distributions (T), in [0.001, 1000].
        soft_targets: As of `SingleLabelTask`.
        device: As of `SingleLabelTask`; the teacher is moved by the caller.

    Raises:
        TypeError: If teacher is no `Teacher`, or a weight no number.
        ValueError: If a setting is out of range, both weights are 0, or the criterion sums over the batch; in
            `forward`, if targets are not float or not (B, C), or the teacher has other classes.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        >>> teacher = Teacher(model, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> result = SupervisedDistillationTask(model, teacher)(torch.rand(2, 3, 2, 2), torch.eye(5)[:2])
        >>> result['kd_loss'].item()
        0.0
    """

    teacher: Teacher

    def __init__(
            self,
            model: nn.Module,
            teacher: Teacher,
            criterion: nn.Module | None = None,
            *,
            task_loss_weight: float = 1.0,
            distill_loss_weight: float = 5.0,
            temperature: float = 1.0,
            soft_targets: bool = True,
            device: torch.device | None = None,
    ) -> None:
        super().__init__(model, criterion, soft_targets=soft_targets, device=device)
        check_averages(self.criterion)
        self.hold_teacher(teacher, task_loss_weight=task_loss_weight, distill_loss_weight=distill_loss_weight)
        self.distillation = DistillationLoss(temperature)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a batch, as the class says."""
        teacher_logits = self.teacher(input)
        result = super().forward(input, target)
        check_answer(result['output'], teacher_logits)
        return self.combined(result, self.distillation(result['output'], teacher_logits))


class MultiLabelDistillationTask(WithTeacher, MultiLabelTask):
    """Labels that do not exclude one another, and a teacher's probability of each.

    loss = task_loss_weight * criterion + distill_loss_weight * T^2 KL(sigmoid(teacher / T) || sigmoid(student / T)).
    The divergence of each label of each picture is reduced as the criterion reduces its own: summed over labels and
    batch with one that sums (the asymmetric loss as the authors train with it), averaged with one that averages. The
    weights so mean the same for a label of a picture whatever the reduction and the batch size are. Labels that are
    unknown (-1) to the criterion are taught by the teacher.

    A batch gives what `SupervisedDistillationTask` does; timm's methods are as there.

    Args:
        model: Student to train.
        teacher: Who it learns from.
        criterion: As of `MultiLabelTask`.
        task_loss_weight: Weight of the criterion, at least 0; 0 is without labels.
        distill_loss_weight: Weight of the divergence, at least 0.
        temperature: Softens all probabilities (T), in [0.001, 1000].
        reduction: Of the divergence: 'sum', 'mean' over B * C or 'batchmean' (sum / B); None takes the criterion's
            attribute `reduction`, and 'mean' if it has none.
        threshold: As of `MultiLabelTask`.
        device: As of `MultiLabelTask`; the teacher is moved by the caller.

    Raises:
        TypeError: If teacher is no `Teacher`, or a weight no number.
        ValueError: If a setting is out of range, or both weights are 0; in `forward`, if targets are not float or not
            (B, C), or the teacher has other classes.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        >>> teacher = Teacher(model, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> task = MultiLabelDistillationTask(model, teacher)
        >>> sorted(task(torch.rand(2, 3, 2, 2), torch.ones(2, 5)))
        ['kd_loss', 'loss', 'output', 'task_loss']
    """

    teacher: Teacher

    def __init__(
            self,
            model: nn.Module,
            teacher: Teacher,
            criterion: nn.Module | None = None,
            *,
            task_loss_weight: float = 1.0,
            distill_loss_weight: float = 5.0,
            temperature: float = 1.0,
            reduction: str | None = None,
            threshold: float = 0.5,
            device: torch.device | None = None,
    ) -> None:
        super().__init__(model, criterion, threshold=threshold, device=device)
        reduction = str(reduction or getattr(self.criterion, 'reduction', 'mean'))
        check_choice(reduction=reduction, choices=SCALAR_REDUCTIONS)
        self.hold_teacher(teacher, task_loss_weight=task_loss_weight, distill_loss_weight=distill_loss_weight)
        self.distillation = MultiLabelDistillationLoss(temperature, reduction=reduction)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a batch, as the class says."""
        teacher_logits = self.teacher(input)
        result = super().forward(input, target)
        check_answer(result['output'], teacher_logits)
        return self.combined(result, self.distillation(result['output'], teacher_logits))
