"""Any listed head on any backbone, saved and loaded by timm."""
import pytest
import timm
import torch

from timm_miil._errors import CheckpointError
from timm_miil.heads import CSRA, GAPHead, MLDecoder, Query2Label, list_heads

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
ARGS = {
    'csra': dict(num_heads=4, residual_weight=0.3),
    'gap': dict(drop_rate=0.25),
    'ml_decoder': dict(num_groups=3, embed_dim=16, num_heads=2, feedforward_dim=24, shared_query_dropout=True),
    'query2label': dict(embed_dim=16, feedforward_dim=24, num_decoder_layers=1),
}
# What depends on the classes, by the names in a file.
OF_CLASSES = {
    'csra': {'head.fc.weight'},
    'gap': {'head.fc.weight', 'head.fc.bias'},
    'ml_decoder': {'head.group_fc.weight', 'head.group_fc.bias'},
    'query2label': {'head.query_embed', 'head.fc.weight', 'head.fc.bias'},
}


def build(head, **kwargs):
    torch.manual_seed(0)
    return timm.create_model('multilabel_classifier', **{
        'backbone': 'test_resnet', 'head': head, 'head_args': ARGS[head], 'num_classes': 7, **kwargs}).eval()


def save(model, path):
    timm.models.save_for_hf(model, path, safe_serialization=True)
    return f'local-dir:{path}'


@pytest.mark.parametrize('head', list_heads())
def test_a_saved_folder_gives_the_same_logits(head, tmp_path):
    model = build(head)
    source = save(model, tmp_path)
    torch.manual_seed(1)
    again = timm.create_model(source, pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    assert again.pretrained_cfg['classifier'] == model.classifier_key
    assert f'{model.classifier_key}.weight' in model.state_dict()
    model.reset_classifier(9)
    again = timm.create_model(save(model, tmp_path), pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    assert again(IMAGES).shape == (2, 9)


@pytest.mark.parametrize('head', list_heads())
def test_other_classes_keep_what_does_not_depend_on_them(head, tmp_path):
    model = build(head)
    source = save(model, tmp_path)
    torch.manual_seed(1)
    other = timm.create_model(source, pretrained=True, num_classes=8)
    own, loaded = model.state_dict(), other.state_dict()
    assert {key for key in own if not torch.equal(own[key], loaded[key])} == OF_CLASSES[head]
    bare = timm.create_model(source, pretrained=True, num_classes=0).eval()
    assert bare(IMAGES).shape == (2, model.num_features)


def test_settings_arrive():
    heads = {name: build(name).head for name in list_heads()}
    assert isinstance(heads['csra'], CSRA) and heads['csra'].residual_weight == 0.3
    assert isinstance(heads['gap'], GAPHead) and heads['gap'].drop_rate == 0.25
    assert isinstance(heads['ml_decoder'], MLDecoder) and heads['ml_decoder'].decoder.shared_query_dropout
    assert isinstance(heads['query2label'], Query2Label) and len(heads['query2label'].decoder) == 1
    assert build('csra', drop_rate=0.5).head.drop_rate == 0.5
    assert build('gap', drop_rate=0.5).head.drop_rate == 0.25
    decoder = timm.create_model('mldecoder', backbone='test_resnet', shared_query_dropout=True).head.decoder
    assert decoder.shared_query_dropout


def test_it_is_the_mldecoder_entry_point_for_that_head():
    one = build('ml_decoder')
    two = timm.create_model('mldecoder', backbone='test_resnet', num_classes=7, **ARGS['ml_decoder']).eval()
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(IMAGES), two(IMAGES))
    assert one.pretrained_cfg['classifier'] == two.pretrained_cfg['classifier'] == 'head.group_fc'


def test_checkpoints_of_another_head_or_size_are_refused(tmp_path):
    source = save(build('csra'), tmp_path)
    with pytest.raises(CheckpointError, match='1 missing: head.fc.bias.*another shape: head.fc.weight is'):
        timm.create_model(source, pretrained=True, head='gap', head_args={})
    with pytest.raises(CheckpointError, match='another shape: head.fc.weight'):
        timm.create_model(source, pretrained=True, head_args=dict(num_heads=2))


def test_wrong_settings():
    with pytest.raises(ValueError, match="head must be one of 'csra', 'gap', 'ml_decoder', 'query2label', got 'crsa'"):
        timm.create_model('multilabel_classifier', backbone='test_resnet', head='crsa')
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        build('csra', head_args=dict(heads=2))
    with pytest.raises(ValueError, match="backbone must be the name of a registered timm model, got 'resnet_18'"):
        build('gap', backbone='resnet_18')
