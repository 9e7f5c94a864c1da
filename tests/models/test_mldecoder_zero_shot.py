"""Zero-shot networks: the label set by name or by embeddings, in timm's records and through real folders."""
import json
import subprocess
import sys

import pytest
import timm
import torch

import timm_miil
from timm_miil._errors import CheckpointError
from timm_miil.heads import embed_characters
from timm_miil.hub import CardFacts, render_card, save_model_folder

LABELS = ['red 7', 'blue 3', 'digit 7']
OTHERS = ['green 1', 'digit 3', 'Ünicorn', 'a "bird"']
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def build(**kwargs):
    torch.manual_seed(0)
    sizes = dict(text_dim=20, embed_dim=16, num_heads=2, feedforward_dim=24)
    return timm.create_model('mldecoder_zero_shot', **{'backbone': 'test_resnet', **sizes, **kwargs}).eval()


def save(model, path):
    timm.models.save_for_hf(model, path, safe_serialization=True)
    return f'local-dir:{path}'


def load(source, **kwargs):
    return timm.create_model(source, pretrained=True, **kwargs).eval()


@torch.no_grad()
def logits(model):
    return model(IMAGES)


def test_labels_are_the_embeddings_of_their_characters():
    by_name, by_vector = build(labels=LABELS), build()
    by_vector.set_queries(embed_characters(LABELS, 20))
    assert torch.equal(logits(by_name), logits(by_vector))
    assert logits(by_name).shape == (2, 3)
    assert by_name.num_classes == by_vector.num_classes == 3
    assert by_name.labels == tuple(LABELS) and by_vector.labels is None
    assert by_name.pretrained_cfg['label_names'] == tuple(LABELS) and by_vector.pretrained_cfg['label_names'] is None
    assert by_name.pretrained_cfg['num_classes'] == by_vector.pretrained_cfg['num_classes'] == 3
    assert build(labels=tuple(LABELS), num_classes=3).labels == tuple(LABELS)


def test_labels_change_in_place_and_each_logit_is_its_labels():
    model = build(labels=LABELS)
    before = logits(model)
    model.set_labels([*OTHERS, LABELS[1]])
    assert logits(model).shape == (2, 5) == (2, model.num_classes)
    torch.testing.assert_close(logits(model)[:, 4], before[:, 1], rtol=1e-5, atol=1e-6)
    assert model.pretrained_cfg is model.default_cfg
    assert model.pretrained_cfg['label_names'] == (*OTHERS, LABELS[1])


def test_names_that_are_embedded_alike_are_told(caplog):
    model = build(labels=LABELS)
    assert caplog.messages == []
    model.set_labels([*LABELS, '7 Red'])
    assert model.num_classes == 4 and "equal scores: 'red 7' and '7 Red'; leave out or rename" in caplog.text
    with torch.device('meta'):
        assert build(labels=[*LABELS, '7 Red']).num_classes == 4  # there are no values to compare


def test_without_a_label_set_it_says_what_is_missing():
    model = build()
    assert model.num_classes == 0 == model.pretrained_cfg['num_classes']
    with pytest.raises(RuntimeError, match='no label set yet; call set_queries'):
        model(IMAGES)
    assert model.forward_head(model.forward_features(IMAGES), pre_logits=True).shape == (2, model.num_features)


@pytest.mark.parametrize('change', ['none', 'labels', 'queries', 'no set', 'no head'])
def test_a_saved_folder_gives_the_same_logits(change, tmp_path):
    model = build(labels=None if change == 'no set' else LABELS)
    if change == 'labels':
        model.set_labels(OTHERS)
    elif change == 'queries':
        model.set_queries(embed_characters(OTHERS, 20))
    elif change == 'no head':
        model.reset_classifier(0)
    again = load(save(model, tmp_path))
    assert type(again) is type(model) and again.labels == model.labels
    if change in ('queries', 'no set'):  # embeddings are the caller's, the weights of the head are not
        with pytest.raises(RuntimeError, match='no label set yet'):
            again(IMAGES)
        for each in (model, again):
            each.set_queries(embed_characters(LABELS, 20))
    assert torch.equal(logits(again), logits(model))
    assert again.num_classes == model.num_classes == again.pretrained_cfg['num_classes']


def test_a_saved_folder_takes_other_labels_at_loading_and_loses_its_head_for_features(tmp_path):
    model = build(labels=LABELS)
    source = save(model, tmp_path)
    other, features = load(source, labels=OTHERS), load(source, num_classes=0)
    model.set_labels(OTHERS)
    assert torch.equal(logits(other), logits(model))
    model.reset_classifier(0)
    assert torch.equal(logits(features), logits(model)) and logits(features).shape == (2, model.num_features)
    model.set_queries(torch.ones(2, 20))
    assert logits(load(save(model, tmp_path), num_classes=0)).shape == (2, model.num_features)


