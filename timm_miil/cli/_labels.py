"""The words that choose a model and its label set, for every verb that has them."""
import argparse
from pathlib import Path

from timm_miil.inference import DEFAULT_MODEL, DEFAULT_ZERO_SHOT_MODEL

__all__ = ['add_model_arguments']


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--model`, `--labels` and `--embeddings`, as `Tagger.from_name` takes them."""
    parser.add_argument(
        '--model',
        help=f'timm model, hf-hub:owner/repo, or folder with config.json and weights (default: {DEFAULT_MODEL}, with '
             f'--labels {DEFAULT_ZERO_SHOT_MODEL})')
    parser.add_argument(
        '--labels', type=Path, metavar='FILE',
        help="text file of label names, one a line, for a zero-shot model; they need not be those it was trained with, "
             "and the model's own thresholds are not used")
    parser.add_argument(
        '--embeddings', type=Path, metavar='FILE',
        help='the embeddings of these labels, where the model was trained with others than its own: GloVe or word2vec '
             '(.txt, .bin), or .npy or .safetensors')
