"""A network optimized for inference says what the network says."""
import copy

import pytest
import timm
import torch
from timm.layers import EffectiveSEModule, LayerScale, SEModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import timm_miil  # noqa: F401  registers our networks
from timm_miil._errors import PredictionError
from timm_miil._timm import SqueezeExcite
from timm_miil.inference import Tagger, optimize_for_inference

QUICK = {
    # name -> norms that are left of those in the network
    'test_resnet': 0, 'test_efficientnet': 0, 'test_byobnet': 0, 'test_vit': 0, 'test_nfnet': 0, 'test_convnext': 0,
    'mldecoder_scenes': 0, 'mobilenetv3_small_050': 0, 'ghostnet_100': 0, 'repvgg_a0': 0, 'resnet10t': 0,
}
SLOW = {
    'tresnet_m': 0, 'hardcorenas_a': 0, 'regnety_002': 0, 'levit_128s': 48, 'densenet121': 62, 'mobileone_s0': 0,
    'fastvit_t8': 0, 'ese_vovnet19b_dw': 0, 'dla34': 0, 'mixer_s32_224': 0, 'deit_tiny_patch16_224': 0,
    'resnetv2_50': 17, 'xception41': 0, 'efficientvit_b0': 0, 'mldecoder_tresnet_m': 0, 'edgenext_xx_small': 0,
}


def unsettled(name: str, **kwargs: object) -> nn.Module:
    """A network in float64 whose norms do something."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval().double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.normal_(1, 0.2)
                module.bias.normal_(0, 0.1)
    return model


def pictures(model: nn.Module, number: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(number, *timm.data.resolve_model_data_config(model)['input_size'], generator=generator).double()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


@pytest.mark.parametrize(('name', 'left'), [
    *QUICK.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())])
@torch.no_grad()
def test_every_family_says_the_same(name, left):
    model = unsettled(name)
    before = copy.deepcopy(model.state_dict())
    fast = optimize_for_inference(model)
    x = pictures(model)
    expected = model(x)
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    assert norms(fast) == left
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fast.parameters())


@torch.no_grad()
def test_layer_scale_goes_into_the_layer_before_it():
    model = unsettled('test_vit', init_values=0.1)
    scales = [module for module in model.modules() if isinstance(module, LayerScale)]
    for scale in scales:
        scale.gamma.uniform_(0.1, 2)
    fast, x = optimize_for_inference(model), pictures(model)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-12)
    assert scales and not any(isinstance(module, LayerScale) for module in fast.modules())


@torch.no_grad()
def test_the_model_is_not_changed_but_in_a_copy():
    model = timm.create_model('test_resnet').train()
    fast = optimize_for_inference(model)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert norms(model) == 15 and not fast.training
    assert not model._forward_pre_hooks


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'mldecoder_scenes'])
@torch.no_grad()
def test_low_precision_is_about_as_exact_as_autocast(name):
    model = unsettled(name)
    x = pictures(model, 8)
    expected = model(x)
    single = copy.deepcopy(model).float()
    with torch.autocast('cpu', torch.bfloat16):
        autocast = single(x.float()).double()
    fast = optimize_for_inference(single, dtype=torch.bfloat16)
    found = fast(x.float())
    assert found.dtype == torch.bfloat16
    error, limit = (float((y.double() - expected).norm() / expected.norm()) for y in (found, autocast))
    assert 0 < error <= 2 * limit + 1e-3


class Branches(nn.Module):
    """A convolution that two operations read, one norm after two convolutions, and one that may be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm_of_twice = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.first, self.second, self.shared = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.last, self.norm_of_last = nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2, affine=False)
        self.unsure, self.without_statistics = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)

    def forward(self, x):
        y = self.twice(x)
        y = self.norm_of_twice(y) + y.abs()
        y = self.shared(self.first(y)) + self.shared(self.second(y))
        y = self.norm_of_last(self.last(y))
        return self.without_statistics(self.unsure(y))


