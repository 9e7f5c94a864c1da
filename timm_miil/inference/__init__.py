"""Putting trained models to work on files."""
from timm_miil.inference.calibrate import Calibration, calibrate, collect_logits
from timm_miil.inference.class_maps import METHODS, class_maps
from timm_miil.inference.draw import draw_tags, save_tagged
from timm_miil.inference.explain import Explainer, explain, find_classes
from timm_miil.inference.images import IMAGE_SUFFIXES, find_images, load_image
from timm_miil.inference.load import ACTIVATIONS, DEFAULT_ZERO_SHOT_MODEL, OutputConfig, load_model
from timm_miil.inference.optimize import optimize_for_inference
from timm_miil.inference.overlay import draw_overlay, save_overlay
from timm_miil.inference.pairs import PairValidation, validate_pairs
from timm_miil.inference.predict import BATCH_SIZE, DEFAULT_MODEL, Prediction, Tag, Tagger
from timm_miil.inference.reliability import draw_reliability
from timm_miil.inference.report import write_report
from timm_miil.inference.tagging import (
    PART_SIZE, RESULT_FORMATS, Share, TaggingSummary, find_share, tag_to_folder)
from timm_miil.inference.tune import Tuning, tune_folder
from timm_miil.inference.validate import ClassResult, Validation, validate

__all__ = [
    'ACTIVATIONS', 'BATCH_SIZE', 'Calibration', 'ClassResult', 'DEFAULT_MODEL', 'DEFAULT_ZERO_SHOT_MODEL',
    'Explainer', 'IMAGE_SUFFIXES', 'METHODS', 'OutputConfig', 'PART_SIZE', 'PairValidation', 'Prediction',
    'RESULT_FORMATS', 'Share', 'Tag', 'Tagger', 'TaggingSummary', 'Tuning', 'Validation', 'calibrate', 'class_maps',
    'collect_logits', 'draw_overlay', 'draw_reliability', 'draw_tags', 'explain', 'find_classes', 'find_images',
    'find_share', 'load_image', 'load_model', 'optimize_for_inference', 'save_overlay', 'save_tagged',
    'tag_to_folder', 'tune_folder', 'validate', 'validate_pairs', 'write_report',
]
