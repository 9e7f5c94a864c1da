"""Semantic diversity learning (SDL): a picture is several vectors, ranked against the words of its labels.

Ben-Cohen et al., "Semantic Diversity Learning for Zero-Shot Multi-label Classification", arXiv:2105.05926; train on
the seen labels, then exchange the words. No deviations; the equations are those of `SemanticDiversityLoss`.
"""
from typing import Any

import torch
from torch import Tensor, nn

from timm_miil.losses import SemanticDiversityLoss
from timm_miil.tasks.training_model import TrainingModel, TrainingModelTask, kept_network
from timm_miil.tasks.zero_shot import ZeroShotTask

__all__ = ['SemanticDiversityTask']


class SemanticDiversityTask(TrainingModelTask, ZeroShotTask):
    """Zero-shot task of a network that ends in a `SemanticEmbeddingHead`.

    A batch of pictures (B, 3, H, W) and float targets (B, K), one column a label of the current set, gives
    {'loss': scalar, 'output': scores (B, K)}. The words of the loss are the labels that the network has.

    Args:
        model: Network with `embed(images)`, whose classifier is such a head; `miil_sdl`, `miil_sdl_tresnet_m`.
        criterion: Maps vectors (B, D * k), targets (B, K) and words (K, D) to a scalar; `SemanticDiversityLoss()` by
            default.
        threshold: As of `MultiLabelTask`.
        device: As of `MultiLabelTask`.

    Raises:
        TypeError: If the model lacks `embed` or `set_queries`.
        ValueError: If threshold is out of range; in `forward`, if targets are not float or not (B, K).

    Example:
        >>> import timm
        >>> task = SemanticDiversityTask(timm.create_model('miil_sdl_scenes', labels=['red 1', 'blue 2']))
        >>> task(torch.rand(2, 3, 64, 64), torch.ones(2, 2))['output'].shape
        torch.Size([2, 2])
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: nn.Module | None = None,
            *,
            threshold: float = 0.5,
            device: torch.device | None = None,
    ) -> None:
        if not callable(getattr(kept_network(model), 'embed', None)):
            raise TypeError(
                f'model must have embed(images), got {type(kept_network(model)).__name__}; create it by '
                f"timm.create_model('miil_sdl', backbone=...).")
        super().__init__(
            _Vectors(model), criterion or SemanticDiversityLoss(), threshold=threshold, device=device)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and scores of a batch, as the class says."""
        network: Any = kept_network(self.trainable_module)
        self._check_target(target, network.num_classes)
        embedding = self.trainable_module(input) if self.training else network.embed(input)
        head = network.get_classifier()
        loss = self.criterion(embedding, target, head.text_embeddings)
        return {'loss': loss, 'output': head.score(embedding.detach())}


class _Vectors(TrainingModel):
    """Gives the vectors in training, in evaluation the scores of the network."""

    def forward_training(self, x: Tensor) -> Tensor:
        network: Any = self.network
        vectors: Tensor = network.embed(x)
        return vectors
