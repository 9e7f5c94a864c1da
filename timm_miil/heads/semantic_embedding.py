"""Semantic embedding head: a picture becomes several vectors in the space of its labels' word vectors.

Ben-Cohen et al., "Semantic Diversity Learning for Zero-Shot Multi-label Classification", arXiv:2105.05926; original
code in Alibaba-MIIL/ZS_SDL. No deviations: one linear layer without a bias, and the score of a label is the largest
dot product of its word vector with one of the picture's vectors, as `timm_miil.losses.semantic_scores` has it.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._checks import check_positive
from timm_miil.heads._queries import TextQueries
from timm_miil.heads.ml_decoder import flatten_features
from timm_miil.heads.text import TEXT_DIM

__all__ = ['SemanticEmbeddingHead']

NUM_ROWS = 7


class SemanticEmbeddingHead(TextQueries):
    """Mean over positions, a linear layer to num_rows vectors, and the scores of the current labels.

    The label set may be changed at any time, and is no part of the checkpoint; see `ZeroShotMLDecoder`. The one weight,
    (text_dim * num_rows, in_features), is the `embedding.weight` of the authors' file.

    Args:
        in_features: Channels of the features.
        text_dim: Length E of a label's word vector.
        num_rows: Vectors a picture (the paper's principal embedding vectors): 7 in the published NUS-WIDE network, 2
            in the authors' script for MS-COCO.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is below 1.

    Example:
        >>> import torch
        >>> head = SemanticEmbeddingHead(in_features=64, text_dim=50, num_rows=3)
        >>> head(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 150])
        >>> head.set_queries(torch.randn(6, 50))
        >>> head(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 6])
    """

    def __init__(
            self,
            in_features: int,
            text_dim: int = TEXT_DIM,
            num_rows: int = NUM_ROWS,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(text_dim, device)
        check_positive(in_features=in_features, num_rows=num_rows)
        self.in_features = in_features
        self.num_rows = num_rows
        self.weight = nn.Parameter(torch.empty(text_dim * num_rows, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights as `nn.Linear` does, as after `to_empty`; the label set stays."""
        bound = self.in_features ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, text_dim={self.text_dim}, num_rows={self.num_rows}'

    def embed(self, features: Tensor) -> Tensor:
        """The picture's vectors, as the loss takes them.

        Args:
            features: Pooled (B, in_features), a map (B, in_features, H, W) or tokens (B, N, in_features), the head's
                dtype.

        Returns:
            Shape (B, text_dim * num_rows): number (d, i) of A (text_dim, num_rows) stands at d * num_rows + i.

        Raises:
            ValueError: If the shape is none of these.
        """
        if features.ndim != 2:
            features = flatten_features(features, self.in_features).mean(1)
        return F.linear(features, self.weight)

    def score(self, embedding: Tensor) -> Tensor:
        """Scores (B, K) of the current labels for what `embed` gave; they rank labels and are no probabilities."""
        rows = embedding.unflatten(1, (self.text_dim, self.num_rows)).transpose(1, 2)
        # (B, num_rows, K); contiguous rows are one product instead of B small ones.
        return (rows.contiguous() @ self.text_embeddings.to(embedding.dtype).t()).max(dim=1)[0]

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B, K) of the current labels; without labels the vectors, as `embed` gives them."""
        embedding = self.embed(features)
        return self.score(embedding) if self.num_classes > 0 else embedding
