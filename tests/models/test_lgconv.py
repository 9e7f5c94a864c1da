"""Convolutions with a global branch: the equation, the same network at first, and a folder that loads again."""
import copy

import pytest
import timm
import torch
from torch import nn

from timm_miil.models import LocalGlobalConv, convert_to_lgconv


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(module, seed=1):
    """The module in float64 with all weights drawn, so that no branch is 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in module.double().parameters():
            nn.init.normal_(parameter, std=0.4)
    return module


@pytest.mark.parametrize('stride', [1, 2])
def test_the_branch_is_the_equation(stride):
    layer = drawn(LocalGlobalConv(nn.Conv2d(8, 5, 3, stride=stride, padding=1), num_heads=4, reduction=4)).eval()
    x = images(2, 8, 5, 6)
    got = layer(x)
    for picture in range(2):
        at = x[picture].flatten(1).T  # (positions, 8)
        hidden = (at @ layer.reduce.weight.flatten(1).T + layer.reduce.bias).clamp(min=0)
        both = torch.cat([hidden, hidden.mean(0).expand_as(hidden)], 1)
        value = at @ layer.value.weight.flatten(1).T + layer.value.bias
        context = torch.zeros_like(at)
        for head in range(4):
            scores = both @ layer.attention.weight.flatten(1)[head] + layer.attention.bias[head]
            share = scores.exp() / scores.exp().sum()
            gate = 1 / (1 + (-(both @ layer.gate.weight.flatten(1)[head] + layer.gate.bias[head])).exp())
            columns = slice(2 * head, 2 * head + 2)
            context[:, columns] = gate[:, None] * (share @ value[:, columns])
        out = (at + context) @ layer.proj.weight.flatten(1).T + layer.proj.bias
        out = out / (1 + layer.norm.eps) ** 0.5 * layer.norm.weight + layer.norm.bias
        out = out.T.unflatten(1, (5, 6))[:, ::stride, ::stride]
        torch.testing.assert_close(got[picture], layer.conv(x)[picture] + out)


@pytest.mark.parametrize('name', ['test_resnet', 'resnet10t'])
def test_a_converted_network_is_what_it_was_and_learns_with_its_branches(name):
    model = timm.create_model(name, num_classes=3).train()
    plain, x = copy.deepcopy(model), images(2, 3, 32, 32).float()
    count = convert_to_lgconv(model)
    layers = [layer for layer in model.modules() if isinstance(layer, LocalGlobalConv)]
    left = [layer for layer in model.modules() if type(layer) is nn.Conv2d and layer.kernel_size == (3, 3)]
    assert count == len(layers) > 1 and len(left) == count + sum(layer.in_channels % 8 != 0 for layer in left)
    for mode in (False, True):
        assert torch.equal(model.train(mode)(x), plain.train(mode)(x))
    before = layers[0].value.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the scale of the norm learns first, then what is behind it
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(layers[0].value.weight, before) and not torch.equal(model(x), plain(x))


def test_a_saved_folder_gives_the_same_logits(tmp_path):
    args = {'backbone': 'test_resnet', 'head': 'gap', 'num_classes': 4}
    torch.manual_seed(0)
    model = timm.create_model('multilabel_classifier', lgconv=True, **args).eval()
    for layer in model.modules():
        if isinstance(layer, LocalGlobalConv):
            nn.init.ones_(layer.norm.weight)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images(2, 3, 64, 64).float()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert not any(isinstance(layer, LocalGlobalConv) for layer in timm.create_model(
        'multilabel_classifier', **args).modules())


@pytest.mark.parametrize('conv', [
    nn.Conv2d(16, 8, 1), nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(16, 8, 3), nn.Conv2d(16, 8, 3, padding='same')])
def test_another_convolution_is_refused(conv):
    with pytest.raises(ValueError, match=r'conv must be a plain 3x3 convolution .* multiple of 8 heads, got Conv2d'):
        LocalGlobalConv(conv)


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match='ConvNeXt has no 3x3 convolution that could be converted; take a convolu'):
        convert_to_lgconv(timm.create_model('test_convnext'))
    with pytest.raises(ValueError, match='num_heads must be at least 1, got 0'):
        convert_to_lgconv(nn.Identity(), num_heads=0)
    with pytest.raises(ValueError, match='reduction must be at least 1, got 0'):
        LocalGlobalConv(nn.Conv2d(8, 8, 3, padding=1), reduction=0)
