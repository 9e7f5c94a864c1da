"""A tagger gives the model's own answers, in order, for any number of files, and goes on after broken ones."""
import json
import math
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from timm_miil import catalog
from timm_miil._errors import PredictionError
from timm_miil.inference import DEFAULT_MODEL, Prediction, Tag, Tagger
from timm_miil.inference.load import METRIC_ACTIVATIONS

LABELS = ('ant', 'bee', 'cat', 'dog', 'elk', 'fox', 'gnu')


def save_model(folder: Path, num_classes: int = len(LABELS), **config) -> Path:
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=num_classes)
    nn.init.normal_(model.fc.weight)  # so that answers differ
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_config=config)
    return folder


def constant_model(logits: list[float]) -> nn.Module:
    """A real model that gives the same logits for every picture."""
    model = timm.create_model('test_resnet', num_classes=len(logits))
    nn.init.zeros_(model.fc.weight)
    model.fc.bias.data.copy_(torch.tensor(logits))
    return model


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp('model'), label_names=list(LABELS), activation='sigmoid')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> list[Path]:
    """20 different pictures of different sizes."""
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    paths = []
    for index in range(20):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        size = tuple(int(side) for side in rng.integers(40, 200, 2))
        Image.fromarray(small).resize(size).save(folder / f'{index:02}.png')
        paths.append(folder / f'{index:02}.png')
    return paths


@pytest.fixture
def picture(pictures) -> Path:
    return pictures[0]


def confidences(prediction: Prediction) -> dict[str, float]:
    assert prediction.error is None
    return {tag.label: tag.confidence for tag in prediction.tags}


# -- answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('activation, function', [
    ('sigmoid', torch.sigmoid), ('softmax', lambda logits: logits.softmax(dim=1))])
def test_confidences_are_those_of_timms_own_pipeline(activation, function, model_dir, pictures):
    model = timm.create_model(f'local-dir:{model_dir}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    tagger = Tagger.from_name(str(model_dir), activation=activation, threshold=0)
    for path, prediction in zip(pictures, tagger(pictures), strict=True):
        with torch.no_grad():
            want = function(model(transform(Image.open(path)).unsqueeze(0)))[0]
        assert prediction.path == path
        assert [tag.label for tag in prediction.tags] == [LABELS[tag.index] for tag in prediction.tags]
        got = torch.tensor([confidences(prediction)[label] for label in LABELS])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize('batch_size, num_workers', [(1, 1), (7, 3), (20, 2), (100, 4)])
def test_batch_size_and_workers_do_not_change_the_answers(batch_size, num_workers, model_dir, pictures):
    tagger = Tagger.from_name(f'local-dir:{model_dir}', threshold=0)
    want = [tagger.tag(Image.open(path)) for path in pictures]
    got = list(tagger(pictures, batch_size=batch_size, num_workers=num_workers))
    assert [prediction.path for prediction in got] == pictures
    for prediction, tags in zip(got, want, strict=True):
        assert [tag.index for tag in prediction.tags] == [tag.index for tag in tags]
        np.testing.assert_allclose(
            [tag.confidence for tag in prediction.tags], [tag.confidence for tag in tags], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-30.0, -1.0, -0.01, 0.0, 0.5, 2.0, 30.0]), min_size=1, max_size=8),
    threshold=st.none() | st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1),
    topk=st.none() | st.integers(1, 10),
    activation=st.sampled_from(['sigmoid', 'softmax']))
def test_tags_are_the_best_above_the_threshold(logits, threshold, topk, activation):
    tagger = Tagger(constant_model(logits), activation=activation, threshold=threshold, topk=topk)
    values = torch.tensor(logits).double()
    confidence = (values.sigmoid() if activation == 'sigmoid' else values.softmax(0)).tolist()
    if threshold is None and topk is None:
        threshold, topk = (0.5, None) if activation == 'sigmoid' else (0.0, 5)
    order = sorted(range(len(logits)), key=lambda index: (-confidence[index], index))
    want = [index for index in order[:topk] if confidence[index] >= (threshold or 0.0)]

    tags = tagger.tag(Image.new('RGB', (8, 8)))
    assert [tag.index for tag in tags] == want
    assert [tag.label for tag in tags] == [f'class_{index}' for index in want]
    np.testing.assert_allclose([tag.confidence for tag in tags], [confidence[index] for index in want], rtol=1e-6)


