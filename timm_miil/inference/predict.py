"""Tagging any number of picture files with a timm model."""
import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from timm_miil._checks import check_choice, check_class_settings, check_paths, check_positive, check_range, cut
from timm_miil._errors import PredictionError
from timm_miil.data import read_word_vectors
from timm_miil.inference._selection import select_classes
from timm_miil.inference.images import load_image, read_input
from timm_miil.inference.load import (
    ACTIVATIONS, DEFAULT_ZERO_SHOT_MODEL, Activation, check_label_names, default_activation, find_label_names,
    input_like, load_model, set_labels, uncompiled)

__all__ = ['DEFAULT_MODEL', 'Prediction', 'Tag', 'Tagger']

DEFAULT_MODEL = 'mldecoder_scenes'
BATCH_SIZE = 32
NUM_WORKERS = 4
SIGMOID_THRESHOLD = 0.5
SOFTMAX_TOPK = 5
NOT_FINITE = 'the model gives scores that are not finite.'

# A file and its preprocessed pixels (3, H, W), or why there are none.
_Picture = tuple[Path, Tensor | str]


@dataclasses.dataclass(frozen=True, slots=True)
class Tag:
    """One label of a picture.

    Attributes:
        label: Name of the class.
        confidence: Probability in [0, 1].
        index: Position of the class in the model's output.
    """

    label: str
    confidence: float
    index: int


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """What is in one picture file.

    Attributes:
        path: The file.
        tags: Its labels, the most confident first.
        error: Why there are none, in one line with the path; None for a picture that was read.
    """

    path: Path
    tags: tuple[Tag, ...] = ()
    error: str | None = None


