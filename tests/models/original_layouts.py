"""The names that published files use, made from timm's by rules of their own: the way back.

Nothing here reads the tables of the package, so that a wrong one cannot agree with itself.
"""
import functools
import re
from itertools import accumulate

import timm

DECODER = {
    'head.embed.weight': 'head.decoder.embed_standart.weight',
    'head.embed.bias': 'head.decoder.embed_standart.bias',
    'head.query_embed': 'head.decoder.query_embed.weight',
    'head.group_fc.weight': 'head.decoder.duplicate_pooling',
    'head.group_fc.bias': 'head.decoder.duplicate_pooling_bias',
}
CONV_OR_NORM = {'conv': '0', 'bn': '1'}


def tresnet(tensors, v2=False):
    """InPlaceABN's layout; the oldest files have no counters."""
    def old(key):
        key = re.sub(r'^(body\.conv1)\.(conv|bn)', lambda m: f'{m[1]}.{CONV_OR_NORM[m[2]]}', key)
        key = re.sub(r'(downsample\.\d)\.(conv|bn)', lambda m: f'{m[1]}.{CONV_OR_NORM[m[2]]}', key)

        def in_block(match):
            stage, block, conv, kind = match.groups()
            basic = stage in '12' and not v2
            strided = stage != '1' and block == '0' and conv == ('1' if basic else '2')
            return f'layer{stage}.{block}.conv{conv}.{"0." * strided}{CONV_OR_NORM[kind]}'
        return re.sub(r'layer(\d)\.(\d+)\.conv(\d)\.(conv|bn)', in_block, key)
    return {old(key): tensor for key, tensor in tensors.items() if not key.endswith('num_batches_tracked')}


def bottleneck(tensors):
    """The two-layer head of ASL and CSL."""
    moved = {'head.fc.': 'head.fc.FC.', 'head.embed.': 'head.fc.embedding_generator.0.'}
    for ours, theirs in moved.items():
        tensors = {theirs + key.removeprefix(ours) if key.startswith(ours) else key: value
                   for key, value in tensors.items()}
    return tensors


def sdl(tensors):
    return {key.removeprefix('body.'): tensor for key, tensor in tensors.items()}


def ml_decoder(tensors):
    def old(key):
        if key in DECODER:
            return DECODER[key]
        key = re.sub(r'^head\.decoder\.attn', 'head.decoder.layers.0.multihead_attn', key)
        return re.sub(r'^head\.decoder\.(linear\d|norm\d)', r'head.decoder.layers.0.\1', key).removeprefix('backbone.')
    return {old(key): tensor for key, tensor in tensors.items()}


def levit(tensors, depth):
    ends = [2 * (blocks + stage) for stage, blocks in enumerate(accumulate(depth))]  # place after each stage's blocks
    starts = [0, *(end + 2 for end in ends)]

    def old(key):
        key = key.replace('.linear.', '.l.' if key.startswith('head') else '.c.')
        key = re.sub(r'^stem\.conv(\d)', lambda m: f'patch_embed.{2 * int(m[1]) - 2}', key)
        key = re.sub(r'(proj|q)\.ln\.', r'\1.1.', key)
        key = re.sub(
            r'^stages\.(\d+)\.blocks\.(\d+)\.(attn|mlp)',
            lambda m: f'blocks.{starts[int(m[1])] + 2 * int(m[2]) + (m[3] == "mlp")}.m', key)
        key = re.sub(
            r'^stages\.(\d+)\.downsample\.(attn_downsample|mlp)',
            lambda m: f'blocks.{starts[int(m[1])] - 2}' if 'attn' in m[2] else f'blocks.{starts[int(m[1])] - 1}.m', key)
        return re.sub(r'\.m\.ln([12])\.', lambda m: f'.m.{2 * int(m[1]) - 2}.', key)
    return {old(key): tensor for key, tensor in tensors.items()}


def ofa(tensors):
    stages = [1, 3, 4, 4, 4, 4]
    starts = [0, *accumulate(stages)]
    outside = {
        'conv_stem': 'first_conv.conv', 'bn1': 'first_conv.bn', 'blocks.6.0.conv': 'final_expand_layer.conv',
        'blocks.6.0.bn1': 'final_expand_layer.bn', 'conv_head': 'feature_mix_layer.conv',
        'classifier': 'classifier.linear'}
    first = {'conv_dw': 'depth_conv.conv', 'bn1': 'depth_conv.bn', 'conv_pw': 'point_linear.conv',
             'bn2': 'point_linear.bn'}
    inner = {'conv_pw': 'inverted_bottleneck.conv', 'bn1': 'inverted_bottleneck.bn', 'conv_dw': 'depth_conv.conv',
             'bn2': 'depth_conv.bn', 'conv_pwl': 'point_linear.conv', 'bn3': 'point_linear.bn',
             'se.conv_reduce': 'depth_conv.se.fc.reduce', 'se.conv_expand': 'depth_conv.se.fc.expand'}

    def old(key):
        module, kind = key.rsplit('.', 1)
        if module in outside:
            return f'{outside[module]}.{kind}'
        _, stage, index, inside = module.split('.', 3)
        place = starts[int(stage)] + int(index)
        return f'blocks.{place}.mobile_inverted_conv.{(inner if place else first)[inside]}.{kind}'
    return {old(key): tensor[:, :, None, None] if key == 'classifier.weight' else tensor
            for key, tensor in tensors.items()}


def edgenext(tensors):
    def old(key):
        key = re.sub(r'^stages\.(\d)\.downsample', r'downsample_layers.\1', key)
        key = re.sub(r'^stages\.(\d)\.blocks', r'stages.\1', key)
        key = re.sub(r'^stem', 'downsample_layers.0', key).replace('conv_dw', 'dwconv').replace('mlp.fc', 'pwconv')
        return key.replace('head.fc', 'head').replace('head.norm', 'norm')
    return {old(key): tensor for key, tensor in tensors.items()}


LEVIT_768 = dict(embed_dim=[48, 64, 80], key_dim=8, depth=[2, 3, 1], num_heads=[3, 4, 6])  # nobody knows the true sizes


def published(architecture, num_classes):
    """As `_published`, a mapping of one's own."""
    return dict(_published(architecture, num_classes))


@functools.cache
def _published(architecture, num_classes):
    """The tensors of a published file of a network, without storage, in the layout of its authors."""
    args = {'levit_384': dict(distilled=False), 'miil_levit_768': LEVIT_768}.get(architecture, {})
    tensors = timm.create_model(architecture, num_classes=num_classes, device='meta', **args).state_dict()
    if architecture.startswith('mldecoder_tresnet'):
        return tresnet(ml_decoder(tensors), v2=not architecture.endswith('_m'))
    if architecture == 'miil_sdl_tresnet_m':
        return sdl(tresnet(tensors))
    if 'tresnet' in architecture:
        tensors = tresnet(tensors, v2='v2' in architecture)
        return bottleneck(tensors) if architecture.endswith('bottleneck') else tensors
    if 'levit' in architecture:
        return levit(tensors, args.get('depth', [4, 4, 4]))
    if architecture == 'edgenext_small':
        return edgenext(tensors)
    return ofa(tensors) if architecture == 'miil_ofa_595m' else tensors
