"""Models as the Hub and timm take them: folders and cards."""
from timm_miil.hub.card import CardFacts, CardMetric, catalog_card, check_card, render_card
from timm_miil.hub.folder import check_model_folder, save_model_folder
from timm_miil.hub.push import Push, push_folder

__all__ = [
    'CardFacts', 'CardMetric', 'Push', 'catalog_card', 'check_card', 'check_model_folder', 'push_folder',
    'render_card', 'save_model_folder',
]
