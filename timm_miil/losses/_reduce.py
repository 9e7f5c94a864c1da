"""How element losses become one number."""
from torch import Tensor

__all__ = ['REDUCTIONS', 'reduce']

REDUCTIONS = ('sum', 'mean', 'batchmean', 'none')


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """Reduce element losses of shape (B, ...).

    Args:
        loss: One value an element, shape (B, ...).
        reduction: 'sum', 'mean' over all elements, 'batchmean' (sum / B) or 'none'; checked by the caller.

    Returns:
        A scalar, or `loss` itself for 'none'.
    """
    if reduction == 'none':
        return loss
    if reduction == 'mean':
        return loss.mean()
    return loss.sum() / loss.shape[0] if reduction == 'batchmean' else loss.sum()
