"""The cards of all weights of the catalogue, as files of a folder: `hub_cards` of this package's repository."""
import os
from pathlib import Path

from timm_miil import catalog
from timm_miil._atomic import write_file
from timm_miil.hub.card import catalog_card

__all__ = ['check_cards', 'write_cards']


def check_cards(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """What is wrong with a folder of cards, one line a file; nothing if it is as `write_cards` leaves it.

    Args:
        directory: The folder, which may be missing.

    Raises:
        CatalogError: If a data file of the catalogue is wrong.
        OSError: If a file cannot be read.
    """
    cards, wrong = _cards(), []
    for name, text in cards.items():
        file = Path(directory) / name
        if not file.is_file():
            wrong.append(f'{name}: is not there')
        elif file.read_bytes() != text.encode():
            wrong.append(f'{name}: is not what the catalogue says')
    strangers = sorted(path.name for path in Path(directory).glob('*.md') if path.name not in cards)
    return (*wrong, *(f'{name}: is of no weights in the catalogue' for name in strangers))


def write_cards(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """Write the card of every entry of the catalogue as 'architecture.tag.md'.

    Each file appears whole or stays as it was; one that is right already is left alone, and so are all others.

    Args:
        directory: The folder, which is made if it is not there.

    Returns:
        Names of the files that were written.

    Raises:
        CatalogError: If a data file of the catalogue is wrong.
        OSError: If a file cannot be read or written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    changed = []
    for name, text in _cards().items():
        file = directory / name
        if not file.is_file() or file.read_bytes() != text.encode():
            write_file(file, text)
            changed.append(name)
    return tuple(changed)


def _cards() -> dict[str, str]:
    return {f'{name}.md': catalog_card(name) for name in catalog.weights()}
