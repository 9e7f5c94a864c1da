"""Which network the tensors of a published file are of: one function a family, by key names and shapes."""
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from timm.models import create_model, edgenext, get_pretrained_cfg, is_model
from torch import Tensor, nn

from timm_miil._errors import CheckpointError
from timm_miil.models import miil_levit, miil_mobilenet
from timm_miil.models._fit import COUNTER, class_count, fill_counters
from timm_miil.models._loading import check_fit

__all__ = ['Found', 'identify']

SHOWN_KEYS = 3


class Found(NamedTuple):
    """A network: timm's name, further arguments, classes."""

    architecture: str
    model_args: Mapping[str, Any]
    num_classes: int


def identify(tensors: Mapping[str, Tensor], architecture: str | None) -> Found:
    """Which network the tensors are of.

    Raises:
        CheckpointError: If it is none of ours, or one that timm cannot hold.
    """
    _refuse_what_timm_cannot_hold(tensors)
    if any(key.startswith('backbone.') for key in tensors):
        return _own(tensors, architecture)
    tensors = miil_levit.to_timm_names(miil_mobilenet.to_timm_names(tensors))
    for markers, family in FAMILIES:
        if any(marker in tensors for marker in markers):
            return family(tensors, architecture)
    if architecture is not None and is_model(architecture):
        return _first_that_fits(tensors, [architecture])
    raise CheckpointError(
        f'the file is of no network that is known here: {_words(tensors)}. Known are the published networks of the '
        f'MIIL family in their original layout or timm\'s; of any other network of timm\'s, name the architecture.')


# ---- networks that are not for timm

SUPERNET = re.compile(r'blocks\.\d+\.\d+\.(conv_dw|bn2|bn3|se)\.\d+\.')
REFUSED = (
    ('aggregate.', 'patch_embed.', 'STAM, a network for video clips'),
    ('aggregate.', 'body.', 'PETA, a network for albums of pictures'),
    ('tf.', 'down.', 'EAT, a network for sound'),
)


def _refuse_what_timm_cannot_hold(tensors: Mapping[str, Tensor]) -> None:
    options = [key for key in tensors if SUPERNET.match(key)]
    if options:
        raise CheckpointError(
            f'the file is a search supernet, {len(options)} of its {len(tensors)} tensors are of one option of a block '
            f'each, such as {options[0]!r}; timm holds none. Take the file of one searched network, such as '
            f'hardcorenas_a.miil_red_in1k.')
    for first, second, what in REFUSED:
        if all(any(key.startswith(prefix) for key in tensors) for prefix in (first, second)):
            raise CheckpointError(
                f'the file is of {what}, not of one for single pictures: {_words(tensors)}. timm\'s contract has no '
                f'such input, so it cannot be converted.')


def _words(tensors: Iterable[str]) -> str:
    keys = list(tensors)
    return f'{len(keys)} tensors, {", ".join(map(repr, keys[:SHOWN_KEYS]))}{", ..." if len(keys) > SHOWN_KEYS else ""}'


# ---- TResNet, with any of its heads

TRESNETS: dict[tuple[bool, tuple[int, ...], int], str] = {  # v2, blocks of the stages, width of the stem
    (False, (3, 4, 6, 3), 64): 'miil_tresnet_s',
    (False, (3, 4, 11, 3), 64): 'tresnet_m',
    (False, (4, 5, 18, 3), 76): 'tresnet_l',
    (False, (4, 5, 24, 3), 83): 'tresnet_xl',
    (True, (3, 4, 23, 3), 64): 'tresnet_v2_l',
    (True, (3, 8, 34, 5), 64): 'miil_tresnet_v2_xl',
}
SLOPE_1E6 = 'miil_tresnet_v2_l_slope1e6'
TRESNET_ARGS = {  # to build one from the entry point of another
    'miil_tresnet_s': dict(layers=[3, 4, 6, 3], width_factor=1.0),
    'tresnet_xl': dict(layers=[4, 5, 24, 3], width_factor=1.3),
    'tresnet_v2_l': dict(layers=[3, 4, 23, 3], width_factor=1.0, v2=True),
    'miil_tresnet_v2_xl': dict(layers=[3, 8, 34, 5], width_factor=1.0, v2=True),
}
BOTTLENECKS = {'tresnet_m': 'miil_tresnet_m_bottleneck', 'tresnet_l': 'miil_tresnet_l_bottleneck'}
ML_DECODERS = {
    'tresnet_m': 'mldecoder_tresnet_m',
    'tresnet_v2_l': 'mldecoder_tresnet_l',
    'miil_tresnet_v2_xl': 'mldecoder_tresnet_xl',
}
TRESNET_MARKERS = ('body.conv1.0.weight', 'body.conv1.conv.weight', 'layer1.0.conv1.0.weight')
TRESNET_STEMS = (*TRESNET_MARKERS[:2], 'conv1.0.weight')
BLOCK = re.compile(r'(?:backbone\.)?(?:body\.)?layer([1-4])\.(\d+)\.')
BOTTLENECK_DIM = 512


