"""Long-tailed labels of which some are missing: correction, modification, balance (COMIC).

Zhang et al., "Learning in Imperfect Environment: Multi-Label Classification with Long-Tailed Distribution and Partial
Labels", arXiv:2304.10539. The losses are checked against the published code, see `timm_miil.losses.long_tail`.

Deviations: the published code trains three networks on three samplers (natural, reversed and balanced), each of which
corrects labels for itself; here one body has three classifiers, the balanced one corrects for all, and what the
samplers do, powers of the class weight do. Its balance, which the published code leaves out of its loss, compares
products of softmaxes; here it is the divergence of each label's probability.
"""
import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_miil._checks import check_choice, check_range
from timm_miil.losses import LabelCorrector, MultiFocalModifierLoss, MultiLabelDistillationLoss
from timm_miil.tasks._embedding import split_head
from timm_miil.tasks.multi_label import MultiLabelTask
from timm_miil.tasks.training_model import TrainingModel, TrainingModelTask

__all__ = ['ComicModel', 'ComicTask']


class ComicModel(TrainingModel):
    """A network with a corrector of labels and, beside its own classifier, one for frequent and one for rare labels.

    The network's own classifier is the balanced one: what is saved is a plain timm model. The others start as copies.

    Args:
        network: A timm model with a linear classifier, or a network of this package with any head.
        warmup_steps: Batches before the first correction, see `LabelCorrector`.
        correct_threshold: Probability above which an unknown label may be corrected, in [0, 1].
        balance: Whether there are the two other classifiers.

    Raises:
        TypeError: If the network's classifier is of another kind, see the message.
        ValueError: If a setting is out of range.
    """

    def __init__(
            self, network: nn.Module, *, warmup_steps: int, correct_threshold: float = 0.7, balance: bool = True,
    ) -> None:
        super().__init__(network)
        self.corrector = LabelCorrector(warmup_steps=warmup_steps, threshold=correct_threshold)
        self.head: nn.Module | None = None
        self.tail: nn.Module | None = None
        if balance:
            network_: Any = network
            classifier = network_.get_classifier() if hasattr(network, 'head_input') else split_head(network)
            self.head, self.tail = copy.deepcopy(classifier), copy.deepcopy(classifier)

    def forward_training(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, C) of the balanced classifier and, if there are such, of the head's and the tail's."""
        if self.head is None or self.tail is None:
            return (self.network(x),)
        network: Any = self.network
        features = network.forward_features(x)
        if hasattr(network, 'head_input'):
            read = network.head_input(features)
        else:
            read = network.forward_head(features, pre_logits=True)
        return network.get_classifier()(read), self.head(read), self.tail(read)


class ComicTask(TrainingModelTask, MultiLabelTask):
    """COMIC: find missing labels, weigh rare ones up, and let one classifier learn from two extremes.

    Unknown labels (-1) that the balanced classifier is sure of are corrected: they become present (`LabelCorrector`).
    A classifier's loss with labels y as they are given and y' corrected is

        L(y) + correct_loss_weight * L(y'),

    L the multi-focal modifier loss: of the balanced classifier with the criterion's power of the class weight, of the
    head's with a smaller one, which takes the labels as they come, and of the tail's with a greater one. What is given
    outweighs what is corrected, or wrong corrections would feed themselves. The balanced one also learns from the
    others by

        distill_loss_weight * (w_h KL(head || balanced) + w_t KL(tail || balanced)),

    with w_h = L(head)^2 / (L(head)^2 + L(tail)^2) and w_t = 1 - w_h by the criterion on y, and the divergence of
    `MultiLabelDistillationLoss`, in which the other two are constants. The loss is the sum of all of these. Means and
    weights are of this process's batch.

    A batch of pictures (B, I, H, W) and float targets (B, C) gives {'loss': scalar, 'output': the balanced logits
    (B, C)}; in evaluation mode the loss is the criterion alone, on y.

    Args:
        model: The network and what is trained beside it; it counts the steps until correction begins.
        criterion: The loss L, with the counts of the classes.
        head_exponent: Power of the class weight for the head's classifier, at least 0; 0 weighs all labels the same.
        tail_exponent: The same for the tail's.
        correct_loss_weight: Weight of the loss of corrected labels, at least 0; the authors' is 0.2.
        distill_loss_weight: Weight of the divergences, at least 0.
        unknown_is_absent: Take unknown labels that are not corrected as absent, as the authors do; otherwise the
            criterion must ignore them.
        threshold: As of `MultiLabelTask`.
        device: As of `MultiLabelTask`; the model is moved by the caller.

    Raises:
        TypeError: If model is no `ComicModel`, or criterion no `MultiFocalModifierLoss`.
        ValueError: If a setting is out of range, or the criterion does not reduce; in `forward`, if targets are not
            float or not (B, C).

    Example:
        >>> import timm
        >>> model = ComicModel(timm.create_model('resnet10t', num_classes=3), warmup_steps=0)
        >>> task = ComicTask(model, MultiFocalModifierLoss([90, 9, 1]))
        >>> targets = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]])
        >>> task(torch.rand(2, 3, 32, 32), targets)['output'].shape
        torch.Size([2, 3])
    """

    criterion: MultiFocalModifierLoss

    def __init__(
            self,
            model: ComicModel,
            criterion: MultiFocalModifierLoss,
            *,
            head_exponent: float = 0.0,
            tail_exponent: float = 1.0,
            correct_loss_weight: float = 0.2,
            distill_loss_weight: float = 1.0,
            unknown_is_absent: bool = True,
            threshold: float = 0.5,
            device: torch.device | None = None,
    ) -> None:
        if not isinstance(model, ComicModel):
            raise TypeError(
                f'model must be a ComicModel, got {type(model).__name__}; make one by ComicModel(network, '
                f'warmup_steps=...).')
        if not isinstance(criterion, MultiFocalModifierLoss):
            raise TypeError(
                f'criterion must be a MultiFocalModifierLoss, got {type(criterion).__name__}; make one by '
                f'MultiFocalModifierLoss(class_counts).')
        check_choice(reduction=criterion.reduction, choices=('sum', 'mean', 'batchmean'))
        check_range(
            low=0.0, high=float('inf'), head_exponent=head_exponent, tail_exponent=tail_exponent,
            correct_loss_weight=correct_loss_weight, distill_loss_weight=distill_loss_weight)
        super().__init__(model, criterion, threshold=threshold, device=device)
        self.head_criterion = _with_exponent(self.criterion, head_exponent)
        self.tail_criterion = _with_exponent(self.criterion, tail_exponent)
        self.distillation = MultiLabelDistillationLoss(reduction=criterion.reduction)
        self.correct_loss_weight = correct_loss_weight
        self.distill_loss_weight = distill_loss_weight
        self.unknown_is_absent = unknown_is_absent

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a batch, as the class says."""
        if target.ndim != 2 or not target.is_floating_point():
            raise ValueError(f'target must be float of shape (B, C), got {target.dtype} {tuple(target.shape)}.')
        given = self._filled(target)
        answer = self.trainable_module(input)
        if not isinstance(answer, tuple):  # in evaluation mode
            return {'loss': self.criterion(answer, given), 'output': answer}
        output, *others = answer
        model: Any = unwrap_model(self.trainable_module)
        corrected = self._filled(model.corrector(output, target))
        loss = torch.zeros((), device=output.device)
        for criterion, logits in zip((self.criterion, self.head_criterion, self.tail_criterion), answer):
            loss = loss + criterion(logits, given) + self.correct_loss_weight * criterion(logits, corrected)
        if others:
            loss = loss + self.distill_loss_weight * self._divergence(output, others, given)
        return {'loss': loss, 'output': output}

    def _filled(self, target: Tensor) -> Tensor:
        return target.clamp(min=0.0) if self.unknown_is_absent else target

    def _divergence(self, output: Tensor, others: Sequence[Tensor], given: Tensor) -> Tensor:
        """What the balanced classifier lacks of the others, the more the worse one is."""
        with torch.no_grad():
            squares = torch.stack([self.criterion(logits, given) for logits in others]).square()
            shares = squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)
        return torch.stack([self.distillation(output, logits) for logits in others]) @ shares


def _with_exponent(criterion: MultiFocalModifierLoss, exponent: float) -> MultiFocalModifierLoss:
    other = copy.deepcopy(criterion)
    other.exponent = exponent
    return other
