"""Identities: an offline data set for verification, of made-up faces.

Each identity is a face of its own proportions and colours. Its pictures differ in pose, light, background and noise,
and a patch hides a part of some. No identity is in two splits: what is learnt is to compare faces, not to name them.

Nothing is drawn from people. The files are those of a user's data set: a folder an identity in each split.
"""
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from timm_miil._atomic import whole_folder
from timm_miil._checks import check_positive, check_range
from timm_miil.data._face_pictures import draw_face, paint_face
from timm_miil.data._scene_pictures import Draws, encode_png
from timm_miil.data._scene_sources import SPLIT_STREAM, SPLITS, holds, write_json

__all__ = ['IdentityConfig', 'make_identities']

SETTINGS_FILE = 'identities.json'
FORMAT = 1
# In units of SPLIT_STREAM; those below are of scenes.
FACE_STREAM, PICTURE_STREAM = 8, 9
MOST = 1 << 16                   # identities, and pictures of one
MIN_IMAGE_SIZE = 24


@dataclass(frozen=True)
class IdentityConfig:
    """What decides the data set, to the byte.

    Args:
        num_train: Identities for training, at least 2.
        num_val: Identities for validation, at least 2.
        num_test: Identities for the test, at least 2.
        num_pictures: Pictures of each, 2 to 65536.
        image_size: Side of the pictures in pixels, 24 to 1024.
        covered: Share of the pictures that a patch hides a part of, in [0, 1], drawn picture by picture.
        seed: Decides everything that is random, in [0, 2**63).

    Raises:
        TypeError: If a count or the seed is not an int.
        ValueError: If a value is out of range.
    """
    num_train: int = 120
    num_val: int = 20
    num_test: int = 40
    num_pictures: int = 25
    image_size: int = 32
    covered: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {'num_train': self.num_train, 'num_val': self.num_val, 'num_test': self.num_test}
        check_positive(**counts, num_pictures=self.num_pictures, image_size=self.image_size)
        for name, count in {**counts, 'num_pictures': self.num_pictures, 'the identities of all splits': sum(
                counts.values())}.items():
            check_range(**{name: count}, low=2, high=MOST, closed=True)
        check_range(image_size=self.image_size, low=MIN_IMAGE_SIZE, high=1024, closed=True)
        check_range(covered=self.covered, low=0.0, high=1.0, closed=True)
        if type(self.seed) is not int:
            raise TypeError(f'seed must be an int, got {type(self.seed).__name__} {self.seed!r}.')
        check_range(seed=self.seed, low=0, high=2 ** 63)

    def identities(self, split: str) -> range:
        """Numbers of the identities of train, val or test; their folders are named by these."""
        first = {'train': 0, 'val': self.num_train, 'test': self.num_train + self.num_val}[split]
        return range(first, first + {'train': self.num_train, 'val': self.num_val, 'test': self.num_test}[split])


def make_identities(
        directory: str | Path,
        config: IdentityConfig | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the data set as files; equal configurations give equal bytes on every machine.

    Args:
        directory: Folder to make. If it holds the whole data set of this configuration already, it is left as it is;
            an incomplete one is made again.
        config: What to make; None for the default.
        on_progress: Called with pictures written and pictures in all, after each picture.

    Returns:
        The folder: `<split>/<identity>/*.png` for train, val and test.

    Raises:
        FileExistsError: If the folder holds something else, or identities of another configuration.

    Example:
        >>> config = IdentityConfig(num_train=2, num_val=2, num_test=3, num_pictures=2)
        >>> folder = make_identities(getfixture('tmp_path') / 'faces', config)
        >>> sorted(path.name for path in (folder / 'test').iterdir())
        ['id_00004', 'id_00005', 'id_00006']
    """
    directory, config = Path(directory), config or IdentityConfig()
    settings = {'format': FORMAT, **dataclasses.asdict(config)}
    if _is_complete(directory, config, settings):
        return directory
    total, done = sum(len(config.identities(split)) for split in SPLITS) * config.num_pictures, 0
    with whole_folder(directory) as folder:
        for split in SPLITS:
            for number in config.identities(split):
                face = draw_face(Draws(config.seed, FACE_STREAM * SPLIT_STREAM + number))
                own = folder / split / f'id_{number:05d}'
                own.mkdir(parents=True)
                for index in range(config.num_pictures):
                    draws = Draws(config.seed, PICTURE_STREAM * SPLIT_STREAM + number * MOST + index)
                    is_covered = draws.between(0.0, 1.0) < config.covered
                    pixels = paint_face(face, config.image_size, draws, is_covered=is_covered)
                    (own / f'{index:05d}.png').write_bytes(encode_png(pixels))
                    done += 1
                    if on_progress is not None:
                        on_progress(done, total)
        write_json(folder / SETTINGS_FILE, settings)
    return directory


def _is_complete(directory: Path, config: IdentityConfig, settings: dict[str, object]) -> bool:
    """Whether the folder holds this very data set; False if it may be (re)made, FileExistsError if not."""
    return holds(directory, SETTINGS_FILE, settings) and all(
        sum(1 for _ in (directory / split).glob('*/*.png')) == len(config.identities(split)) * config.num_pictures
        for split in SPLITS)
