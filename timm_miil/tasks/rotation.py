"""Self-supervised training by telling how pictures were turned (RotNet).

Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations", arXiv:1803.07728. No deviations.
"""
import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_miil._checks import check_positive
from timm_miil.tasks.training_model import TrainingModel, TrainingModelTask

__all__ = ['RotationHead', 'RotationTask']

TURNS = 4


class RotationHead(TrainingModel):
    """A network that embeds pictures, with a linear head for the four turns beside it.

    In training pictures (B, I, S, S) give logits (4 B, 4), of the pictures turned by 0, 90, 180 and 270 degrees: first
    all of them by 0, then all by 90, and so on.

    Args:
        network: Maps pictures to embeddings (B, embed_dim), such as a timm model with num_classes=0.
        embed_dim: Their width; a timm model tells it as `head_hidden_size`.

    Raises:
        TypeError: If the width is no int.
        ValueError: If the width is below 1; in `forward` in training, if the pictures are not square.
    """

    def __init__(self, network: nn.Module, embed_dim: int) -> None:
        check_positive(embed_dim=embed_dim)
        super().__init__(network)
        self.head = nn.Linear(embed_dim, TURNS)

    def forward_training(self, x: Tensor) -> Tensor:
        """Logits of the turned pictures, as the class says."""
        if x.ndim != 4 or x.shape[2] != x.shape[3]:
            raise ValueError(f'x must be square pictures (B, I, S, S), to be turned, got {tuple(x.shape)}.')
        turned = torch.cat([torch.rot90(x, turns, (2, 3)) for turns in range(TURNS)])
        logits: Tensor = self.head(self.network(turned))
        return logits


class RotationTask(TrainingModelTask):
    """Cross-entropy of the turns.

    A batch of pictures (B, I, S, S) gives {'loss': scalar, 'output': logits (4 B, 4)}. Labels are not looked at.

    Args:
        model: Network with its head.
        device: Where the task's own tensors live; the model is moved by the caller.

    Raises:
        TypeError: If model is no `RotationHead`.
        ValueError: In `forward`, if the pictures are not square.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 8))
        >>> RotationTask(RotationHead(network, embed_dim=8))(torch.rand(2, 3, 4, 4))['output'].shape
        torch.Size([8, 4])
    """

    def __init__(self, model: RotationHead, *, device: torch.device | None = None) -> None:
        if not isinstance(unwrap_model(model), RotationHead):
            raise TypeError(
                f'model must be a RotationHead, got {type(unwrap_model(model)).__name__}; make one by '
                f'RotationHead(network, embed_dim).')
        super().__init__(model, nn.CrossEntropyLoss(), device=device, verbose=False)

    def forward(self, input: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """Loss and logits of a batch, as the class says."""
        logits = self.trainable_module(input)
        turns = torch.arange(TURNS, device=logits.device).repeat_interleave(len(input))
        return {'loss': F.cross_entropy(logits.float(), turns), 'output': logits}