def test_a_half_precision_model_gives_float64_confidences():
    tagger = Tagger(constant_model([0.0, 9.0]).bfloat16(), activation='sigmoid', threshold=0)
    [first, second] = tagger.tag(Image.new('RGB', (8, 8)))
    assert first.confidence == pytest.approx(1 / (1 + math.exp(-9.0)), abs=1e-15)
    assert second == Tag('class_0', 0.5, 0)


def test_the_model_is_used_for_inference_only(picture):
    model = constant_model([0.0, 1.0]).train()
    tagger = Tagger(model, threshold=0)
    during = []
    model.register_forward_pre_hook(lambda *_: during.append(torch.is_inference_mode_enabled()))
    predictions = tagger([picture] * 3, batch_size=1)
    next(predictions)
    assert not model.training and during == [True]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()  # between two answers
    assert len(list(predictions)) == 2


@pytest.mark.parametrize('num_classes', [2, 3])
def test_a_compiled_model_gives_the_answers_of_its_own(num_classes, pictures):
    model = constant_model([0.5, -1.0, 2.0][:num_classes])
    want = list(Tagger(model, threshold=0)(pictures[:3], batch_size=2))
    got = list(Tagger(torch.compile(model, backend='eager'), threshold=0)(pictures[:3], batch_size=2))
    assert [prediction.path for prediction in got] == pictures[:3]
    for one, other in zip(got, want, strict=True):
        assert confidences(one) == pytest.approx(confidences(other), rel=1e-6)


class Colours(nn.Module):
    """A network without parameters: its scores are the mean red and green of a picture."""

    num_classes, pretrained_cfg = 2, {'input_size': (3, 8, 8), 'mean': (0.0,) * 3, 'std': (1.0,) * 3}

    def forward(self, x):
        return x.mean((2, 3))[:, :2]


def test_a_model_without_parameters_tags_on_the_cpu():
    tagger = Tagger(Colours(), activation='sigmoid', threshold=0)
    tags = tagger.tag(Image.new('RGB', (8, 8), (255, 0, 0)))
    assert [tag.index for tag in tags] == [0, 1]
    assert tags[0].confidence == pytest.approx(1 / (1 + math.exp(-1.0)), abs=1e-6) and tags[1].confidence == 0.5
    tagger.model.register_buffer('scale', torch.ones(1, dtype=torch.float64))  # then it says the dtype
    assert tagger.tag(Image.new('RGB', (8, 8), (255, 0, 0)))[0].confidence == 1 / (1 + math.exp(-1.0))


# -- many files ------------------------------------------------------------------------------------------------


def test_a_broken_file_is_reported_in_its_place_and_the_rest_goes_on(model_dir, pictures, tmp_path):
    (tmp_path / 'text.jpg').write_text('hello')
    Image.new('RGB', (2000, 9)).save(tmp_path / 'strip.png')
    paths = [tmp_path / 'text.jpg', pictures[0], tmp_path / 'none.jpg', tmp_path / 'strip.png', pictures[1]]
    tagger = Tagger.from_name(str(model_dir), threshold=0)
    for batch_size in (1, 2, 5):
        got = list(tagger(paths, batch_size=batch_size))
        assert [prediction.path for prediction in got] == paths
        assert [len(prediction.tags) for prediction in got] == [0, len(LABELS), 0, 0, len(LABELS)]
        assert [prediction.error for prediction in got] == [
            f"cannot read '{tmp_path}/text.jpg': it is not a JPEG, PNG, WebP, GIF, BMP or TIFF picture.",
            None,
            f"cannot read '{tmp_path}/none.jpg': no such file or directory.",
            f"cannot tag '{tmp_path}/strip.png': one side of 2000 x 9 pixels is more than 200 times the other.",
            None]


