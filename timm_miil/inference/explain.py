"""Where in a picture a model sees its labels.

The maps of `class_maps` lie on a grid of features. Here they are brought to the picture: through the crop or squeeze of
the model's preprocessing, and to where the features really look. A strided network's position (i, j) need not look at
the middle of its cell: a ResNet's look half a cell to the upper left of it. So the offset is measured: noise at known
places changes the features at others (the effective receptive field of Luo et al., arXiv:1701.04128, from the input's
side and without gradients).
"""
import numbers
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_miil._checks import check_positive, nearest, shown
from timm_miil.inference.class_maps import Method, at_rest, choose_method, class_maps, feature_map
from timm_miil.inference.load import input_like, uncompiled
from timm_miil.inference.predict import Tagger

__all__ = ['Explainer', 'explain', 'find_classes']

PROBES_A_SIDE = 4
PROBE_BATCH = 4


def explain(
        model: nn.Module,
        image: Image.Image | Tensor,
        labels: Sequence[str | int] | None = None,
        *,
        method: Method | None = None,
        size: tuple[int, int] | None = None,
) -> Tensor:
    """Show where in a picture a model sees its labels; for many pictures make one `Explainer`.

    The model is left as it was: its modes, gradients and the random number generators.

    Args:
        model: A timm model for RGB pictures.
        image: Picture of mode 'RGB', which `load_image` makes of any file; or what the model's preprocessing made of
            one, floats of shape (3, H, W).
        labels: Names as the model gives them, or class indices; None for those that `Tagger(model).tag(image)` finds,
            in its order.
        method: 'attention', 'grad_cam' or 'layer_cam', see `class_maps`; None for 'attention' where the head attends,
            else 'grad_cam', which needs the extra `explain`.
        size: Height and width of the maps, which always span the whole picture; None for the picture's own.

    Returns:
        Maps (labels, H, W), float32, not negative, on the CPU. Each sums to 1, so that the sum over a part is its
        share; or is 0 everywhere if nothing in the picture speaks for the label. What the preprocessing cuts off is 0.

    Raises:
        ImportError: If grad-cam is needed and not installed.
        PredictionError: If the model is not for tagging RGB pictures, has no single map of features, or gives values
            that are not finite.
        TypeError: If the model is not timm's, image no picture or a tensor of another dtype, labels no list of names
            or indices, or size no (height, width).
        ValueError: If there is no such label or method, a name stands for several classes, the method is not for this
            model, the picture has another mode or the tensor another shape, or a size is below 1.

    Example:
        >>> import timm, timm_miil
        >>> model = timm.create_model('mldecoder_scenes', pretrained=True)
        >>> explain(model, Image.new('RGB', (96, 64)), ['digit 7', 'red 7']).shape
        torch.Size([2, 64, 96])
    """
    choose_method(model, method)
    with at_rest(model):
        return Explainer(Tagger(model), method=method)(image, labels, size=size)


