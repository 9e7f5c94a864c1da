"""One model of each of timm's families carries the head: the smallest, with four input channels where it takes them.

Forward and backward run on the CPU, at 32 pixels where the family can; the largest run on the meta device. All
architectures are asked by benchmarks/families.py.
"""
from functools import partial

import pytest
import timm
import torch
from timm.models import get_model_input_config, get_pretrained_cfg, list_models, list_modules, model_entrypoint

from timm_miil.heads import MLDecoder, attach_head

SMALL_HEAD = partial(MLDecoder, embed_dim=16, num_heads=2, feedforward_dim=16)
NUM_CLASSES = 5
FAMILIES = [
    module for module in list_modules()
    if any(model_entrypoint(name).__module__.startswith('timm.') for name in list_models(module=module))]
SMALLEST = {  # by number of parameters, without the classifier
    'beit': 'beit_base_patch16_224', 'byoanet': 'halonet_h1', 'byobnet': 'test_byobnet', 'cait': 'cait_xxs24_224',
    'coat': 'coat_tiny', 'convit': 'convit_tiny', 'convmixer': 'convmixer_768_32', 'convnext': 'test_convnext',
    'cpubone': 'cpubone_nano', 'crossvit': 'crossvit_tiny_240', 'csatv2': 'csatv2', 'cspnet': 'cs3darknet_focus_s',
    'cspnext': 'cspnext_tiny', 'davit': 'davit_tiny', 'deepseek_vit': 'deepseek_vit_412m',
    'deit': 'deit_tiny_patch16_224', 'densenet': 'densenet121', 'dla': 'dla46x_c', 'dpn': 'dpn48b',
    'edgenext': 'edgenext_xx_small', 'efficientformer': 'efficientformer_l1',
    'efficientformer_v2': 'efficientformerv2_s0', 'efficientnet': 'test_efficientnet',
    'efficientvim': 'efficientvim_m1', 'efficientvit_mit': 'efficientvit_b0', 'efficientvit_msra': 'efficientvit_m0',
    'eva': 'vit_tiny_patch16_dinov3_qkvb', 'fasternet': 'fasternet_t0', 'fastvit': 'fastvit_t8',
    'focalnet': 'focalnet_tiny_srf', 'gcvit': 'gcvit_xxtiny', 'gemma4_vit': 'gemma4_vit_167m',
    'ghostnet': 'ghostnet_050', 'hardcorenas': 'hardcorenas_b', 'hgnet': 'hgnetv2_b0', 'hiera': 'hiera_tiny_224',
    'hieradet_sam2': 'sam2_hiera_tiny', 'hrnet': 'hrnet_w18_small', 'iformer': 'iformer_t',
    'inception_next': 'inception_next_atto', 'inception_resnet_v2': 'inception_resnet_v2',
    'inception_v3': 'inception_v3', 'inception_v4': 'inception_v4', 'lcnetv2': 'lcnetv2_small', 'levit': 'levit_128s',
    'lowformer': 'lowformer_b0', 'mambaout': 'test_mambaout', 'maxxvit': 'test_coatnet',
    'metaformer': 'poolformerv2_s12', 'mlp_mixer': 'gmlp_ti16_224', 'mobilenetv3': 'lcnet_035',
    'mobilenetv5': 'mobilenetv5_300m', 'mobilevit': 'mobilevit_xxs', 'mvitv2': 'mvitv2_tiny',
    'naflexvit': 'naflexvit_base_patch16_parfac_gap', 'nasnet': 'nasnetalarge', 'nest': 'nest_tiny',
    'nextvit': 'nextvit_small', 'nfnet': 'test_nfnet', 'pit': 'pit_ti_224', 'pnasnet': 'pnasnet5large',
    'pvt_v2': 'pvt_v2_b0', 'qwen3_vit': 'qwen3_vit_88m', 'rdnet': 'rdnet_tiny', 'regnet': 'regnetx_002',
    'repghost': 'repghostnet_050', 'repvit': 'repvit_m1', 'res2net': 'res2next50', 'resnest': 'resnest14d',
    'resnet': 'test_resnet', 'resnetv2': 'resnetv2_18', 'rexnet': 'rexnet_100', 'selecsls': 'selecsls42',
    'senet': 'legacy_seresnet18', 'sequencer': 'sequencer2d_s', 'shvit': 'shvit_s1', 'sknet': 'skresnet18',
    'starnet': 'starnet_s050', 'swiftformer': 'swiftformer_xs', 'swin_transformer': 'swin_tiny_patch4_window7_224',
    'swin_transformer_v2': 'swinv2_tiny_window16_256', 'swin_transformer_v2_cr': 'swinv2_cr_tiny_224',
    'tiny_vit': 'tiny_vit_5m_224', 'tnt': 'tnt_s_legacy_patch16_224', 'tresnet': 'tresnet_m',
    'twins': 'twins_svt_small', 'vgg': 'vgg11', 'visformer': 'visformer_tiny', 'vision_transformer': 'test_vit',
    'vision_transformer_hybrid': 'vit_tiny_r_s16_p8_224', 'vision_transformer_relpos': 'test_vit_relpos',
    'vision_transformer_sam': 'samvit_base_patch16_224', 'vitamin': 'vitamin_small_224', 'volo': 'volo_d1_224',
    'vovnet': 'ese_vovnet19b_slim_dw', 'xception': 'legacy_xception', 'xception_aligned': 'xception41p',
    'xcit': 'xcit_nano_12_p8_224',
}
SIDE = 32
OTHER_SIDES = {'crossvit': 240, 'csatv2': 64, 'efficientformer': 224, 'inception_v3': 96, 'maxxvit': 160}
ON_META = {
    'beit', 'byoanet', 'deepseek_vit', 'gemma4_vit', 'inception_resnet_v2', 'inception_v4', 'mobilenetv5', 'naflexvit',
    'nasnet', 'nextvit', 'pnasnet', 'qwen3_vit', 'vgg', 'vision_transformer_sam'}
