"""What a network says of pictures, and how good that is."""
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_miil._checks import check_choice
from timm_miil.data import ImageStream, LabelledImages
from timm_miil.losses import SemanticHierarchy
from timm_miil.metrics import MultilabelAveragePrecision, multilabel_f1, output_std
from timm_miil.train._tally import Tally
from timm_miil.train._verification import measure_pairs
from timm_miil.train._verification_settings import VerificationSettings
from timm_miil.train._zero_shot import retrieval_figures
from timm_miil.train.build import build_eval_loader

__all__ = ['METRIC_OF_TASK', 'evaluate', 'measure', 'score_batches']

METRIC_OF_TASK = MappingProxyType({
    'multi_label': 'map', 'self_supervised': 'output_std', 'semantic': 'semantic_top1', 'single_label': 'top1',
    'verification': 'tar', 'zero_shot': 'map'})
"""What a run's best epoch is chosen by: a key of `measure`."""

NO_PICTURES = 'source must have pictures to measure a model on, got none.'
_ROWS = 1 << 12  # at a time, where a copy of all would double the memory


def evaluate(
        model: nn.Module,
        source: LabelledImages | ImageStream,
        *,
        batch_size: int = 64,
        workers: int = 0,
        task: str = 'multi_label',
        hierarchy: SemanticHierarchy | None = None,
        verification: VerificationSettings = VerificationSettings(),
) -> dict[str, float]:
    """Measure a model on pictures, preprocessed as its configuration says.

    Args:
        model: Network with one logit a label, or that embeds pictures; its mode is left as it was.
        source: Pictures and targets.
        batch_size: Pictures at a time.
        workers: Processes that read pictures.
        task: A recipe's task, which decides what is measured.
        hierarchy: The tree over the labels, for the task 'semantic'.
        verification: The rates of the task 'verification'.

    Returns:
        The figures of `measure`.

    Raises:
        OSError: If a picture cannot be read.
        ValueError: If the model has another number of outputs than there are labels, there are no pictures, or the
            task asks for a tree.
    """
    _check_task(task, hierarchy)
    loader = build_eval_loader(
        source, model, batch_size=batch_size, workers=workers, device=next(model.parameters()).device)
    if task in ('semantic', 'single_label'):
        tally = Tally(hierarchy if task == 'semantic' else None)
        for scores, labels in score_batches(model, loader):
            tally.update(scores, labels)
        totals = tally.totals()
        if not totals[0]:
            raise ValueError(NO_PICTURES)
        return Tally.figures(totals)
    batches = list(score_batches(model, loader, embeds=task in ('self_supervised', 'verification')))
    if not batches:
        raise ValueError(NO_PICTURES)
    logits, targets = map(torch.cat, zip(*batches))
    return measure(logits, targets, task, verification=verification)


def score_batches(
        model: nn.Module,
        loader: Iterable[Any],
        *,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        embeds: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets, batch by batch.

    Args:
        model: Network on its device; it is in evaluation mode while this is iterated, and then as it was.
        loader: Batches of pictures and targets.
        autocast: Makes the context in which the model runs.
        embeds: Whether the model gives embeddings (B, D) in place of logits.

    Returns:
        Logits (B, C), float32 on the model's device, and targets (B, C), int8 in host memory.

    Raises:
        ValueError: If the numbers of columns differ.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for images, targets, *_ in loader:
            with torch.no_grad(), autocast():
                logits = model(images.to(device, non_blocking=True)).float()
            if logits.ndim != 2 or logits.shape[1] != targets.shape[1] and not embeds:
                raise ValueError(
                    f'the model must have one output a label, got {logits.shape[-1]} outputs for '
                    f'{targets.shape[1]} labels.')
            yield logits, targets.to(torch.int8)
    finally:
        model.train(was_training)


def measure(
        logits: Tensor, targets: Tensor, task: str = 'multi_label', *, hierarchy: SemanticHierarchy | None = None,
        verification: VerificationSettings = VerificationSettings(),
) -> dict[str, float]:
    """How well scores fit what is known, unknown labels left out.

    Args:
        logits: Raw scores, shape (N, C); embeddings (N, D) of the tasks 'self_supervised' and 'verification'.
        targets: 1 present, 0 absent, -1 unknown, shape (N, C).
        task: A recipe's task.
        hierarchy: The tree over the labels, for the task 'semantic'.
        verification: The rates of the task 'verification'.

    Returns:
        For 'single_label', 'top1', 'top5' (percent of pictures) and 'loss' (cross-entropy). For 'semantic' also
        'semantic_top1', the semantic accuracy of `timm_miil.metrics`, in percent. For 'self_supervised', 'output_std',
        see `timm_miil.metrics.output_std`. For 'verification', 'tar' and 'tar_at_<rate>', percent of the pairs of one
        identity that are accepted at the false accept rates. Else 'map' (mean average precision; where all labels are
        known a class without positives counts 0, else only classes with known positives and negatives count),
        'micro_f1' and 'macro_f1' at probability 0.5, in percent, and 'loss' (binary cross-entropy of a known label);
        for 'zero_shot' also 'retrieval_map', 'f1_at_3' and 'f1_at_5', percent, of the pictures that show a label.

    Raises:
        ValueError: If the task is unknown or asks for a tree, or a score is NaN.
    """
    _check_task(task, hierarchy)
    if task in ('semantic', 'single_label'):
        tally = Tally(hierarchy if task == 'semantic' else None)
        for scores, labels in zip(logits.split(_ROWS), targets.split(_ROWS)):
            tally.update(scores, labels)
        return Tally.figures(tally.totals())
    if task == 'self_supervised':
        return {'output_std': output_std(logits)}
    if task == 'verification':
        return measure_pairs(logits, targets, verification)
    metric, total, known = MultilabelAveragePrecision(logits.shape[1]), 0.0, 0
    for scores, labels in zip(logits.split(_ROWS), targets.split(_ROWS)):
        metric.update(scores.cpu(), labels.cpu())
        labels = labels.to(scores.device)
        losses = F.binary_cross_entropy_with_logits(scores.float(), (labels == 1).float(), reduction='none')
        total += float(losses.masked_fill(labels < 0, 0.0).double().sum())
        known += int((labels >= 0).sum())
    precision = metric.compute()
    f1 = multilabel_f1(logits.cpu(), targets.cpu(), threshold=0.0)
    mean = precision.mean if known < targets.numel() else precision.mean_with_zeros
    figures = {'map': mean, 'micro_f1': f1.overall_f1, 'macro_f1': f1.class_f1}
    found = {**{name: 100.0 * value for name, value in figures.items()}, 'loss': total / max(known, 1)}
    return found | retrieval_figures(logits, targets) if task == 'zero_shot' else found


def _check_task(task: str, hierarchy: SemanticHierarchy | None) -> None:
    check_choice(task=task, choices=METRIC_OF_TASK)
    if task == 'semantic' and hierarchy is None:
        raise ValueError("hierarchy must be given to measure the task 'semantic', got None; see SemanticHierarchy.")
