"""Thresholds and temperatures of a model folder, found on labelled pictures and written into its config.json."""
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from timm_miil._atomic import whole_folder, write_file
from timm_miil._errors import PredictionError
from timm_miil.data import ImageStream, LabelledImages
from timm_miil.inference._measure import ReliabilitySum, expected_error, probs_in_parts
from timm_miil.inference.calibrate import Calibration, calibrate
from timm_miil.inference.predict import BATCH_SIZE, Tagger
from timm_miil.inference.validate import Validation, validate_tagger
from timm_miil.metrics import fit_temperatures
from timm_miil.metrics.thresholds import Objective
from timm_miil.models.saved_config import CONFIG_FILE

__all__ = ['Tuning', 'tune_folder']


@dataclasses.dataclass(frozen=True, eq=False)
class Tuning:
    """What was found for a model folder.

    Attributes:
        folder: Where it was written.
        before: The model measured with what its folder said before.
        calibration: What was found, for each class of the model. Precision, recall and F1 in it are those of held-out
            folds.
        calibration_error: Expected calibration error, each half of the pictures by temperatures of the other half.
    """

    folder: Path
    before: Validation
    calibration: Calibration
    calibration_error: float

    def compare(self) -> dict[str, tuple[float, float]]:
        """Before and after, fractions: means over the measured classes, and the error; after on held-out pictures."""
        f1, found, columns = self.before.f1, self.calibration.found, list(self.before.columns)
        precision, recall, mean_f1 = (
            float(values[columns].mean()) for values in (found.precision, found.recall, found.f1))
        return {
            'mean precision': (f1.class_precision, precision), 'mean recall': (f1.class_recall, recall),
            'mean F1': (f1.class_f1, mean_f1),
            'calibration error': (self.before.calibration_error, self.calibration_error)}


def tune_folder(
        folder: str | os.PathLike[str],
        source: LabelledImages | ImageStream,
        *,
        objective: Objective = 'f1',
        target: float | None = None,
        num_folds: int = 5,
        seed: int = 0,
        output: str | os.PathLike[str] | None = None,
        common: bool = False,
        batch_size: int = BATCH_SIZE,
        workers: int = 0,
        device: torch.device | None = None,
        amp_dtype: torch.dtype | None = None,
        strict: bool = False,
        on_batch: Callable[[int], None] | None = None,
) -> Tuning:
    """Find thresholds and temperatures of a model folder's classes, and write them into its config.json.

    Every other byte of the folder stays as it is. A class that the data lack (with `common`) or hardly show gets what
    all classes share.

    Args:
        folder: A model folder on this machine, with independent classes.
        source: Labelled pictures that the model was not trained on.
        objective: What thresholds are chosen for, see `calibrate`.
        target: See `calibrate`.
        num_folds: See `calibrate`.
        seed: See `calibrate`.
        output: Folder to make, a copy with the new config.json; None changes the folder's own.
        common: See `validate`; likewise the others.
        batch_size: Pictures in one pass through the model.
        workers: Processes that read pictures.
        device: Where to run; None takes the CPU.
        amp_dtype: Mixed precision; None for none.
        strict: Whether a picture that cannot be used is an error.
        on_batch: Called after each batch with its number of pictures.

    Returns:
        What was found, and how it compares with what was there.

    Raises:
        FileExistsError: If the output is there and not empty.
        FileNotFoundError: If there is no such folder, or it has no config.json.
        ImageError: If a picture cannot be used, with `strict`.
        OSError: If the result cannot be written; the folder is then as it was.
        PredictionError: If the model cannot be loaded, its classes exclude one another, its config.json is a link and
            there is no output, or no picture can be used.
        TypeError: If a setting is of the wrong kind.
        ValueError: If labels do not match, the data show no label, or a setting is out of range.
    """
    folder, output = Path(folder), None if output is None else Path(output)
    _check_places(folder, output)
    # Whether the settings are right is seen before the long run, on two pictures.
    calibrate(
        torch.zeros(2, 1), torch.tensor([[1], [0]]), objective=objective, target=target, num_folds=num_folds, seed=seed)
    tagger = Tagger.from_name(f'local-dir:{folder}', device=device)
    if tagger.activation != 'sigmoid':
        raise PredictionError(
            f'thresholds and temperatures are for independent classes; those of {str(folder)!r} exclude one another.')
    before = validate_tagger(
        tagger, source, common=common, batch_size=batch_size, workers=workers, amp_dtype=amp_dtype, strict=strict,
        on_batch=on_batch)
    logits, targets = _of_all_classes(before, len(tagger.label_names))
    is_present, is_absent = (targets == 1).any(0), (targets == 0).any(0)
    if bool(is_present.any()) and not bool((is_present & is_absent).any()):
        raise ValueError(
            'no label is known to be present in some of the pictures and absent in others, so that no threshold is '
            'better than another; give pictures that are annotated with both.')
    found = calibrate(logits, targets, objective=objective, target=target, num_folds=num_folds, seed=seed)
    text = _with_members(
        (folder / CONFIG_FILE).read_bytes().decode(),
        {'thresholds': list(found.thresholds), 'temperatures': list(found.temperatures)})
    if output is None:
        write_file(folder / CONFIG_FILE, text)
    else:
        with whole_folder(output) as fresh:
            shutil.copytree(folder, fresh, dirs_exist_ok=True)
            (fresh / CONFIG_FILE).write_bytes(text.encode())
    return Tuning(output or folder, before, found, _held_out_error(logits, targets, seed))


