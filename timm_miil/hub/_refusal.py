"""What may not go to the Hub, or cannot yet, and why."""
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard
from timm.models import is_model

from timm_miil import catalog

__all__ = ['check_may_go', 'why_not']

# What people write where there is no licence.
NO_LICENCE = frozenset({'', 'n/a', 'na', 'no', 'no license', 'none', 'none stated', 'null', 'unknown', 'unlicensed'})


def why_not(entry: catalog.Weights) -> str | None:
    """Why weights of the catalogue are not published by us, a sentence without its full stop; None if they may be."""
    if entry.why_not_publish is not None:
        return entry.why_not_publish
    if not is_model(entry.architecture):
        return f'there is no architecture {entry.architecture} yet that could hold them'
    if entry.url is None and entry.file is None:
        return 'the catalogue has no file of them'
    return None


def check_may_go(card: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError unless a folder's card and config.json let others pass the weights on."""
    licence = str(ModelCard(card).data.get('license') or '').strip().lower()
    if licence in NO_LICENCE:
        raise ValueError(
            f'the card names {licence!r} for a licence, without which nobody may pass the weights on; write the one '
            f'that their owner gives into the head of README.md, such as "license: mit".')
    conversion = config.get('conversion')
    name = conversion.get('name') if isinstance(conversion, dict) else None
    if not isinstance(name, str) or name not in catalog.weights():
        return
    entry = catalog.weight(name)
    if (reason := why_not(entry)) is not None:
        raise ValueError(f'{name} is not for the Hub: {reason}.')
    if licence != (entry.licence or '').lower():
        raise ValueError(
            f'the card names {licence!r} for a licence, and {name} has {entry.licence!r}; convert it again for a card '
            f'that says so.')
