"""Zero-shot multi-label training: the labels are the model's queries, and may be others tomorrow.

Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", arXiv:2111.12933, section on zero-shot
learning: train on the seen labels, then exchange the queries. No deviations.
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil.tasks.multi_label import MultiLabelTask
from timm_miil.tasks.training_model import kept_network

__all__ = ['ZeroShotTask']


class ZeroShotTask(MultiLabelTask):
    """Multi-label task of a model whose label set is exchanged by `set_queries`.

    A batch of pictures (B, 3, H, W) and float targets (B, K), one column a label of the current set, gives
    {'loss': scalar, 'output': logits (B, K)}. A model that adds random queries in training gives logits (B, K + R): the
    last R join the loss as labels that are absent, and are left out of the output.

    Args:
        model: Network with `set_queries(embeddings)` and `num_classes`, such as `mldecoder_zero_shot`.
        criterion: As of `MultiLabelTask`; it gets (B, K + R).
        threshold: As of `MultiLabelTask`.
        device: As of `MultiLabelTask`.

    Raises:
        TypeError: If the model lacks `set_queries`.
        ValueError: If threshold is out of range; in `forward`, if targets are not float or not (B, K).

    Example:
        >>> from timm_miil.heads import ZeroShotMLDecoder
        >>> task = ZeroShotTask(ZeroShotMLDecoder(in_features=8, embed_dim=16, text_dim=5))
        >>> task.set_queries(torch.randn(3, 5))
        >>> task(torch.randn(2, 8, 7, 7), torch.ones(2, 3))['output'].shape
        torch.Size([2, 3])
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: nn.Module | None = None,
            *,
            threshold: float = 0.5,
            device: torch.device | None = None,
    ) -> None:
        if not hasattr(kept_network(model), 'set_queries'):
            raise TypeError(
                f'model must have set_queries(embeddings), got {type(kept_network(model)).__name__}; create it by '
                f"timm.create_model('mldecoder_zero_shot', backbone=...), or train it by MultiLabelTask.")
        super().__init__(model, criterion, threshold=threshold, device=device)

    def set_queries(self, embeddings: Tensor) -> None:
        """Choose the label set of the model and of its averaged copy, through DDP's and the compiler's wrappers.

        Set the seen labels before training, those to be found before validation, and the seen ones again after it.

        Args:
            embeddings: One row a label, shape (K, E); the same on every rank.

        Raises:
            ValueError: If the shape is not (K, E), with the model's E and K at least 1.
        """
        for is_ema in (False, True)[:1 + self.has_ema()]:
            module: Any = self.get_trainable_module(ema=is_ema)
            network: Any = kept_network(module)
            network.set_queries(embeddings)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a batch, as the class says."""
        network: Any = kept_network(self.trainable_module)
        num_labels: int = network.num_classes
        self._check_target(target, num_labels)
        output = self.trainable_module(input)
        loss = self.criterion(output, F.pad(target, (0, output.shape[1] - num_labels)))
        return {'loss': loss, 'output': output[:, :num_labels]}

    @staticmethod
    def _check_target(target: Tensor, num_labels: int) -> None:
        if target.ndim != 2 or target.shape[1] != num_labels or not target.is_floating_point():
            raise ValueError(
                f'target must be float of shape (B, {num_labels}), one column a label that is set, got {target.dtype} '
                f'{tuple(target.shape)}; for other labels call set_queries(embeddings) first.')
