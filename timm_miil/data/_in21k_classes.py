"""The classes of ImageNet-21K-P: how many a release has, and the tree over them, from a tree file or from WordNet."""
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from timm_miil._checks import shown
from timm_miil.data._files import few
from timm_miil.data.hierarchy import ClassTree, read_class_tree

__all__ = ['CUSTOM', 'RELEASES', 'Release', 'TreeMaker', 'read_is_a', 'read_words']


class Release(NamedTuple):
    """What the authors got of a release: classes, pictures to train on, and pictures to validate on."""
    classes: int
    train: int
    val: int


RELEASES = {'fall11': Release(11_221, 11_797_632, 561_052), 'winter21': Release(10_450, 11_060_223, 522_500)}
"""As the authors' instructions for each release state."""

CUSTOM = 'custom'


def read_is_a(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Read WordNet's is_a relation as ImageNet publishes it, `wordnet.is_a.txt`: a line has parent and child.

    Returns:
        (child, parent) synsets, as `ClassTree.from_is_a` takes them.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If a line has not two words.
    """
    pairs = []
    for number, line in _lines(path):
        synsets = line.split()
        if len(synsets) != 2:
            raise ValueError(f'{path}:{number} must have a parent and a child synset, got {shown(line)}.')
        pairs.append((synsets[1], synsets[0]))
    return pairs


def read_words(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read what synsets mean as ImageNet publishes it, `words.txt`: a line has the synset, a tab, and the words.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If a line is not so.
    """
    words = {}
    for number, line in _lines(path):
        synset, tab, text = line.partition('\t')
        if not tab or not text.strip():
            raise ValueError(f'{path}:{number} must have a synset, a tab and words, got {shown(line)}.')
        words[synset.strip()] = text.strip()
    return words


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding='utf-8') as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip('\n')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is no text in UTF-8 ({error.reason}).') from error


@dataclass(frozen=True)
class TreeMaker:
    """The classes that there should be, and their tree."""
    release: str
    tree: ClassTree | None
    is_a: Path | None
    pairs: tuple[tuple[str, str], ...]
    words: Mapping[str, str]

    @property
    def has_tree(self) -> bool:
        """Whether it makes a tree."""
        return self.tree is not None or self.is_a is not None

    @classmethod
    def read(
            cls, release: str, tree: str | os.PathLike[str] | None, is_a: str | os.PathLike[str] | None,
            words: str | os.PathLike[str] | None,
    ) -> 'TreeMaker':
        class_tree = None if tree is None else read_class_tree(tree)
        if class_tree is not None and release != CUSTOM and len(class_tree) != RELEASES[release].classes:
            raise ValueError(
                f'{tree} must have the {RELEASES[release].classes} classes of {release}, got {len(class_tree)}.')
        return cls(
            release, class_tree, None if is_a is None else Path(is_a), () if is_a is None else tuple(read_is_a(is_a)),
            {} if words is None else read_words(words))

    def check_can_be(self, synsets: Iterable[str]) -> None:
        """Raise ValueError if classes of the release or of the tree are not even there, before hours of work."""
        synsets = set(synsets)
        if self.release != CUSTOM and len(synsets) < RELEASES[self.release].classes:
            raise ValueError(
                f'{self.release} has {RELEASES[self.release].classes} classes, got {len(synsets)} synsets in source; '
                f'take release={CUSTOM!r} for a part of it, and the release when all are there.')
        if self.tree is not None and self.release != CUSTOM:
            if missing := sorted(set(self.tree.class_names) - synsets):
                raise ValueError(
                    f'source must have all classes of the tree, got none of {len(missing)}: '
                    f'{few(missing, len(missing))}; take release={CUSTOM!r} to do without.')

    def make(self, classes: list[str], report: Path) -> ClassTree | None:
        """The tree over the classes, if they are the right ones."""
        missing: list[str] = []
        if self.tree is not None and self.release != CUSTOM:
            missing = sorted(set(self.tree.class_names) - set(classes))
        unknown = [] if self.tree is None else sorted(set(classes) - set(self.tree.class_names))
        if missing or unknown:
            differences = ' and '.join(
                f'{words} {len(names)} ({few(names, len(names))})'
                for words, names in (('lack', missing), ('have besides', unknown)) if names)
            raise ValueError(
                f'the classes must be those of the tree, but they {differences}; {report} says what each synset has.')
        if self.release != CUSTOM and len(classes) != RELEASES[self.release].classes:
            raise ValueError(
                f'{self.release} must give {RELEASES[self.release].classes} classes, got {len(classes)}; {report} says '
                f'what each synset has, and release={CUSTOM!r} takes any number.')
        if not classes:
            raise ValueError(f'no synset has enough pictures; {report} says how many each has.')
        if self.tree is not None:
            return self.tree.ordered_as(classes)
        if self.is_a is None:
            return None
        if lost := sorted(set(classes) - {synset for pair in self.pairs for synset in pair}):
            raise ValueError(f'{self.is_a} must name every class, got none of {len(lost)}: {few(lost, len(lost))}.')
        texts = [self.words.get(synset, synset) for synset in classes] if self.words else None
        return ClassTree.from_is_a(self.pairs, classes, descriptions=texts)
