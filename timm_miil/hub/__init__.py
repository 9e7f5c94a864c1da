"""Models as the Hub and timm take them: converted, described, pushed and verified."""
from timm_miil.hub.card import CardFacts, CardMetric, catalog_card, check_card, render_card
from timm_miil.hub.convert import Conversion, convert
from timm_miil.hub.folder import check_model_folder, save_model_folder
from timm_miil.hub.links import Link, links
from timm_miil.hub.publish import publish, publish_all
from timm_miil.hub.push import Push, push_folder
from timm_miil.hub.verify import Verification, verify_repo

__all__ = [
    'CardFacts', 'CardMetric', 'Conversion', 'Link', 'Push', 'Verification', 'catalog_card', 'check_card',
    'check_model_folder', 'convert', 'links', 'publish', 'publish_all', 'push_folder', 'render_card',
    'save_model_folder', 'verify_repo',
]
