"""Thresholds and temperatures of a model: found on logits, kept in its folder, used by the tagger and the command."""
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_miil._errors import PredictionError
from timm_miil.cli.main import main
from timm_miil.hub import CardFacts, render_card, save_model_folder
from timm_miil.inference import Tagger, calibrate, collect_logits, draw_reliability
from timm_miil.metrics import find_thresholds, fit_temperatures, reliability_curve

LABELS = ('ant', 'bee', 'cat', 'dog')
LOGITS = (2.0, 0.5, -0.5, -2.0)             # sigmoid: 0.88, 0.62, 0.38, 0.12
TEMPERATURES = [1.0, 4.0, 0.5, 2.0]
COOLED = (0.880797, 0.531209, 0.268941, 0.268941)
PICTURE = Image.new('RGB', (8, 8))


def constant_model() -> nn.Module:
    """A real model that gives the same logits for every picture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model('test_resnet', num_classes=len(LOGITS))
    nn.init.zeros_(model.fc.weight)
    model.fc.bias.data.copy_(torch.tensor(LOGITS))
    return model


def save(folder: Path, **options) -> Path:
    card = render_card(CardFacts(
        name='test', summary='A test.', source='local-dir:model', licence='apache-2.0', architecture='test_resnet',
        num_params=10, input_size=(3, 160, 160), dataset='None such', dataset_id='none', label_names=LABELS,
        metrics=[], training='Not trained.', papers=['asl']))
    return save_model_folder(constant_model(), folder, label_names=LABELS, card=card, **options)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return save(
        tmp_path_factory.mktemp('saved') / 'model', thresholds=[0.9, 0.5, 0.2, 0.25], temperatures=TEMPERATURES)


def labels(tagger: Tagger) -> list[str]:
    return [tag.label for tag in tagger.tag(PICTURE)]


def confidences(tagger: Tagger) -> list[float]:
    return [tag.confidence for tag in sorted(tagger.tag(PICTURE), key=lambda tag: tag.index)]


# -- the tagger ------------------------------------------------------------------------------------------------


def test_each_class_has_its_threshold():
    tagger = Tagger(constant_model(), activation='sigmoid', label_names=LABELS, threshold=(0.9, 0.7, 0.2, 0.1))
    assert tagger.thresholds == (0.9, 0.7, 0.2, 0.1) and tagger.temperatures is None
    assert labels(tagger) == ['cat', 'dog']
    limited = Tagger(
        constant_model(), activation='sigmoid', label_names=LABELS, threshold=[0.9, 0.7, 0.2, 0.1], topk=1)
    assert labels(limited) == ['cat']  # the best of those above their thresholds, not above those of the best


def test_temperatures_are_applied_before_the_threshold():
    tagger = Tagger(
        constant_model(), activation='sigmoid', label_names=LABELS, threshold=0.55, temperatures=TEMPERATURES)
    assert labels(tagger) == ['ant']
    tagger = Tagger(constant_model(), activation='sigmoid', threshold=0.0, temperatures=TEMPERATURES)
    assert confidences(tagger) == pytest.approx(COOLED, abs=1e-6)


@pytest.mark.parametrize(('options', 'error', 'words'), [
    (dict(threshold=[0.5] * 3), ValueError, r'^thresholds must have one number a class, got 3 for 4 classes\.$'),
    (dict(threshold=[0.5, 0.5, 2.0, 0.5]), ValueError, r'^thresholds\[2\] must be in \[0, 1\], got 2\.0\.$'),
    (dict(threshold=[0.5, None, 0.5, 0.5]), TypeError, r'^thresholds\[1\] must be a number, got NoneType None\.$'),
    (dict(threshold='half'), TypeError, r"^thresholds must be a list of numbers, got str 'half'\.$"),
    (dict(threshold=torch.ones(4)), TypeError, r'^threshold must be a number, got Tensor; call \.tolist\(\)\.$'),
    (dict(temperatures=[1.0] * 5), ValueError, r'^temperatures must have one number a class, got 5 for 4 classes\.$'),
    (dict(temperatures=[1.0, 1.0, 1.0, 0.0]), ValueError, r'^temperatures\[3\] must be in \[0\.01, 100\], got 0\.0\.$'),
    (dict(temperatures=TEMPERATURES, activation='softmax'), ValueError,
     r"^temperatures are for the activation 'sigmoid', got 'softmax'\.$"),
])
def test_wrong_settings(options, error, words):
    with pytest.raises(error, match=words):
        Tagger(constant_model(), **{'activation': 'sigmoid', **options})


# -- the model's own -------------------------------------------------------------------------------------------


def test_a_folders_own_thresholds_and_temperatures_are_used(folder):
    tagger = Tagger.from_name(str(folder))
    assert tagger.thresholds == (0.9, 0.5, 0.2, 0.25) and tagger.temperatures == tuple(TEMPERATURES)
    assert labels(tagger) == ['bee', 'cat', 'dog']


def test_given_settings_win_over_a_folders_own(folder):
    tagger = Tagger.from_name(str(folder), threshold=0.0)
    assert confidences(tagger) == pytest.approx(COOLED, abs=1e-6)  # still calibrated
    assert labels(Tagger.from_name(str(folder), topk=2, threshold=0.0)) == ['ant', 'bee']
    assert labels(Tagger.from_name(str(folder), threshold=[0.0, 1.0, 1.0, 0.0])) == ['ant', 'dog']
    softmax = Tagger.from_name(str(folder), activation='softmax', threshold=0.0)
    assert confidences(softmax) == pytest.approx(torch.tensor(LOGITS).softmax(0).tolist(), abs=1e-6)


def test_topk_only_limits_the_tags_above_a_folders_own_thresholds(folder, tmp_path):
    tagger = Tagger.from_name(str(folder), topk=2)
    assert tagger.thresholds == (0.9, 0.5, 0.2, 0.25) and labels(tagger) == ['bee', 'cat']  # 'ant' is below its own
    plain = Tagger.from_name(str(save(tmp_path / 'plain', temperatures=TEMPERATURES)), topk=3)
    assert plain.thresholds == (0.0,) * 4 and labels(plain) == ['ant', 'bee', 'cat']


def test_either_may_be_left_out(tmp_path):
    tagger = Tagger.from_name(str(save(tmp_path / 'warm', temperatures=TEMPERATURES)))
    assert labels(tagger) == ['ant', 'bee'] and tagger.thresholds == (0.5,) * 4
    tagger = Tagger.from_name(str(save(tmp_path / 'cut', thresholds=[0, 1, 1, 0])))
    assert labels(tagger) == ['ant', 'dog'] and tagger.temperatures is None


def test_timm_and_the_bytes_of_other_files_do_not_notice(folder, tmp_path):
    plain = save(tmp_path / 'plain')
    for name in ('model.safetensors', 'README.md'):
        assert (plain / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((folder / 'config.json').read_text())
    assert (config.pop('thresholds'), config.pop('temperatures')) == ([0.9, 0.5, 0.2, 0.25], TEMPERATURES)
    assert config == json.loads((plain / 'config.json').read_text())
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.zeros(1, 3, 160, 160)), torch.tensor([LOGITS]))


def test_the_command_uses_them(folder, tmp_path, capsys):
    PICTURE.save(tmp_path / 'a.png')
    want = {(): ['bee', 'cat', 'dog'], ('--threshold', '0.5'): ['ant', 'bee'], ('--topk', '1'): ['bee']}
    for options, names in want.items():
        assert main(['predict', str(tmp_path / 'a.png'), '--model', str(folder), '--format', 'json', *options]) == 0
        tags = json.loads(capsys.readouterr().out)['tags']
        assert [tag['label'] for tag in tags] == names
    assert tags[0]['confidence'] == pytest.approx(COOLED[1], abs=1e-6)


@pytest.mark.parametrize(('change', 'words'), [
    ({'thresholds': [0.5] * 3}, 'thresholds must have one number a class, got 3 for 4 classes'),
    ({'thresholds': []}, 'thresholds must have one number a class, got 0 for 4 classes'),
    ({'thresholds': 0.5}, 'thresholds must be a list of numbers, got float 0.5'),
    ({'thresholds': '0.50'}, "thresholds must be a list of numbers, got str '0.50'"),
    ({'thresholds': {'ant': 0.5}}, "thresholds must be a list of numbers, got dict {'ant': 0.5}"),
    ({'thresholds': [0.5, 0.5, 0.5, float('nan')]}, 'thresholds[3] must be in [0, 1], got nan'),
    ({'thresholds': [0.5, -0.1, 0.5, 0.5]}, 'thresholds[1] must be in [0, 1], got -0.1'),
    ({'thresholds': [0.5, True, 0.5, 0.5]}, 'thresholds[1] must be a number, got bool True'),
    ({'thresholds': [0.5, [0.5], 0.5, 0.5]}, 'thresholds[1] must be a number, got list [0.5]'),
    ({'temperatures': [1.0, 1.0, float('inf'), 1.0]}, 'temperatures[2] must be in [0.01, 100], got inf'),
    ({'temperatures': [1.0, 1.0, 1.0, 10 ** 400]}, f'temperatures[3] must be in [0.01, 100], got 1{"0" * 99}...'),
    ({'problem_type': 'single_label_classification'},
     'thresholds and temperatures are for independent classes, and the activation is softmax'),
])
def test_a_folder_with_wrong_ones_is_one_line(change, words, tmp_path):
    folder = save(tmp_path / 'model', thresholds=[0.5] * 4, temperatures=TEMPERATURES)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **change}))
    with pytest.raises(PredictionError) as caught:
        Tagger.from_name(str(folder))
    assert str(caught.value) == f'cannot load model {str(folder)!r}: {words}; correct its config.json.'


def test_thresholds_mean_independent_classes_unless_said_otherwise(tmp_path):
    folder = save(tmp_path / 'model', thresholds=[0.5] * 4)
    config = json.loads((folder / 'config.json').read_text())
    del config['problem_type']
    (folder / 'config.json').write_text(json.dumps(config))
    assert Tagger.from_name(str(folder)).activation == 'sigmoid'
    (folder / 'config.json').write_text(json.dumps({**config, 'thresholds': None}))
    assert Tagger.from_name(str(folder)).activation == 'softmax'


@pytest.mark.parametrize(('options', 'error', 'words'), [
    (dict(thresholds=[0.5] * 3), ValueError, r'^thresholds must have one number a class, got 3 for 4 classes\.$'),
    (dict(temperatures=[1, 1, 1, 101]), ValueError, r'^temperatures\[3\] must be in \[0\.01, 100\], got 101\.$'),
    (dict(temperatures=torch.ones(4)), TypeError,
     r'^temperatures must be a list of numbers, got Tensor; call \.tolist\(\)\.$'),
    (dict(thresholds=[0.5] * 4, problem_type='single_label_classification'), ValueError,
     r"^thresholds are for independent classes, got problem_type 'single_label_classification'\.$"),
    (dict(problem_type='foo'), ValueError,
     r"^problem_type must be one of 'multi_label_classification', 'single_label_classification', 'embedding', got "
     r"'foo'\.$"),
])
def test_wrong_ones_are_refused_before_anything_is_written(options, error, words, tmp_path):
    with pytest.raises(error, match=words):
        save(tmp_path / 'model', **options)
    assert list(tmp_path.iterdir()) == []


# -- finding them ----------------------------------------------------------------------------------------------


def labelled_logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, len(LABELS), generator=generator) * 2 - 1
    return 2.5 * x, (torch.rand(x.shape, generator=generator) < x.sigmoid()).int()


def test_thresholds_are_found_for_calibrated_confidences():
    logits, targets = labelled_logits()
    found = calibrate(logits, targets, objective='recall', target=0.8, num_folds=3, seed=4)
    temperatures = fit_temperatures(logits, targets)
    assert found.temperatures == tuple(temperatures.tolist())
    assert found.temperatures == pytest.approx([2.5] * 4, rel=0.3)
    probs = (logits.double() / temperatures).sigmoid()
    want = find_thresholds(probs, targets, objective='recall', target=0.8, num_folds=3, seed=4)
    assert found.thresholds == tuple(want.values.tolist()) == tuple(found.found.values.tolist())


def test_logits_of_any_dtype_are_left_as_they_were():
    logits, targets = labelled_logits()
    given = logits.double().requires_grad_()
    found, want = calibrate(given, targets), calibrate(logits, targets)
    assert torch.equal(given, logits.double())
    assert (found.thresholds, found.temperatures) == (want.thresholds, want.temperatures)


def test_a_taggers_confidences_are_those_that_thresholds_are_found_for():
    model = constant_model()
    tagger = Tagger(model, activation='sigmoid', threshold=0.0, temperatures=[0.7, 1.9, 0.3, 2.1])
    logits, _ = collect_logits(model, [(torch.zeros(1, 3, 160, 160), torch.zeros(1, 4))])
    probs = (logits.double() / torch.tensor(tagger.temperatures, dtype=torch.float64)).sigmoid()[0]
    assert confidences(tagger) == probs.tolist()
    at_the_edge = Tagger(model, activation='sigmoid', threshold=probs.tolist(), temperatures=tagger.temperatures)
    assert len(at_the_edge.tag(PICTURE)) == len(LABELS)


def test_what_is_found_goes_to_a_folder_and_comes_back(tmp_path):
    found = calibrate(*labelled_logits())
    tagger = Tagger.from_name(str(save(
        tmp_path / 'model', thresholds=found.thresholds, temperatures=found.temperatures)))
    assert (tagger.thresholds, tagger.temperatures) == (found.thresholds, found.temperatures)


def test_logits_are_collected_in_evaluation_mode():
    model = timm.create_model('test_resnet', num_classes=4).train()
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.rand(5, 3, 32, 32, generator=generator), torch.eye(5, 4)
    logits, labels_ = collect_logits(model, [(images[:3], targets[:3]), (images[3:], targets[3:])])
    assert model.training and not logits.requires_grad
    assert torch.equal(labels_, targets)
    with torch.no_grad():
        torch.testing.assert_close(logits, model.eval()(images))
    collect_logits(model, [(images, targets)])
    assert not model.training
    half, _ = collect_logits(model.bfloat16(), [(images, targets)])
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match=r'^batches must hold labelled pictures, got none\.$'):
        collect_logits(model, [])
    with pytest.raises(TypeError, match=r'^batches must give pairs \(pictures, targets\), got dict\.$'):
        collect_logits(model, [{'image': images, 'label': targets}])
    with pytest.raises(ValueError, match=r'^model must have parameters, .* got none\.$'):
        collect_logits(nn.Identity(), [(images, targets)])


# -- the picture -----------------------------------------------------------------------------------------------


CURVE_BLUE, BAR_BLUE, WHITE = (47, 93, 138), (157, 184, 210), (255, 255, 255)


def test_the_picture_shows_each_bin_at_its_place():
    probs, targets = torch.tensor([[0.25], [0.25], [0.75], [0.75]]), torch.tensor([[1], [1], [1], [0]])
    picture = draw_reliability(reliability_curve(probs, targets, num_bins=4), title='two dots')
    assert picture.mode == 'RGB'
    left, top, side = 56, 56, 400
    for confidence, frequency in ((0.25, 1.0), (0.75, 0.5)):
        assert picture.getpixel((left + confidence * side, top + side * (1 - frequency))) == CURVE_BLUE
        assert picture.getpixel((left + confidence * side, picture.height - 56 // 2 - 4)) == BAR_BLUE
    assert picture.getpixel((left + side // 2 + 3, picture.height - 56 // 2 - 4)) == WHITE


def test_a_curve_without_labels_is_an_empty_picture():
    empty = draw_reliability(reliability_curve(torch.zeros(1, 1), torch.full((1, 1), -1)))
    assert CURVE_BLUE not in {color for _, color in empty.getcolors()}


def test_a_curve_of_many_classes_is_refused():
    curve = reliability_curve(torch.zeros(2, 3), torch.zeros(2, 3), per_class=True)
    with pytest.raises(ValueError, match=r'^confidence must have 1 dimensions, got shape \(3, 15\)\.$'):
        draw_reliability(curve)
