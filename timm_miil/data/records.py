"""Pictures with several labels each: what every reader returns, and the data set that feeds a network."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from timm_miil.data.seeding import mix_seed, seeded

__all__ = ['MultiLabelDataset', 'MultiLabelRecords']


@dataclass(frozen=True, eq=False)
class MultiLabelRecords:
    """Pictures on disk and what they show.

    Args:
        image_paths: N files.
        targets: 1 for present and 0 for absent, shape (N, C), dtype uint8.
        label_names: C names, in the order of the columns.

    Raises:
        TypeError: If targets are not uint8.
        ValueError: If the sizes do not agree.
    """
    image_paths: tuple[Path, ...]
    targets: Tensor
    label_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.targets.dtype != torch.uint8:
            raise TypeError(f'targets must be uint8, got {self.targets.dtype}.')
        expected = (len(self.image_paths), len(self.label_names))
        if tuple(self.targets.shape) != expected:
            raise ValueError(
                f'targets must have shape {expected} for {expected[0]} pictures and {expected[1]} labels, '
                f'got {tuple(self.targets.shape)}.')

    def __len__(self) -> int:
        return len(self.image_paths)


class MultiLabelDataset(Dataset[tuple[Tensor, Tensor]]):
    """Reads and transforms one picture at a time.

    Args:
        records: Pictures and targets.
        transform: Turns an RGB picture into a tensor (3, H, W).
        seed: Makes a random transform repeatable: what it draws depends on seed, epoch and index alone, so neither
            the order of the pictures nor the number of worker processes matters. None leaves the transform to the
            global generators.
    """

    def __init__(
            self,
            records: MultiLabelRecords,
            transform: Callable[[Image.Image], Tensor],
            *,
            seed: int | None = None,
    ) -> None:
        self.records = records
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Let the transform draw anew; call it before iterating over the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Picture (3, H, W) and targets (C,), float32.

        Raises:
            OSError: If the picture cannot be read.
        """
        with Image.open(self.records.image_paths[index]) as file:
            picture = file.convert('RGB')
        if self.seed is None:
            image = self.transform(picture)
        else:
            with seeded(mix_seed(self.seed, self.epoch, index)):
                image = self.transform(picture)
        return image, self.records.targets[index].float()
