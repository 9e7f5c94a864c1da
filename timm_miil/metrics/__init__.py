"""Measuring predictions, and fitting what turns scores into decisions."""
from timm_miil.metrics.calibration import ReliabilityCurve, calibration_error, fit_temperatures, reliability_curve
from timm_miil.metrics.diversity import (
    cka_redundancy, effective_rank, filter_diversity, layer_filter_diversity, mean_log_odds, nc1, output_std,
    participation_ratio)
from timm_miil.metrics.f1 import F1, MultilabelF1, multilabel_f1
from timm_miil.metrics.multilabel import AveragePrecision, MultilabelAveragePrecision, multilabel_average_precision
from timm_miil.metrics.retrieval import (
    F1AtK, MultilabelF1AtK, Retrieval, ZeroShotRetrieval, multilabel_f1_at_k, zero_shot_retrieval)
from timm_miil.metrics.semantic import SemanticAccuracy, semantic_accuracy
from timm_miil.metrics.thresholds import Thresholds, best_thresholds, find_thresholds
from timm_miil.metrics.verification import TarAtFar, pairwise_tar_at_far, rate_of_percent, tar_at_far

__all__ = [
    'AveragePrecision', 'F1', 'F1AtK', 'MultilabelAveragePrecision', 'MultilabelF1', 'MultilabelF1AtK',
    'ReliabilityCurve', 'Retrieval', 'SemanticAccuracy', 'TarAtFar', 'Thresholds', 'ZeroShotRetrieval',
    'best_thresholds', 'calibration_error', 'cka_redundancy', 'effective_rank', 'filter_diversity', 'find_thresholds',
    'fit_temperatures', 'layer_filter_diversity', 'mean_log_odds', 'multilabel_average_precision', 'multilabel_f1',
    'multilabel_f1_at_k', 'nc1', 'output_std', 'pairwise_tar_at_far', 'participation_ratio', 'rate_of_percent',
    'reliability_curve', 'semantic_accuracy', 'tar_at_far', 'zero_shot_retrieval',
]