@torch.no_grad()
def test_only_what_nothing_else_reads_is_folded():
    model = Branches().eval().double()
    for module in (model.norm_of_twice, model.shared, model.norm_of_last):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    x = torch.rand(2, 3, 6, 6).double()
    fast = optimize_for_inference(model, example_input=x)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-12)
    left = {name for name, module in fast.named_modules() if isinstance(module, _BatchNorm)}
    assert left == {'norm_of_twice', 'shared', 'without_statistics'}


@torch.no_grad()
def test_weights_that_are_tied_or_made_at_each_call_keep_their_norms():
    tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    tied[2].weight = tied[0].weight
    normed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)).eval()
    old_way = nn.Sequential(torch.nn.utils.spectral_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)).eval()
    hooked = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    hooked[0].register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.rand(1, 3, 4, 4)
    for model in (tied, normed, old_way, hooked):
        fast = optimize_for_inference(model, example_input=x)
        assert norms(fast) == norms(model)
        torch.testing.assert_close(fast(x), model(x))


class Squeezes(nn.Module):
    """Squeeze-and-excitations of which the first reads the picture, others what is read again, and two nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.of_picture, self.of_shortcut = SEModule(8), EffectiveSEModule(8)
        self.conv, self.alone, self.twice, self.last = nn.Conv2d(8, 8, 3), SEModule(8), SEModule(8), SqueezeExcite(8)
        self.with_maximum = SEModule(8, add_maxpool=True)

    def forward(self, x):
        x = self.alone(self.conv(self.of_picture(x)))
        x = x + self.of_shortcut(x)
        return self.last(self.with_maximum(self.twice(self.twice(x))))


@torch.no_grad()
def test_excitation_is_in_place_where_nothing_else_reads_its_input():
    model, x = Squeezes().eval().double(), torch.rand(2, 8, 6, 6).double()
    before, expected = x.clone(), model(x)
    fast = optimize_for_inference(model, example_input=x)
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(x, before)
    replaced = {name for name, module in model.named_children() if type(module) is not type(fast.get_submodule(name))}
    assert replaced == {'alone', 'last'}


class TwoReaders(nn.Module):
    """Two squeeze-and-excitations of one map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.first, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), SEModule(8), SEModule(8)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return {'sum': [self.first(x) + self.last(x)], 'words': 'as they are'}


@torch.no_grad()
def test_the_last_reader_of_a_map_may_change_it_and_outputs_may_be_in_containers():
    model, x = TwoReaders().eval().double(), torch.rand(2, 3, 6, 6).double()
    fast = optimize_for_inference(model, example_input=x)
    torch.testing.assert_close(fast(x)['sum'][0], model(x)['sum'][0], rtol=0, atol=1e-12)
    assert fast(x)['words'] == 'as they are' and norms(fast) == 0
    assert type(fast.first) is SEModule and type(fast.last) is not SEModule