def _tresnet(tensors: Mapping[str, Tensor], architecture: str | None) -> Found:
    body = _tresnet_body(tensors)
    if 'embedding.weight' in tensors:
        return _by_shape(tensors, 'miil_sdl_tresnet_m', 'embedding', 'SDL classifier', body, {'tresnet_m': {}})
    for classifier, embed in (('head.fc.FC', 'head.fc.embedding_generator.0'), ('head.fc', 'head.embed')):
        if f'{embed}.weight' in tensors:
            width = class_count(tensors, embed)
            found = _by_shape(
                tensors, BOTTLENECKS.get(body, 'miil_tresnet_l_bottleneck'), classifier, 'two-layer head', body,
                TRESNET_ARGS | {name: {} for name in BOTTLENECKS})
            return found if width == BOTTLENECK_DIM else found._replace(
                model_args={**found.model_args, 'embed_dim': width})
    if 'head.decoder.duplicate_pooling' in tensors:
        return _ml_decoder(tensors, body, ORIGINAL_DECODER)
    slopes = architecture == SLOPE_1E6 and body == 'tresnet_v2_l'
    return Found(SLOPE_1E6 if slopes else body, {}, class_count(tensors, 'head.fc'))


def _by_shape(
        tensors: Mapping[str, Tensor],
        name: str,
        classifier: str,
        head: str,
        body: str,
        args: Mapping[str, dict[str, Any]],
) -> Found:
    if body not in args:
        raise CheckpointError(f'the file is a {body} with an {head}, which none of our networks is; known is {name!r}.')
    return Found(name, args[body], class_count(tensors, classifier))


def _tresnet_body(tensors: Mapping[str, Tensor]) -> str:
    blocks = {match.groups() for key in tensors if (match := BLOCK.match(key))}
    layers = tuple(len({block for stage, block in blocks if stage == str(i)}) for i in range(1, 5))
    is_v2 = any(re.match(r'(backbone\.)?(body\.)?layer1\.0\.conv3\.', key) for key in tensors)
    width = max({
        len(tensor) for key, tensor in tensors.items()
        if key.removeprefix('backbone.') in TRESNET_STEMS and tensor.ndim} or {0})
    body = TRESNETS.get((is_v2, layers, width))
    if body is None:
        raise CheckpointError(
            f'the file is a TResNet of the {"second" if is_v2 else "first"} layout with {"-".join(map(str, layers))} '
            f'blocks and a stem of {width}; known are '
            + ', '.join(f'{name} ({"-".join(map(str, key[1]))}, {key[2]})' for key, name in TRESNETS.items())
            + '.')
    return body


# ---- ML-Decoder

class _DecoderKeys(NamedTuple):
    queries: str
    classes: str
    embed: str
    hidden: str


ORIGINAL_DECODER = _DecoderKeys(
    'head.decoder.query_embed.weight', 'head.decoder.duplicate_pooling_bias', 'head.decoder.embed_standart.bias',
    'head.decoder.layers.0.linear1.bias')
OWN_DECODER = _DecoderKeys('head.query_embed', 'head.group_fc.bias', 'head.embed.bias', 'head.decoder.linear1.bias')
ZERO_SHOT = 'head.word_embed.weight'  # the classes are labels, on which no tensor depends
DECODER_SIZES = {'num_groups': 100, 'embed_dim': 768, 'feedforward_dim': 2048}


def _ml_decoder(tensors: Mapping[str, Tensor], body: str, keys: _DecoderKeys) -> Found:
    sizes = [len(tensors[key]) if key in tensors and tensors[key].ndim else 0 for key in keys]
    if not all(sizes):
        raise CheckpointError(
            f'the file has an ML-Decoder head for labels that are given as word vectors or one that lacks tensors: '
            f'{", ".join(repr(key) for key, size in zip(keys, sizes) if not size)} not found; of zero-shot heads, none '
            f'is published that could be converted.')
    groups, classes, embed_dim, feedforward_dim = sizes
    args: dict[str, Any] = {} if body in ML_DECODERS else {'backbone': body}
    args |= {name: size for name, size in (('embed_dim', embed_dim), ('feedforward_dim', feedforward_dim))
             if size != DECODER_SIZES[name]}
    if groups != min(DECODER_SIZES['num_groups'], classes):  # else it is the default, clipped
        args['num_groups'] = groups
    return Found(ML_DECODERS.get(body, 'mldecoder'), args, classes)


def _own(tensors: Mapping[str, Tensor], architecture: str | None) -> Found:
    """A network of ours with a head on a backbone: named, or a TResNet with an ML-Decoder."""
    if architecture is not None and is_model(architecture):
        cfg = get_pretrained_cfg(architecture)
        heads = (OWN_DECODER.classes, 'head.fc.bias', 'head.fc.weight')
        rows = [len(tensors[key]) for key in heads if key in tensors and tensors[key].ndim]
        by_file = rows and ZERO_SHOT not in tensors
        found = Found(architecture, {}, rows[0] if by_file else cfg.num_classes if cfg else 0)
        if _misfit(tensors, found) == 0:
            return found
    if OWN_DECODER.queries in tensors and f'backbone.{TRESNET_MARKERS[1]}' in tensors:
        return _ml_decoder(tensors, _tresnet_body(tensors), OWN_DECODER)
    raise CheckpointError(
        f'the file is of a backbone with a head of ours, {_words(tensors)}, and its names do not tell which; load its '
        f'model folder, whose config.json does, or name the architecture (got {architecture!r}).')


