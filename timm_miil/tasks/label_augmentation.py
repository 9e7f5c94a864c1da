"""Self-supervised label augmentation (SLA): one classifier of classes times transforms.

Lee et al., "Self-supervised Label Augmentation via Input Transformations", arXiv:1910.05872; the losses as in
github.com/hankook/SLA (read, not run). A picture is shown in M ways, such as four rotations, and the classifier tells
which class it is and which way it is shown: label y shown in way j is y * M + j of K * M.

Deviation: the classifier's outputs of the picture as it is (j = 0) are those of the network's own head, so that the
network that is kept is the paper's single inference (SLA+SI). With self-distillation the own head is another one, as
in the paper (SLA+SD).
"""
import itertools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from timm_miil._checks import check_choice, check_floating, check_ndim, check_range
from timm_miil.losses import DistillationLoss
from timm_miil.tasks._embedding import embed, split_head
from timm_miil.tasks.single_label import SingleLabelTask
from timm_miil.tasks.training_model import TrainingModel, TrainingModelTask

__all__ = [
    'NUM_TRANSFORMS', 'LabelAugmentation', 'LabelAugmentationTask', 'aggregate_logits', 'joint_cross_entropy',
    'transform_images',
]

NUM_TRANSFORMS: Mapping[str, int] = MappingProxyType({'rotation': 4, 'colour_permutation': 6})
"""How many ways there are to show a picture (M), by name."""


def transform_images(images: Tensor, transforms: str) -> Tensor:
    """Pictures in all ways, the first of which is as they are.

    Args:
        images: Pictures, shape (B, I, H, W).
        transforms: 'rotation' by 0, 90, 180 and 270 degrees counter-clockwise, for square pictures; or
            'colour_permutation', the 6 orders of three channels (as they are normalised).

    Returns:
        The pictures, shape (M, B, I, H, W).

    Raises:
        ValueError: If transforms is unknown, or the pictures are not (B, I, H, W), not square or not of three channels.

    Example:
        >>> transform_images(torch.rand(2, 3, 8, 8), 'rotation').shape
        torch.Size([4, 2, 3, 8, 8])
    """
    check_choice(transforms=transforms, choices=NUM_TRANSFORMS)
    check_ndim(4, images=images)
    if transforms == 'rotation':
        if images.shape[2] != images.shape[3]:
            raise ValueError(
                f'images must be square to be rotated, got {tuple(images.shape)}; crop them, or take '
                f"'colour_permutation'.")
        return torch.stack([images.rot90(quarters, (2, 3)) for quarters in range(4)])
    if images.shape[1] != 3:
        raise ValueError(
            f"images must have 3 channels to be permuted, got {tuple(images.shape)}; take 'rotation'.")
    return torch.stack([images[:, order] for order in itertools.permutations(range(3))])


def joint_cross_entropy(joint_logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of classes times transforms, averaged over pictures and transforms.

    Args:
        joint_logits: Logits of each class and way (last two) of each picture in each way (first two), shape
            (M, B, K, M).
        targets: 1 at the label and 0 elsewhere, or a distribution, shape (B, K), floating.

    Returns:
        A scalar; float32, or float64 if the logits are. An empty batch gives 0.

    Raises:
        TypeError: If a tensor is not floating-point.
        ValueError: If the shapes do not fit.

    Example:
        >>> joint_cross_entropy(torch.zeros(4, 2, 5, 4), torch.eye(5)[:2])  # log(5 * 4)
        tensor(2.9957)
    """
    _check_joint(joint_logits)
    check_floating(targets=targets)
    if targets.shape != joint_logits.shape[1:3]:
        raise ValueError(
            f'targets must be (B, K) of joint logits (M, B, K, M), got {tuple(targets.shape)} and '
            f'{tuple(joint_logits.shape)}.')
    log_prob = _widened(joint_logits).flatten(2).log_softmax(2).unflatten(2, joint_logits.shape[2:])
    shown = log_prob.diagonal(dim1=0, dim2=3)  # (B, K, M): way j of a picture at the outputs of way j
    return -(targets[:, :, None] * shown).sum() / max(shown.shape[0] * shown.shape[2], 1)


def aggregate_logits(joint_logits: Tensor) -> Tensor:
    """Logits of the classes (SLA+AG): the mean over the ways j of what a picture in way j has at the outputs of way j.

    Args:
        joint_logits: As of `joint_cross_entropy`, shape (M, B, K, M).

    Returns:
        Logits, shape (B, K); float32, or float64 if the joint ones are.

    Raises:
        TypeError: If the logits are not floating-point.
        ValueError: If they are not (M, B, K, M).
    """
    _check_joint(joint_logits)
    return _widened(joint_logits).diagonal(dim1=0, dim2=3).mean(2)


class LabelAugmentation(TrainingModel):
    """A network with the outputs of classes times transforms on its embedding, which are left behind.

    In training mode it gives the network's logits (B, K) of the pictures as they are and the joint ones (M, B, K, M),
    in evaluation mode the network's. To aggregate in inference (SLA+AG), save and load the whole.

    Args:
        network: A timm model with a linear classifier of K classes.
        transforms: A key of `NUM_TRANSFORMS`; see `transform_images`.
        self_distillation: Whether the network's own head is not a part of the joint one, but learns from it (SLA+SD).

    Raises:
        TypeError: If the logits of the network are not one linear layer on its embedding.
        ValueError: If transforms is unknown.

    Example:
        >>> import timm
        >>> model = LabelAugmentation(timm.create_model('test_resnet', num_classes=5)).eval()
        >>> model.forward_aggregated(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 5])
    """

    def __init__(
            self, network: nn.Module, *, transforms: str = 'rotation', self_distillation: bool = False) -> None:
        super().__init__(network)
        check_choice(transforms=transforms, choices=NUM_TRANSFORMS)
        self.transforms = transforms
        self.self_distillation = self_distillation
        classifier = split_head(network)
        num_ways = NUM_TRANSFORMS[transforms] - (0 if self_distillation else 1)
        self.joint_head = nn.Linear(
            classifier.in_features, classifier.out_features * num_ways).to(classifier.weight)

    def forward_training(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the network (B, K) and of classes times transforms (M, B, K, M)."""
        ways = transform_images(x, self.transforms)
        embedding = embed(self.network, ways.flatten(0, 1))
        own: Tensor = cast(Any, self.network).get_classifier()(embedding)
        joint = self.joint_head(embedding).unflatten(1, (own.shape[1], -1))
        if not self.self_distillation:
            joint = torch.cat([own[:, :, None], joint], dim=2)
        return own[:len(x)], joint.unflatten(0, ways.shape[:2])

    def forward_aggregated(self, images: Tensor) -> Tensor:
        """Logits (B, K) that aggregate all ways to show the pictures, see `aggregate_logits`."""
        return aggregate_logits(self.forward_training(images)[1])