@torch.no_grad()
def test_one_norm_that_must_stay_does_not_keep_the_others():
    model = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))), Tampering())
    model[3].register_forward_hook(lambda module, inputs, output: output + 1)
    seen = []
    model[5].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model, x = model.eval(), torch.rand(1, 3, 4, 4)
    fast = optimize_for_inference(model, example_input=x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    assert [name for name, module in fast.named_modules() if isinstance(module, _BatchNorm)] == ['3', '5', '10.norm']
    seen.clear()
    fast(x)
    assert len(seen) == 1


@torch.no_grad()
def test_what_else_a_network_returns_is_the_same():
    model = unsettled('ghostnet_100', features_only=True)
    fast, x = optimize_for_inference(model, example_input=torch.rand(1, 3, 64, 64).double()), torch.rand(1, 3, 64, 64)
    for found, expected in zip(fast(x), model(x.double()), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    assert 0 < norms(fast) < 3


@torch.no_grad()
def test_what_a_network_keeps_is_not_written_to():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.cached = nn.Parameter(torch.rand(1, 8, 4, 4)), []
            self.se, self.again, self.once = SEModule(8), SEModule(8), SEModule(8)

        def forward(self, x):
            if not self.cached:
                self.cached += [x * 2, x * 3]
            mine, twice = self.se(self.map), self.again(x=self.cached[0]) + self.again(self.cached[0])
            return x + mine + twice + self.once(self.cached[1])

    model, x = Cached().eval(), torch.rand(1, 8, 4, 4)
    fast = optimize_for_inference(model, example_input=x)
    for _ in range(3):
        torch.testing.assert_close(fast(x), model(x))


@torch.no_grad()
def test_flat_and_deep_convolutions_in_one_network():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.deep, self.norm = nn.Conv2d(3, 4, 1), nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)

        def forward(self, x):
            return self.norm(self.deep(self.flat(input=x).unsqueeze(1)))

    model, x = Both().eval(), torch.rand(2, 3, 4, 4)
    fast = optimize_for_inference(model, example_input=x)
    torch.testing.assert_close(fast(x), model(x))
    assert norms(fast) == 0 and fast.flat.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_value_that_a_dtype_cannot_hold_is_told():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))
    model[1].running_var.fill_(1e5)
    with pytest.raises(ValueError, match='float16 cannot hold the values of 1.running_var; take bfloat16'):
        optimize_for_inference(model, dtype=torch.float16, example_input=torch.rand(1, 3, 4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['highest', 'high'])
def test_tf32_is_off_while_outputs_are_compared_and_as_it_was_after(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        model = timm.create_model('mobilenetv3_small_050').eval().cuda()
        assert norms(optimize_for_inference(model)) == 0
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def test_the_size_that_a_network_was_made_for_is_the_one_that_is_tried():
    model = timm.create_model('test_vit', img_size=64).eval()
    assert optimize_for_inference(model)(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


class Tampering(nn.Module):
    """Reads its norm, so that it cannot be taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.norm.weight[0]


@torch.no_grad()
def test_a_network_that_needs_its_norms_keeps_them():
    model, x = Tampering().eval(), torch.rand(1, 3, 4, 4)
    fast = optimize_for_inference(model, example_input=x)
    assert norms(fast) == 1
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)  # channels_last may sum in another order


@torch.no_grad()
def test_another_size_of_pictures():
    model = unsettled('test_efficientnet')
    fast = optimize_for_inference(model, example_input=torch.rand(1, 3, 32, 32).double())  # its last map has one pixel
    x = torch.rand(2, 3, 96, 64).double()
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-10)


@torch.no_grad()
def test_it_can_be_exported():
    model = timm.create_model('test_efficientnet').eval()
    fast = optimize_for_inference(model, dtype=torch.bfloat16)
    x = pictures(model, 1).float()
    exported = torch.export.export(fast, (x,)).module()
    assert torch.equal(exported(x), fast(x))


@pytest.mark.slow
@torch.no_grad()
def test_it_can_be_compiled():
    model = timm.create_model('test_efficientnet').eval()
    fast = optimize_for_inference(model)
    x = pictures(model).float()
    torch.testing.assert_close(torch.compile(fast, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)
    assert norms(optimize_for_inference(torch.compile(model))) == 0


def test_a_tagger_takes_it():
    model = timm.create_model('mldecoder_scenes', pretrained=True)
    picture = torch.rand(3, 64, 64)
    plain, fast = (Tagger(each, threshold=0.0).tag(picture) for each in (model, optimize_for_inference(model)))
    assert [tag.label for tag in fast] == [tag.label for tag in plain]
    assert [tag.confidence for tag in fast] == pytest.approx([tag.confidence for tag in plain], abs=1e-5)


def test_bad_input():
    with pytest.raises(TypeError, match='must be a torch module, got str'):
        optimize_for_inference('resnet18')
    with pytest.raises(ValueError, match='dtype must be one of'):
        optimize_for_inference(timm.create_model('test_resnet'), dtype=torch.int8)
    with pytest.raises(ValueError, match='example_input must be given for Linear'):
        optimize_for_inference(nn.Linear(2, 2))
    with pytest.raises(PredictionError, match=r'does not run on an input of shape \(1, 5\)'):
        optimize_for_inference(nn.Linear(2, 2), example_input=torch.rand(1, 5))
