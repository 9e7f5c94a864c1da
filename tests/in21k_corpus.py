"""A made-up release of ImageNet-21K: small pictures, in folders and tar files, some of them broken."""
import io
import random
import tarfile
from pathlib import Path

from PIL import Image

VAL, LEAST = 2, 4  # val_images and min_images that fit it


def picture(seed: int, size: tuple[int, int] = (12, 9), form: str = 'JPEG') -> bytes:
    """The bytes of a small picture of random grey."""
    buffer = io.BytesIO()
    Image.frombytes('L', size, random.Random(seed).randbytes(size[0] * size[1])).save(buffer, form)
    return buffer.getvalue()


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """A synset as a folder."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def write_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]]) -> None:
    """A synset as a tar file; a list may have a name twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def names(synset: str, count: int) -> list[str]:
    """File names as in the release."""
    return [f'{synset}_{number}.JPEG' for number in range(count)]


def make_corpus(folder: Path, *, synsets: int) -> dict[str, int]:
    """Write synsets of 1 to 8 pictures, half of them tar files, a third one folder below; some pictures are broken.

    Returns:
        How many picture files each has.
    """
    generator, counts = random.Random(0), {}
    for number in range(synsets):
        synset, count = f'n{number * 37:08d}', generator.randint(1, 8)
        files = {name: picture(number * 100 + place) for place, name in enumerate(names(synset, count))}
        if number % 5 == 0:  # one that breaks off, behind those for validation
            last = names(synset, count)[-1]
            files[last] = files[last][:60]
        where = folder / ('part' if number % 3 == 0 else '')
        if number % 2:
            write_tar(where / f'{synset}.tar', files)
        else:
            write_folder(where / synset, files)
        counts[synset] = count
    return counts
