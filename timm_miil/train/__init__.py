"""Training: recipes, and the engine that follows them."""
from timm_miil.train.build import Splits, hold_out, read_splits
from timm_miil.train.engine import EpochRecord, TrainResult, evaluate, train
from timm_miil.train.recipe import Recipe, list_recipes, load_recipe

__all__ = [
    'EpochRecord', 'Recipe', 'Splits', 'TrainResult', 'evaluate', 'hold_out', 'list_recipes', 'load_recipe',
    'read_splits', 'train',
]
