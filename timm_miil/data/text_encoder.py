"""Embeddings of label names from a trained text encoder, by the optional extra `text`.

Two libraries do the work: Sentence Transformers runs sentence encoders, Transformers the text towers of models such as
CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343).
"""
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_miil._checks import check_choice, check_positive, shown
from timm_miil._extras import require

__all__ = ['embed_text']

Library = Literal['sentence-transformers', 'transformers']

LIBRARIES: tuple[Library, ...] = ('sentence-transformers', 'transformers')
BATCH_LABELS = 256


def embed_text(
        labels: Sequence[str],
        encoder: str,
        *,
        library: Library = 'sentence-transformers',
        template: str = '{}',
        batch_size: int = BATCH_LABELS,
        device: torch.device | str | None = None,
) -> Tensor:
    """Embed label names by a trained text encoder; `ZeroShotMLDecoder.set_queries` takes the result.

    Needs `pip install "timm-miil[text]"`. The libraries download an encoder that is given by its name on the Hub.

    Args:
        labels: Names.
        encoder: Name on the Hub or folder, such as 'sentence-transformers/all-MiniLM-L6-v2', or with library
            'transformers' 'openai/clip-vit-base-patch32' or 'google/siglip-base-patch16-224'.
        library: 'sentence-transformers', or 'transformers' for the text tower of a model of pictures and text.
        template: What is read for a label, with '{}' where the name goes, such as 'a photo of a {}.'.
        batch_size: Labels in one pass through the encoder.
        device: Where the encoder runs; None leaves it to the library.

    Returns:
        One row of length 1 a label, shape (K, E), float32, on the CPU; E is the encoder's.

    Raises:
        ImportError: If the library is not installed, with the pip line.
        TypeError: If labels is one string, a label is none, or batch_size no int.
        ValueError: If there are no labels, the template has no '{}', batch_size is below 1, the library is unknown, or
            the encoder has no text tower.
        OSError: From the library, if there is no such encoder.
    """
    check_choice(library=library, choices=LIBRARIES)
    check_positive(batch_size=batch_size)
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f'labels must be a list of strings, got {shown(labels)}.')
    if not labels:
        raise ValueError('labels must have at least one name, got none.')
    if '{}' not in template:
        raise ValueError(f"template must have '{{}}' where the name goes, got {shown(template)}.")
    texts = [template.replace('{}', label) for label in labels]
    embed = _by_sentences if library == 'sentence-transformers' else _by_tower
    with torch.no_grad():
        return F.normalize(embed(texts, encoder, batch_size, device).float().cpu(), dim=1)


def _by_sentences(texts: list[str], encoder: str, batch_size: int, device: torch.device | str | None) -> Tensor:
    model = require('sentence_transformers').SentenceTransformer(encoder, device=device and str(device))
    return model.encode(texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)


def _by_tower(texts: list[str], encoder: str, batch_size: int, device: torch.device | str | None) -> Tensor:
    transformers = require('transformers')
    model = transformers.AutoModel.from_pretrained(encoder).eval().to(device)
    if not hasattr(model, 'get_text_features'):
        raise ValueError(
            f"{encoder!r} has no text tower, as CLIP and SigLIP have; for an encoder of sentences give "
            f"library='sentence-transformers'.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    parts = []
    for start in range(0, len(texts), batch_size):
        # To the full length: SigLIP is trained so, and CLIP reads no further than the end of the text.
        inputs = tokenizer(
            texts[start:start + batch_size], padding='max_length', truncation=True, return_tensors='pt',
            max_length=model.config.text_config.max_position_embeddings).to(model.device)
        found: Any = model.get_text_features(**inputs)
        parts.append(found if isinstance(found, Tensor) else found.pooler_output)  # since transformers 5
    return torch.cat(parts)
