"""Semantic diversity loss (SDL): a picture is several vectors, and each label's word is near one of them.

Ben-Cohen et al., "Semantic Diversity Learning for Zero-Shot Multi-label Classification", arXiv:2105.05926; checked
against the published code.

Deviations: half precision is computed in float32, log(1 + exp(v)) is a softplus (it overflowed above 88), and a
picture without positives and an embedding of one row have defined values (both gave NaN).
"""
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from timm_miil._checks import check_choice, check_floating, check_ndim, check_positive, check_range
from timm_miil.losses._precision import is_eager, matmul, widen
from timm_miil.losses._reduce import ROW_REDUCTIONS, reduce

__all__ = ['SemanticDiversityLoss', 'label_diversity', 'semantic_diversity_loss', 'semantic_scores']

_PAIRS_AT_ONCE = 2 ** 19  # of a positive and a negative class: a buffer in float32 takes 2 MiB
_PIECES_COMPILED = 4      # at most: a compiler unrolls them, and fuses what a piece computes into its sums


def semantic_scores(embedding: Tensor, word_vectors: Tensor, *, num_rows: int) -> Tensor:
    """Score of each class: the largest dot product of its word vector with one of the picture's vectors.

    S_bc = max_i sum_d A_b[d, i] W[c, d]. The gradient flows to the largest alone. At inference, pass the word
    vectors of the labels that are wanted: those seen in training, others (zero-shot), or both (generalised).

    Args:
        embedding: The network's output, shape (B, D * num_rows), read as A of shape (B, D, num_rows): element
            (d, i) stands at d * num_rows + i. Any floating dtype, computed in float32 or wider.
        word_vectors: One row a class (W), shape (K, D); D is 300 in the paper. They get no gradient.
        num_rows: Vectors a picture (the paper's principal embedding vectors), at least 1.

    Returns:
        Shape (B, K); float32, or float64 for a float64 embedding. They rank classes and are no probabilities.

    Raises:
        TypeError: If a tensor is not floating-point, or num_rows is not an int.
        ValueError: If the shapes do not fit, or num_rows is below 1.

    Example:
        >>> words = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> semantic_scores(torch.tensor([[3.0, 0.0, 1.0, 2.0]]), words, num_rows=2)
        tensor([[3., 2.]])
    """
    check_positive(num_rows=num_rows)
    _check_word_vectors(word_vectors)
    _check_embedding(embedding, word_vectors, num_rows)
    # (B, num_rows, D), contiguous: one product instead of B small ones, a tenth of the time.
    rows = widen(embedding).unflatten(1, (word_vectors.shape[1], num_rows)).mT.contiguous()
    return matmul(rows, word_vectors.detach().to(rows.dtype).T).max(dim=1).values


def label_diversity(targets: Tensor, word_vectors: Tensor) -> Tensor:
    """How far apart in meaning a picture's labels are: the summed variance of their word vectors (V_b).

    Args:
        targets: 1 for present, anything else for absent, shape (B, K); any dtype.
        word_vectors: One row a class, shape (K, D).

    Returns:
        Shape (B,), with the unbiased variance; 0 for one label or none. Float32, or float64 for float64 words.

    Raises:
        TypeError: If word_vectors are not floating-point.
        ValueError: If the shapes do not fit.

    Example:
        >>> words = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> label_diversity(torch.tensor([[1, 1], [1, 0]]), words)
        tensor([1., 0.])
    """
    _check_word_vectors(word_vectors)
    _check_targets(targets, word_vectors, targets.shape[0] if targets.ndim else 1)
    words = widen(word_vectors.detach())
    words = words - words.mean(dim=0)       # same variance, less to cancel
    is_pos = (targets == 1).to(words.dtype)
    count = is_pos.sum(dim=1)
    squares = matmul(is_pos, words.square().sum(dim=1, keepdim=True)).squeeze(dim=1)
    spread = squares - matmul(is_pos, words).square().sum(dim=1) / count.clamp(min=1)
    return torch.where(count > 1, spread.clamp(min=0) / (count - 1).clamp(min=1), 0.0)


