"""What does an exact mean average precision cost? Ours, timm's, scikit-learn's and the loop in numpy, in turns.

    python benchmarks/metrics.py             # about 2 minutes, 2 GB

One thread, and processor time: a run of milliseconds on a shared machine is often interrupted. Targets are int8, 3.6 %
(as in COCO) or 1 % of them positive; scores are float32 and random, which spares ours nothing. timm's evaluator and
scikit-learn, slow and hungry, meet the small size only.
"""
from collections.abc import Callable

import numpy as np
import torch
from run import save
from sklearn.metrics import average_precision_score
from timm.task import MultiLabelClassificationEvaluator

from timm_miil.bench import compare, processor
from timm_miil.metrics import MultilabelAveragePrecision, multilabel_average_precision

BATCH = 256


def numpy_loop(scores: np.ndarray, targets: np.ndarray) -> float:
    """The textbook: sort each class, count the positives from the top, average the precision where they are."""
    found = np.zeros(scores.shape[1])
    ranks = np.arange(1, len(scores) + 1)
    for index in range(scores.shape[1]):
        order = np.argsort(-scores[:, index])
        is_pos = targets[order, index] == 1
        precision = np.cumsum(is_pos) / ranks
        found[index] = precision[is_pos].mean() if is_pos.any() else 0.0
    return float(found.mean())


def streamed(metric: MultilabelAveragePrecision, scores: torch.Tensor, targets: torch.Tensor) -> float:
    metric.reset()
    for some, labels in zip(scores.split(BATCH), targets.split(BATCH)):
        metric.update(some, labels)
    return metric.compute().mean_with_zeros


def timm_evaluator(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """Its mAP comes with a loss and three F1, which it has no way to leave out."""
    evaluator = MultiLabelClassificationEvaluator()
    for some, labels in zip(scores.split(BATCH), targets.split(BATCH)):
        evaluator.update(some, labels)
    return evaluator.compute()['map'] / 100


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for num_rows, num_classes, share, repeats, with_others in (
            (5_000, 80, 0.036, 40, True), (100_000, 1_000, 0.01, 3, False)):
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(num_rows, num_classes, generator=generator)
        targets = (torch.rand(num_rows, num_classes, generator=generator) < share).to(torch.int8)
        metric = MultilabelAveragePrecision(num_classes)
        contestants: dict[str, Callable[[], float]] = {
            'numpy loop': lambda: numpy_loop(scores.numpy(), targets.numpy()),
            'multilabel_average_precision': lambda: float(
                multilabel_average_precision(scores, targets).nan_to_num(0.0).mean()),
            'MultilabelAveragePrecision': lambda: streamed(metric, scores, targets),
        }
        if with_others:
            contestants |= {
                'timm evaluator': lambda: timm_evaluator(scores, targets),
                'scikit-learn': lambda: float(average_precision_score(targets.numpy(), scores.numpy())),
            }
        means = {name: run() for name, run in contestants.items()}
        if max(means.values()) - min(means.values()) > 1e-6:  # the loop ranks ties arbitrarily
            raise SystemExit(f'the contestants disagree: {means}')
        rows += compare(
            contestants, repeats=repeats, warmup=0, clock=processor, num_rows=num_rows, num_classes=num_classes,
            positive_share=share)
    save('metrics-cpu', rows)


if __name__ == '__main__':
    main()
