"""Distillation with two heads: the network's own learns from the labels, one beside it from the teacher.

DHKD, Yang et al., arXiv:2411.08937 (mode 'binary'), and DHO, Kang et al., arXiv:2505.07675 (mode 'softmax'). The
objectives are those of `timm_miil.losses.dual_head_distillation_loss`, which names their sources.

Deviations: those of the loss. DHKD's gradient alignment is left out: it needs the gradients of both terms apart, so two
backward passes a step. DHO's code draws labelled and unlabelled pictures from two loaders; here a batch has those that
the data have.
"""
import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_miil._checks import check_indices, check_ndim, check_not_negative, check_range, check_same_length
from timm_miil.losses import DualHeadDistillationLoss, dual_head_prob
from timm_miil.tasks._embedding import embed, split_head
from timm_miil.tasks._with_teacher import WithTeacher, check_answer
from timm_miil.tasks.single_label import SingleLabelTask
from timm_miil.tasks.teacher import Teacher
from timm_miil.tasks.training_model import TrainingModel, TrainingModelTask

__all__ = ['DualHead', 'DualHeadTask', 'fit_dual_head']

ALPHAS = tuple(tenth / 10 for tenth in range(11))
BETAS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
HIDDEN_DROPOUT = 0.1  # of DHKD's code