def semantic_diversity_loss(
        embedding: Tensor,
        targets: Tensor,
        word_vectors: Tensor,
        *,
        num_rows: int,
        diversity_weight: float | None = 0.3,
        reduction: str = 'mean',
) -> Tensor:
    """Ranks the words of a picture's labels above all others, and keeps its vectors alike.

    With scores S from `semantic_scores`, positives P, negatives N and V from `label_diversity`, a row costs
    l = (1 + V) / |P| sum_{p in P} sum_{n in N} log(1 + exp(S_n - S_p)); a row without negatives compares its
    positives to 0. With G the summed unbiased variance of the picture's vectors, the regularised row is
    2 ((1 - w) l + w G): the factor 2 makes w = 0 twice the loss of w = None. A row without positives costs 0, G
    included, and counts in the mean. The code's equations; the paper's are recalled, not checked.

    Time grows with B * K times the most positives of a row, which an accelerator is asked for once a call; memory
    grows with B * K alone. Under torch.compile and torch.func each row is taken to have up to K positives.

    Args:
        embedding: The network's output, shape (B, D * num_rows), laid out as in `semantic_scores`; any floating
            dtype, computed in float32 or wider.
        targets: 1 for present, shape (B, K), any dtype. Everything else is a negative, as in the original: 0, the
            unannotated mark -1, and soft values below 1.
        word_vectors: One row a class, shape (K, D). They get no gradient.
        num_rows: Vectors a picture, at least 1; one has no variance, so G = 0.
        diversity_weight: Weight w of G (the paper's lambda), in [0, 1]; None leaves G and the factor 2 out. The
            published COCO script has 0.01.
        reduction: 'mean' over the batch, 'sum', or 'none'.

    Returns:
        A scalar, or shape (B,) when reduction is 'none'; float32, or float64 for a float64 embedding. At least 0;
        an empty batch gives 0.

    Raises:
        TypeError: If embedding or word_vectors are not floating-point, or a setting is not a number.
        ValueError: If the shapes do not fit, or a setting is out of range.

    Example:
        >>> words = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> semantic_diversity_loss(
        ...     torch.tensor([[2.0, 0.0]]), torch.tensor([[1, 0]]), words, num_rows=1, diversity_weight=None)
        tensor(0.1269)
    """
    _check_settings(num_rows, diversity_weight, reduction)
    scores = semantic_scores(embedding, word_vectors, num_rows=num_rows)
    _check_targets(targets, word_vectors, scores.shape[0])
    is_pos = targets == 1
    loss = (1 + label_diversity(targets, word_vectors.to(scores.dtype))) * _ranking_loss(scores, is_pos)
    if diversity_weight is not None:
        loss = 2 * (1 - diversity_weight) * loss
        if num_rows > 1:
            rows = widen(embedding).unflatten(1, (word_vectors.shape[1], num_rows))
            spread = (rows - rows.mean(dim=2, keepdim=True)).square().sum(dim=(1, 2)) / (num_rows - 1)
            loss = loss + 2 * diversity_weight * torch.where(is_pos.any(dim=1), spread, 0.0)
    return reduce(loss, reduction)