class LabelAugmentationTask(TrainingModelTask, SingleLabelTask):
    """Exclusive classes, learnt times transforms.

    loss = joint_loss_weight * `joint_cross_entropy`, and with the model's self-distillation
    + CE(own head, labels) + T^2 KL(softmax(aggregated / T) || softmax(own head / T)), where the aggregated logits get
    no gradient.

    A batch of pictures (B, I, H, W), mixed or not, and float targets (B, K) gives {'loss': scalar, 'output': the
    network's logits (B, K)}. In evaluation mode the loss is the network's cross-entropy. EMA, DDP and compile hold all
    heads; evaluation and export have the network alone.

    Args:
        model: What gives both kinds of logits.
        joint_loss_weight: Above 0; the paper multiplies by M on large data.
        temperature: T, in [0.001, 1000]; 1 in the authors' code.
        device: As of `SingleLabelTask`.

    Raises:
        TypeError: If model is no `LabelAugmentation`, or a number is of the wrong kind.
        ValueError: If a number is out of range; in `forward`, if targets are not float or not (B, K), or the pictures
            cannot be transformed.

    Example:
        >>> import timm
        >>> task = LabelAugmentationTask(LabelAugmentation(timm.create_model('test_resnet', num_classes=5)))
        >>> task(torch.randn(2, 3, 64, 64), torch.eye(5)[:2])['output'].shape
        torch.Size([2, 5])
    """

    def __init__(
            self,
            model: LabelAugmentation,
            *,
            joint_loss_weight: float = 1.0,
            temperature: float = 1.0,
            device: torch.device | None = None,
    ) -> None:
        if not isinstance(model, LabelAugmentation):
            raise TypeError(
                f'model must be a LabelAugmentation, got {type(model).__name__}; make one by '
                f'LabelAugmentation(network).')
        super().__init__(model, device=device)
        check_range(joint_loss_weight=joint_loss_weight, low=math.ulp(0.0), high=math.inf)
        self.joint_loss_weight = joint_loss_weight
        self.distillation = DistillationLoss(temperature) if model.self_distillation else None

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a batch, as the class says."""
        target = self.criterion_target(target)
        output = self.trainable_module(input)
        if isinstance(output, Tensor):
            return {'loss': self.criterion(output, target), 'output': output}
        own, joint = output
        loss = self.joint_loss_weight * joint_cross_entropy(joint, target)
        if self.distillation is not None:
            loss = loss + self.criterion(own, target) + self.distillation(own, aggregate_logits(joint))
        return {'loss': loss, 'output': own}


def _check_joint(joint_logits: Tensor) -> None:
    check_floating(joint_logits=joint_logits)
    check_ndim(4, joint_logits=joint_logits)
    if joint_logits.shape[0] != joint_logits.shape[3]:
        raise ValueError(
            f'joint_logits must be (M, B, K, M), got {tuple(joint_logits.shape)}, of {joint_logits.shape[0]} and '
            f'{joint_logits.shape[3]} transforms.')


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
