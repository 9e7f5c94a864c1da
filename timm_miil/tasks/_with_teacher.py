"""What tasks with a teacher share."""
from typing import Any

from timm.task import ClassificationTask
from torch import Tensor, nn

from timm_miil._checks import check_range
from timm_miil.tasks.teacher import Teacher

__all__ = ['WithTeacher', 'check_answer', 'check_averages', 'check_teacher']


class WithTeacher(ClassificationTask):
    """A task whose loss has a second term, of the teacher.

    The teacher is asked before the student runs: its activations are gone when those of the student, which wait for
    the backward pass, need memory.
    """

    teacher: Teacher | None
    task_loss_weight: float
    distill_loss_weight: float

    def hold_teacher(self, teacher: Teacher, *, task_loss_weight: float, distill_loss_weight: float) -> None:
        """Keep the teacher and the weights of the two terms; raise if they are none."""
        check_teacher(teacher)
        check_range(
            low=0.0, high=float('inf'), task_loss_weight=task_loss_weight, distill_loss_weight=distill_loss_weight)
        if not task_loss_weight and not distill_loss_weight:
            raise ValueError('one of task_loss_weight and distill_loss_weight must be above 0, got 0 for both.')
        self.teacher = teacher
        self.task_loss_weight = task_loss_weight
        self.distill_loss_weight = distill_loss_weight

    def compile(                                                    # type: ignore[override]  # it is timm's
            self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the student, as timm does, and the teacher.

        Args:
            backend: As of `torch.compile`, and so are the others.
            mode: As of `torch.compile`.
            **compile_kwargs: As of `torch.compile`.

        Returns:
            The compiled student.
        """
        if self.teacher is not None:
            self.teacher.compile(backend=backend, mode=mode, **compile_kwargs)
        compiled: nn.Module = super().compile(backend=backend, mode=mode, **compile_kwargs)
        return compiled

    def combined(self, result: dict[str, Tensor], kd_loss: Tensor) -> dict[str, Tensor]:
        """The result of the task alone, with the teacher's term in the loss and both terms, detached, beside it."""
        task_loss = result['loss']
        loss = self.distill_loss_weight * kd_loss
        if self.task_loss_weight:  # 0 is without it, whatever it is
            loss = loss + self.task_loss_weight * task_loss
        return {**result, 'loss': loss, 'task_loss': task_loss.detach(), 'kd_loss': kd_loss.detach()}


def check_teacher(teacher: Teacher) -> None:
    """Raise TypeError unless it is a `Teacher`."""
    if not isinstance(teacher, Teacher):
        raise TypeError(
            f'teacher must be a Teacher, got {type(teacher).__name__}; make one by Teacher(model, mean=..., std=...) '
            f'with the mean and deviation that the student\'s pictures are normalised with.')


def check_averages(criterion: object) -> None:
    """Raise ValueError if the criterion says that it does not average over the batch."""
    reduction = getattr(criterion, 'reduction', 'mean')
    if reduction not in ('mean', 'batchmean'):
        raise ValueError(
            f'criterion must average over the batch, as the divergence does, got reduction {reduction!r}; make it '
            f"with reduction='mean'.")


def check_answer(output: Tensor, teacher_logits: Tensor) -> None:
    """Raise ValueError unless teacher and student speak of as many classes."""
    if output.shape != teacher_logits.shape:
        raise ValueError(
            f'the teacher must have the student\'s classes, got logits {tuple(teacher_logits.shape)} of the teacher '
            f'and {tuple(output.shape)} of the student; tell Teacher by `columns` which of its outputs they are.')