# ---- LeViT

LEVIT_384 = dict(
    embed_dim=[384, 512, 768], depth=[4, 4, 4], num_heads=[6, 9, 12], key_dim=32, attn_ratio=[2, 2, 2],
    mlp_ratio=[2, 2, 2])


def _levit(tensors: Mapping[str, Tensor], architecture: str | None) -> Found:
    args = miil_levit.read_levit_sizes(tensors)
    if LEVIT_384.items() <= args.items():  # timm's is distilled unless told otherwise
        args = {'distilled': False} | {name: value for name, value in args.items() if name not in LEVIT_384}
        return Found('levit_384', args, class_count(tensors, 'head.linear'))
    return Found('miil_levit_768', args, class_count(tensors, 'head.linear'))


# ---- networks whose layout is timm's: the first that fits

EDGENEXT = 'downsample_layers.0.0.weight'


def edgenext_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an EdgeNeXt file under timm's names, by timm's own rule.

    Raises:
        CheckpointError: If the file is in the authors' layout and a key or shape is not of it.
    """
    if EDGENEXT not in tensors:
        return dict(tensors)
    try:
        return dict(edgenext.checkpoint_filter_fn(dict(tensors), model))
    except (KeyError, RuntimeError) as error:  # timm's: an unknown name, a shape that is no matrix of the layer's
        raise CheckpointError(f'the file is not an original EdgeNeXt of this size: {error}.') from error


def _edgenext(tensors: Mapping[str, Tensor], architecture: str | None) -> Found:
    model = create_model('edgenext_small', num_classes=class_count(tensors, 'head'), device='meta')
    return _first_that_fits(edgenext_names(tensors, model), ['edgenext_small'])


HARDCORE = tuple(f'hardcorenas_{letter}' for letter in 'abcdef')
BINAS = tuple(f'miil_binas_{letter}' for letter in 'abcdef')


def _one_of(*names: str) -> 'Family':
    def family(tensors: Mapping[str, Tensor], architecture: str | None) -> Found:
        first = [architecture] if architecture is not None and is_model(architecture) else []
        return _first_that_fits(tensors, [*first, *filter(is_model, names)])
    return family


def _first_that_fits(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Found:
    """The first of the networks whose names and shapes are the tensors'; else the error of the nearest."""
    tried: list[tuple[int, Found]] = []
    for name in dict.fromkeys(names):
        cfg = get_pretrained_cfg(name)
        classifiers = (cfg.classifier if cfg else None) or ()
        classifier = classifiers if isinstance(classifiers, str) else next(iter(classifiers), '')
        found = Found(name, {}, class_count(tensors, classifier))
        tried.append((_misfit(tensors, found), found))
        if tried[-1][0] == 0:
            return found
    nearest = min(tried, key=lambda trial: trial[0])[1]
    model = create_model(nearest.architecture, num_classes=nearest.num_classes, device='meta')
    try:
        check_fit(fill_counters(tensors, model), model)
    except CheckpointError as error:
        raise CheckpointError(
            f'the file is not of {nearest.architecture}, the nearest of those known: {error}') from error
    return nearest


def _misfit(tensors: Mapping[str, Tensor], found: Found) -> int:
    """How many tensors differ from the network's in name or shape, counters that are not there aside."""
    wanted = _layout(found.architecture, found.num_classes)
    there = {(key, tuple(tensor.shape)) for key, tensor in tensors.items()}
    return sum(not key.endswith(COUNTER) for key, _ in wanted - there) + len(there - wanted)


@functools.cache
def _layout(architecture: str, num_classes: int) -> frozenset[tuple[str, tuple[int, ...]]]:
    model = create_model(architecture, num_classes=num_classes, device='meta')
    return frozenset((key, tuple(tensor.shape)) for key, tensor in model.state_dict().items())


Family = Callable[[Mapping[str, Tensor], str | None], Found]
FAMILIES: tuple[tuple[tuple[str, ...], Family], ...] = (
    (TRESNET_MARKERS, _tresnet),
    ((miil_levit.STEM,), _levit),
    (('conv_stem.weight',), _one_of(*HARDCORE, *BINAS, 'mobilenetv3_large_100', 'miil_ofa_595m')),
    (('conv1.weight',), _one_of('resnet50', 'miil_resnet32x4', 'miil_resnet8x4')),
    (('stem.proj.weight',), _one_of('mixer_b16_224')),
    (('patch_embed.proj.weight',), _one_of('vit_base_patch16_224_miil', 'vit_base_patch16_224')),
    ((EDGENEXT,), _edgenext),
    (('stem.0.weight',), _one_of('edgenext_small')),
)
