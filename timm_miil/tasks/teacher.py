"""A frozen network that a student learns from.

It sees the very pictures that the student sees, as in Ridnik et al., "Solving ImageNet: a Unified Scheme for Training
any Backbone to Top Results" (USI), arXiv:2204.03475, section 3, normalised and sized for itself.

Deviations: the mean shift is divided by the teacher's deviation (see `timm_miil.losses.renormalize`); pictures are
resized where the teacher's input has another size, for which the published code has no means.
"""
import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F

from timm_miil._checks import check_not_negative, check_positive, shown
from timm_miil.losses import renormalize
from timm_miil.tasks._embedding import embed_and_classify, split_head
from timm_miil.tasks.teacher_cache import TeacherCache

__all__ = ['Teacher', 'teacher_fingerprint']

PRECISIONS = (torch.bfloat16, torch.float16)
# Their weights are what autocast casts. Not their subclasses, some of which compute with the weights first.
CAST_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
HASH_BYTES = 1 << 26


class Teacher(nn.Module):
    """A copy of a network that only answers: a batch that is ready for the student gives the teacher's logits.

    The copy is always in evaluation mode and without gradients. Tasks keep it beside the student: it is in no
    checkpoint, no optimizer, no average of weights and no wrapper of DDP.

    With a `precision`, convolutions and matrix products are in it and the rest in float32, the numbers of autocast to
    the bit; their weights are cast once, here. The logits are float32 or wider.

    Args:
        model: The trained network, maps pictures (B, I, H, W) to logits (B, K). Its `pretrained_cfg`, as timm's have
            it, says mean, deviation and size of its input; one without gets the pictures as the student does. It is
            copied, on its device and in its memory format, and left as it is.
        mean: What the student's pictures are normalised with, one a channel, in the unit of pixels in [0, 1].
        std: Its standard deviations, one a channel, above 0.
        columns: Which of the K outputs are the student's classes, in the student's order; None takes all.
        image_size: Side in pixels, or (height, width), to which pictures are resized by antialiased bicubic
            interpolation (which may overshoot, as values are not cut to the range of pixels). None takes the size in
            `pretrained_cfg`, 'student' leaves pictures as they are, for teachers that take any size.
        precision: torch.bfloat16, torch.float16 or None for the network's own, also where the student is under
            autocast.
        compiled: Whether the network is compiled, with the defaults of `torch.compile`.
        cache: Answers that earlier batches had; see `TeacherCache`. It can be set later, as the attribute `cache`.
        shares_head: Whether its last layer and what that reads are asked for, as by `ClassifierSharingTask`. The
            network must then be a timm model with one linear classifier.

    Attributes:
        num_classes: Columns of the logits, None if the network does not tell.
        head: The last layer, D -> C, of the rows in `columns`, frozen and in the network's own precision; None unless
            `shares_head`.
        image_size: (height, width) that the network sees, None where pictures keep their size.

    Raises:
        TypeError: If model is no module, or a number is of the wrong kind; with `shares_head`, if its logits are not
            one linear layer on its embedding.
        ValueError: If a setting is out of range, mean, std and the teacher's statistics are not of one length, or the
            cache is of another number of classes; in `forward`, if the network does not give (B, K).

    Example:
        >>> import timm
        >>> student = timm.create_model('test_resnet')
        >>> cfg = student.pretrained_cfg
        >>> teacher = Teacher(timm.create_model('test_vit'), mean=cfg['mean'], std=cfg['std'])
        >>> teacher(torch.randn(2, 3, 96, 96)).shape
        torch.Size([2, 1000])
    """

    columns: Tensor | None

    def __init__(
            self,
            model: nn.Module,
            *,
            mean: Sequence[float],
            std: Sequence[float],
            columns: Sequence[int] | None = None,
            image_size: int | tuple[int, int] | Literal['student'] | None = None,
            precision: torch.dtype | None = None,
            compiled: bool = False,
            cache: TeacherCache | None = None,
            shares_head: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f'model must be a module, got {type(model).__name__} {shown(model)}; create it by timm.create_model.')
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f'precision must be torch.bfloat16, torch.float16 or None, got {precision}.')
        model = unwrap_model(model)
        config: dict[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
        self.mean, self.std = tuple(mean), tuple(std)
        self.teacher_mean = tuple(config.get('mean') or self.mean)
        self.teacher_std = tuple(config.get('std') or self.std)
        _check_statistics(mean=self.mean, std=self.std, teacher_mean=self.teacher_mean, teacher_std=self.teacher_std)
        self._renormalizations: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.image_size = _chosen_size(image_size, config)
        self.precision = precision
        known = getattr(model, 'num_classes', None)
        self.num_classes: int | None = known if columns is None else len(columns)
        chosen = None if columns is None else torch.tensor(_checked_columns(columns, known))
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
        self.register_buffer('columns', None if chosen is None else chosen.to(device), persistent=False)
        if cache is not None and self.num_classes is not None and cache.num_classes != self.num_classes:
            raise ValueError(
                f'cache must be of the teacher\'s {self.num_classes} classes, got one of {cache.num_classes}.')
        self.cache = cache
        self.head = _chosen_head(split_head(model), self.columns) if shares_head else None

        self.model: nn.Module = copy.deepcopy(model).requires_grad_(False)
        self._split: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = embed_and_classify
        if precision is not None:
            for module in self.model.modules():
                if type(module) in CAST_LAYERS:
                    module.to(precision)
        self.eval()
        if compiled:
            self.compile()

    def train(self, mode: bool = True) -> 'Teacher':
        """Nothing: it stays in evaluation mode."""
        return super().train(False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network, with the arguments of `torch.compile`."""
        self.model.compile(*args, **kwargs)
        self._split = torch.compile(embed_and_classify, *args, **kwargs)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C), float32 or wider, of pictures (B, I, H, W) as the student gets them."""
        if self.cache is None:
            return self._answer(images)
        return self.cache.answer(images, self._answer)

    @torch.no_grad()
    def answer_with_embedding(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C), as of a call, and what `head` reads for them, (B, D); both float32 or wider.

        Raises:
            ValueError: If the teacher was made without `shares_head`, or has a cache, which keeps logits alone.
        """
        if self.head is None:
            raise ValueError('the teacher must be made with shares_head=True to give its embedding.')
        if self.cache is not None:
            raise ValueError(
                'the teacher must have no cache where its embedding is asked for, as a cache keeps logits alone; set '
                'its attribute cache to None.')
        images = self.prepare(images)
        with self._autocast(images):
            embedding, logits = self._split(self.model, images)
        return self._chosen_logits(logits), embedding.to(torch.promote_types(embedding.dtype, torch.float32))

    @torch.no_grad()
    def prepare(self, images: Tensor) -> Tensor:
        """What the network sees of the student's pictures (B, I, H, W)."""
        if (self.mean, self.std) != (self.teacher_mean, self.teacher_std):
            scale, shift = self._renormalization(images)
            images = torch.addcmul(shift, images.to(shift.dtype), scale).to(images.dtype)
        if self.image_size is None or tuple(images.shape[-2:]) == self.image_size:
            return images
        return F.interpolate(images, self.image_size, mode='bicubic', antialias=True, align_corners=False)

    def fingerprint(self) -> str:
        """64 hex digits that stand for the weights and for all settings that the logits depend on."""
        facts = {
            'model': type(self.model).__name__, 'mean': self.mean, 'std': self.std, 'teacher_mean': self.teacher_mean,
            'teacher_std': self.teacher_std, 'image_size': self.image_size, 'precision': str(self.precision),
            'columns': None if self.columns is None else self.columns.tolist()}
        digest = hashlib.sha256(json.dumps(facts).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
            for part in tensor.detach().contiguous().view(-1).split(HASH_BYTES):
                digest.update(part.cpu().view(torch.uint8).numpy())
        return digest.hexdigest()

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return f'image_size={self.image_size}, precision={self.precision}, num_classes={self.num_classes}'

    def _renormalization(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`renormalize` as scale and shift (I, 1, 1); made once, as to bring numbers to a device is to wait for it."""
        key = images.device, torch.promote_types(images.dtype, torch.float32)
        if key not in self._renormalizations:
            zero = torch.zeros(len(self.mean), 1, 1, dtype=torch.float64)
            shift, one = (renormalize(
                pixels, mean=self.mean, std=self.std, teacher_mean=self.teacher_mean, teacher_std=self.teacher_std)
                for pixels in (zero, zero + 1))
            self._renormalizations[key] = (one - shift).to(*key), shift.to(*key)
        return self._renormalizations[key]

    def _answer(self, images: Tensor) -> Tensor:
        images = self.prepare(images)
        with self._autocast(images):
            logits = self.model(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = f'shape {tuple(logits.shape)}' if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f'the teacher must give logits of shape (B, K), got {got}; set its number of classes.')
        return self._chosen_logits(logits)

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, dtype=self.precision, enabled=self.precision is not None)

    def _chosen_logits(self, logits: Tensor) -> Tensor:
        if self.columns is not None:
            logits = logits.index_select(1, self.columns)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def teacher_fingerprint(
        model: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        columns: Sequence[int] | None = None,
        image_size: int | tuple[int, int] | Literal['student'] | None = None,
        precision: torch.dtype | None = None,
) -> str:
    """The `fingerprint` of a `Teacher` of these arguments, by which a `TeacherCache` knows whose answers it has.

    Args:
        model: As of `Teacher`, and so are the others.
        mean: As of `Teacher`.
        std: As of `Teacher`.
        columns: As of `Teacher`.
        image_size: As of `Teacher`.
        precision: As of `Teacher`.

    Returns:
        64 hex digits.

    Raises:
        TypeError: As `Teacher`.
        ValueError: As `Teacher`.
    """
    return Teacher(
        model, mean=mean, std=std, columns=columns, image_size=image_size, precision=precision).fingerprint()


def _check_statistics(**named: tuple[float, ...]) -> None:
    if len({len(numbers) for numbers in named.values()}) > 1:
        words = ', '.join(f'{name} {numbers}' for name, numbers in named.items())
        raise ValueError(f'mean and std must have one number a channel, as many as the teacher has, got {words}.')
    # What else can be wrong with them, it knows.
    images = torch.zeros(len(named['mean']), 1, 1)
    renormalize(images, mean=named['mean'], std=named['std'], teacher_mean=named['teacher_mean'],
                teacher_std=named['teacher_std'])


def _chosen_size(
        image_size: int | tuple[int, int] | str | None, config: dict[str, Any]) -> tuple[int, int] | None:
    if isinstance(image_size, str):
        if image_size != 'student':
            raise ValueError(f"image_size must be a size in pixels, 'student' or None, got {shown(image_size)}.")
        return None
    if image_size is None:
        size = config.get('input_size')
        return None if size is None else (size[1], size[2])
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_positive(image_height=height, image_width=width)
    return height, width


def _checked_columns(columns: Sequence[int], num_outputs: int | None) -> list[int]:
    for place, column in enumerate(columns):
        check_not_negative(**{f'columns[{place}]': column})
    if not columns or len(set(columns)) < len(columns):
        raise ValueError(f'columns must be outputs of the teacher, one or more, each once, got {shown(list(columns))}.')
    if num_outputs is not None and max(columns) >= num_outputs:
        raise ValueError(f'columns must be below the teacher\'s {num_outputs} outputs, got {max(columns)}.')
    return list(columns)


def _chosen_head(classifier: nn.Linear, columns: Tensor | None) -> nn.Linear:
    """A frozen copy of the classifier, or of some of its rows."""
    head = copy.deepcopy(classifier).requires_grad_(False)
    if columns is not None:
        head.weight = nn.Parameter(head.weight.index_select(0, columns), requires_grad=False)
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias.index_select(0, columns), requires_grad=False)
        head.out_features = len(columns)
    return head
