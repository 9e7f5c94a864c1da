"""Figures of pictures with one label each, counted as they come: no score is kept."""
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_miil.losses import SemanticHierarchy
from timm_miil.metrics import SemanticAccuracy

__all__ = ['Tally']

_TOP = 5


class Tally:
    """Counts what is right, picture by picture.

    Args:
        hierarchy: The tree over the classes; None does without its figure.
    """

    def __init__(self, hierarchy: SemanticHierarchy | None = None) -> None:
        self.semantic = None if hierarchy is None else SemanticAccuracy(hierarchy)
        self._sums = torch.zeros(4, dtype=torch.float64)  # pictures, right, right among the first, losses

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            logits: Raw scores, shape (B, C).
            targets: 1 at a picture's label, 0 elsewhere, shape (B, C).

        Raises:
            ValueError: If there is a tree and a score is NaN.
        """
        if not len(logits):
            return
        label = targets.argmax(1).to(logits.device)
        ranked = logits.topk(min(_TOP, logits.shape[1]), dim=1).indices == label.unsqueeze(1)
        losses = F.cross_entropy(logits.float(), label, reduction='none')
        found = torch.stack([ranked[:, 0].sum(), ranked.any(1).sum(), losses.sum(dtype=_wide(losses))]).double()
        self._sums += torch.cat([torch.tensor([float(len(label))], dtype=torch.float64), found.cpu()])
        if self.semantic is not None:
            self.semantic.update(logits, label)

    def totals(self) -> Tensor:
        """All counts, which add up over processes: float64 in host memory, shape (4,), or (4 + 2 J,) with a tree."""
        if self.semantic is None:
            return self._sums
        return torch.cat([self._sums, self.semantic.counts().double().flatten()])

    @staticmethod
    def figures(totals: Tensor) -> dict[str, float]:
        """'top1', 'top5' (percent) and 'loss'; with a tree 'semantic_top1' (percent). All are NaN without pictures."""
        count, first, among, loss = totals[:4]
        found = {'top1': 100.0 * first / count, 'top5': 100.0 * among / count, 'loss': loss / count}
        if len(totals) > 4:
            right, answers = totals[4:].view(2, -1).sum(1)
            found['semantic_top1'] = 100.0 * right / answers
        return {name: float(value) for name, value in found.items()}


def _wide(losses: Tensor) -> torch.dtype:
    return torch.float32 if losses.device.type == 'mps' else torch.float64
