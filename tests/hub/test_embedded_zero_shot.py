"""The zero-shot model inside the package: it loads offline, takes any labels and scores what the catalogue says."""
import dataclasses
from pathlib import Path

import pytest
import timm
import torch

import timm_miil
from timm_miil import catalog
from timm_miil.data import SceneConfig, make_scenes, read_coco
from timm_miil.train import evaluate, load_recipe
from timm_miil.train.build import with_labels

NAME = 'mldecoder_zero_shot_scenes.miil_scenes'
PACKAGE = Path(timm_miil.__file__).parent
UNSEEN = load_recipe('scenes_zero_shot').unseen_labels
SCENES = SceneConfig(num_classes=50, num_train=40, num_val=40, num_test=200)


@pytest.fixture
def model():
    return timm.create_model('mldecoder_zero_shot_scenes', pretrained=True).eval()


def test_it_is_small_and_in_the_package():
    file = PACKAGE / catalog.weight(NAME).file
    assert file.suffix == '.safetensors' and 100_000 < file.stat().st_size < 2_000_000


def test_its_labels_are_those_it_learnt(model):
    seen = tuple(label for label in SCENES.label_names if label not in UNSEEN)
    assert model.labels == seen == catalog.label_set(catalog.weight(NAME).labels).labels
    assert tuple(model.pretrained_cfg['label_names']) == seen and model.num_classes == 42


def test_every_word_of_an_unseen_label_was_seen_in_others(model):
    words = {word for label in model.labels for word in label.split()}
    assert len(UNSEEN) == len(set(UNSEEN) - set(model.labels)) == 8
    assert all(word in words for label in UNSEEN for word in label.split())


# The test part of 2000 is that of benchmarks/zero_shot.py: its pictures do not depend on how many there are to train
# on. Other processors round otherwise; a few pictures, drawn likewise, score about the same.
@pytest.mark.parametrize(
    ('num_test', 'tolerance'), [(200, 8), pytest.param(2000, 0.05, marks=pytest.mark.slow)])
def test_it_scores_what_the_catalogue_says(model, tmp_path, num_test, tolerance):
    scenes = make_scenes(tmp_path / 'scenes', dataclasses.replace(SCENES, num_test=num_test))
    records = read_coco(scenes / 'annotations' / 'instances_test.json', scenes / 'test')
    metrics = {metric.name: metric for metric in catalog.weight(NAME).metrics}
    assert {metric.origin for metric in metrics.values()} == {'measured'}
    for name, labels in (('mAP', model.labels), ('unseen_mAP', UNSEEN)):
        model.set_labels(labels)
        found = evaluate(model, with_labels(records, labels))['map']
        assert found == pytest.approx(metrics[name].value, abs=tolerance), name


def test_labels_at_construction_are_those_set_later(model):
    given = timm.create_model('mldecoder_zero_shot_scenes', pretrained=True, labels=list(UNSEEN)).eval()
    model.set_labels(UNSEEN)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(picture), given(picture)) and given.labels == UNSEEN