def test_a_strip_that_would_resize_to_nothing_is_reported(picture, tmp_path):
    Image.new('RGB', (400, 2)).save(tmp_path / 'strip.png')
    overlay = dict(input_size=(3, 96, 96), crop_mode='border', crop_pct=1.0)
    model = timm.create_model('test_resnet', num_classes=2, pretrained_cfg_overlay=overlay)
    strip, whole = Tagger(model, threshold=0)([tmp_path / 'strip.png', picture])
    assert strip.error == f"cannot tag '{tmp_path}/strip.png': height and width must be > 0."
    assert whole.error is None and len(whole.tags) == 2


def test_a_picture_with_scores_that_are_not_finite_is_reported(picture):
    tagger = Tagger(constant_model([0.0, float('nan')]))
    [prediction] = tagger([picture])
    assert prediction == Prediction(
        picture, error=f'cannot tag {str(picture)!r}: the model gives scores that are not finite.')
    with pytest.raises(PredictionError, match=r'^the model gives scores that are not finite\.$'):
        tagger.tag(Image.new('RGB', (8, 8)))


def test_files_are_read_only_a_little_ahead(model_dir, picture):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield picture

    predictions = Tagger.from_name(str(model_dir))(endless(), batch_size=4, num_workers=2)
    assert taken == 0
    for index in range(40):
        next(predictions)
        assert taken <= index // 4 * 4 + 4 + 4 + 2  # the batch at work, one that waits, one picture a thread
    predictions.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('read_pictures')]


def test_no_paths_no_predictions(model_dir):
    assert list(Tagger.from_name(str(model_dir))([])) == []


def test_wrong_arguments_are_told_at_once(model_dir):
    tagger = Tagger.from_name(str(model_dir))
    with pytest.raises(TypeError, match=r"^paths must be a list of paths, got the single path 'a.jpg'\.$"):
        tagger('a.jpg')
    with pytest.raises(ValueError, match=r'^batch_size must be at least 1, got 0\.$'):
        tagger([], batch_size=0)
    with pytest.raises(ValueError, match=r'^num_workers must be at least 1, got -1\.$'):
        tagger([], num_workers=-1)
    with pytest.raises(ValueError, match=r"^image must have mode 'RGB', got 'L'; load_image reads any file as RGB\.$"):
        tagger.tag(Image.new('L', (8, 8)))


@pytest.mark.parametrize('settings_, error, words', [
    (dict(threshold=1.5), ValueError, r'^threshold must be in \[0, 1\], got 1\.5\.$'),
    (dict(threshold=float('nan')), ValueError, r'^threshold must be in \[0, 1\], got nan\.$'),
    (dict(topk=0), ValueError, r'^topk must be at least 1, got 0\.$'),
    (dict(topk=2.5), TypeError, r'^topk must be an int, got float 2\.5\.$'),
    (dict(activation='relu'), ValueError, r"^activation must be one of 'sigmoid', 'softmax', got 'relu'\.$"),
])
def test_settings_are_checked_before_the_model_is_loaded(settings_, error, words):
    with pytest.raises(error, match=words):
        Tagger.from_name('no/such/model', **settings_)
    with pytest.raises(error, match=words):
        Tagger(constant_model([0.0]), **settings_)


# -- models that cannot tag ------------------------------------------------------------------------------------


