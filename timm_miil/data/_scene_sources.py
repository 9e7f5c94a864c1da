"""What the offline data sets of painted digits share: the source digits, who may use which, and whole folders."""
import json
from collections.abc import Mapping
from pathlib import Path

from timm_miil._extras import require
from timm_miil.data._scene_pictures import Draws, Floats

__all__ = ['DIGITS', 'SPLITS', 'SPLIT_STREAM', 'holds', 'source_digits', 'split_sources', 'write_json']

SPLITS = ('train', 'val', 'test')
SOURCE_SHARE = {'train': 0.7, 'val': 0.1, 'test': 0.2}
DIGITS = 10
SOURCE_STREAM = 0
SPLIT_STREAM = 1 << 32   # streams of a split's pictures start at multiples of this; lower ones are plans


def source_digits() -> tuple[Floats, list[int]]:
    """scikit-learn's digits: pictures (1797, 8, 8) in [0, 1] and their classes."""
    digits = require('sklearn.datasets').load_digits()
    return digits.images / 16.0, [int(digit) for digit in digits.target]


def split_sources(classes: list[int], seed: int) -> dict[str, list[list[int]]]:
    """Share out the source digits: for each split, the sources of each digit class, in random order."""
    order = Draws(seed, SOURCE_STREAM).permutation(len(classes))
    pools: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
    for digit in range(DIGITS):
        sources = [source for source in order if classes[source] == digit]
        start = 0
        for split in SPLITS:
            stop = len(sources) if split == SPLITS[-1] else start + int(SOURCE_SHARE[split] * len(sources))
            pools[split].append(sources[start:stop])
            start = stop
    return pools


def holds(directory: Path, settings_file: str, settings: Mapping[str, object]) -> bool:
    """Whether pictures with these settings were made there; False if they may be, FileExistsError if not."""
    if not directory.exists() or directory.is_dir() and not any(directory.iterdir()):
        return False
    try:
        found = json.loads((directory / settings_file).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        raise FileExistsError(
            f'{directory} is not empty and holds no scenes; choose another folder.') from None
    # Tuples come back as lists.
    wanted = json.loads(json.dumps(settings))
    if found != wanted:
        differing = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
        raise FileExistsError(
            f'{directory} holds scenes made with another {", ".join(differing)}; delete it or choose another folder.')
    return True


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whose bytes are the same everywhere."""
    path.write_text(json.dumps(content, separators=(',', ':')) + '\n', encoding='utf-8', newline='\n')
