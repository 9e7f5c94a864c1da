"""Tree scenes: an offline data set whose labels form a tree, and stop at different depths of it.

Each picture shows one handwritten digit on a background cluttered with pieces of other digits, and has one label: the
digit with its colour ('red 7'), the digit alone ('digit 7'), or the group that the digit is of ('straight digit').
That is what ImageNet-21K looks like: a class and its parent are both labels, though a picture of one is a picture of
the other, so that a softmax over all classes is asked to tell apart what is the same.

The digits, their split and the painting are those of `timm_miil.data.scenes`. The files are those of a user's data set:
a folder a label in each split, and `tree.json`.
"""
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from timm_miil._atomic import whole_folder
from timm_miil._checks import check_positive, check_range
from timm_miil.data._scene_pictures import (
    COLOURS, DIGIT_SIDE, FRAGMENTS, Draws, SceneObject, encode_png, paint_scene)
from timm_miil.data._scene_sources import (
    DIGITS, SPLIT_STREAM, SPLITS, holds, source_digits, split_sources, write_json)
from timm_miil.data.hierarchy import TREE_FILE, ClassTree, write_class_tree

__all__ = ['TreeSceneConfig', 'make_tree_scenes']

# By how they are drawn: with loops, with straight strokes, with open bends.
GROUPS = {'round digit': (0, 6, 8, 9), 'straight digit': (1, 4, 7), 'bent digit': (2, 3, 5)}
GROUP_OF = {digit: name for name, digits in GROUPS.items() for digit in digits}
DEPTHS = 3
SETTINGS_FILE = 'tree_scenes.json'
FORMAT = 1
FIRST_STREAM = 4  # in units of SPLIT_STREAM for pictures, of 1 for plans: those below it are of scenes
MIN_IMAGE_SIZE = 32


@dataclass(frozen=True)
class TreeSceneConfig:
    """What decides the data set, to the byte.

    Of the pictures of each depth of label, each digit in each colour is shown equally often, give or take one.

    Args:
        num_colours: Colours of the digits, 2 to 9. There are 3 + 10 + 10 * num_colours labels.
        num_train: Pictures for training.
        num_val: Pictures for validation.
        num_test: Pictures for the test.
        shares: Parts of the pictures that are labelled with a group, with a digit, and with a coloured digit: three
            numbers from 0 whose sum is 1; the same in each split. Labels of a depth of 0 have no folder.
        image_size: Side of the pictures in pixels, at least 32.
        digit_side: Least and greatest side of a digit, as a part of the picture's, in [0.2, 0.95].
        fragments: Fewest and most pieces of digits in the background, at most 100.
        seed: Decides everything that is random, in [0, 2**63). Which source digits serve which split is as in
            `SceneConfig` of this seed, so that a test of either has digits that training of neither has.

    Raises:
        TypeError: If a count or the seed is not an int.
        ValueError: If a value is out of range, or a split is too small to show each digit in each colour at each depth.
    """
    num_colours: int = 4
    num_train: int = 3000
    num_val: int = 400
    num_test: int = 800
    shares: tuple[float, float, float] = (0.2, 0.3, 0.5)
    image_size: int = 64
    digit_side: tuple[float, float] = DIGIT_SIDE
    fragments: tuple[int, int] = FRAGMENTS
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(
            num_colours=self.num_colours, num_train=self.num_train, num_val=self.num_val, num_test=self.num_test,
            image_size=self.image_size)
        check_range(num_colours=self.num_colours, low=2, high=len(COLOURS), closed=True)
        check_range(image_size=self.image_size, low=MIN_IMAGE_SIZE, high=1024, closed=True)
        if len(self.shares) != DEPTHS or min(self.shares) < 0 or not abs(sum(self.shares) - 1) < 1e-9:
            raise ValueError(f'shares must be {DEPTHS} numbers from 0 whose sum is 1, got {self.shares!r}.')
        if not 0.2 <= self.digit_side[0] <= self.digit_side[1] <= 0.95:
            raise ValueError(f'digit_side must be two rising numbers in [0.2, 0.95], got {self.digit_side!r}.')
        if not 0 <= self.fragments[0] <= self.fragments[1] <= 100:
            raise ValueError(f'fragments must be two rising whole numbers in [0, 100], got {self.fragments!r}.')
        if type(self.seed) is not int:
            raise TypeError(f'seed must be an int, got {type(self.seed).__name__} {self.seed!r}.')
        check_range(seed=self.seed, low=0, high=2 ** 63)
        pairs = DIGITS * self.num_colours
        for split in SPLITS:
            if any(0 < share and count < pairs for share, count in zip(self.shares, self.depth_counts(split))):
                raise ValueError(
                    f'num_{split} must be large enough to show each of {pairs} pairs of colour and digit at each '
                    f'depth, got {self.num_pictures(split)} pictures, of which {self.depth_counts(split)} at the '
                    f'{DEPTHS} depths; take more pictures, fewer colours or more even shares.')

    @property
    def tree(self) -> ClassTree:
        """The labels, sorted as a reader of folders sorts them, with their parents."""
        parent_of: dict[str, str | None] = {group: None for group in GROUPS}
        parent_of |= {f'digit {digit}': GROUP_OF[digit] for digit in range(DIGITS)}
        parent_of |= {
            f'{colour} {digit}': f'digit {digit}' for colour in list(COLOURS)[:self.num_colours]
            for digit in range(DIGITS)}
        names = sorted(parent_of)
        place = {name: index for index, name in enumerate(names)}
        parents = (parent_of[name] for name in names)
        return ClassTree(tuple(names), tuple(-1 if parent is None else place[parent] for parent in parents))

    def num_pictures(self, split: str) -> int:
        """Pictures in a split of train, val and test."""
        return {'train': self.num_train, 'val': self.num_val, 'test': self.num_test}[split]

    def depth_counts(self, split: str) -> tuple[int, int, int]:
        """Pictures of a split that are labelled with a group, a digit and a coloured digit."""
        total = self.num_pictures(split)
        # A share such as 0.3 of 10 is 3, though 0.3 * 10 need not be.
        counts = [int(total * share + 1e-6) for share in self.shares]
        deepest = max(depth for depth, share in enumerate(self.shares) if share)
        counts[deepest] += total - sum(counts)
        return counts[0], counts[1], counts[2]