class SemanticDiversityLoss(nn.Module):
    """Semantic diversity loss over fixed labels; see `semantic_diversity_loss` for the mathematics.

    Args:
        word_vectors: One row a class, shape (K, D), as it will meet targets (B, K); copied, not part of the state
            dict. None for words that come with each batch.
        num_rows: Vectors a picture; 2 in the published COCO script, 7 in the published NUS-WIDE model. None for as many
            as the embedding is times longer than a word.
        diversity_weight: Weight of the picture's own variance; None for the loss without it.
        reduction: 'mean' over the batch, 'sum', or 'none'.

    Raises:
        TypeError: If word_vectors are not floating-point, or a setting is not a number.
        ValueError: If word_vectors are not of shape (K, D), or a setting is out of range.
    """

    word_vectors: Tensor | None

    def __init__(
            self,
            word_vectors: Tensor | None = None,
            num_rows: int | None = None,
            diversity_weight: float | None = 0.3,
            reduction: str = 'mean',
    ) -> None:
        super().__init__()
        _check_settings(1 if num_rows is None else num_rows, diversity_weight, reduction)
        self.num_rows = num_rows
        self.diversity_weight = diversity_weight
        self.reduction = reduction
        if word_vectors is not None:
            _check_word_vectors(word_vectors)
            word_vectors = word_vectors.detach().clone()
        self.register_buffer('word_vectors', word_vectors, persistent=False)

    def forward(self, embedding: Tensor, targets: Tensor, word_vectors: Tensor | None = None) -> Tensor:
        """Loss of embeddings (B, D * num_rows) against targets (B, K).

        Args:
            embedding: As of `semantic_diversity_loss`.
            targets: As of `semantic_diversity_loss`.
            word_vectors: One row a class, shape (K, D), in place of the loss's own.

        Raises:
            ValueError: If there are no word vectors, or the shapes do not fit.
        """
        words = self.word_vectors if word_vectors is None else word_vectors
        if words is None:
            raise ValueError(
                'word_vectors must be given, of shape (K, D), to the loss or with each batch; got neither.')
        num_rows = self.num_rows
        if num_rows is None:
            _check_word_vectors(words)
            num_rows = max(embedding.shape[-1] // words.shape[1], 1)
        return semantic_diversity_loss(
            embedding, targets, words, num_rows=num_rows, diversity_weight=self.diversity_weight,
            reduction=self.reduction)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        shape = None if self.word_vectors is None else tuple(self.word_vectors.shape)
        return (
            f'word_vectors={shape}, num_rows={self.num_rows}, '
            f'diversity_weight={self.diversity_weight}, reduction={self.reduction!r}')


def _ranking_loss(scores: Tensor, is_pos: Tensor) -> Tensor:
    """Mean over a row's positives of the summed softplus over its negatives, shape (B,)."""
    positive = is_pos.to(scores.dtype)
    # No more places for positives than the fullest row needs, where a shape may depend on that.
    places = int(is_pos.sum(dim=1).max()) if is_pos.numel() and is_eager() else is_pos.shape[1]
    weight, classes = positive.topk(max(places, 1), dim=1)
    weight = weight / positive.sum(dim=1, keepdim=True).clamp(min=1)
    # A row without negatives has one of score 0 instead.
    negative_scores = torch.cat([scores, scores.new_zeros(scores.shape[0], 1)], dim=1)
    negative = torch.cat([1 - positive, is_pos.all(dim=1, keepdim=True).to(scores.dtype)], dim=1)
    size = max(_PAIRS_AT_ONCE // max(negative.numel(), 1), 1)
    if torch.compiler.is_compiling():
        size = max(size, classes.shape[1] // _PIECES_COMPILED)
    loss: Tensor = _PairwiseSoftplus.apply(scores.gather(1, classes), negative_scores, weight, negative, size)
    return loss


class _PairwiseSoftplus(torch.autograd.Function):
    """sum_p v_p sum_n w_n softplus(n - p) of each row, in pieces: neither direction holds all pairs at once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(positives: Tensor, negatives: Tensor, v: Tensor, w: Tensor, size: int) -> Tensor:
        loss = positives.new_zeros(positives.shape[0])
        for piece, v_piece in zip(positives.split(size, dim=1), v.split(size, dim=1)):
            pairs = F.logsigmoid(piece[:, :, None] - negatives[:, None, :])
            loss = loss - ((pairs * w[:, None, :]).sum(dim=2) * v_piece).sum(dim=1)
        return loss

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        *tensors, ctx.size = inputs                                 # type: ignore[attr-defined]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        positives, negatives, v, w = ctx.saved_tensors              # type: ignore[attr-defined]
        size = ctx.size                                             # type: ignore[attr-defined]
        positive_grads, negative_grad = [], torch.zeros_like(negatives)
        for piece, v_piece in zip(positives.split(size, dim=1), v.split(size, dim=1)):
            slope = (negatives[:, None, :] - piece[:, :, None]).sigmoid()
            positive_grads.append(-(slope * w[:, None, :]).sum(dim=2) * v_piece)
            negative_grad = negative_grad + (slope * v_piece[:, :, None]).sum(dim=1)
        grad = grad[:, None]
        return grad * torch.cat(positive_grads, dim=1), grad * negative_grad * w, None, None, None


def _check_settings(num_rows: int, diversity_weight: float | None, reduction: str) -> None:
    check_positive(num_rows=num_rows)
    check_choice(reduction=reduction, choices=ROW_REDUCTIONS)
    if diversity_weight is not None:
        check_range(diversity_weight=diversity_weight, low=0.0, high=1.0, closed=True)


def _check_word_vectors(word_vectors: Tensor) -> None:
    check_floating(word_vectors=word_vectors)
    if word_vectors.ndim != 2:
        raise ValueError(
            f'word_vectors must have shape (K, D), one row a class, got {tuple(word_vectors.shape)}; the published '
            f'files hold (1, D, K): pass word_vectors[0].T.')


def _check_embedding(embedding: Tensor, word_vectors: Tensor, num_rows: int) -> None:
    check_floating(embedding=embedding)
    check_ndim(2, embedding=embedding)
    length = word_vectors.shape[1]
    if embedding.shape[1] != length * num_rows:
        raise ValueError(
            f'embedding must have shape (B, {length * num_rows}), num_rows={num_rows} vectors as long as a word '
            f'({length}), got {tuple(embedding.shape)}'
            f'{_hint(word_vectors, embedding.shape[1] == word_vectors.shape[0] * num_rows)}.')


def _check_targets(targets: Tensor, word_vectors: Tensor, batch: int) -> None:
    if targets.shape != (batch, word_vectors.shape[0]):
        raise ValueError(
            f'targets must have shape ({batch}, {word_vectors.shape[0]}), one column a word, got '
            f'{tuple(targets.shape)}{_hint(word_vectors, targets.shape[1:] == (word_vectors.shape[1],))}.')


def _hint(word_vectors: Tensor, would_fit_transposed: bool) -> str:
    if not would_fit_transposed:
        return ''
    shape = tuple(word_vectors.shape)
    return f'; word_vectors of shape {shape} are read as (K, D): if they are (D, K), pass word_vectors.T'
