"""Tagging with labels that are chosen at run time: which models take them, and what follows from other labels."""
import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_miil  # noqa: F401
from timm_miil._errors import PredictionError
from timm_miil.heads import ZeroShotMLDecoder, attach_head, embed_characters
from timm_miil.inference import Tagger

OWN = ('red 7', 'digit 7', 'blue 3')
OTHER = ['blue 7', 'red 7', 'green 1', 'cat']


def build(labels=OWN):
    torch.manual_seed(0)
    model = timm.create_model(
        'mldecoder_zero_shot', backbone='test_resnet', labels=labels and list(labels), embed_dim=8, text_dim=16,
        feedforward_dim=8, num_heads=2).eval()
    nn.init.normal_(model.head.group_fc.weight)
    return model


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """A saved zero-shot model with thresholds and temperatures of its own labels."""
    timm.models.save_for_hf(build(), tmp_path / 'm', safe_serialization=True, model_config=dict(
        label_names=list(OWN), problem_type='multi_label_classification', thresholds=[0.0, 0.1, 1.0],
        temperatures=[1.0, 2.0, 3.0]))
    return str(tmp_path / 'm')


def confidences(tagger, picture):
    return {tag.label: tag.confidence for tag in tagger.tag(picture)}


def test_each_label_has_the_confidence_of_its_name_in_any_set(folder, picture):
    tagger = Tagger.from_name(folder, labels=OTHER, threshold=0)
    assert tagger.label_names == tuple(OTHER) and tagger.has_label_names
    assert [OTHER[tag.index] for tag in tagger.tag(picture)] == [tag.label for tag in tagger.tag(picture)]
    found = confidences(tagger, picture)
    assert found.keys() == set(OTHER)
    own = confidences(Tagger(build(), threshold=0), picture)
    assert found['red 7'] == pytest.approx(own['red 7'], rel=1e-5)
    by_vector = Tagger(build(), labels=OTHER, embeddings=embed_characters(OTHER, 16), threshold=0)
    assert confidences(by_vector, picture) == pytest.approx(found, rel=1e-5)
    assert len({round(value, 4) for value in found.values()}) == 4


def test_settings_of_the_models_own_labels_are_left_out_for_others(folder):
    own = Tagger.from_name(folder)
    assert own.thresholds == (0.0, 0.1, 1.0) and own.temperatures == (1.0, 2.0, 3.0) and own.unused_settings == ()
    other = Tagger.from_name(folder, labels=OTHER)
    assert other.activation == 'sigmoid'
    assert other.thresholds == (0.5,) * 4 and other.temperatures is None
    assert other.unused_settings == ('thresholds', 'temperatures')
    assert Tagger.from_name(folder, labels=OTHER, threshold=[0.1, 0.2, 0.3, 0.4]).thresholds == (0.1, 0.2, 0.3, 0.4)
    with pytest.raises(ValueError, match='thresholds must have one number a class, got 3 for 4 classes'):
        Tagger.from_name(folder, labels=OTHER, threshold=[0.1, 0.2, 0.3])


def test_embeddings_come_from_a_file_too(tmp_path, picture):
    np.save(tmp_path / 'e.npy', embed_characters(OTHER, 16).numpy())
    by_file = Tagger(build(), labels=OTHER, embeddings=tmp_path / 'e.npy', threshold=0)
    assert confidences(by_file, picture) == pytest.approx(
        confidences(Tagger(build(), labels=OTHER, threshold=0), picture), rel=1e-5)


