"""A timm model by name, and what it says about its own output: activation, calibration and label names."""
import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import is_model, is_model_pretrained, list_models, parse_model_name
from torch import Tensor, nn

from timm_miil import catalog
from timm_miil._checks import check_class_settings, cut, nearest, shown
from timm_miil._errors import PredictionError
from timm_miil.heads.text import note_equal
from timm_miil.models import loading
from timm_miil.models.saved_config import CONFIG_FILE, read_config

__all__ = [
    'ACTIVATIONS', 'DEFAULT_ZERO_SHOT_MODEL', 'Activation', 'OutputConfig', 'check_label_names', 'default_activation',
    'find_label_names', 'input_like', 'is_embedding', 'load_model', 'set_labels', 'uncompiled',
]

Activation = Literal['sigmoid', 'softmax']

ACTIVATIONS: tuple[Activation, ...] = ('sigmoid', 'softmax')
DEFAULT_ZERO_SHOT_MODEL = 'mldecoder_zero_shot_scenes'

# Fields at the top of config.json that name the activation, the first one present counts. The second is known
# from transformers.
_CONFIG_KEYS: dict[str, dict[str, Activation]] = {
    'activation': {'sigmoid': 'sigmoid', 'softmax': 'softmax'},
    'problem_type': {'multi_label_classification': 'sigmoid', 'single_label_classification': 'softmax'},
}
EMBEDDING = 'embedding'  # a problem type without activation
METRIC_ACTIVATIONS: dict[str, Activation] = {
    'mAP': 'sigmoid', 'unseen_mAP': 'sigmoid', 'top1': 'softmax', 'semantic_top1': 'softmax'}
# Names that are identifiers (WordNet synsets, Freebase ids): people read their description.
_IDENTIFIER = re.compile(r'n\d{8}|/[mg]/\w+')


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """What the `config.json` of a model says about its output.

    Attributes:
        activation: The field `activation` ('sigmoid' or 'softmax'), else `problem_type`
            ('multi_label_classification' or 'single_label_classification'), else 'sigmoid' where there are thresholds
            or temperatures; None if it says nothing.
        thresholds: The field `thresholds`: least confidence of each class, in [0, 1]; None if it has none.
        temperatures: The field `temperatures`: what the logits of each class are divided by, in [0.01, 100]; None if it
            has none.
        embeds: Whether `problem_type` is 'embedding': the outputs are a vector that describes the picture.
    """

    activation: Activation | None = None
    thresholds: tuple[float, ...] | None = None
    temperatures: tuple[float, ...] | None = None
    embeds: bool = False

    def check_classes(self, name: str) -> None:
        """Raise PredictionError if the model of that name has no classes."""
        if self.embeds:
            raise PredictionError(
                f'the model {name!r} gives embeddings, and no labels; how well they tell identities is measured by '
                f'`timm-miil validate` and `timm_miil.inference.validate_pairs`.')


def load_model(name: str) -> tuple[nn.Module, OutputConfig]:
    """Load a model with its weights, see `timm_miil.models.load_model`.

    A folder or Hub repository is not trusted. Read are safetensors, or pickles with `weights_only=True`; refused are a
    folder whose files are links to elsewhere, a configuration that names other files, and one that leaves the
    classifier untrained.

    Args:
        name: A registered model ('resnet18', 'resnet18.a1_in1k'), a Hub repository
            ('hf-hub:owner/repo@revision'), or a folder ('local-dir:path', or just its path) with `config.json`
            and weights.

    Returns:
        The model, and what its `config.json` says about its output.

    Raises:
        PredictionError: If there is no such model or it cannot be loaded completely; one line that says why.
    """
    source, where = parse_model_name(_with_source(name))
    try:
        config = read_config(source, where)
        activation = _config_activation(config)  # before a long download
        model = loading.load_model(f'{source}:{where}' if source else where)
    except Exception as error:  # timm and the Hub's client raise whatever a damaged file or a broken line leads to
        words = ' '.join(str(error).split()) or type(error).__name__
        inner = Path(where) / 'model'
        if source == 'local-dir' and (inner / CONFIG_FILE).is_file():
            words = f'the folder is of a training; its model is {str(inner)!r}.'
        raise PredictionError(f'cannot load model {name!r}: {cut(words)}') from error
    built_for, trained_for = getattr(model, 'num_classes', 0), _cfg(model).get('num_classes', 0)
    if built_for != trained_for:
        raise PredictionError(
            f'cannot load model {name!r}: it was built for {built_for} classes and its weights are for '
            f'{shown(trained_for)}; correct its {CONFIG_FILE}.')
    try:
        embeds = config.get('problem_type') == EMBEDDING
        return model, dataclasses.replace(_read_output(config, activation, built_for), embeds=embeds)
    except (TypeError, ValueError) as error:
        raise PredictionError(
            f'cannot load model {name!r}: {str(error).removesuffix(".")}; correct its {CONFIG_FILE}.') from error


