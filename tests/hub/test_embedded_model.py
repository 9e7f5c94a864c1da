"""The small model inside the package: it loads offline, names its labels and scores what the catalogue says."""
from pathlib import Path

import pytest
import timm
import torch

import timm_miil
from timm_miil import catalog
from timm_miil.data import SceneConfig, make_scenes, read_coco
from timm_miil.train import evaluate

NAME = 'mldecoder_scenes.miil_scenes'
PACKAGE = Path(timm_miil.__file__).parent


@pytest.fixture(scope='module')
def model():
    return timm.create_model('mldecoder_scenes', pretrained=True).eval()


def test_it_is_small_and_in_the_package():
    file = PACKAGE / catalog.weight(NAME).file
    assert file.suffix == '.safetensors' and 100_000 < file.stat().st_size < 2_000_000


def test_its_labels_are_those_of_the_scenes(model):
    names = SceneConfig().label_names
    assert tuple(model.pretrained_cfg['label_names']) == names == catalog.label_set(catalog.weight(NAME).labels).labels


# The test part of 800 is that of the quickstart: its pictures do not depend on how many there are to train on. Other
# processors round otherwise; a few pictures, drawn likewise, score about the same.
@pytest.mark.parametrize(
    ('num_test', 'tolerance'), [(100, 4), pytest.param(800, 0.05, marks=pytest.mark.slow)])
def test_it_scores_what_the_catalogue_says(model, tmp_path, num_test, tolerance):
    scenes = make_scenes(tmp_path / 'scenes', SceneConfig(num_train=40, num_val=40, num_test=num_test))
    records = read_coco(scenes / 'annotations' / 'instances_test.json', scenes / 'test')
    [metric] = catalog.weight(NAME).metrics
    assert metric.name == 'mAP' and metric.origin == 'measured'
    assert evaluate(model, records)['map'] == pytest.approx(metric.value, abs=tolerance)


def test_another_number_of_classes_keeps_the_body(model):
    other = timm.create_model('mldecoder_scenes', pretrained=True, num_classes=7).eval()
    body = other.state_dict()
    same = [name for name, tensor in model.state_dict().items() if name.startswith('backbone.')]
    assert len(same) > 20 and all(torch.equal(body[name], model.state_dict()[name]) for name in same)
