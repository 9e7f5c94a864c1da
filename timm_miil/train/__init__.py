"""Training: recipes, and the engine that follows them."""
from timm_miil.train.engine import train
from timm_miil.train.evaluate import evaluate, measure
from timm_miil.train.recipe import Recipe, list_recipes, load_recipe
from timm_miil.train.results import EpochRecord, StepRecord, TrainResult
from timm_miil.train.splits import Splits, hold_out, read_splits

__all__ = [
    'EpochRecord', 'Recipe', 'Splits', 'StepRecord', 'TrainResult', 'evaluate', 'hold_out', 'list_recipes',
    'load_recipe', 'measure', 'read_splits', 'train',
]