def is_embedding(name: str) -> bool:
    """Whether the `config.json` of a model, named as for `load_model`, says that it embeds pictures.

    One that cannot be read says nothing: False.
    """
    try:
        return read_config(*parse_model_name(_with_source(name))).get('problem_type') == EMBEDDING
    except Exception:  # what is wrong with it, `load_model` says
        return False


def default_activation(model: nn.Module) -> Activation:
    """The activation that a model without a `config.json` was trained for.

    The catalogue's metric decides for weights it knows (mAP: sigmoid, top-1: softmax), else a true attribute
    `multi_label` of the model: sigmoid. Everything else is softmax.
    """
    cfg = _cfg(model)
    known = catalog.weights().get(f'{cfg.get("architecture")}.{cfg.get("tag")}')
    if known is not None and known.num_classes == model.num_classes and known.metrics:
        return METRIC_ACTIVATIONS[known.metrics[0].name]
    return 'sigmoid' if getattr(model, 'multi_label', False) else 'softmax'


def find_label_names(model: nn.Module) -> tuple[str, ...] | None:
    """Label names in the order of the logits, as the model's configuration gives them.

    For timm's own ImageNet weights, which carry none, timm's lists serve, chosen by the number of classes. A name
    that is a bare identifier (such as 'n01440764') is replaced by its description where there is one.

    Returns:
        One name a class, or None if nothing is known. Classes that the configuration leaves out are called
        'class_<index>'.

    Raises:
        PredictionError: If the configuration's names do not match the number of classes.
    """
    cfg = _cfg(model)
    num_classes = cast(int, model.num_classes)
    if names := cfg.get('label_names'):
        by_index = _names_by_index(names)
        if max(by_index) >= num_classes or isinstance(names, Sequence) and len(names) < num_classes:
            raise PredictionError(
                f'the model has {num_classes} classes and its configuration names {len(names)}, the last of index '
                f'{shown(max(by_index))}; correct label_names in its {CONFIG_FILE}.')
        descriptions = cfg.get('label_descriptions')
        return tuple(
            _readable(by_index.get(index, f'class_{index}'), descriptions) for index in range(num_classes))
    is_timms = not cfg.get('source') or str(cfg.get('hf_hub_id')).startswith('timm/')
    subset = infer_imagenet_subset(model) if is_timms else None
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else None


def input_like(model: nn.Module) -> Tensor:
    """A tensor of the device and dtype that the model's pictures must have; float32 on the CPU if nothing says them."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of torch.compile, which passes for it but to timm's test of its truth."""
    return cast(nn.Module, getattr(model, '_orig_mod', model))


def check_label_names(labels: Sequence[str]) -> None:
    """Raise unless these are different names: TypeError for what is no list of strings, else ValueError."""
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not all(isinstance(x, str) for x in labels):
        raise TypeError(f'labels must be a list of strings, got {shown(labels)}.')
    if not labels:
        raise ValueError('labels must have at least one name, got none.')
    label, count = Counter(labels).most_common(1)[0]
    if count > 1:
        raise ValueError(f'labels must be different names, got {shown(label)} {count} times.')


def set_labels(model: Any, labels: Sequence[str], embeddings: Tensor | None = None) -> None:
    """Give a zero-shot model, which has a method `set_queries`, another label set.

    Of labels with equal embeddings a warning is logged.

    Args:
        model: The model; changed in place.
        labels: Different names.
        embeddings: One row a label, shape (K, E), by the encoder that the model was trained with. None for a model that
            embeds names itself: its `labels`, set by name, are not None, and its `set_labels` sets others.

    Raises:
        PredictionError: If the model takes no labels, or embeddings are needed to give it any.
        TypeError: If labels are no list of strings, or embeddings no floating tensor.
        ValueError: If there are no labels, one is there twice, or the embeddings do not fit labels or model.
    """
    check_label_names(labels)
    if not callable(getattr(model, 'set_queries', None)):
        raise PredictionError(
            f'the model knows its own {getattr(model, "num_classes", 0)} classes and takes no other labels; leave them '
            f'out, or choose a zero-shot model, such as {DEFAULT_ZERO_SHOT_MODEL}.')
    if embeddings is not None:
        if isinstance(embeddings, Tensor) and embeddings.ndim == 2 and len(embeddings) != len(labels):
            raise ValueError(
                f'embeddings must have one row a label, got {tuple(embeddings.shape)} for {len(labels)} labels.')
        model.set_queries(embeddings)
        note_equal(labels, embeddings)
    elif getattr(model, 'labels', None) is None:
        raise PredictionError(
            'the model does not say how its labels were embedded, so that names do not suffice; also give the '
            'embeddings of the labels, by the encoder that it was trained with.')
    else:
        model.set_labels(labels)


