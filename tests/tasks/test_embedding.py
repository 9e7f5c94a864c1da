"""A network in two parts: what its last layer reads, that layer, and networks that have no such parts."""
import pytest
import timm
import torch
from torch import nn

from timm_miil.tasks._embedding import embed, embed_and_classify, split_head

NAMES = ('test_resnet', 'test_vit', 'test_efficientnet', 'test_convnext', 'test_byobnet')


def small(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=3, drop_rate=0.5)


@pytest.mark.parametrize('name', NAMES)
def test_the_last_layer_on_the_embedding_is_the_model(name):
    model = small(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    model.train()
    model.get_classifier().eval()
    classifier = split_head(model)
    assert classifier is model.get_classifier() and classifier.out_features == 3
    # Nothing is left behind: modes, statistics, hooks, random numbers.
    assert not classifier.training and all(module.training for module in model.modules() if module is not classifier)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not classifier._forward_hooks and torch.equal(state, torch.random.get_rng_state())
    model.eval()
    images = torch.randn(2, 3, *model.pretrained_cfg['input_size'][1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        embedding, logits = embed_and_classify(model, images)
        assert embedding.shape == (2, classifier.in_features) and torch.equal(embedding, embed(model, images))
        assert torch.equal(logits, model(images)) and torch.equal(logits, classifier(embedding))


def twice(model):
    """Logits that are not those of the classifier; it starts at 0, so that their values do not tell."""
    nn.init.zeros_(model.fc.weight), nn.init.zeros_(model.fc.bias)
    forward = model.forward
    model.forward = lambda images: 2 * forward(images)
    return model


def shifted(model):
    """An embedding that is not what the classifier reads."""
    forward_head = model.forward_head
    model.forward_head = lambda x, pre_logits=False: forward_head(x, pre_logits) + (1.0 if pre_logits else 0.0)
    return model


@pytest.mark.parametrize(('model', 'message'), [
    (lambda: nn.Linear(2, 2), 'a timm image model with .*, got Linear without forward_features'),
    (lambda: timm.create_model('test_resnet', num_classes=0), 'must be one nn.Linear on the embedding, got Identity'),
    (lambda: timm.create_model('levit_128s', num_classes=3), 'got NormLinear and NormLinear'),
    (lambda: timm.create_model('resnetv2_50', num_classes=3), 'got Conv2d'),
    (lambda: timm.create_model('mldecoder', backbone='test_resnet', num_classes=3), 'got MLDecoder'),
    (lambda: twice(small('test_resnet')), 'the logits of ResNet must be its get_classifier.* got others'),
    (lambda: shifted(small('test_resnet')), 'the logits of ResNet must be its get_classifier.* got others'),
], ids=['no contract', 'no classes', 'two classifiers', 'convolution', 'queries', 'other logits', 'other embedding'])
def test_networks_without_such_parts(model, message):
    with pytest.raises(TypeError, match=message):
        split_head(model())


def test_a_head_that_gives_no_embedding():
    model = small('test_resnet')
    model.forward_head = lambda x: x
    with pytest.raises(TypeError, match='forward_head of ResNet must take pre_logits'):
        split_head(model)