def make_tree_scenes(
        directory: str | Path,
        config: TreeSceneConfig | None = None,
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
        The folder: `<split>/<label>/*.png` for train, val and test, and `tree.json`.

    Raises:
        FileExistsError: If the folder holds something else, or tree scenes of another configuration.
        ImportError: If scikit-learn is not installed.

    Example:
        >>> config = TreeSceneConfig(num_colours=2, num_train=100, num_val=100, num_test=100)
        >>> folder = make_tree_scenes(getfixture('tmp_path') / 'digits', config)
        >>> sorted(path.name for path in folder.iterdir())
        ['test', 'train', 'tree.json', 'tree_scenes.json', 'val']
    """
    directory, config = Path(directory), config or TreeSceneConfig()
    settings = {'format': FORMAT, **dataclasses.asdict(config)}
    if _is_complete(directory, config, settings):
        return directory
    glyphs, classes = source_digits()
    pools = split_sources(classes, config.seed)
    tree, total = config.tree, sum(config.num_pictures(split) for split in SPLITS)
    done = 0
    with whole_folder(directory) as folder:
        for number, split in enumerate(SPLITS):
            for place, label in enumerate(tree.class_names):
                depth = len(tree.ancestors(place))
                if config.shares[depth]:
                    (folder / split / label).mkdir(parents=True)
            pool = pools[split]
            clutter = sorted(source for sources in pool for source in sources)
            for index, (label, item) in enumerate(_plan(config, split, pool)):
                draws = Draws(config.seed, (FIRST_STREAM + number) * SPLIT_STREAM + index)
                pixels, _, _ = paint_scene(
                    [item], glyphs, clutter, config.image_size, draws, digit_side=config.digit_side,
                    fragments=config.fragments)
                (folder / split / label / f'{index:06d}.png').write_bytes(encode_png(pixels))
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
        write_class_tree(tree, folder / TREE_FILE)
        write_json(folder / SETTINGS_FILE, settings)
    return directory


def _is_complete(directory: Path, config: TreeSceneConfig, settings: dict[str, object]) -> bool:
    """Whether the folder holds this very data set; False if it may be (re)made, FileExistsError if not."""
    return holds(directory, SETTINGS_FILE, settings) and (directory / TREE_FILE).is_file() and all(
        sum(1 for _ in (directory / split).glob('*/*.png')) == config.num_pictures(split) for split in SPLITS)


def _plan(config: TreeSceneConfig, split: str, pool: list[list[int]]) -> list[tuple[str, SceneObject]]:
    """Label and digit of each picture of a split."""
    draws = Draws(config.seed, FIRST_STREAM + SPLITS.index(split))
    pairs = [(digit, colour) for digit in range(DIGITS) for colour in range(config.num_colours)]
    colours = list(COLOURS)
    used = [0] * DIGITS
    pictures = []
    for depth, count in enumerate(config.depth_counts(split)):
        shown: list[int] = []
        while len(shown) < count:
            shown += draws.permutation(len(pairs))
        for digit, colour in (pairs[place] for place in shown[:count]):
            source = pool[digit][used[digit] % len(pool[digit])]
            used[digit] += 1
            label = (GROUP_OF[digit], f'digit {digit}', f'{colours[colour]} {digit}')[depth]
            pictures.append((label, SceneObject(digit, colour, source)))
    return [pictures[place] for place in draws.permutation(len(pictures))]