class Tagger:
    """Labels picture files with a classification model.

    A class becomes a tag when its confidence is at least its threshold; of these, the `topk` most confident are
    kept, equal ones by lower index. If neither is given, the activation decides: a threshold of 0.5 with sigmoid,
    the best 5 with softmax. `from_name` also knows the model's own thresholds.

    Args:
        model: A timm model for RGB pictures; it is moved to `device` and set to evaluation mode.
        label_names: One name a class; None takes the model's own, else 'class_<index>'.
        labels: Names of another label set, for a zero-shot model: one with `set_queries`, which then is changed.
        embeddings: Of these labels, by the encoder that the model was trained with: one row a label, shape (K, E), or
            a file that `read_word_vectors` reads. None embeds the names as the model's own were.
        activation: 'sigmoid' for independent labels, 'softmax' for exclusive ones; None takes what the model was
            trained for, see `default_activation`.
        device: Where to run; None leaves the model where it is.
        threshold: Least confidence of a tag, in [0, 1], or a list of one a class, such as `calibrate` finds.
        topk: Most tags of a picture, at least 1.
        temperatures: One a class, in [0.01, 100]: confidences are sigmoid(logits / temperatures). For sigmoid only.

    Attributes:
        has_label_names: False if labels are mere class numbers, because the model does not say their names.
        thresholds: Least confidence of each class.
        temperatures: What the logits of each class are divided by; None if they stay as they are.
        unused_settings: Settings of the model's `config.json` that are for its own labels, where others were given:
            'thresholds', 'temperatures'.

    Raises:
        PredictionError: If the model is not for tagging RGB pictures, its own label names do not match its classes, or
            it takes no labels, or none without embeddings.
        OSError: If a file of embeddings cannot be read.
        TypeError: If `model` is not a timm model, `topk` not an int, or a threshold or temperature not a number or a
            list of them; of a tensor or array, give its `.tolist()`. If labels are no list of strings.
        ValueError: If label_names, activation, threshold, topk or temperatures are out of range or not one a class, or
            there are temperatures with softmax. If there are label_names and labels, embeddings without labels, a
            label twice, or the embeddings do not fit the labels or the model.

    Example:
        >>> from timm.models import create_model
        >>> tagger = Tagger(create_model('test_resnet', num_classes=2), label_names=['cat', 'dog'], threshold=0)
        >>> [prediction] = tagger(['missing.jpg'])
        >>> prediction.error
        "cannot read 'missing.jpg': no such file or directory."
    """

    def __init__(
            self,
            model: nn.Module,
            *,
            label_names: Sequence[str] | None = None,
            labels: Sequence[str] | None = None,
            embeddings: Tensor | str | os.PathLike[str] | None = None,
            activation: Activation | None = None,
            device: torch.device | None = None,
            threshold: float | Sequence[float] | None = None,
            topk: int | None = None,
            temperatures: Sequence[float] | None = None,
    ) -> None:
        _check_settings(activation, threshold, topk)
        _check_labels(label_names, labels, embeddings)
        if labels is not None:
            set_labels(model, labels, _load_embeddings(embeddings, labels))
            label_names = labels
        num_classes = _check_model(model)
        self.transform = _build_transform(model)
        if label_names is not None and len(label_names) != num_classes:
            raise ValueError(
                f'label_names must have one name a class, got {len(label_names)} names for {num_classes} classes.')

        names = find_label_names(model) if label_names is None else label_names
        self.has_label_names = names is not None
        self.label_names = tuple(names or (f'class_{index}' for index in range(num_classes)))
        self.activation = activation or default_activation(model)
        if threshold is None and topk is None:
            threshold, topk = (SIGMOID_THRESHOLD, None) if self.activation == 'sigmoid' else (None, SOFTMAX_TOPK)
        thresholds = threshold if isinstance(threshold, Sequence) else [threshold or 0.0] * num_classes
        check_class_settings(num_classes=num_classes, thresholds=thresholds, temperatures=temperatures)
        if temperatures is not None and self.activation != 'sigmoid':
            raise ValueError(f"temperatures are for the activation 'sigmoid', got {self.activation!r}.")
        self.thresholds = tuple(thresholds)
        self.temperatures = None if temperatures is None else tuple(temperatures)
        self.unused_settings: tuple[str, ...] = ()
        self.topk = topk
        self.model = model.eval() if device is None else model.eval().to(device)

    @classmethod
    def from_name(
            cls,
            name: str | None = None,
            *,
            label_names: Sequence[str] | None = None,
            labels: Sequence[str] | None = None,
            embeddings: Tensor | str | os.PathLike[str] | None = None,
            activation: Activation | None = None,
            device: torch.device | None = None,
            threshold: float | Sequence[float] | None = None,
            topk: int | None = None,
    ) -> 'Tagger':
        """A tagger for a model given by name.

        Thresholds and temperatures that the model's `config.json` has are used where the activation is sigmoid: the
        temperatures always, the thresholds if `threshold` is None; `topk` then only limits their number. They are for
        the model's own labels: with `labels` none of them is used, and `unused_settings` names them.

        Args:
            name: A registered model, 'hf-hub:owner/repo', or a folder, see `load_model`; None for 'mldecoder_scenes',
                with labels 'mldecoder_zero_shot_scenes'.
            label_names: See `Tagger`.
            labels: See `Tagger`.
            embeddings: See `Tagger`.
            activation: See `Tagger`; None takes what the model's `config.json` says, if it does.
            device: See `Tagger`.
            threshold: See `Tagger`; None takes what the model's `config.json` says, if it does.
            topk: See `Tagger`.

        Raises:
            PredictionError: If there is no such model, it cannot be loaded, it is not for tagging RGB pictures, or it
                takes no labels, or none without embeddings.
            OSError: See `Tagger`.
            TypeError: See `Tagger`.
            ValueError: See `Tagger`.
        """
        _check_settings(activation, threshold, topk)  # before a long download
        _check_labels(label_names, labels, embeddings)
        if labels is not None:
            embeddings = _load_embeddings(embeddings, labels)
        if name is None:
            name = DEFAULT_MODEL if labels is None else DEFAULT_ZERO_SHOT_MODEL
        model, config = load_model(name)
        config.check_classes(name)
        own = {'thresholds': config.thresholds, 'temperatures': config.temperatures}
        unused = () if labels is None else tuple(key for key, values in own.items() if values is not None)
        activation = activation or config.activation
        if threshold is None and activation == 'sigmoid' and not unused:
            threshold = config.thresholds
        tagger = cls(
            model, label_names=label_names, labels=labels, embeddings=embeddings, activation=activation, device=device,
            threshold=threshold, topk=topk,
            temperatures=config.temperatures if activation == 'sigmoid' and not unused else None)
        tagger.unused_settings = unused
        return tagger

    def __call__(
            self,
            paths: Iterable[str | os.PathLike[str]],
            *,
            batch_size: int = BATCH_SIZE,
            num_workers: int = NUM_WORKERS,
    ) -> Iterator[Prediction]:
        """Tag picture files, in their order.

        Works on a few batches at a time, however many paths there are: pictures are read in threads ahead of the
        model. A file that cannot be read gives a prediction with `error` set, and the next ones go on.

        Args:
            paths: Files; `find_images` lists folders.
            batch_size: Pictures in one pass through the model; the result does not depend on it.
            num_workers: Threads that read pictures.

        Returns:
            One prediction a path.

        Raises:
            TypeError: If `paths` is a single path, or a number is not an int.
            ValueError: If a number is below 1.
        """
        check_paths(paths=paths)
        check_positive(batch_size=batch_size, num_workers=num_workers)
        return self._run(paths, batch_size, num_workers)

    def tag(self, image: Image.Image | Tensor) -> tuple[Tag, ...]:
        """Tag one picture in memory.

        Args:
            image: Picture of mode 'RGB', which `load_image` makes of any file; or what `transform` made of one, floats
                of shape (3, H, W).

        Raises:
            PredictionError: If the model's scores are not finite.
            TypeError: If the image is no picture, or a tensor of another dtype.
            ValueError: If the picture has another mode, or the tensor another shape.
        """
        [tags] = self._tag_batch(self.prepare(image).unsqueeze(0))
        if tags is None:
            raise PredictionError(NOT_FINITE)
        return tags

    def prepare(self, image: Image.Image | Tensor) -> Tensor:
        """The network's input (3, H, W) of one picture; arguments and errors are those of `tag`."""
        if isinstance(image, Tensor):
            if not image.is_floating_point():
                raise TypeError(f'image must be preprocessed to floats, got {image.dtype}; give the picture.')
            if image.ndim != 3 or len(image) != 3:
                raise ValueError(
                    f'image must have shape (3, H, W), got {tuple(image.shape)}; take the pictures of a batch singly.')
            return image
        if not isinstance(image, Image.Image):
            raise TypeError(f'image must be a PIL picture or a tensor (3, H, W), got {type(image).__name__}.')
        if image.mode != 'RGB':
            raise ValueError(f"image must have mode 'RGB', got {image.mode!r}; load_image reads any file as RGB.")
        return self.transform(image)

    def _run(
            self, paths: Iterable[str | os.PathLike[str]], batch_size: int, num_workers: int) -> Iterator[Prediction]:
        with closing(self._read_ahead(paths, batch_size + num_workers, num_workers)) as pictures:
            while batch := list(itertools.islice(pictures, batch_size)):
                inputs = [picture for _, picture in batch if isinstance(picture, Tensor)]
                found = iter(self._tag_batch(torch.stack(inputs)) if inputs else ())
                for path, picture in batch:
                    if isinstance(picture, str):
                        yield Prediction(path, error=picture)
                    elif (tags := next(found)) is None:
                        yield Prediction(path, error=f'cannot tag {str(path)!r}: {NOT_FINITE}')
                    else:
                        yield Prediction(path, tags)

    def _read_ahead(
            self, paths: Iterable[str | os.PathLike[str]], limit: int, num_workers: int,
    ) -> Generator[_Picture, None, None]:
        """Pictures in the order of their paths, read by threads; at most `limit` of them wait."""
        waiting: deque[Future[_Picture]] = deque()
        with ThreadPoolExecutor(num_workers, thread_name_prefix='read_pictures') as pool:
            try:
                for path in paths:
                    waiting.append(pool.submit(self._read, Path(path)))
                    if len(waiting) == limit:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _read(self, path: Path) -> _Picture:
        return path, read_input(lambda: load_image(path), self.transform, str(path))

    def _tag_batch(self, inputs: Tensor) -> list[tuple[Tag, ...] | None]:
        return self.tags_of(self.scores(inputs))

    def scores(self, inputs: Tensor) -> Tensor:
        """The model's logits of preprocessed pictures.

        Args:
            inputs: Shape (B, 3, H, W), on any device; from pinned memory they are copied without waiting.

        Returns:
            Shape (B, C), float32, on the model's device, which may still be computing them.

        Raises:
            PredictionError: If the model gives something else.
        """
        with torch.inference_mode():  # never round a yield: it would reach the caller
            logits = self.model(inputs.to(input_like(self.model), non_blocking=True))
            expected = (len(inputs), len(self.label_names))
            if not isinstance(logits, Tensor) or logits.shape != expected:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise PredictionError(f'the model must give scores of shape {expected}, got {got}; it cannot tag.')
            return logits.float()

    def tags_of(self, scores: Tensor) -> list[tuple[Tag, ...] | None]:
        """The tags of each picture by its logits (B, C); None for one whose logits are not finite."""
        with torch.inference_mode():
            # As `calibrate` computes them, to the bit; not every accelerator has float64.
            logits = scores.cpu().double()
            is_finite = logits.isfinite().all(dim=1).tolist()
            if self.temperatures is not None:
                logits = logits / logits.new_tensor(self.temperatures)
            confidence = logits.sigmoid() if self.activation == 'sigmoid' else logits.softmax(dim=1)
            found = select_classes(confidence, confidence.new_tensor(self.thresholds), self.topk)
        return [
            tuple(Tag(self.label_names[index], value, index) for value, index in row) if finite else None
            for finite, row in zip(is_finite, found)]