def test_a_model_must_be_a_classifier_of_rgb_pictures(picture):
    with pytest.raises(TypeError, match=r'^model must be a timm model, got Linear without a pretrained_cfg\.$'):
        Tagger(nn.Linear(3, 3))
    with pytest.raises(PredictionError, match=r'^the model has no classifier \(num_classes is 0\); it cannot tag\.$'):
        Tagger(timm.create_model('test_resnet', num_classes=0))
    grey = timm.create_model('test_resnet', pretrained_cfg_overlay=dict(input_size=(1, 160, 160)))
    for other in (grey, timm.create_model('test_resnet', in_chans=1)):  # the second's configuration says 3
        with pytest.raises(PredictionError, match=r'^the model takes pictures of 1 channels; tagging is for RGB, 3'):
            Tagger(other)
    headless = timm.create_model('test_resnet', num_classes=5)
    headless.fc = nn.Identity()
    with pytest.raises(PredictionError, match=r'^the model must give scores of shape \(1, 5\), got \(1, 96\)'):
        list(Tagger(headless)([picture]))


# -- activation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('config, activation', [
    ({}, 'softmax'),
    (dict(problem_type='multi_label_classification'), 'sigmoid'),
    (dict(problem_type='single_label_classification'), 'softmax'),
    (dict(activation='sigmoid'), 'sigmoid'),
    (dict(activation='softmax', problem_type='multi_label_classification'), 'softmax'),
    (dict(activation=None, problem_type='multi_label_classification'), 'sigmoid'),
])
def test_config_json_says_the_activation(config, activation, tmp_path):
    save_model(tmp_path, **config)
    assert Tagger.from_name(str(tmp_path)).activation == activation
    for explicit in ('sigmoid', 'softmax'):
        assert Tagger.from_name(str(tmp_path), activation=explicit).activation == explicit


@pytest.mark.parametrize('config, words', [
    (dict(activation='relu'), r"activation in config\.json must be one of 'sigmoid', 'softmax', got 'relu'\."),
    (dict(problem_type='regression'), r"problem_type in config\.json must be one of 'multi_.*'regression'\."),
])
def test_an_unknown_activation_in_config_json_is_an_error(config, words, tmp_path):
    save_model(tmp_path, **config)
    with pytest.raises(PredictionError, match=f'^cannot load model .*: {words}$'):
        Tagger.from_name(str(tmp_path))


def small_mldecoder(**options) -> nn.Module:
    return timm.create_model(
        'mldecoder', backbone='test_resnet', num_groups=4, embed_dim=16, num_heads=2, feedforward_dim=16, **options)


def test_a_multi_label_model_has_sigmoid_unless_its_folder_says_otherwise(tmp_path):
    model = small_mldecoder(num_classes=6)
    assert Tagger(model).activation == 'sigmoid'
    for config, activation in (({}, 'sigmoid'), (dict(problem_type='single_label_classification'), 'softmax')):
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_config=config)
        assert Tagger.from_name(str(tmp_path)).activation == activation


def test_every_metric_of_the_catalogue_tells_the_activation():
    assert METRIC_ACTIVATIONS.keys() == catalog.METRICS.keys()


@pytest.mark.parametrize('name, num_classes, activation', [
    ('mldecoder_tresnet_l.miil_stanford_cars_384', 196, 'softmax'),   # one car a picture, by the metric top-1
    ('mldecoder_tresnet_l.miil_stanford_cars_384', 20, 'sigmoid'),    # other classes: no longer those weights
    ('mldecoder_tresnet_l.miil_coco_448', 80, 'sigmoid'),
])
def test_the_catalogue_knows_published_weights(name, num_classes, activation):
    model = timm.create_model(name, num_classes=num_classes, device='meta')
    assert Tagger(model).activation == activation


# -- label names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('config, want', [
    (dict(label_names=['a', 'b', 'c']), ('a', 'b', 'c')),
    (dict(label_names={'0': 'a', '2': 'c'}), ('a', 'class_1', 'c')),
    (dict(label_names=['a', 'n01440764', '/m/01g317'],
          label_descriptions={'a': 'first letter', 'n01440764': 'tench', '/m/01g317': 'person'}),
     ('a', 'tench', 'person')),
    (dict(label_names=['n01440764', 'b', 'c']), ('n01440764', 'b', 'c')),
])
def test_label_names_come_from_config_json(config, want, tmp_path):
    tagger = Tagger.from_name(str(save_model(tmp_path, num_classes=3, **config)))
    assert (tagger.label_names, tagger.has_label_names) == (want, True)


