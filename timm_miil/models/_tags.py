"""The catalogue's weights in timm's registry: also those of timm's own architectures, which timm lacks."""
import dataclasses

from timm.models import (
    PretrainedCfg, get_arch_pretrained_cfgs, is_model, model_entrypoint, register_model_deprecations)

from timm_miil import catalog
from timm_miil._timm import add_pretrained_cfg
from timm_miil.models._pretrained_file import PublishedCfg, PublishedFile, is_ours

__all__ = ['register_authors_names', 'register_tags']

# Networks that only their authors have, under names that nothing else has; timm builds them by these too.
AUTHORS_NAMES = {'ofa_flops_595m_s': 'miil_ofa_595m', 'levit_768': 'miil_levit_768'}


def register_authors_names() -> None:
    """Let timm build a network of ours by the name in its paper's repository, with timm's warning that names ours.

    A name that timm has itself stays timm's.
    """
    for name, architecture in AUTHORS_NAMES.items():
        if not is_model(name):
            register_model_deprecations(model_entrypoint(architecture).__module__, {name: architecture})


def register_tags() -> None:
    """Give every catalogue entry whose network is registered a configuration that finds its weights.

    What timm registers itself stays as it is: its tags, and each architecture's default. Doing it again changes
    nothing.

    Raises:
        CatalogError: If a data file of the catalogue is wrong.
    """
    for family in catalog.families():
        for name, facts in catalog.pretrained_cfgs(family).items():
            architecture, _, tag = name.partition('.')
            if facts.get('file') or not facts.get('url') or not is_model(architecture):
                continue
            known = get_arch_pretrained_cfgs(architecture).get(name)
            if isinstance(known, PublishedCfg) or known is not None and not is_ours(architecture):
                continue
            add_pretrained_cfg(name, _published(name, architecture, tag, facts, known))


def _published(
        name: str, architecture: str, tag: str, facts: dict[str, object], known: PretrainedCfg | None) -> PublishedCfg:
    fields = facts if known is None else {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
    own: dict[str, object] = {'architecture': architecture, 'tag': tag}
    file = PublishedFile(name, url=_text(fields.get('url')), hub_id=_text(fields.get('hf_hub_id')))
    return PublishedCfg(**{**fields, **own, 'file': file})


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