def _check_settings(
        activation: Activation | None, threshold: float | Sequence[float] | None, topk: int | None) -> None:
    if activation is not None:
        check_choice(activation=activation, choices=ACTIVATIONS)
    if threshold is not None and not isinstance(threshold, Sequence):
        check_range(threshold=threshold, low=0.0, high=1.0, closed=True)
    if topk is not None:
        check_positive(topk=topk)


def _check_labels(label_names: object, labels: Sequence[str] | None, embeddings: object) -> None:
    if labels is None:
        if embeddings is not None:
            raise ValueError('embeddings are those of labels, got no labels; give their names too.')
        return
    if label_names is not None:
        raise ValueError('label_names name the classes of a model, and labels replace them; got both.')
    check_label_names(labels)


def _load_embeddings(
        embeddings: Tensor | str | os.PathLike[str] | None, labels: Sequence[str]) -> Tensor | None:
    return read_word_vectors(embeddings, labels) if isinstance(embeddings, (str, os.PathLike)) else embeddings


def _check_model(model: nn.Module) -> int:
    """The number of classes, if the model can tag RGB pictures."""
    if not isinstance(getattr(model, 'pretrained_cfg', None), dict):
        raise TypeError(f'model must be a timm model, got {type(model).__name__} without a pretrained_cfg.')
    num_classes = getattr(model, 'num_classes', 0)
    if num_classes < 1:
        if hasattr(model, 'set_queries'):
            raise PredictionError(
                'the model has no label set yet; give labels, and the embeddings that it was trained with.')
        raise PredictionError('the model has no classifier (num_classes is 0); it cannot tag.')
    return int(num_classes)


def _build_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    try:
        config = resolve_model_data_config(uncompiled(model))
        # timm keeps the configuration's channels where a model is made for others.
        odd_chans = {config['input_size'][0], getattr(model, 'in_chans', 3)} - {3}
        transform: Callable[[Image.Image], Tensor] = create_transform(**config)
    except Exception as error:  # the configuration may be anyone's, and timm does not check it
        raise PredictionError(
            f"the model's preprocessing cannot be built: {type(error).__name__}: {cut(str(error))}.") from error
    if odd_chans:
        raise PredictionError(
            f'the model takes pictures of {odd_chans.pop()} channels; tagging is for RGB, 3 channels.')
    return transform