def _check_places(folder: Path, output: Path | None) -> None:
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise FileNotFoundError(
            f'a model folder on this machine is needed, with {CONFIG_FILE} and weights, such as training writes; '
            f'got {str(folder)!r}, which is none.')
    if output is None:
        if config.is_symlink():
            raise PredictionError(f'{str(config)!r} is a link, as of a download; give another folder as output.')
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f'output must be a new folder, got {str(output)!r}, which is there already.')


def _of_all_classes(result: Validation, num_classes: int) -> tuple[Tensor, Tensor]:
    """Scores and labels of every class of the model, those that were not measured unknown."""
    if len(result.columns) == num_classes:
        return result.logits, result.targets
    logits = torch.zeros(len(result.logits), num_classes)
    targets = torch.full(logits.shape, -1, dtype=torch.int8)
    columns = list(result.columns)
    logits[:, columns], targets[:, columns] = result.logits, result.targets
    return logits, targets


def _held_out_error(logits: Tensor, targets: Tensor, seed: int) -> float:
    """Expected calibration error of each half by temperatures of the other; of one picture, by its own."""
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    halves = order.tensor_split(2)
    total = ReliabilitySum()
    for fitted, held in (halves, halves[::-1]):
        temperatures = fit_temperatures(logits[fitted], targets[fitted]).tolist()
        for _, probs, labels in probs_in_parts(
                logits[held], targets[held], activation='sigmoid', temperatures=temperatures):
            total.update(probs, labels)
    return expected_error(total.compute())


def _with_members(text: str, members: Mapping[str, object]) -> str:
    """The text of a JSON object, not empty, with some members set, and every other byte as it was."""
    gap = text[text.index('{') + 1:text.index('"')]     # before the first name, and so before any other
    indent = gap.rpartition('\n')[2] if '\n' in gap else None
    for name, value in members.items():
        written = json.dumps(value, indent=indent).replace('\n', gap)
        spans = _value_spans(text)
        if name in spans:
            start, end = spans[name]
        else:
            start = end = max(end for _, end in spans.values())
            written = f',{gap or " "}{json.dumps(name)}: {written}'
        text = text[:start] + written + text[end:]
    return text


def _value_spans(text: str) -> dict[str, tuple[int, int]]:
    """Where the value of each member of a valid JSON object starts and ends; of a name there twice, the last."""
    decoder, spans = json.JSONDecoder(), {}
    place = _after_space(text, text.index('{') + 1)
    while text[place] != '}':
        name, place = decoder.raw_decode(text, place)
        start = _after_space(text, _after_space(text, place) + 1)   # past the colon
        _, end = decoder.raw_decode(text, start)
        spans[name] = start, end
        place = _after_space(text, end)
        if text[place] == ',':
            place = _after_space(text, place + 1)
    return spans


def _after_space(text: str, place: int) -> int:
    while text[place].isspace():
        place += 1
    return place