# Half a second or less each, of every layout: these by default, all families slow.
FAST = {
    'convnext', 'cpubone', 'cspnet', 'cspnext', 'deit', 'dla', 'edgenext', 'efficientnet', 'efficientvit_mit',
    'fasternet', 'hgnet', 'inception_next', 'lcnetv2', 'levit', 'mambaout', 'maxxvit', 'mobilenetv3', 'nfnet', 'pit',
    'pvt_v2', 'regnet', 'resnest', 'resnet', 'resnetv2', 'senet', 'sknet', 'starnet', 'swiftformer', 'vgg',
    'visformer', 'vision_transformer', 'vision_transformer_hybrid', 'vision_transformer_relpos', 'vovnet'}
ARGS = {'csatv2': {'in_chans': 3}, 'sequencer': {'layers': (1, 1, 1, 1)}}  # a DCT of colours; slow to initialise


def smallest(family):
    """Architecture and device; a family that is not in the table is looked through."""
    def size(name):
        return sum(parameter.numel() for parameter in timm.create_model(name, device='meta').parameters())

    known = SMALLEST.get(family)
    return known or min(list_models(module=family), key=size), 'cpu' if known and family not in ON_META else 'meta'


@pytest.mark.parametrize(
    'family', [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES])
def test_the_smallest_of_each_family_carries_the_head(family):
    torch.manual_seed(0)
    name, device = smallest(family)
    args = {'in_chans': 4, 'device': device, **ARGS.get(family, {})}
    side = OTHER_SIDES.get(family, SIDE)
    if device == 'cpu' and get_pretrained_cfg(name).fixed_input_size and family not in OTHER_SIDES:
        args['img_size'] = side
    model = attach_head(timm.create_model(name, **args), NUM_CLASSES, SMALL_HEAD).train()
    chans, *size = get_model_input_config(model.backbone)['input_size']
    assert chans == args['in_chans'] == model.in_chans
    images = torch.rand(2, chans, *(size if device == 'meta' else (side, side)), device=device, requires_grad=True)

    features = model.forward_features(images)
    assert model.head_input(features).shape[1 if model.layout in ('NCHW', 'NHWC') else 2] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    logits = model.forward_head(features)
    assert logits.shape == (2, NUM_CLASSES)
    logits.square().sum().backward()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert [key for key, parameter in trained.items() if parameter.grad is None] == []
    assert {f'head.{key}' for key, _ in model.head.named_parameters()} <= trained.keys()
    if device == 'cpu':
        assert images.grad.any()
        model.eval()
        with torch.no_grad():
            together, alone = model(images), torch.cat([model(image[None]) for image in images])
        assert together.isfinite().all()
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
