"""One synset of ImageNet-21K-P: its pictures resized into a folder that appears whole, and a record of it."""
import hashlib
import io
import json
import os
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from timm_miil._atomic import write_file
from timm_miil._checks import cut, shown
from timm_miil._errors import ImageError
from timm_miil.data._in21k_source import UNREADABLE, Omission, SynsetSource, opened
from timm_miil.data.images import decode_image

__all__ = ['RESIZE', 'SPLITS', 'Settings', 'SynsetJob', 'SynsetRecord', 'Workplace', 'resized']

FORMAT = 1  # of what is written; another one makes folders of before out of date
JPEG_QUALITY = 95
MAX_SIDE_PX = 65500  # of a JPEG
RESIZE = ('squish', 'short_edge')
SPLITS = ('train', 'val')


@dataclass(frozen=True)
class Settings:
    """All that decides what is written for a synset; `timm_miil.data.in21k.prepare_in21k` says what they are."""
    size: int
    resize: str
    min_images: int
    val_images: int
    jpeg_quality: int = JPEG_QUALITY
    format: int = FORMAT


@dataclass(frozen=True)
class SynsetRecord:
    """What became of a synset.

    Args:
        synset: Its name.
        kind: 'folder' or 'tar'.
        extent: Bytes of the tar file, or how many files the folder had.
        found: Picture files in the source.
        train: Pictures written to train; 0 if the synset is no class.
        val: Pictures written to val.
        omissions: What was left out.
        damage: '' or what is wrong with the tar file.
    """
    synset: str
    kind: str
    extent: int
    found: int
    train: int
    val: int
    omissions: tuple[Omission, ...]
    damage: str

    @property
    def is_class(self) -> bool:
        """Whether it was kept."""
        return self.train > 0

    def is_out_of_date(self, source: SynsetSource) -> bool:
        """Whether the source is another now: a tar file of another size or that was damaged, or a fuller folder.

        Files that have gone from a folder change nothing: what is finished may be deleted there.
        """
        if source.kind != self.kind:
            return bool(self.damage)  # unpacked since, or packed
        extent = source.extent()
        return bool(self.damage) or (extent != self.extent if self.kind == 'tar' else extent > self.extent)

    @classmethod
    def read(cls, path: Path) -> 'SynsetRecord':
        """Read what `SynsetJob` has written.

        Raises:
            ValueError: If it is something else.
        """
        try:
            fields = json.loads(path.read_text(encoding='utf-8'))
            fields['omissions'] = tuple(Omission(*omission) for omission in fields['omissions'])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{path} is no record of a synset; delete it to have the synset made again.') from error


class Workplace(NamedTuple):
    """Where things are below the folder that is being made."""
    out: Path

    @property
    def hidden(self) -> Path:
        """All that is not the data set."""
        return self.out / '.in21k'

    @property
    def records(self) -> Path:
        """What is known of the finished synsets."""
        return self.hidden / 'synsets'

    @property
    def unfinished(self) -> Path:
        """Synsets that are being made."""
        return self.hidden / 'unfinished'

    def folder(self, split: str, synset: str) -> Path:
        """A class's pictures."""
        return self.out / split / synset

    def record(self, synset: str) -> Path:
        """A synset's record; it is written last."""
        return self.records / f'{synset}.json'

    def part(self, split: str, synset: str) -> Path:
        """A class's lines of the manifest."""
        return self.records / f'{synset}.{split}.jsonl'

    def fresh(self, synset: str) -> Path:
        """Where a synset's folders are filled."""
        return self.unfinished / synset


@dataclass(frozen=True)
class SynsetJob:
    """A synset to prepare, called in a process that may be another.

    Args:
        source: Its pictures.
        place: Where to write.
        settings: How.
    """
    source: SynsetSource
    place: Workplace
    settings: Settings

    def __call__(self) -> SynsetRecord:
        """Write the synset's folders, its lines of the manifest and, last, its record."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings('ignore', module='PIL')  # its remarks on odd files; those unreadable are named
                return self._write()
        except OSError as error:
            raise OSError(
                f'cannot prepare {self.source.synset} ({cut(str(error))}); what is finished is kept, run it again to '
                f'go on.') from error

    def _write(self) -> SynsetRecord:
        synset, fresh = self.source.synset, self.place.fresh(self.source.synset)
        self.place.record(synset).unlink(missing_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        lines: dict[str, list[str]] = {split: [] for split in SPLITS}
        with opened(self.source) as listing:
            omissions, found = list(listing.omissions), len(listing.pictures)
            for number, picture in enumerate(listing.pictures if found > self.settings.min_images else ()):
                split = 'val' if number < self.settings.val_images else 'train'
                try:
                    data = self._encoded(picture.read(), picture.file)
                except ImageError as error:
                    reason = str(error).removeprefix(f'cannot read {picture.file!r}: ')
                    omissions.append(Omission(picture.file, UNREADABLE, reason))
                    continue
                folder = fresh / split
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / picture.output, 'xb') as file:
                    file.write(data)
                lines[split].append(json.dumps({
                    'file': f'{split}/{synset}/{picture.output}', 'bytes': len(data),
                    'sha256': hashlib.sha256(data).hexdigest()}) + '\n')
        is_class = bool(lines['train']) and bool(lines['val'] or not self.settings.val_images)
        for split in SPLITS:
            shutil.rmtree(self.place.folder(split, synset), ignore_errors=True)
            self.place.part(split, synset).unlink(missing_ok=True)
            if is_class and lines[split]:
                os.replace(fresh / split, self.place.folder(split, synset))
                # By the bytes of the new names: suffixes that differ have put them in another order.
                write_file(self.place.part(split, synset), ''.join(sorted(lines[split])))
        shutil.rmtree(fresh, ignore_errors=True)
        train, val = (len(lines[split]) if is_class else 0 for split in SPLITS)
        record = SynsetRecord(
            synset, self.source.kind, listing.extent, found, train, val, tuple(sorted(omissions)), listing.damage)
        write_file(self.place.record(synset), json.dumps(asdict(record)))
        return record

    def _encoded(self, data: bytes, name: str) -> bytes:
        image = resized(decode_image(data, name), self.settings.size, self.settings.resize)
        buffer = io.BytesIO()
        image.save(buffer, 'JPEG', quality=self.settings.jpeg_quality)
        return buffer.getvalue()


def resized(image: Image.Image, size: int, resize: str) -> Image.Image:
    """The picture in its new size; one whose longer side is below `size` stays, as in the original.

    Raises:
        ImageError: If a side would be longer than a JPEG's can be.
    """
    width, height = image.size
    if max(width, height) < size:
        return image
    if resize == 'squish':
        return image.resize((size, size), Image.Resampling.BILINEAR)
    scale = size / min(width, height)
    new = round(width * scale), round(height * scale)
    if max(new) > MAX_SIDE_PX:
        raise ImageError(f'of {width} x {height} pixels it would become {shown(new)}, more than a JPEG holds.')
    return image.resize(new, Image.Resampling.BILINEAR)