def test_a_model_without_names_has_numbered_classes():
    tagger = Tagger(constant_model([0.0, 0.0]))
    assert (tagger.label_names, tagger.has_label_names) == (('class_0', 'class_1'), False)


def test_given_names_win_and_must_fit(model_dir):
    names = [str(index) for index in range(7)]
    assert Tagger.from_name(str(model_dir), label_names=names).label_names == tuple(names)
    with pytest.raises(ValueError, match=r'^label_names must have one name a class, got 6 names for 7 classes\.$'):
        Tagger.from_name(str(model_dir), label_names=names[1:])


@pytest.mark.parametrize('names', [['a', 'b'], ['a', 'b', 'c', 'd'], {'3': 'd'}])
def test_names_of_a_folder_must_fit_its_classes(names, tmp_path):
    save_model(tmp_path, num_classes=3, label_names=names)
    with pytest.raises(PredictionError, match=r'^the model has 3 classes and its configuration names \d, the last of'):
        Tagger.from_name(str(tmp_path))


@pytest.mark.parametrize('names', ['abc', 7, {'one': 'a'}])
def test_names_of_another_kind_are_an_error(names, tmp_path):
    save_model(tmp_path, num_classes=3)
    change_config(tmp_path, lambda config: config.update(label_names=names))
    words = r'^label_names in config\.json must be a list, or an object from class number to name, got .+\.$'
    with pytest.raises(PredictionError, match=words):
        Tagger.from_name(str(tmp_path))


def test_timms_imagenet_weights_have_imagenet_names(tmp_path):
    tagger = Tagger(timm.create_model('test_resnet'))
    assert tagger.label_names[0] == 'tench, Tinca tinca' and len(tagger.label_names) == 1000
    winter = timm.create_model('test_resnet', num_classes=11221)
    assert len(Tagger(winter).label_names) == 11221 and Tagger(winter).has_label_names
    # A folder of one's own with 1000 classes need not be ImageNet.
    assert not Tagger.from_name(str(save_model(tmp_path, num_classes=1000))).has_label_names


# -- finding and trusting models -------------------------------------------------------------------------------


def load_error(name: str) -> str:
    with pytest.raises(PredictionError) as caught:
        Tagger.from_name(name)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    assert load_error('resnet17').startswith("unknown model 'resnet17'; did you mean 'resnet18'? Known: ")
    assert load_error('resnet18.a1_in2k').startswith(
        "unknown weights 'resnet18.a1_in2k'; did you mean 'resnet18.a1_in1k'?")
    assert load_error('resnet50.miil_multi_label_in21k').endswith(
        'run `timm-miil convert resnet50.miil_multi_label_in21k -o DIR`, and give the folder.')
    assert load_error('mldecoder_resnet50') == (
        "'mldecoder_resnet50' has no published weights to tag with; train it and give its folder, or choose another.")
    assert load_error('timm/resnet18') == (
        "no such model folder: 'timm/resnet18'; for a repository on the Hub, write hf-hub:timm/resnet18.")
    assert load_error('./a/b') == "no such model folder: './a/b'."
    assert load_error('local-dir:nowhere').startswith("cannot load model 'local-dir:nowhere': ")
    (tmp_path / 'run' / 'model').mkdir(parents=True)
    (tmp_path / 'run' / 'model' / 'config.json').write_text('{}')
    assert load_error(str(tmp_path / 'run')).endswith(
        f"the folder is of a training; its model is {str(tmp_path / 'run' / 'model')!r}.")
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    assert 'config.json' in load_error('folder')
    (tmp_path / 'resnet18.mine').mkdir()  # a registered architecture wins over a folder of its name
    assert load_error('resnet18.mine').startswith('unknown weights')
    assert 'config.json' in load_error('resnet18.mine/')


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / 'config.json').read_text())
    change(config)
    (folder / 'config.json').write_text(json.dumps(config))


