"""Embeddings of label names from their spelling alone: words and character n-grams, hashed to random vectors.

Subwords as in Bojanowski et al., "Enriching Word Vectors with Subword Information", arXiv:1607.04606. Deviation:
nothing is trained, each subword has a random vector of its own. So it knows spelling, not meaning: 'red 7' is near
'red 3' and 'digit 7', and 'car' is no nearer to 'automobile' than to 'banana'.
"""
import hashlib
import logging
import unicodedata
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_miil._checks import check_positive, shown

__all__ = ['embed_characters', 'note_equal']

TEXT_DIM = 300
NGRAM_CHARS = (3, 4)
MIN_TEXT_DIM = 8  # fewer dimensions, and words may cancel out
CHUNK_LABELS = 1024
CHUNK_WORDS = 4096
PAIRS_NAMED = 3

_logger = logging.getLogger(__name__)


def embed_characters(labels: Sequence[str], text_dim: int = TEXT_DIM) -> Tensor:
    """Embed label names by their spelling: the same on every machine, without any file.

    Words that share beginnings, ends or longer parts are similar; labels that share words are. Case, the order of
    words and repeated words do not count, underscores are spaces, and compatible forms of a character (Unicode NFKC)
    are one.

    Args:
        labels: Names, in any script.
        text_dim: Length E of an embedding.

    Returns:
        One row of length 1 a label, shape (K, E), float32, on the CPU.

    Raises:
        TypeError: If labels is a single string, a label is no string, or text_dim no int.
        ValueError: If text_dim is below 8, or a label has no character to read.

    Example:
        >>> one, other, third = embed_characters(['red 7', 'digit 7', 'cat'])
        >>> bool(one @ other > 0.4), bool(one @ third < 0.2)
        (True, True)
    """
    check_positive(text_dim=text_dim)
    if text_dim < MIN_TEXT_DIM:
        raise ValueError(f'text_dim must be at least {MIN_TEXT_DIM}, got {text_dim}.')
    if isinstance(labels, str):
        raise TypeError(f'labels must be a list of names, got the single string {shown(labels)}.')
    embeddings = torch.empty(len(labels), text_dim)
    for start in range(0, len(labels), CHUNK_LABELS):  # so that little memory is needed besides the result
        chunk = _split_labels(labels[start:start + CHUNK_LABELS], start)
        embeddings[start:start + len(chunk)] = _embed_labels(chunk, text_dim)
    return embeddings


def note_equal(labels: Sequence[str], embeddings: Tensor) -> None:
    """Log a warning of labels with equal embeddings: no model can tell them apart.

    Args:
        labels: K names.
        embeddings: One row a label, shape (K, E).
    """
    if embeddings.is_meta:
        return
    first: dict[bytes, str] = {}
    pairs = []
    for label, row in zip(labels, embeddings.detach().float().cpu().contiguous().numpy()):
        other = first.setdefault(hashlib.blake2b(row, digest_size=16).digest(), label)
        if other is not label:
            pairs.append(f'{shown(other)} and {shown(label)}')
    if pairs:
        more = f' and {len(pairs) - PAIRS_NAMED} more' if len(pairs) > PAIRS_NAMED else ''
        _logger.warning(
            'labels have equal embeddings, and so equal scores: %s%s; leave out or rename one of each.',
            ', '.join(pairs[:PAIRS_NAMED]), more)


def _split_labels(labels: Sequence[str], first: int) -> list[list[str]]:
    """The words of each label; the index of the first is for messages."""
    split = []
    for index, label in enumerate(labels, first):
        if not isinstance(label, str):
            raise TypeError(f'labels must be strings, got {type(label).__name__} {shown(label)} at index {index}.')
        found = _split_words(label)
        if not found:
            raise ValueError(f'labels must have a character to read, got {shown(label)} at index {index}.')
        split.append(found)
    return split


def _embed_labels(labels: Sequence[Sequence[str]], text_dim: int) -> Tensor:
    """Unit rows (K, E): the sum over the words of a label."""
    numbers: dict[str, int] = {}
    words: list[int] = []
    starts: list[int] = []
    for label in labels:
        starts.append(len(words))
        words += [numbers.setdefault(word, len(numbers)) for word in label]
    known, table = list(numbers), torch.empty(len(numbers), text_dim)
    for start in range(0, len(known), CHUNK_WORDS):
        table[start:start + CHUNK_WORDS] = _embed_words(known[start:start + CHUNK_WORDS], text_dim)
    return _to_unit(_sum_rows(table, words, starts))


def _split_words(label: str) -> list[str]:
    """The different words, sorted: runs of letters, marks and digits; any other visible character alone."""
    text = unicodedata.normalize('NFKC', unicodedata.normalize('NFKC', label).casefold())
    pieces = []
    for char in text:
        kind = unicodedata.category(char)
        if kind[0] in 'LMN':
            pieces.append(char)
        elif char == '_' or kind[0] == 'Z' or kind == 'Cc':
            pieces.append(' ')
        elif kind != 'Cf':  # format characters, such as joiners, cannot be seen
            pieces.append(f' {char} ')
    return sorted(set(''.join(pieces).split()))  # one order, so that equal words give equal sums to the bit


def _embed_words(words: Sequence[str], text_dim: int) -> Tensor:
    """Unit rows (W, E): the sum over the character n-grams of a framed word, itself among them."""
    numbers: dict[str, int] = {}
    ngrams: list[int] = []
    starts: list[int] = []
    for word in words:
        starts.append(len(ngrams))
        framed = f'<{word}>'
        found = {framed[at:at + size] for size in NGRAM_CHARS for at in range(len(framed) - size + 1)} | {framed}
        ngrams += [numbers.setdefault(ngram, len(numbers)) for ngram in found]
    return _to_unit(_sum_rows(_draw_rows(numbers, text_dim), ngrams, starts))


def _draw_rows(keys: Iterable[str], text_dim: int) -> Tensor:
    """A row of odd numbers in [-255, 255] for each key, by its SHAKE-128 hash; their sums are exact in any order."""
    digests = bytearray().join(
        hashlib.shake_128(key.encode('utf-8', 'surrogatepass')).digest(text_dim) for key in keys)
    return torch.frombuffer(digests, dtype=torch.uint8).view(-1, text_dim).float().mul_(2).sub_(255)


def _sum_rows(table: Tensor, rows: list[int], starts: list[int]) -> Tensor:
    """One sum a bag: of the rows from its start to the next bag's."""
    return F.embedding_bag(
        torch.tensor(rows, dtype=torch.int64), table, torch.tensor(starts, dtype=torch.int64), mode='sum')


def _to_unit(x: Tensor) -> Tensor:
    return x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64).float())
