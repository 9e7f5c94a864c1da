"""Measuring a model on labelled pictures: any timm model on any reader's data, labels matched by name."""
import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

from timm_miil._checks import check_not_negative, check_positive
from timm_miil._errors import PredictionError
from timm_miil.data import ImageStream, LabelledImages
from timm_miil.inference._matching import find_identifiers, match_labels
from timm_miil.inference._measure import measure
from timm_miil.inference._scoring import collect_scores
from timm_miil.inference.load import Activation, OutputConfig, find_label_names, load_model
from timm_miil.inference.predict import BATCH_SIZE, SIGMOID_THRESHOLD, Tagger
from timm_miil.metrics import F1, AveragePrecision

__all__ = ['ClassResult', 'Validation', 'check_run', 'validate', 'validate_tagger']

AMP_DTYPES = (torch.bfloat16, torch.float16)

_Number = TypeVar('_Number')


@dataclasses.dataclass(frozen=True)
class ClassResult:
    """What was measured of one class. Fractions; `average_precision` is NaN where it is undefined.

    Attributes:
        label: Its name.
        average_precision: Average precision.
        present: Pictures that show it.
        absent: Pictures that do not.
        unknown: Pictures of which that is unknown; left out of everything.
        threshold: Least confidence of a prediction.
        precision: Share of predictions that are right; 0 without any.
        recall: Share of pictures showing it that are found; 0 without any.
        f1: Their harmonic mean.
    """

    label: str
    average_precision: float
    present: int
    absent: int
    unknown: int
    threshold: float
    precision: float
    recall: float
    f1: float


