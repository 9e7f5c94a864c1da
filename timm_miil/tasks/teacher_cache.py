"""Answers of a teacher on disk, for training several times with the same pictures.

The k largest logits of each picture are kept, with what the others have together; no one paper's.
"""
import logging
import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_miil._checks import check_choice, check_positive, check_text
from timm_miil.tasks._answer_files import AnswerFiles
from timm_miil.tasks._picture_keys import PictureKeys

__all__ = ['TeacherCache']

FORMAT = 1
TAILS = ('softmax', 'sigmoid')  # columns of the records' `rest`
HALF_MAX = 65504.0
VAIN_BATCHES = 20  # after which one is told that nothing is found

_logger = logging.getLogger(__name__)


class TeacherCache:
    """Top-k logits of a teacher in a folder, found by the pixels of the pictures.

    A key is a 128-bit hash of the very pixels that the student gets, after all augmentation and mixing. Two pictures
    share one with a probability of at most 2^-66, and of 2^-128 unless they are made for it, so an answer is never of
    another picture. A run finds the answers of an earlier one as far as it draws the same pictures: with the same seed,
    recipe and batches, at one input size and normalisation, whatever the student is.

    A batch is answered from the folder if all its pictures are there; else the teacher is asked for the whole batch,
    and what is new is kept. Either way the answer is what the folder can hold of it, so that the loss does not depend
    on what was there: the k largest logits in float16, and one value for all others. With `tail='softmax'` this is
    their log-sum-exp spread evenly, so that the largest keep their probabilities under a softmax at temperature 1; with
    'sigmoid' it is the logit of their mean probability. `topk=num_classes` keeps all, to float16.

    Records are written in parts of about 32 MB, each appearing whole; those that wait are written by `flush` and when
    the cache or the program ends. Several processes may share a folder. A record takes 24 bytes and 4 for each of the k
    (6 beyond 32,767 classes) on disk, and 16 in memory.

    Args:
        directory: The folder; it is made.
        num_classes: Columns of the teacher's answers (C).
        topk: How many logits of a picture to keep (k), at most C.
        max_bytes: Bound of all parts together. When it is reached, nothing more is added, which is logged once.
        teacher: What stands for the teacher and its settings: `Teacher.fingerprint()`.
        tail: For which loss the others are made up; the folder serves both.

    Attributes:
        num_classes: As given.
        topk: As given.
        num_found: Pictures that were answered from the folder since it was opened.
        num_asked: Pictures that the teacher was asked for.

    Raises:
        OSError: If the folder cannot be written to.
        TypeError: If a number is no int, or teacher no string.
        ValueError: If a setting is out of range, or the folder is of another teacher or other settings.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> cache = TeacherCache(folder.name, num_classes=3, topk=2, max_bytes=10**6, teacher='an example')
        >>> cache.answer(torch.rand(1, 3, 8, 8), lambda images: torch.tensor([[1.0, 2.0, 0.5]]))
        tensor([[1.0000, 2.0000, 0.5000]])
        >>> cache.num_asked, len(cache)
        (1, 1)
        >>> cache.flush()
        >>> folder.cleanup()
    """

    def __init__(
            self,
            directory: str | os.PathLike[str],
            *,
            num_classes: int,
            topk: int,
            max_bytes: int,
            teacher: str,
            tail: Literal['softmax', 'sigmoid'] = 'softmax',
    ) -> None:
        check_positive(num_classes=num_classes, topk=topk, max_bytes=max_bytes)
        check_text(teacher=teacher)
        check_choice(tail=tail, choices=TAILS)
        if topk > num_classes:
            raise ValueError(f'topk must be at most num_classes, got {topk} of {num_classes}.')
        self.num_classes, self.topk, self.tail = num_classes, topk, tail
        self.num_found = self.num_asked = 0
        self._keys = PictureKeys()
        places = torch.int16 if num_classes <= torch.iinfo(torch.int16).max else torch.int32
        self._files = AnswerFiles(
            Path(directory), {'format': FORMAT, 'teacher': teacher, 'num_classes': num_classes, 'topk': topk},
            {'places': ((topk,), places), 'logits': ((topk,), torch.float16), 'rest': ((2,), torch.float32)}, max_bytes)
        self._num_known, self._num_batches = len(self), 0
        # At the end of the program, too; it must not hold the cache itself.
        weakref.finalize(self, self._files.close)

    def __len__(self) -> int:
        return len(self._files.index)

    @torch.no_grad()
    def answer(self, images: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of pictures, from the folder or by asking.

        Args:
            images: Pictures, shape (B, I, H, W), on any device.
            ask: Gives logits (B, C) of such pictures.

        Returns:
            Shape (B, C), float32, on the device of the pictures.

        Raises:
            OSError: If a part is full and cannot be written.
            ValueError: If `ask` gives another shape.
        """
        keys = self._keys(images).cpu()
        found = self._files.read(keys)
        if found is not None:
            self.num_found += len(images)
            return self._restored({name: tensor.to(images.device) for name, tensor in found.items()})
        self.num_asked += len(images)
        self._warn_if_vain()
        logits = ask(images)
        if logits.shape != (len(images), self.num_classes):
            raise ValueError(
                f'the teacher must give {self.num_classes} logits a picture, got shape {tuple(logits.shape)} for '
                f'{len(images)}; open the cache with its number of classes.')
        record = self._record(logits)
        if not self._files.is_full:
            kept = {name: tensor.cpu() for name, tensor in record.items()}
            is_sound = kept['logits'].isfinite().all(1) & ~kept['rest'].isnan().any(1)
            self._files.add({name: tensor[is_sound] for name, tensor in {'keys': keys, **kept}.items()})
        return self._restored(record)

    def flush(self) -> None:
        """Write the records that wait, and take in what other processes wrote.

        Raises:
            OSError: If they cannot be written.
        """
        self._files.flush()

    def _warn_if_vain(self) -> None:
        """Tell once, where the folder had answers and none is of the pictures that come."""
        self._num_batches += 1
        if self._num_batches == VAIN_BATCHES and self._num_known and not self.num_found:
            _logger.warning(
                '%s has %d answers, and none is of the pictures that came: it helps a training that draws the very '
                'pictures of an earlier one, with its seed, batches and augmentation.', self._files.folder,
                self._num_known)

    def _record(self, logits: Tensor) -> dict[str, Tensor]:
        logits = logits.float()
        best, places = logits.topk(self.topk, dim=1)
        rest = logits.new_zeros(len(logits), 2)
        if self.topk < self.num_classes:
            low, high = (logits.scatter(1, places, value) for value in (-torch.inf, torch.inf))
            softmax = low.logsumexp(1) - math.log(self.num_classes - self.topk)
            sigmoid = F.logsigmoid(low).logsumexp(1) - F.logsigmoid(-high).logsumexp(1)
            rest = torch.stack([softmax, sigmoid], dim=1)
        return {
            'places': places.to(self._files.layout['places'][1]),
            'logits': best.clamp(-HALF_MAX, HALF_MAX).half(), 'rest': rest}

    def _restored(self, record: dict[str, Tensor]) -> Tensor:
        column = TAILS.index(self.tail)
        logits = record['rest'][:, column:column + 1].repeat(1, self.num_classes)
        return logits.scatter_(1, record['places'].long(), record['logits'].float())
