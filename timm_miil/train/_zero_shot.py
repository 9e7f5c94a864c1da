"""Training whose labels are words: the task, the label sets that it is given, and what is measured of them."""
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from timm_miil.data import LabelledImages, read_word_vectors
from timm_miil.losses import SemanticDiversityLoss
from timm_miil.metrics import MultilabelAveragePrecision, multilabel_f1_at_k
from timm_miil.tasks import SemanticDiversityTask, ZeroShotTask
from timm_miil.train._task_parts import TaskParts
from timm_miil.train.recipe import Recipe

__all__ = [
    'build_zero_shot_task', 'label_args', 'measure_label_sets', 'refuse_plain_network', 'retrieval_figures',
    'set_words',
]

TOP = (3, 5)
NO_FIGURES = MappingProxyType(dict[str, dict[str, float]](seen={}, unseen={}, generalised={}))


def label_args(recipe: Recipe, labels: Sequence[str]) -> dict[str, Any]:
    """What the network is made with: the labels by name, or nothing if their words come from a file."""
    return {} if _word_vectors(recipe) else {'labels': list(labels)}


def refuse_plain_network(recipe: Recipe, error: TypeError) -> None:
    """Raise ValueError if the error, of making the network, means that it knows no labels."""
    if recipe.task == 'zero_shot' and "'labels'" in str(error):
        raise ValueError(
            f"model.name must be a network whose classes are words for task 'zero_shot', such as 'mldecoder_zero_shot' "
            f"or 'miil_sdl', got {recipe.model.name!r}.") from error


def set_words(model: Any, recipe: Recipe, labels: Sequence[str]) -> None:
    """Give a network a label set, by the words that the recipe asks for.

    Raises:
        OSError: If the file of word vectors cannot be read.
        ValueError: If it lacks words, or they do not fit the network.
    """
    path = _word_vectors(recipe)
    if path:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f'zero_shot.word_vectors must be a file of word vectors, got {path!r}, where none is.')
        model.set_queries(read_word_vectors(path, labels))
    else:
        model.set_labels(labels)


def build_zero_shot_task(parts: TaskParts) -> ZeroShotTask:
    """The task: SDL's, if the loss is SDL's."""
    kind = SemanticDiversityTask if isinstance(parts.criterion, SemanticDiversityLoss) else ZeroShotTask
    return kind(parts.model, parts.criterion, device=parts.device)


def measure_label_sets(
        model: nn.Module, recipe: Recipe, source: LabelledImages, seen: Sequence[str], unseen: Sequence[str],
        figures: Callable[[LabelledImages], dict[str, float]],
) -> dict[str, dict[str, float]]:
    """Figures over the labels that were learnt ('seen'), those held out ('unseen') and both ('generalised').

    Args:
        model: The network, which is left with the seen labels.
        recipe: All settings.
        source: Pictures of all these labels.
        seen: Labels that were learnt.
        unseen: Labels that were held out.
        figures: Measures the model on pictures with its labels.
    """
    found = dict(NO_FIGURES)
    for name, labels in {'unseen': unseen, 'generalised': (*seen, *unseen), 'seen': seen}.items():
        set_words(model, recipe, labels)
        found[name] = figures(source.with_labels(labels))
    return found


def retrieval_figures(scores: Tensor, targets: Tensor) -> dict[str, float]:
    """How well labels are found in the pictures that show one, in percent; see `timm_miil.metrics.ZeroShotRetrieval`.

    Args:
        scores: Shape (N, C).
        targets: 1 present, 0 absent, -1 unknown, shape (N, C).

    Returns:
        'retrieval_map', where a class that no picture shows counts 0, and 'f1_at_3' and 'f1_at_5', as far as there are
        so many classes.
    """
    is_kept = (targets == 1).any(1)
    scores, targets = scores[is_kept].cpu(), targets[is_kept].cpu()
    precision = MultilabelAveragePrecision(scores.shape[1])
    precision.update(scores, targets)
    found = {'retrieval_map': precision.compute().mean_with_zeros}
    for k in TOP:
        if k <= scores.shape[1]:
            found[f'f1_at_{k}'] = multilabel_f1_at_k(scores, targets, k=k).f1
    return {name: 100.0 * value for name, value in found.items()}


def _word_vectors(recipe: Recipe) -> str:
    return '' if recipe.zero_shot is None else recipe.zero_shot.word_vectors