def test_any_model_with_set_queries_takes_embeddings(picture):
    """Whatever its class: the head here is attached to a model of another kind."""
    class Attached(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = attach_head(timm.create_model('test_resnet'), 1, lambda num_classes, **placement:
                                       ZeroShotMLDecoder(embed_dim=8, text_dim=16, feedforward_dim=8, **placement))
            self.pretrained_cfg, self.multi_label = self.network.pretrained_cfg, True

        num_classes = property(lambda self: self.network.head.num_classes)

        def set_queries(self, embeddings):
            self.network.head.set_queries(embeddings)

        def forward(self, x):
            return self.network(x)

    tagger = Tagger(Attached(), labels=OTHER, embeddings=torch.randn(4, 16), threshold=0)
    assert tagger.activation == 'sigmoid'
    assert confidences(tagger, picture).keys() == set(OTHER)
    with pytest.raises(PredictionError, match='does not say how its labels were embedded.*also give the embeddings'):
        Tagger(Attached(), labels=OTHER)


def test_a_model_of_other_embeddings_needs_embeddings(picture):
    model = build(labels=None)
    model.set_queries(torch.randn(3, 16))
    with pytest.raises(PredictionError, match='names do not suffice'):
        Tagger(model, labels=OTHER)
    assert confidences(Tagger(model, labels=OTHER[:2], embeddings=torch.randn(2, 16), threshold=0), picture)


def test_labels_with_equal_embeddings_are_told(picture, caplog):
    Tagger(build(), labels=OTHER, embeddings=torch.eye(4, 16))
    assert caplog.messages == []
    tagger = Tagger(build(), labels=OTHER, embeddings=torch.eye(4, 16)[[0, 1, 2, 1]], threshold=0)
    assert "labels have equal embeddings, and so equal scores: 'red 7' and 'cat'; leave out or" in caplog.text
    found = confidences(tagger, picture)
    assert found['red 7'] == pytest.approx(found['cat'], rel=1e-5)


def test_a_model_without_labels_asks_for_some():
    with pytest.raises(PredictionError, match='^the model has no label set yet; give labels, and the embeddings'):
        Tagger(build(labels=None))


@pytest.mark.parametrize('arguments, kind, words', [
    (dict(labels=[]), ValueError, 'labels must have at least one name, got none'),
    (dict(labels=['a', 'b', 'a']), ValueError, "labels must be different names, got 'a' 2 times"),
    (dict(labels='cat'), TypeError, "labels must be a list of strings, got 'cat'"),
    (dict(labels=['cat', 7]), TypeError, r"labels must be a list of strings, got \['cat', 7\]"),
    (dict(labels=['cat'], label_names=['dog']), ValueError, 'got both'),
    (dict(embeddings=torch.zeros(1, 16)), ValueError, 'are those of labels, got no labels; give their names too'),
    (dict(labels=['cat'], embeddings=torch.zeros(2, 16)), ValueError, r'one row a label, got \(2, 16\) for 1 labels'),
    (dict(labels=['cat'], embeddings=torch.zeros(1, 9)), ValueError, r'must have shape \(K, 16\), got \(1, 9\)'),
    (dict(labels=['cat'], embeddings='lost.npy'), OSError, 'lost.npy'),
    (dict(labels=['cat', '  ']), ValueError, "labels must have a character to read, got '  ' at index 1"),
])
def test_wrong_labels_are_refused(arguments, kind, words, folder):
    for use in (lambda: Tagger(build(), **arguments), lambda: Tagger.from_name(folder, **arguments)):
        with pytest.raises(kind, match=words):
            use()


def test_wrong_labels_are_refused_before_the_model_is_loaded():
    with pytest.raises(TypeError, match='labels must be a list'):
        Tagger.from_name('no such model', labels='cat')
    with pytest.raises(OSError, match='lost'):
        Tagger.from_name('no such model', labels=['cat'], embeddings='lost.txt')


def test_a_model_of_fixed_classes_says_what_to_do(picture):
    model = timm.create_model('test_resnet', num_classes=5)
    with pytest.raises(PredictionError, match=re.escape(
            'the model knows its own 5 classes and takes no other labels; leave them out, or choose a zero-shot model, '
            'such as mldecoder_zero_shot_scenes.')):
        Tagger(model, labels=OTHER)
    assert len(Tagger(model).tag(picture)) == 5


def test_labels_travel_with_a_saved_model(folder, tmp_path):
    tagger = Tagger.from_name(folder, labels=OTHER)
    timm.models.save_for_hf(tagger.model, tmp_path / 'again', safe_serialization=True)
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['model_args']['labels'] == OTHER
    assert Tagger.from_name(str(tmp_path / 'again')).label_names == tuple(OTHER)