def test_damaged_folders_give_one_line(tmp_path):
    save_model(tmp_path)
    good = (tmp_path / 'config.json').read_text()
    for text, words in [('[]', 'config.json must hold an object, got list'),
                        ('{}', 'architecture in config.json must be a string, got None'),
                        (good.replace('test_resnet', 'no_such_net'), 'no_such_net')]:
        (tmp_path / 'config.json').write_text(text)
        assert words in load_error(str(tmp_path))
    (tmp_path / 'config.json').write_text(good)
    weights = (tmp_path / 'model.safetensors').read_bytes()
    (tmp_path / 'model.safetensors').write_bytes(weights[:len(weights) // 2])
    assert load_error(str(tmp_path)).startswith('cannot load model')
    (tmp_path / 'model.safetensors').unlink()
    assert 'No suitable checkpoints found' in load_error(str(tmp_path))


def test_a_configuration_that_leaves_the_classifier_untrained_is_refused(tmp_path):
    save_model(tmp_path)
    change_config(tmp_path, lambda config: config['model_args'].update(num_classes=9))
    assert load_error(str(tmp_path)).endswith(
        'it was built for 9 classes and its weights are for 7; correct its config.json.')


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize('change', [
    dict(interpolation='magic'), dict(input_size=[]), dict(mean='grey'), dict(crop_pct='all')])
def test_preprocessing_that_makes_no_sense_is_one_error(change, tmp_path):
    save_model(tmp_path)
    change_config(tmp_path, lambda config: config['pretrained_cfg'].update(change))
    assert re.match(r"(the model's preprocessing cannot be built|cannot load model '.*'): ", load_error(str(tmp_path)))


def test_a_pickle_runs_nothing(tmp_path):
    folder = save_model(tmp_path / 'model')
    (folder / 'model.safetensors').unlink()
    torch.save({'fc.weight': Payload(tmp_path / 'proof')}, folder / 'pytorch_model.bin')
    assert 'weights_only=True blocked loading' in load_error(str(folder))
    assert not (tmp_path / 'proof').exists()


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_links_out_of_the_folder_are_refused(name, tmp_path):
    folder = save_model(tmp_path / 'model')
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert load_error(str(folder)) == (
        f'cannot load model {str(folder)!r}: {name} is a link out of the folder; put the file itself there.')


def test_links_inside_and_those_of_the_hubs_cache_are_fine(tmp_path, picture):
    folder = save_model(tmp_path / 'repo' / 'snapshots' / '0123abc', label_names=list(LABELS))
    (folder / 'config.json').rename(folder / 'other.json')
    (folder / 'config.json').symlink_to('other.json')
    (tmp_path / 'repo' / 'blobs').mkdir()
    (folder / 'model.safetensors').rename(tmp_path / 'repo' / 'blobs' / '4567')
    (folder / 'model.safetensors').symlink_to('../../blobs/4567')
    [prediction] = Tagger.from_name(str(folder))([picture])
    assert prediction.error is None and len(prediction.tags) == 5


def test_the_default_model_tags_offline(picture):
    tagger = Tagger.from_name()
    assert (tagger.model.pretrained_cfg['architecture'], tagger.activation) == (DEFAULT_MODEL, 'sigmoid')
    assert tagger.has_label_names
    [prediction] = tagger([picture])
    assert prediction.error is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_an_accelerator_gives_the_answers_of_the_cpu(model_dir, pictures):
    on_cpu = Tagger.from_name(str(model_dir), threshold=0)
    on_cuda = Tagger.from_name(str(model_dir), threshold=0, device=torch.device('cuda'))
    assert next(on_cuda.model.parameters()).is_cuda
    for cpu, cuda in zip(on_cpu(pictures), on_cuda(pictures), strict=True):
        assert confidences(cuda) == pytest.approx(confidences(cpu), abs=2e-3)  # TF32 convolutions
