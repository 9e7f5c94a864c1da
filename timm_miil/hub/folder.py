"""Hub-ready folders: `config.json`, `model.safetensors` and `README.md`, as timm reads and the Hub shows them."""
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import safetensors.torch
import torch
from timm.models import create_model
from torch import Tensor, nn

from timm_miil._atomic import whole_folder
from timm_miil._checks import check_choice, check_class_settings
from timm_miil._errors import CheckpointError
from timm_miil._timm import save_config_for_hf
from timm_miil.hub._probe import record_probe
from timm_miil.hub.card import CARD_FILE, ProblemType, check_card
from timm_miil.models.checkpoint_file import write_safetensors
from timm_miil.models.download import sha256_of

__all__ = ['check_model_folder', 'save_model_folder', 'tuned_settings', 'write_model_folder']

PROBLEM_TYPES: tuple[ProblemType, ...] = ('multi_label_classification', 'single_label_classification', 'embedding')
FILES = frozenset({'config.json', 'model.safetensors', CARD_FILE})


def save_model_folder(
        model: nn.Module,
        directory: str | os.PathLike[str],
        *,
        label_names: Sequence[str],
        card: str,
        problem_type: ProblemType = 'multi_label_classification',
        thresholds: Sequence[float] | None = None,
        temperatures: Sequence[float] | None = None,
) -> Path:
    """Write a model as `timm.create_model('local-dir:...', pretrained=True)` and the Hub take it.

    The folder appears when it is complete and has been read back: the same weights, to the bit. A model folder of
    that name is replaced. Equal models give equal bytes.

    Args:
        model: A model made by `timm.create_model`; its preprocessing is taken from its pretrained configuration.
        directory: Folder to write.
        label_names: One name a class, in the order of the logits; none of a network that embeds pictures.
        card: Text of README.md: a YAML head and Markdown, see `render_card`.
        problem_type: Whether the classes are independent or exclusive, or the network embeds pictures; noted in
            config.json.
        thresholds: Least confidence of each class, in [0, 1], for `timm-miil predict`; noted in config.json, where timm
            passes over it. None leaves it out.
        temperatures: What the logits of each class are divided by before the sigmoid, in [0.01, 100]; likewise.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the folder does not give the model back.
        FileExistsError: If the folder exists and holds anything but a model folder's files.
        TypeError: If thresholds or temperatures are no list of numbers.
        ValueError: If there is not one label name, threshold or temperature a class, a name occurs twice, a number is
            out of range, problem_type is another, exclusive classes have thresholds or temperatures, or the card is not
            valid.
    """
    check_choice(problem_type=problem_type, choices=PROBLEM_TYPES)
    directory = Path(directory)
    num_classes = int(cast(int, model.num_classes))
    num_names = 0 if problem_type == 'embedding' else num_classes
    if len(label_names) != num_names or len(set(label_names)) != len(label_names):
        raise ValueError(
            f'label_names must have one name a class, each once, got {len(set(label_names))} different names among '
            f'{len(label_names)} for {num_names} classes.')
    check_class_settings(num_classes=num_classes, thresholds=thresholds, temperatures=temperatures)
    calibration = {
        name: [float(value) for value in values]
        for name, values in (('thresholds', thresholds), ('temperatures', temperatures)) if values is not None}
    if calibration and problem_type != 'multi_label_classification':
        raise ValueError(f'{" and ".join(calibration)} are for independent classes, got problem_type {problem_type!r}.')
    names = {} if problem_type == 'embedding' else {
        'label_names': list(label_names), 'label_descriptions': {name: name for name in label_names}}
    write_model_folder(model, directory, card=card, config={**names, 'problem_type': problem_type, **calibration})
    return directory


def write_model_folder(
        model: nn.Module,
        directory: str | os.PathLike[str],
        *,
        card: str,
        config: Mapping[str, Any],
        metadata: Mapping[str, str] = MappingProxyType({}),
        conversion: Mapping[str, Any] | None = None,
) -> str:
    """Write a folder that is complete and has been read back, or none.

    Args:
        model: A model made by `timm.create_model`; tensors keep their dtype.
        directory: Folder to write; a model folder of that name is replaced.
        card: Text of README.md.
        config: Further entries of config.json, on top.
        metadata: Further entries of the weights' header.
        conversion: Where the weights come from. With it, config.json has it under 'conversion', together with the
            SHA-256 of the weights and logits of a fixed input, by which others can check what they load.

    Returns:
        SHA-256 of model.safetensors, in hex.

    Raises:
        CheckpointError: If the folder does not give the model back.
        FileExistsError: If the folder exists and holds anything but a model folder's files.
        ValueError: If the card is not valid.
    """
    directory = Path(directory)
    check_card(card)
    check_model_folder(directory)
    with whole_folder(directory) as folder:
        weights = folder / 'model.safetensors'
        write_safetensors(weights, model.state_dict(), {'format': 'pt', **metadata})
        digest = sha256_of(weights)[1]
        (folder / CARD_FILE).write_text(card, encoding='utf-8', newline='\n')
        save_config_for_hf(model, str(folder / 'config.json'), model_config=dict(config))
        saved = _read_back(folder, model)
        if conversion is not None:
            record = {**conversion, 'weights_sha256': digest, 'probe': record_probe(saved)}
            save_config_for_hf(
                model, str(folder / 'config.json'), model_config={**config, 'conversion': record})
    return digest


def check_model_folder(directory: str | os.PathLike[str]) -> None:
    """Raise FileExistsError unless `save_model_folder` may write there: nothing, or a model folder to replace."""
    directory = Path(directory)
    if directory.exists():
        inside = [path.name for path in directory.iterdir()] if directory.is_dir() else ['the content of a file']
        foreign = sorted(name for name in inside if name not in FILES)
        if foreign:
            raise FileExistsError(
                f'{directory} is no model folder: it holds {", ".join(foreign[:5])}; choose another folder.')


def tuned_settings(directory: str | os.PathLike[str], model: nn.Module) -> dict[str, list[float]]:
    """Thresholds and temperatures that a model folder has for this very model; none where its weights are others.

    Args:
        directory: A folder of `save_model_folder`, which may be missing or damaged.
        model: What is compared with its weights.

    Returns:
        Arguments for `save_model_folder`.
    """
    directory = Path(directory)
    try:
        config: dict[str, Any] = json.loads((directory / 'config.json').read_text(encoding='utf-8'))
        kept: dict[str, list[float]] = {name: config[name] for name in ('thresholds', 'temperatures') if name in config}
        saved = safetensors.torch.load_file(directory / 'model.safetensors') if kept else {}
    except (OSError, TypeError, ValueError, safetensors.SafetensorError):
        return {}
    return {} if _differing(saved, model) else kept


def _read_back(folder: Path, model: nn.Module) -> nn.Module:
    """What timm makes of the folder.

    Raises:
        CheckpointError: If that is not the model.
    """
    with torch.random.fork_rng(devices=[]):  # building a model draws its first weights
        saved = create_model(f'local-dir:{folder}', pretrained=True)
    if differing := _differing(saved.state_dict(), model):
        raise CheckpointError(
            f'the saved model differs from the given one in {len(differing)} tensors, such as {differing[0]!r}; was '
            f'it changed after timm.create_model?')
    return saved


def _differing(saved: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    own = model.state_dict()
    return [name for name in {**own, **saved} if name not in own or name not in saved
            or not torch.equal(saved[name], own[name].cpu().to(saved[name].dtype))]
