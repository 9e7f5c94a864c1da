"""Scenes: an offline multi-label data set made of real handwritten digits.

Each picture shows one to `max_digits` handwritten digits in several colours on a background cluttered with pieces of
other digits. Labels say what is present: the ten digits ('digit 7'), then colour and digit together ('red 7').
The digits are the 1797 that ship with scikit-learn (UCI Optical Recognition of Handwritten Digits, CC BY 4.0); no
source digit serves two splits. The files are those of a user's data set: pictures and COCO-style annotations.
"""
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from timm_miil._atomic import whole_folder
from timm_miil._checks import check_positive, check_range
from timm_miil.data._scene_pictures import COLOURS, Draws, SceneObject, encode_png, paint_scene
from timm_miil.data._scene_sources import (
    DIGITS, SPLIT_STREAM, SPLITS, holds, source_digits, split_sources, write_json)

__all__ = ['SPLITS', 'SceneConfig', 'make_scenes']

MIN_COLOURS = 4
SETTINGS_FILE = 'scenes.json'
FORMAT = 1
MIN_IMAGE_SIZE = 32


@dataclass(frozen=True)
class SceneConfig:
    """What decides the data set, to the byte.

    The painted digits have an exponential long tail, as long-tailed CIFAR has: with C colours, the pair of digit d
    and colour c (both counted from 0) weighs imbalance^(-(d / 9 + c / (C - 1)) / 2), so that the first pair weighs
    `imbalance` times as much as the last. In each split every pair occurs once, and the other digits are shared
    out by these weights, rounded by largest remainder. The counts do not depend on the seed.

    Args:
        num_classes: Number of labels, 10 to 100: the ten digits, then ten for each colour.
        num_train: Pictures for training.
        num_val: Pictures for validation.
        num_test: Pictures for the test.
        image_size: Side of the pictures in pixels, at least 32.
        max_digits: Most digits in a picture, 1 to 9; pictures have 1, 2, ... max_digits equally often.
        imbalance: Weight of the commonest pair of digit and colour over that of the rarest, in [1, 1e6].
        seed: Decides everything that is random, in [0, 2**63).

    Raises:
        TypeError: If a count or the seed is not an int.
        ValueError: If a value is out of range, or a split is too small to show every pair of colour and digit.
    """
    num_classes: int = 30
    num_train: int = 3000
    num_val: int = 400
    num_test: int = 800
    image_size: int = 64
    max_digits: int = 4
    imbalance: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(
            num_classes=self.num_classes, num_train=self.num_train, num_val=self.num_val, num_test=self.num_test,
            image_size=self.image_size, max_digits=self.max_digits)
        check_range(num_classes=self.num_classes, low=DIGITS, high=DIGITS * (1 + len(COLOURS)), closed=True)
        check_range(image_size=self.image_size, low=MIN_IMAGE_SIZE, high=1024, closed=True)
        check_range(max_digits=self.max_digits, low=1, high=9, closed=True)
        check_range(imbalance=self.imbalance, low=1.0, high=1e6, closed=True)
        if type(self.seed) is not int:
            raise TypeError(f'seed must be an int, got {type(self.seed).__name__} {self.seed!r}.')
        check_range(seed=self.seed, low=0, high=2 ** 63)
        for split in SPLITS:
            digits, pairs = sum(_digits_per_picture(self, split)), DIGITS * self.num_colours
            if digits < pairs:
                raise ValueError(
                    f'num_{split} must be large enough to show each of {pairs} pairs of colour and digit, got '
                    f'{self.num_pictures(split)} pictures with {digits} digits; take more pictures or fewer classes.')

    @property
    def num_colours(self) -> int:
        """Colours of the painted digits; those without labels of their own are there to be told apart."""
        return max(MIN_COLOURS, -(-(self.num_classes - DIGITS) // DIGITS))

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels, in the order of the targets."""
        names = [f'digit {digit}' for digit in range(DIGITS)]
        names += [f'{colour} {digit}' for colour in COLOURS for digit in range(DIGITS)]
        return tuple(names[:self.num_classes])

    def num_pictures(self, split: str) -> int:
        """Pictures in a split of `SPLITS`."""
        return {'train': self.num_train, 'val': self.num_val, 'test': self.num_test}[split]


def make_scenes(
        directory: str | Path,
        config: SceneConfig | None = None,
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
        The folder: `train/`, `val/`, `test/` with pictures, `annotations/instances_<split>.json`.

    Raises:
        FileExistsError: If the folder holds something else, or scenes of another configuration.
        ImportError: If scikit-learn is not installed.
    """
    directory, config = Path(directory), config or SceneConfig()
    settings = {'format': FORMAT, **dataclasses.asdict(config)}
    if _is_complete(directory, config, settings):
        return directory
    glyphs, classes = source_digits()
    pools = split_sources(classes, config.seed)
    total = sum(config.num_pictures(split) for split in SPLITS)
    done = 0
    with whole_folder(directory) as folder:
        (folder / 'annotations').mkdir()
        for number, split in enumerate(SPLITS):
            (folder / split).mkdir()
            pool = pools[split]
            clutter = sorted(source for sources in pool for source in sources)
            images: list[dict[str, object]] = []
            annotations: list[dict[str, object]] = []
            for index, objects in enumerate(_plan(config, split, pool)):
                draws = Draws(config.seed, (number + 1) * SPLIT_STREAM + index)
                pixels, boxes, areas = paint_scene(objects, glyphs, clutter, config.image_size, draws)
                name = f'{index:06d}.png'
                (folder / split / name).write_bytes(encode_png(pixels))
                images.append({
                    'id': index + 1, 'file_name': name, 'width': config.image_size, 'height': config.image_size})
                for item, box, area in zip(objects, boxes, areas):
                    for category in _categories_of(item, config):
                        annotations.append({
                            'id': len(annotations) + 1, 'image_id': index + 1, 'category_id': category,
                            'bbox': box, 'area': area, 'iscrowd': 0})
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
            info: dict[str, object] = {'description': 'Scenes of handwritten digits, made by timm-miil', **settings}
            write_json(folder / 'annotations' / f'instances_{split}.json', {
                'info': info,
                'licenses': [{'id': 1, 'name': 'CC BY 4.0'}],
                'images': images,
                'annotations': annotations,
                'categories': [
                    {'id': number + 1, 'name': name, 'supercategory': name.split()[0]}
                    for number, name in enumerate(config.label_names)],
            })
        write_json(folder / SETTINGS_FILE, settings)
    return directory


def _is_complete(directory: Path, config: SceneConfig, settings: dict[str, object]) -> bool:
    """Whether the folder holds this very data set; False if it may be (re)made, FileExistsError if not."""
    return holds(directory, SETTINGS_FILE, settings) and all(
        (directory / 'annotations' / f'instances_{split}.json').is_file()
        and sum(1 for _ in (directory / split).glob('*.png')) == config.num_pictures(split)
        for split in SPLITS)


def _digits_per_picture(config: SceneConfig, split: str) -> list[int]:
    return [1 + index % config.max_digits for index in range(config.num_pictures(split))]


def _pair_counts(config: SceneConfig, total: int) -> list[int]:
    """How often each pair of digit and colour occurs among `total` digits, digit by digit."""
    steps = max(1, config.num_colours - 1)
    shares = [
        # Whole numbers from here on, so that rounding is the same on every machine.
        round(1e9 * config.imbalance ** (-(digit / (DIGITS - 1) + colour / steps) / 2))
        for digit in range(DIGITS) for colour in range(config.num_colours)]
    whole, left = sum(shares), total - len(shares)
    counts = [1 + left * share // whole for share in shares]
    remainders = [left * share % whole for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda pair: (-remainders[pair], pair))
    for pair in by_remainder[:total - sum(counts)]:
        counts[pair] += 1
    return counts


def _plan(config: SceneConfig, split: str, pool: list[list[int]]) -> list[list[SceneObject]]:
    """Which digits each picture of a split shows."""
    draws = Draws(config.seed, 1 + SPLITS.index(split))
    sizes = _digits_per_picture(config, split)
    pairs = [
        divmod(pair, config.num_colours)
        for pair, count in enumerate(_pair_counts(config, sum(sizes))) for _ in range(count)]
    used = [0] * DIGITS
    scenes: list[list[SceneObject]] = []
    pairs = [pairs[place] for place in draws.permutation(len(pairs))]
    start = 0
    for place in draws.permutation(len(sizes)):
        scene = []
        for digit, colour in pairs[start:start + sizes[place]]:
            scene.append(SceneObject(digit, colour, pool[digit][used[digit] % len(pool[digit])]))
            used[digit] += 1
        scenes.append(scene)
        start += sizes[place]
    return scenes


def _categories_of(item: SceneObject, config: SceneConfig) -> list[int]:
    """Category ids (from 1) of a digit's labels."""
    labels = (item.digit, DIGITS * (1 + item.colour) + item.digit)
    return [label + 1 for label in labels if label < config.num_classes]
