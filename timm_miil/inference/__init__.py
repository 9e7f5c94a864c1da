"""Putting trained models to work on files."""
from timm_miil.inference.draw import draw_tags, save_tagged
from timm_miil.inference.images import IMAGE_SUFFIXES, find_images, load_image
from timm_miil.inference.load import ACTIVATIONS, load_model
from timm_miil.inference.predict import BATCH_SIZE, DEFAULT_MODEL, Prediction, Tag, Tagger

__all__ = [
    'ACTIVATIONS', 'BATCH_SIZE', 'DEFAULT_MODEL', 'IMAGE_SUFFIXES', 'Prediction', 'Tag', 'Tagger', 'draw_tags',
    'find_images', 'load_image', 'load_model', 'save_tagged',
]