@pytest.mark.slow
def test_a_folder_with_a_card_works_in_another_process(tmp_path):
    model = build(labels=LABELS)
    model.set_labels(OTHERS)
    card = render_card(CardFacts(
        name='mldecoder_zero_shot.test', summary='A test.', source='local-dir:model', licence='apache-2.0',
        architecture='mldecoder_zero_shot', num_params=10, input_size=(3, 64, 64), dataset='None such',
        dataset_id='none', label_names=OTHERS, metrics=[], training='Not trained.', papers=['mldecoder']))
    folder = save_model_folder(model, tmp_path / 'model', label_names=OTHERS, card=card)
    assert json.loads((folder / 'config.json').read_text())['model_args']['labels'] == OTHERS
    torch.save((IMAGES, logits(model)), tmp_path / 'want.pt')
    code = (
        'import timm, timm_miil, torch\n'
        f'images, want = torch.load({str(tmp_path / "want.pt")!r})\n'
        f'model = timm.create_model({f"local-dir:{folder}"!r}, pretrained=True).eval()\n'
        f'assert model.labels == model.pretrained_cfg["label_names"] == tuple({OTHERS!r})\n'
        'torch.testing.assert_close(model(images), want, rtol=1e-5, atol=1e-6)\n')
    subprocess.run([sys.executable, '-c', code], check=True)


def test_ten_thousand_labels_travel_in_the_folder(tmp_path):
    labels = [f'label {i}' for i in range(10_000)]
    again = load(save(build(labels=labels), tmp_path))
    assert again.labels == tuple(labels)
    assert logits(again).shape == (2, 10_000)


def test_another_number_of_classes_is_refused_and_zero_removes_the_head():
    model = build(labels=LABELS)
    head = model.get_classifier()
    with pytest.raises(ValueError, match='takes labels, not a number of classes, got num_classes=7; call set_labels'):
        model.reset_classifier(7)
    model.reset_classifier(3, '')
    assert model.get_classifier() is head and model.global_pool == ''
    with pytest.raises(ValueError, match="global_pool must be one of 'avg', '', got 'max'"):
        model.reset_classifier(3, 'max')
    model.reset_classifier(0)
    assert model.labels is None and logits(model).ndim == 4
    with pytest.raises(TypeError, match='embeddings must be a tensor, got list'):
        model.set_queries([0.0] * 20)
    assert not model.has_head
    model.set_labels(OTHERS)
    assert model.get_classifier() is not head and logits(model).shape == (2, 4)


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(num_classes=7), ValueError, 'num_classes=7 names no labels; pass labels='),
    (dict(num_classes=7, labels=LABELS), ValueError, 'num_classes=7 contradicts the 3 labels; leave num_classes out'),
    (dict(labels='red 7'), TypeError, "labels must be a list of names, got str 'red 7'"),
    (dict(labels=torch.zeros(2)), TypeError, 'labels must be a list of names, got Tensor'),
    (dict(labels=['red 7', 'red 7']), ValueError, 'got 1 different names among 2'),
    (dict(labels=[7]), TypeError, 'label'),
    (dict(backbone='resnet_18'), ValueError, "backbone must be the name of a registered timm model, got 'resnet_18'"),
    (dict(text_dim=0), ValueError, 'text_dim must be at least 1, got 0'),
])
def test_wrong_settings(kwargs, error, message):
    with pytest.raises(error, match=message):
        build(**kwargs)


def test_wrong_label_sets_change_nothing():
    model = build(labels=LABELS)
    before = logits(model)
    with pytest.raises(ValueError, match='labels must be one or more different names, got 0'):
        model.set_labels([])
    with pytest.raises(ValueError, match=r'embeddings must have shape \(K, 20\)'):
        model.set_queries(torch.zeros(3, 19))
    assert torch.equal(logits(model), before) and model.labels == tuple(LABELS)


def test_checkpoints_load_whole_or_not_at_all(tmp_path):
    source = save(build(labels=LABELS), tmp_path)
    with pytest.raises(CheckpointError, match='another shape: head.word_embed.weight'):
        load(source, text_dim=21)
    with pytest.raises(CheckpointError, match='missing'):
        load(source, backbone='resnet18')


def test_other_input_channels_and_no_labels_in_the_weights(tmp_path):
    model = build(labels=LABELS)
    grey = load(save(model, tmp_path), in_chans=1)
    weight = model.get_parameter(model.pretrained_cfg['first_conv'][0] + '.weight')
    torch.testing.assert_close(
        grey.get_parameter(model.pretrained_cfg['first_conv'][0] + '.weight'), weight.sum(1, keepdim=True))
    assert not any(tensor.shape[:1] == (3,) for key, tensor in model.state_dict().items() if key.startswith('head.'))


def test_settings_of_the_head_arrive():
    model = build(labels=LABELS, num_random_queries=2, query_noise=0.1, decoder_drop_rate=0.2).train()
    assert model.head.query_noise == 0.1 and model.head.decoder.drop_rate == 0.2
    assert model(IMAGES).shape == (2, 5)


def test_the_scenes_network_is_that_of_mldecoder_scenes():
    ours, theirs = timm.create_model('mldecoder_zero_shot_scenes', labels=LABELS), timm.create_model('mldecoder_scenes')
    shapes = [{key: tensor.shape for key, tensor in model.backbone.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours(IMAGES).shape == (2, 3)
    assert timm_miil.models.ZeroShotClassifier is type(ours)