class Explainer:
    """Shows where a tagger's model sees its labels, in any number of pictures.

    Args:
        tagger: The model with its preprocessing, label names and thresholds.
        method: See `explain`.

    Attributes:
        method: The method in use.
        offset: How far the middle of a cell of the feature map lies below and to the right of where the feature looks,
            in pixels of the network's input; measured with noise.

    Raises:
        PredictionError: If the model has no single map of features.
        ValueError: If there is no such method, or it is not for this model.

    Example:
        >>> explainer = Explainer(Tagger.from_name('mldecoder_scenes'))
        >>> explainer(Image.new('RGB', (96, 64)), ['digit 7']).shape
        torch.Size([1, 64, 96])
    """

    def __init__(self, tagger: Tagger, *, method: Method | None = None) -> None:
        model, self.tagger = uncompiled(tagger.model), tagger
        self.method = choose_method(model, method)
        self.offset = _measure_offset(model)

    def __call__(
            self,
            image: Image.Image | Tensor,
            labels: Sequence[str | int] | None = None,
            *,
            size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Maps (labels, H, W) of a picture; arguments, result and errors are those of `explain`."""
        inputs = self.tagger.prepare(image)
        high, wide = inputs.shape[1:] if isinstance(image, Tensor) else (image.height, image.width)
        if size is not None and (not isinstance(size, Sequence) or len(size) != 2):
            raise TypeError(f'size must be (height, width), got {type(size).__name__} {shown(size)}.')
        height, width = (high, wide) if size is None else size
        check_positive(height=height, width=width)
        if labels is None:
            classes = [tag.index for tag in self.tagger.tag(image)]
        else:
            classes = find_classes(self.tagger.label_names, labels)
        if not classes:
            return torch.zeros(0, height, width)
        maps = class_maps(self.tagger.model, inputs.unsqueeze(0), classes, method=self.method)[0].cpu()
        left, top, right, bottom = (0.0, 0.0, wide, high) if isinstance(image, Tensor) else _input_box(
            self.tagger.transform, image.size, inputs.shape[1:])
        down, across = self.offset[0] / inputs.shape[1], self.offset[1] / inputs.shape[2]
        rows = _interpolation(height, (top / high, bottom / high), maps.shape[1], down)
        columns = _interpolation(width, (left / wide, right / wide), maps.shape[2], across)
        placed = rows @ maps @ columns.T
        return placed / placed.sum((1, 2), keepdim=True).clamp(min=torch.finfo(placed.dtype).tiny)


def find_classes(label_names: Sequence[str], labels: Sequence[str | int]) -> list[int]:
    """Class indices of labels given by name or index.

    Args:
        label_names: One name a class.
        labels: Names or indices, in any order.

    Raises:
        TypeError: If labels is no list of names or indices.
        ValueError: If there is no such label, or a name stands for several classes.
    """
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Sequence):
        raise TypeError(f'labels must be a list of names or indices, got {type(labels).__name__} {shown(labels)}.')
    found = []
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, (str, int, numbers.Integral)):
            raise TypeError(f'labels must be names or indices, got {type(label).__name__} {shown(label)}.')
        if not isinstance(label, str):
            if not 0 <= label < len(label_names):
                raise ValueError(f'labels must be indices in [0, {len(label_names)}), got {label}.')
            found.append(int(label))
            continue
        classes = [index for index, name in enumerate(label_names) if name == label]
        if not classes:
            raise ValueError(f'the model has no label {shown(label)}; {nearest(label, label_names)}')
        if len(classes) > 1:
            raise ValueError(
                f'label {shown(label)} stands for the classes {", ".join(map(str, classes))}; give the index.')
        found += classes
    return found


def _input_box(
        transform: Callable[[Image.Image], Tensor],
        picture: tuple[int, int],
        input_size: Sequence[int],
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the network's input, in pixels of the picture; beyond its edges where padded.

    timm's preprocessing for evaluation resizes first, then crops or pads around the middle (to half a pixel).
    """
    resize = cast(Any, transform).transforms[0]
    scaled: tuple[int, int] = resize(Image.new('L', picture)).size
    edges = []
    for length, resized, taken in zip(picture, scaled, reversed(input_size)):
        middle, half = length / 2, taken / 2 * length / resized
        edges.append((middle - half, middle + half))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def _interpolation(length: int, box: tuple[float, float], cells: int, offset: float) -> Tensor:
    """Linear interpolation along one side, as a matrix (length, cells); rows beyond the box are 0.

    Args:
        length: Points along the picture.
        box: Where the grid begins and ends, in parts of the picture.
        cells: Positions of the grid along this side.
        offset: How far the middle of a cell lies behind where its feature looks, in parts of the grid.
    """
    low, high = box
    place = ((torch.arange(length, dtype=torch.float64) + 0.5) / length - low) / (high - low)
    cell = ((place + offset) * cells - 0.5).clamp(0, cells - 1)
    weights = (1 - (cell[:, None] - torch.arange(cells)).abs()).clamp(min=0)
    return (weights * ((place >= 0) & (place <= 1))[:, None]).float()


def _measure_offset(model: nn.Module) -> tuple[float, float]:
    """How far the middle of a cell lies below and to the right of where its feature looks, in pixels of the input.

    A square of noise is replaced by other noise at places all over the input. The features change around the cell that
    looks there; the offset is the mean distance between the two.
    """
    config = resolve_model_data_config(model)
    channels, height, width = config['input_size']
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    generator = torch.Generator().manual_seed(0)

    def noise(height: int, width: int) -> Tensor:
        return (torch.rand(channels, height, width, generator=generator) - mean) / std

    with at_rest(model):
        like = input_like(model)
        plain = noise(height, width)
        before = feature_map(model, plain[None].to(like))
        rows, columns = before.shape[2:]
        side = torch.tensor([max(1, height // rows), max(1, width // columns)])
        high, wide = side.tolist()
        # One place in each of 4 x 4 parts, each row and column of them at another phase of the stride.
        parts = torch.cartesian_prod(*[torch.arange(PROBES_A_SIDE)] * 2)
        spread = (parts + (parts.flip(1) + 0.5) / PROBES_A_SIDE) / PROBES_A_SIDE
        places = (spread * (torch.tensor([height, width]) - side)).long()
        middles = [(torch.arange(cells) + 0.5) / cells for cells in (rows, columns)]
        shifts = []
        for batch in places.split(PROBE_BATCH):
            probes = plain.repeat(len(batch), 1, 1, 1)
            for probe, (top, left) in zip(probes, batch.tolist()):
                probe[:, top:top + high, left:left + wide] = noise(high, wide)
            change = (feature_map(model, probes.to(like)) - before).float().square().sum(1).cpu()
            total = change.sum((1, 2))
            seen = torch.stack([change.sum(2) @ middles[0], change.sum(1) @ middles[1]], dim=1) / total[:, None]
            looked = (batch + side / 2) / torch.tensor([height, width])
            shifts.append((seen - looked)[total > 0])
    shift = torch.cat(shifts)
    down, right = shift.mean(0).tolist() if len(shift) else (0.0, 0.0)
    return down * height, right * width
