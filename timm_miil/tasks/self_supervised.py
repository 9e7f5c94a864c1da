"""Self-supervised training by two views of each picture: SimSiam.

Chen and He, "Exploring Simple Siamese Representation Learning", arXiv:2011.10566, section 3 and appendix A. Deviation:
the predictor's learning rate follows the schedule, where the paper also tries a constant one.
"""
import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_miil._checks import check_positive
from timm_miil.tasks.training_model import TrainingModel, TrainingModelTask

__all__ = ['SimSiam', 'SimSiamTask']


class SimSiam(TrainingModel):
    """A network that embeds pictures, with SimSiam's projector and predictor beside it.

    In training pictures (2 B, I, H, W), the two views of a picture one after the other, give predictions and targets,
    of shape (B, 2, proj_dim) each: a view's prediction belongs to the other view's target. Each of the two views runs
    on its own, so that batch norms see one view a picture.

    Args:
        network: Maps pictures to embeddings (B, embed_dim), such as a timm model with num_classes=0.
        embed_dim: Their width; a timm model tells it as `head_hidden_size`.
        proj_dim: Width of what is compared.
        pred_dim: Width of the predictor's bottleneck.

    Raises:
        TypeError: If a width is no int.
        ValueError: If a width is below 1; in `forward` in training, if the number of pictures is odd or the embeddings
            are not (B, embed_dim).
    """

    def __init__(self, network: nn.Module, embed_dim: int, *, proj_dim: int = 2048, pred_dim: int = 512) -> None:
        check_positive(embed_dim=embed_dim, proj_dim=proj_dim, pred_dim=pred_dim)
        super().__init__(network)
        self.embed_dim = embed_dim
        self.projector = nn.Sequential(
            *_layer(embed_dim, embed_dim), *_layer(embed_dim, embed_dim),
            nn.Linear(embed_dim, proj_dim, bias=False), nn.BatchNorm1d(proj_dim, affine=False))
        self.predictor = nn.Sequential(*_layer(proj_dim, pred_dim), nn.Linear(pred_dim, proj_dim))

    def forward_training(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions, and targets, which are constants for the backward pass; as the class says."""
        if len(x) % 2:
            raise ValueError(f'x must have two views of each picture, one after the other, got {len(x)} pictures.')
        projections = [self.projector(self._embed(view)) for view in x.unflatten(0, (-1, 2)).unbind(1)]
        predictions = [self.predictor(projection) for projection in projections]
        return torch.stack(predictions, dim=1), torch.stack(projections, dim=1).detach().flip(1)

    def _embed(self, view: Tensor) -> Tensor:
        embeddings: Tensor = self.network(view)
        if embeddings.shape != (len(view), self.embed_dim):
            raise ValueError(
                f'network must give embeddings (B, {self.embed_dim}), got {tuple(embeddings.shape)}; create it by '
                f'timm.create_model(name, num_classes=0), and give its head_hidden_size.')
        return embeddings


class SimSiamTask(TrainingModelTask):
    """Negative cosine between what one view predicts and what the other is, which stays a constant (Eq. 1 to 4).

    A batch of pictures (2 B, I, H, W), the two views of a picture one after the other, gives {'loss': scalar in
    [-1, 1], 'output': targets (2 B, proj_dim)}. Labels are not looked at.

    Args:
        model: Network with projector and predictor.
        device: Where the task's own tensors live; the model is moved by the caller.

    Raises:
        TypeError: If model is no `SimSiam`.
        ValueError: In `forward`, if the number of pictures is odd or the network gives other embeddings.

    Example:
        >>> task = SimSiamTask(SimSiam(nn.Linear(4, 8), embed_dim=8, proj_dim=16, pred_dim=4))
        >>> task(torch.rand(6, 4))['output'].shape
        torch.Size([6, 16])
    """

    def __init__(self, model: SimSiam, *, device: torch.device | None = None) -> None:
        if not isinstance(unwrap_model(model), SimSiam):
            raise TypeError(
                f'model must be a SimSiam, got {type(unwrap_model(model)).__name__}; make one by SimSiam(network, '
                f'embed_dim).')
        super().__init__(model, nn.CosineSimilarity(dim=-1), device=device, verbose=False)

    def forward(self, input: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """Loss and outputs of a batch, as the class says."""
        predictions, targets = self.trainable_module(input)
        loss = -self.criterion(predictions.float(), targets.float()).mean()
        return {'loss': loss, 'output': targets.flip(1).flatten(0, 1)}


def _layer(in_features: int, out_features: int) -> tuple[nn.Module, ...]:
    return nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features), nn.ReLU()
