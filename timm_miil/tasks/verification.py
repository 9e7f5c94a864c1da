"""Embeddings of identities by a margin softmax (ArcFace), with or without a teacher's embeddings.

Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", arXiv:1801.07698 (Eq. 3); the margin is
`pytorch_metric_learning.losses.ArcFaceLoss`. The teacher's term is the distance of directions of Ben-Baruch et al.,
arXiv:2201.06945, as in `timm_miil.losses.embedding_distillation_loss`.

Deviation: where the angle and its margin m would pass 180 degrees, cos(angle) - m sin(m), m in radians, stands for
cos(angle + m), as in that library: the loss would fall again otherwise.
"""
from typing import Any, cast

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_miil._checks import check_positive, check_range
from timm_miil._extras import require
from timm_miil.losses import embedding_distillation_loss
from timm_miil.tasks._with_teacher import WithTeacher
from timm_miil.tasks.teacher import Teacher
from timm_miil.tasks.training_model import TrainingModel, TrainingModelTask

__all__ = ['MarginSoftmax', 'VerificationTask']


class MarginSoftmax(TrainingModel):
    """A network that embeds pictures, with a weight vector an identity beside it.

    In training pictures (B, I, H, W) and the numbers of their identities (B,) give embeddings (B, embed_dim) and the
    loss of each, (B,): cross-entropy of scale * cos(angle), where the angle to the picture's own identity has grown by
    the margin. The loss is computed in float32, also under autocast. What verifies is the cosine of two embeddings,
    so identities need not be those of training.

    Args:
        network: Maps pictures to embeddings (B, embed_dim), such as a timm model with num_classes=embed_dim.
        num_identities: Identities of the training pictures.
        embed_dim: Length of an embedding.
        margin: In degrees, in [0, 90]; the paper's 0.5 radians are 28.6.
        scale: The paper's s, above 0.

    Raises:
        ImportError: If pytorch-metric-learning is not installed.
        TypeError: If a number is of another kind.
        ValueError: If a setting is out of range; in `forward`, if the network gives other embeddings.
    """

    def __init__(
            self, network: nn.Module, num_identities: int, embed_dim: int, *, margin: float = 28.6, scale: float = 64.0,
    ) -> None:
        check_positive(num_identities=num_identities, embed_dim=embed_dim)
        check_range(low=0.0, high=90.0, closed=True, margin=margin)
        check_range(low=1e-3, high=1e6, scale=scale)
        super().__init__(network)
        self.num_identities, self.embed_dim = num_identities, embed_dim
        self.margin: nn.Module = require('pytorch_metric_learning.losses').ArcFaceLoss(
            num_identities, embed_dim, margin=margin, scale=scale,
            reducer=require('pytorch_metric_learning.reducers').DoNothingReducer())

    def forward(self, x: Tensor, identities: Tensor | None = None) -> Any:
        """Embeddings and losses where identities are given, which is in training; else the network's answer."""
        return self.network(x) if identities is None else self.forward_training(x, identities)

    def forward_training(self, x: Tensor, identities: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings and losses, as the class says."""
        embeddings: Tensor = self.network(x)
        if embeddings.shape != (len(x), self.embed_dim):
            raise ValueError(
                f'network must give embeddings (B, {self.embed_dim}), got {tuple(embeddings.shape)}; create it by '
                f'timm.create_model(name, num_classes={self.embed_dim}).')
        return embeddings, self._losses(embeddings, cast(Tensor, identities))

    @torch.compiler.disable
    def _losses(self, embeddings: Tensor, identities: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            found: Tensor = self.margin(embeddings.float(), identities)['loss']['losses']
            return found


class VerificationTask(WithTeacher, TrainingModelTask):
    """A margin softmax over the identities of training and, if there is a teacher, its embeddings.

    loss = task_loss_weight * margin softmax + distill_loss_weight * || f_s / |f_s| - f_t / |f_t| ||^2, both averaged
    over the batch; without a teacher it is the margin softmax.

    A batch of pictures (B, I, H, W) and float targets (B, K), a row of which is 1 at its identity and 0 elsewhere,
    gives {'loss': scalar, 'output': embeddings (B, embed_dim)}; with a teacher also 'task_loss' and 'kd_loss', detached
    and not weighted. What is saved, averaged for evaluation and measured is the network alone.

    Args:
        model: Network with the margin softmax.
        teacher: Whose embeddings, of as many numbers, are learnt from; None for nobody.
        task_loss_weight: Weight of the margin softmax, at least 0.
        distill_loss_weight: Weight of the teacher's term, at least 0.
        device: Where the task's own tensors live; the model is moved by the caller.

    Raises:
        TypeError: If model is no `MarginSoftmax`, teacher no `Teacher`, or a weight no number.
        ValueError: If a weight is out of range, or both are 0; in `forward`, if targets are not float or not (B, K), or
            the embeddings of teacher and student differ in length.

    Example:
        >>> network = nn.Linear(4, 8)
        >>> task = VerificationTask(MarginSoftmax(network, num_identities=3, embed_dim=8))
        >>> task(torch.rand(2, 4), torch.eye(3)[:2])['output'].shape
        torch.Size([2, 8])
    """

    def __init__(
            self,
            model: MarginSoftmax,
            teacher: Teacher | None = None,
            *,
            task_loss_weight: float = 1.0,
            distill_loss_weight: float = 1.0,
            device: torch.device | None = None,
    ) -> None:
        margin_model = unwrap_model(model)
        if not isinstance(margin_model, MarginSoftmax):
            raise TypeError(
                f'model must be a MarginSoftmax, got {type(margin_model).__name__}; make one by MarginSoftmax(network, '
                f'num_identities, embed_dim).')
        super().__init__(model, margin_model.margin, device=device, verbose=False)
        self.num_identities = margin_model.num_identities
        self.teacher = None
        if teacher is not None:
            self.hold_teacher(teacher, task_loss_weight=task_loss_weight, distill_loss_weight=distill_loss_weight)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and embeddings of a batch, as the class says."""
        if target.ndim != 2 or target.shape[1] != self.num_identities or not target.is_floating_point():
            raise ValueError(
                f'target must be float of shape (B, {self.num_identities}), one column an identity, got {target.dtype} '
                f'{tuple(target.shape)}.')
        wanted = None if self.teacher is None else self.teacher(input)
        embeddings, losses = self.trainable_module(input, target.argmax(1))
        result = {'loss': losses.mean(), 'output': embeddings}
        if wanted is None:
            return result
        if wanted.shape != embeddings.shape:
            raise ValueError(
                f'the teacher must embed as the student does, got embeddings of {wanted.shape[1]} numbers of the '
                f'teacher and {embeddings.shape[1]} of the student; give both the same embed_dim.')
        return self.combined(result, embedding_distillation_loss(embeddings, wanted, reduction='mean'))
