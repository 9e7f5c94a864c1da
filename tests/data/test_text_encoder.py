"""Text encoders by the optional extra: tiny ones of our own where the libraries are installed, else the error."""
import json
import sys

import pytest
import torch
import torch.nn.functional as F

from timm_miil.data import embed_text

LABELS = ['red 7', 'cat', 'a name that is longer than the encoder reads']


@pytest.mark.filterwarnings('ignore')  # the libraries' own
def test_the_text_tower_of_a_clip(tmp_path):
    transformers = pytest.importorskip('transformers')
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(f'{character}</w>' for character in characters), '<|startoftext|>', '<|endoftext|>']
    (tmp_path / 'vocab.json').write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n')
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=len(tokens), max_position_embeddings=20, bos_token_id=188, eos_token_id=189, **sizes)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=dict(image_size=16, patch_size=8, **sizes), projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    found = embed_text(LABELS, str(tmp_path), library='transformers', template='a {}', batch_size=2)
    assert found.shape == (3, 12) and found.dtype == torch.float32 and not found.requires_grad
    with torch.no_grad():
        hidden = model.text_model(**tokenizer(['a cat'], return_tensors='pt')).pooler_output
        want = F.normalize(model.text_projection(hidden), dim=1)
    torch.testing.assert_close(found[1:2], want)


@pytest.mark.filterwarnings('ignore')  # the libraries' own
def test_an_encoder_of_sentences(tmp_path):
    transformers = pytest.importorskip('transformers')
    library = pytest.importorskip('sentence_transformers')
    parts = pytest.importorskip('sentence_transformers.models')
    (tmp_path / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'red', 'cat', '7']))
    transformers.BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    transformers.BertModel(transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    )).save_pretrained(tmp_path)
    model = library.SentenceTransformer(modules=[parts.Transformer(str(tmp_path)), parts.Pooling(16)])
    model.save(str(tmp_path / 'sentences'))
    found = embed_text(LABELS, str(tmp_path / 'sentences'))
    want = F.normalize(torch.from_numpy(model.encode(LABELS)), dim=1)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="has no text tower.*give library='sentence-transformers'"):
        embed_text(LABELS, str(tmp_path), library='transformers')


@pytest.mark.parametrize('library', ['sentence-transformers', 'transformers'])
def test_a_missing_library_is_told_with_the_pip_line(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library.replace('-', '_'), None)
    with pytest.raises(ImportError, match=r'needed here and is not installed; run: pip install "timm-miil\[text\]"'):
        embed_text(LABELS, 'any/encoder', library=library)


@pytest.mark.parametrize('arguments, kind, words', [
    (dict(labels='cat'), TypeError, "labels must be a list of strings, got 'cat'"),
    (dict(labels=[7]), TypeError, 'labels must be a list of strings'),
    (dict(labels=[]), ValueError, 'labels must have at least one name'),
    (dict(library='open_clip'), ValueError, "library must be one of 'sentence-transformers', 'transformers', got"),
    (dict(template='a photo'), ValueError, "template must have '{}' where the name goes, got 'a photo'"),
    (dict(batch_size=0), ValueError, 'batch_size must be at least 1, got 0'),
    (dict(batch_size=1.5), TypeError, 'batch_size must be an int'),
])
def test_wrong_arguments_are_refused_before_a_library_is_loaded(arguments, kind, words):
    with pytest.raises(kind, match=words):
        embed_text(**{'labels': LABELS, 'encoder': 'any/encoder', **arguments})