class DualHead(TrainingModel):
    """A network with a second classifier on its embedding, which learns from the teacher and is left behind.

    In training mode it gives the logits of both heads, in evaluation mode those of the network alone. Where both are
    wanted in inference, as DHO mixes them, save and load the whole: its state dict has both.

    Args:
        network: A timm model with a linear classifier.
        hidden: Width of the second head's hidden layer; 0 for a linear head. DHKD's code has 200 on CIFAR-100 and 0 on
            ImageNet.
        normalize: Scale the embedding that the second head sees to length 1, as DHO for teachers like CLIP.
        scale: Factor of the second head's logits, above 0; DHO's is 100 where it normalises.

    Raises:
        TypeError: If the logits of the network are not one linear layer on its embedding, or a number is of the wrong
            kind.
        ValueError: If a number is out of range.

    Example:
        >>> import timm
        >>> model = DualHead(timm.create_model('test_resnet', num_classes=5)).eval()
        >>> images = torch.randn(2, 3, 64, 64)
        >>> main, aux = model.forward_both(images)
        >>> main.shape, aux.shape, torch.equal(main, model(images))
        (torch.Size([2, 5]), torch.Size([2, 5]), True)
    """

    def __init__(
            self, network: nn.Module, *, hidden: int = 0, normalize: bool = False, scale: float = 1.0) -> None:
        super().__init__(network)
        check_not_negative(hidden=hidden)
        check_range(scale=scale, low=math.ulp(0.0), high=math.inf)
        self.normalize = normalize
        self.scale = scale
        classifier = split_head(network)
        embed_dim, num_classes = classifier.in_features, classifier.out_features
        head: nn.Module = nn.Linear(embed_dim, num_classes)
        if hidden:
            head = nn.Sequential(
                nn.Linear(embed_dim, hidden), nn.Dropout(HIDDEN_DROPOUT), nn.BatchNorm1d(hidden), nn.ReLU(),
                nn.Linear(hidden, num_classes))
        self.aux_head = head.to(classifier.weight)

    def forward_both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of the network's own head and of the second one."""
        embedding = embed(self.network, images)
        main: Tensor = cast(Any, self.network).get_classifier()(embedding)
        if self.normalize:
            embedding = F.normalize(embedding, dim=1)
        return main, self.scale * self.aux_head(embedding)

    def forward_training(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward_both`."""
        return self.forward_both(x)


class DualHeadTask(WithTeacher, TrainingModelTask, SingleLabelTask):
    """Labels for the network's own head, a teacher of exclusive classes for the second one.

    loss = CE(own head, labels) + distill_loss_weight * T^2 * distance of the second head from the teacher, see
    `timm_miil.losses.dual_head_distillation_loss`. The defaults are those of DHKD on CIFAR-100; on ImageNet its weight
    is 0.1. DHO has mode 'softmax'.

    A batch of pictures (B, I, H, W) and float targets (B, C) gives {'loss': scalar, 'output': the own head's logits
    (B, C)}. A row of the targets is 1 at its label and 0 elsewhere, or -1 everywhere for a picture without a label,
    which the teacher alone teaches. In evaluation mode the second head is not computed and the loss has no distance.
    EMA, DDP and compile hold both heads; evaluation and export have the network alone. The means of the loss are of the
    batch that the task is given: with pictures without a label, several processes or parts of a step weigh the labelled
    ones a little differently than one does.

    Args:
        model: A `DualHead`. Any other network learns both terms with its one head, which is what DHKD is compared with.
        teacher: Who the second head learns from.
        mode: Distance: 'binary' (DHKD) or 'softmax' (DHO).
        temperature: T, in [0.001, 1000]; both papers use 2.
        distill_loss_weight: Weight of the distance, at least 0.
        device: As of `SingleLabelTask`; the teacher is moved by the caller.

    Raises:
        TypeError: If teacher is no `Teacher`, or a number is of the wrong kind.
        ValueError: If a setting is out of range, or the teacher's cache keeps less than mode 'binary' needs; in
            `forward`, if targets are not float or not (B, C), or the teacher has other classes.

    Example:
        >>> import timm
        >>> student, other = (timm.create_model('test_resnet', num_classes=5) for _ in range(2))
        >>> teacher = Teacher(other, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size='student')
        >>> task = DualHeadTask(DualHead(student), teacher)
        >>> targets = torch.eye(5)[:2]
        >>> targets[1] = -1  # no label
        >>> task(torch.randn(2, 3, 64, 64), targets)['output'].shape
        torch.Size([2, 5])
    """

    teacher: Teacher

    def __init__(
            self,
            model: nn.Module,
            teacher: Teacher,
            *,
            mode: str = 'binary',
            temperature: float = 2.0,
            distill_loss_weight: float = 1.0,
            device: torch.device | None = None,
    ) -> None:
        super().__init__(model, device=device)
        self.hold_teacher(teacher, task_loss_weight=1.0, distill_loss_weight=distill_loss_weight)
        self.has_two_heads = isinstance(model, DualHead)
        self.distillation = DualHeadDistillationLoss(temperature=temperature, weight=distill_loss_weight, mode=mode)
        cache = teacher.cache
        if mode == 'binary' and cache is not None and cache.topk < cache.num_classes:
            raise ValueError(
                f"the teacher's cache must keep all logits for mode 'binary', which learns each, got topk {cache.topk} "
                f'of {cache.num_classes} classes; open it with topk={cache.num_classes}, or do without.')

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a batch, as the class says."""
        target = self.criterion_target(target)
        index = target.argmax(1).masked_fill((target <= 0).all(1), -1)
        teacher_logits = self.teacher(input)
        output = self.trainable_module(input)
        main, aux = output if isinstance(output, tuple) else (output, output)
        check_answer(main, teacher_logits)
        if self.has_two_heads and aux is main:
            aux = teacher_logits  # no distance
        return {'loss': self.distillation(main, aux, teacher_logits, index), 'output': main}


def fit_dual_head(main_logits: Tensor, aux_logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Choose how to mix the two heads in inference, as DHO does on validation pictures.

    Of the alphas 0, 0.1, ..., 1 and the betas 0.1, 0.2, 0.5, 1, 2, 5 the pair whose mixture names most labels; among
    equals the one that gives the labels the largest mean log-probability.

    Args:
        main_logits: Logits of the network's own head on validation pictures, shape (N, C).
        aux_logits: Logits of the second head, shape (N, C).
        targets: Class indices, shape (N,), integer dtype.

    Returns:
        alpha and beta of `timm_miil.losses.dual_head_prob`.

    Raises:
        TypeError: If logits are not floating-point or targets not of an integer dtype.
        ValueError: If the shapes do not fit, there are no pictures, or a target is not in [0, C).

    Example:
        >>> main = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> aux = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
        >>> fit_dual_head(main, aux, torch.tensor([0, 1]))
        (0.0, 0.1)
    """
    check_ndim(2, main_logits=main_logits)
    check_ndim(1, targets=targets)
    check_same_length(main_logits=main_logits, targets=targets)
    check_indices(targets=targets, num_classes=main_logits.shape[1], read=True)
    if not len(targets):
        raise ValueError('there must be pictures to choose by, got none; give logits of the validation pictures.')
    index = targets.long()[:, None]

    def merit(settings: tuple[float, float]) -> tuple[float, float]:
        prob = dual_head_prob(main_logits.double(), aux_logits.double(), alpha=settings[0], beta=settings[1])
        is_right = prob.argmax(1, keepdim=True) == index
        return is_right.double().mean().item(), prob.gather(1, index).log().mean().item()

    return max(((alpha, beta) for alpha in ALPHAS for beta in BETAS), key=merit)