def _cfg(model: nn.Module) -> dict[str, Any]:
    return cast(dict[str, Any], model.pretrained_cfg)


def _with_source(name: str) -> str:
    """The name as timm takes it, with 'local-dir:' before a bare folder."""
    if re.match(r'(hf[-_]hub|local-dir):.', name, re.IGNORECASE):
        return name
    is_path = re.search(r'[/\\:]', name) is not None
    if not is_path and is_model(name):
        return _check_registered(name)
    if os.path.isdir(name):
        return f'local-dir:{name}'
    if is_path:
        is_like_hub = re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', name)
        advice = f'; for a repository on the Hub, write hf-hub:{name}' if is_like_hub else ''
        raise PredictionError(f'no such model folder: {name!r}{advice}.')
    raise PredictionError(f'unknown model {name!r}; {nearest(name.partition(".")[0], list_models())}')


def _check_registered(name: str) -> str:
    architecture, dot, _ = name.partition('.')
    if dot and name not in (known := list_models(architecture, include_tags=True)):
        if name in catalog.weights():
            raise PredictionError(
                f'the catalogue has {name!r}, but not all that a network needs to know; run `timm-miil convert {name} '
                f'-o DIR`, and give the folder.')
        raise PredictionError(f'unknown weights {name!r}; {nearest(name, known)}')
    if not is_model_pretrained(name):
        raise PredictionError(
            f'{name!r} has no published weights to tag with; train it and give its folder, or choose another.')
    return name


def _config_activation(config: Mapping[str, Any]) -> Activation | None:
    for key, meanings in _CONFIG_KEYS.items():
        value = config.get(key)
        if value is not None and (key, value) != ('problem_type', EMBEDDING):
            if not isinstance(value, str) or value not in meanings:
                raise ValueError(
                    f'{key} in {CONFIG_FILE} must be one of {", ".join(map(repr, meanings))}, got {shown(value)}.')
            return meanings[value]
    return None


def _read_output(config: Mapping[str, Any], activation: Activation | None, num_classes: int) -> OutputConfig:
    own = {name: config[name] for name in ('thresholds', 'temperatures') if config.get(name) is not None}
    if not own:
        return OutputConfig(activation)
    if activation == 'softmax':
        raise ValueError(f'{" and ".join(own)} are for independent classes, and the activation is softmax')
    thresholds, temperatures = own.get('thresholds'), own.get('temperatures')
    check_class_settings(num_classes=num_classes, thresholds=thresholds, temperatures=temperatures)
    return OutputConfig(
        'sigmoid', thresholds and tuple(map(float, thresholds)), temperatures and tuple(map(float, temperatures)))


def _names_by_index(names: object) -> dict[int, str]:
    try:
        if isinstance(names, Mapping):  # for gaps
            pairs = [(int(index), name) for index, name in names.items()]
        elif isinstance(names, Sequence) and not isinstance(names, str):
            pairs = list(enumerate(names))
        else:
            raise TypeError
    except (TypeError, ValueError):
        raise PredictionError(
            f'label_names in {CONFIG_FILE} must be a list, or an object from class number to name, got '
            f'{shown(names)}.') from None
    by_index: dict[int, str] = {}
    for index, name in pairs:
        if index < 0 or index in by_index or not isinstance(name, str):
            raise PredictionError(
                f'label_names in {CONFIG_FILE} must have strings, and each class number once and from 0 on, got '
                f'{shown(name)} for {shown(index)}.')
        by_index[index] = name
    return by_index


def _readable(name: str, descriptions: object) -> str:
    if isinstance(descriptions, Mapping) and _IDENTIFIER.fullmatch(name):
        return str(descriptions.get(name, name))
    return name