@dataclasses.dataclass(frozen=True, eq=False)
class Validation:
    """A model measured on N pictures and C labels.

    Attributes:
        label_names: The labels, in the order of the model's classes, as the data name them.
        logits: Raw scores, shape (N, C), float32, in host memory.
        targets: 1 for present, 0 for absent, -1 for unknown, shape (N, C), int8.
        columns: Which class of the model each label is; C numbers.
        rows: Which picture of the source each row is, shape (N,), int64; None for a stream.
        activation: 'sigmoid' for independent classes, 'softmax' for classes that exclude one another.
        thresholds: Least confidence of a prediction; one a class.
        temperatures: What the logits of each class were divided by; None for 1.
        average_precision: Of each class, and its means: `mean` over classes that have one, `mean_with_zeros` over all.
        f1: Precision, recall and F1 at the thresholds: of each class, their means (CP, CR, CF1), and over all labels
            (OP, OR, OF1).
        calibration_error: Expected calibration error of all labels together, a fraction.
        top1: For classes that exclude one another, the share of pictures whose most confident label is present; else
            None.
        top5: Likewise of the five most confident; None for 5 classes or fewer.
        only_model: Labels of the model that the data lack, and so were not measured.
        only_data: Labels of the data that the model lacks.
        broken: Why pictures could not be used, one line each; they are left out.
        images_per_second: Speed of everything: reading, preprocessing and the model.
        model_images_per_second: Speed of the model alone.
    """

    label_names: tuple[str, ...]
    logits: Tensor
    targets: Tensor
    columns: tuple[int, ...]
    rows: Tensor | None
    activation: Activation
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...] | None
    average_precision: AveragePrecision
    f1: F1
    calibration_error: float
    top1: float | None
    top5: float | None
    only_model: tuple[str, ...]
    only_data: tuple[str, ...]
    broken: tuple[str, ...]
    images_per_second: float
    model_images_per_second: float

    def class_results(self) -> list[ClassResult]:
        """What was measured of each class, in the order of `label_names`."""
        ranking, f1 = self.average_precision, self.f1
        present, absent = ranking.support, ranking.num_negatives
        return [
            ClassResult(*fields) for fields in zip(
                self.label_names, ranking.per_class.tolist(), present.tolist(), absent.tolist(),
                (len(self.targets) - present - absent).tolist(), self.thresholds, f1.precision.tolist(),
                f1.recall.tolist(), f1.f1.tolist())]

    def summary(self) -> dict[str, float | int | None]:
        """The numbers of the whole by name: fractions, counts and speeds; None where there is none."""
        f1 = self.f1
        numbers = {
            'mAP': self.average_precision.mean, 'mAP_with_zeros': self.average_precision.mean_with_zeros,
            'OP': f1.overall_precision, 'OR': f1.overall_recall, 'OF1': f1.overall_f1,
            'CP': f1.class_precision, 'CR': f1.class_recall, 'CF1': f1.class_f1, 'CF1_of_means': f1.class_f1_of_means,
            'calibration_error': self.calibration_error, 'top1': self.top1, 'top5': self.top5,
            'images': len(self.targets), 'labels': len(self.label_names), 'broken': len(self.broken),
            'images_per_second': self.images_per_second, 'model_images_per_second': self.model_images_per_second}
        return {name: _finite(number) for name, number in numbers.items()}

    def to_json(self, facts: Mapping[str, str | float] = MappingProxyType({})) -> str:
        """All numbers as one JSON object: `summary`, and under 'classes' those of each class.

        Args:
            facts: What else to note, ahead of them, such as the name of the model.
        """
        classes = [
            {name: _finite(value) for name, value in dataclasses.asdict(result).items()}
            for result in self.class_results()]
        return json.dumps({
            **facts, **self.summary(), 'only_model': self.only_model, 'only_data': self.only_data,
            'broken_images': self.broken, 'classes': classes}, indent=2) + '\n'

    def to_csv(self) -> str:
        """The numbers of the classes as CSV, one line each below a line of names."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(field.name for field in dataclasses.fields(ClassResult))
        for result in self.class_results():
            writer.writerow('' if _finite(value) is None else value for value in dataclasses.astuple(result))
        return file.getvalue()


def validate(
        model: str | nn.Module,
        source: LabelledImages | ImageStream,
        *,
        label_names: Sequence[str] | None = None,
        embeddings: Tensor | None = None,
        common: bool = False,
        activation: Activation | None = None,
        threshold: float | Sequence[float] | None = None,
        batch_size: int = BATCH_SIZE,
        workers: int = 0,
        device: torch.device | None = None,
        amp_dtype: torch.dtype | None = None,
        strict: bool = False,
        on_batch: Callable[[int], None] | None = None,
) -> Validation:
    """Measure a model on labelled pictures.

    Labels are matched by name, never by order. A class is also found by its identifier, such as ImageNet's 'n01440764'.
    A zero-shot model is told the labels of the data, and keeps them. Of classes that exclude one another, those that
    are measured share the probability among themselves. Scores of all pictures are kept, 5 bytes a label.

    Args:
        model: A name as `load_model` takes it, or a timm model for RGB pictures, whose preprocessing is used.
        source: The pictures and their labels: 1 for present, 0 for absent, -1 for unknown (left out everywhere).
        label_names: Names of the classes, one each, of a model that does not know them; others keep their own.
        embeddings: Of the data's labels, for a zero-shot model that does not embed names itself: one row a label.
        common: Whether labels that only the model or only the data have are passed over.
        activation: 'sigmoid' for independent classes, 'softmax' for classes that exclude one another; None takes what
            the model was trained for.
        threshold: Least confidence of a prediction, in [0, 1], or a list of one for each class of the model; None takes
            the model's own, else 0.5.
        batch_size: Pictures in one pass through the model.
        workers: Processes that read pictures; 0 reads them in this one.
        device: Where to run, and where the model then is; None leaves it where it is.
        amp_dtype: `torch.bfloat16` or `torch.float16` for automatic mixed precision; None for none.
        strict: Whether a picture that cannot be used is an error. Otherwise it is counted and named in the result.
        on_batch: Called after each batch with its number of pictures.

    Returns:
        Scores, and all that is measured of them.

    Raises:
        ImageError: If a picture cannot be used, with `strict`.
        PredictionError: If the model cannot be loaded or is not for RGB pictures, does not name its classes and there
            are no label_names, or no picture can be used.
        TypeError: If the model is none of timm's, or a setting is of the wrong kind.
        ValueError: If labels do not match, a stream gives another number of pictures than it says, or a setting is out
            of range.
    """
    check_run(batch_size, workers, amp_dtype)      # before a long download
    module, config = load_model(model) if isinstance(model, str) else (model, OutputConfig())
    config.check_classes(str(model))
    was_training = module.training
    try:
        tagger = _build_tagger(
            module, config, source.label_names, label_names=label_names, embeddings=embeddings, activation=activation,
            device=device, threshold=threshold)
        return validate_tagger(
            tagger, source, common=common, batch_size=batch_size, workers=workers, amp_dtype=amp_dtype, strict=strict,
            on_batch=on_batch)
    finally:
        module.train(was_training)


def validate_tagger(
        tagger: Tagger,
        source: LabelledImages | ImageStream,
        *,
        common: bool = False,
        batch_size: int = BATCH_SIZE,
        workers: int = 0,
        amp_dtype: torch.dtype | None = None,
        strict: bool = False,
        on_batch: Callable[[int], None] | None = None,
) -> Validation:
    """Measure a model with its names, device, thresholds and temperatures; arguments and errors as of `validate`."""
    check_run(batch_size, workers, amp_dtype)
    matching = match_labels(
        tagger.label_names, source.label_names, identifiers=find_identifiers(tagger.model), common=common)
    scores = collect_scores(
        tagger, source, matching.names, matching.columns, batch_size=batch_size, workers=workers, amp_dtype=amp_dtype,
        strict=strict, on_batch=on_batch)
    thresholds = tuple(tagger.thresholds[column] for column in matching.columns)
    temperatures = tagger.temperatures and tuple(tagger.temperatures[column] for column in matching.columns)
    measures = measure(
        scores.logits, scores.targets, activation=tagger.activation, thresholds=thresholds, temperatures=temperatures)
    return Validation(
        label_names=matching.names, logits=scores.logits, targets=scores.targets, columns=matching.columns,
        rows=scores.rows, activation=tagger.activation, thresholds=thresholds, temperatures=temperatures,
        average_precision=measures.average_precision, f1=measures.f1, calibration_error=measures.calibration_error,
        top1=measures.top1, top5=measures.top5, only_model=matching.only_model, only_data=matching.only_data,
        broken=scores.broken, images_per_second=scores.images_per_second,
        model_images_per_second=scores.model_images_per_second)


def check_run(batch_size: int, workers: int, amp_dtype: torch.dtype | None) -> None:
    """Raise unless these are numbers and a precision to run with: TypeError for a kind, else ValueError."""
    check_positive(batch_size=batch_size)
    check_not_negative(workers=workers)
    if amp_dtype is not None and amp_dtype not in AMP_DTYPES:
        raise ValueError(f'amp_dtype must be torch.bfloat16, torch.float16 or None, got {amp_dtype!r}.')


def _build_tagger(
        model: nn.Module, config: OutputConfig, data_names: Sequence[str], *, label_names: Sequence[str] | None,
        embeddings: Tensor | None, activation: Activation | None, device: torch.device | None,
        threshold: float | Sequence[float] | None) -> Tagger:
    """The model with names, thresholds and temperatures of its classes; a zero-shot one is told the data's labels."""
    labels = None
    if callable(getattr(model, 'set_queries', None)):
        is_told = embeddings is None and set(getattr(model, 'labels', None) or ()) == set(data_names)
        labels = None if is_told else data_names
    elif isinstance(getattr(model, 'pretrained_cfg', None), dict) and find_label_names(model) is None:
        if label_names is None:
            raise PredictionError('the model does not name its classes; give label_names, one a class (--labels).')
    else:
        label_names = None
    activation = activation or config.activation
    # Its own are for its own labels.
    is_calibrated = activation == 'sigmoid' and labels is None
    if threshold is None:
        threshold = is_calibrated and config.thresholds or SIGMOID_THRESHOLD
    return Tagger(
        model, label_names=None if labels else label_names, labels=labels, embeddings=embeddings, activation=activation,
        device=device, threshold=threshold, temperatures=config.temperatures if is_calibrated else None)


def _finite(number: _Number) -> _Number | None:
    return None if isinstance(number, float) and not math.isfinite(number) else number
