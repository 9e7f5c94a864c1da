"""Controlled label injection: labels for a network that has learnt without, a little of them and from the end on.

Nayman et al., "Diverse Imagenet Models Transfer Better", arXiv:2204.09134: train a classifier on the frozen network
first, so that a random one does not spoil it, then all of it, gently. Which statistics the frozen network's batch norms
use was not at hand: they keep theirs.
"""
import torch
from timm.utils import unwrap_model
from torch import nn

from timm_miil._checks import check_choice
from timm_miil.tasks.single_label import SingleLabelTask

__all__ = ['FROZEN', 'LabelInjectionTask']

FROZEN = ('backbone', 'statistics', 'nothing')
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class LabelInjectionTask(SingleLabelTask):
    """A single-label task of a network of which a part does not change.

    Args:
        model: Network with `get_classifier()`, on its device.
        criterion: As of `SingleLabelTask`.
        frozen: 'backbone' trains the classifier alone, on what the network says in evaluation mode: without dropout,
            batch norms with their statistics. All else stays as it is to the bit, and its parameters take no gradient.
            'statistics' trains all, but batch norms use and keep the statistics they have. 'nothing' trains as usual.
        soft_targets: As of `SingleLabelTask`.
        device: As of `SingleLabelTask`.

    Raises:
        TypeError: If the backbone is to be frozen and the model has no classifier with parameters.
        ValueError: If frozen is none of these.

    Example:
        >>> import timm
        >>> task = LabelInjectionTask(timm.create_model('test_resnet', num_classes=4), frozen='backbone')
        >>> [name for name, parameter in task.trainable_module.named_parameters() if parameter.requires_grad]
        ['fc.weight', 'fc.bias']
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: nn.Module | None = None,
            *,
            frozen: str = 'statistics',
            soft_targets: bool = True,
            device: torch.device | None = None,
    ) -> None:
        check_choice(frozen=frozen, choices=FROZEN)
        super().__init__(model, criterion, soft_targets=soft_targets, device=device)
        self.frozen = frozen
        if frozen == 'backbone':
            classifier = getattr(unwrap_model(model), 'get_classifier', lambda: None)()
            if not isinstance(classifier, nn.Module) or not any(True for _ in classifier.parameters()):
                raise TypeError(
                    f'model must have one classifier with parameters to train alone, got '
                    f'{type(unwrap_model(model)).__name__} with {type(classifier).__name__}.')
            model.requires_grad_(False)
            classifier.requires_grad_(True)

    def train(self, mode: bool = True) -> 'LabelInjectionTask':
        """As of any module, but that what is frozen stays in evaluation mode."""
        super().train(mode)
        network = unwrap_model(self.trainable_module)
        if self.frozen == 'backbone':
            network.eval()
        elif self.frozen == 'statistics':
            for module in network.modules():
                if isinstance(module, BATCH_NORMS):
                    module.eval()
        return self
