"""ImageNet-21K-P: the classes of ImageNet-21K with enough pictures, split and resized, with their tree.

Ridnik et al., "ImageNet-21K Pretraining for the Masses", arXiv:2104.10972, section 2.1. As the published scripts do:
a synset is a class if it has more than 500 picture files, the first 50 by name are for validation, and pictures whose
longer side is below the new size keep theirs. Files that cannot be read count, and are left out afterwards.

Deviations: pictures are made smaller with antialiasing (Pillow's bilinear), where the original read between pixels; all
are written as JPEG of quality 95, 4:2:0, also those that keep their size, where the original copied these; they are
upright by their EXIF; names are ordered by their bytes, where the original's order was that of the machine's language.
"""
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from timm_miil._cores import count_cores
from timm_miil._atomic import whole_file, write_file
from timm_miil._checks import check_choice, check_folder, check_not_negative, check_positive, cut, shown
from timm_miil._errors import CheckpointError
from timm_miil._locks import locked
from timm_miil.data._files import few
from timm_miil.data._in21k_check import MANIFEST_FILE, check_in21k
from timm_miil.data._in21k_classes import CUSTOM, RELEASES, Release, TreeMaker, read_is_a, read_words
from timm_miil.data._in21k_source import Omission, SynsetSource, find_synsets
from timm_miil.data._in21k_synset import RESIZE, SPLITS, Settings, SynsetJob, SynsetRecord, Workplace
from timm_miil.data._processes import run_jobs
from timm_miil.data._shard_index import hash_file
from timm_miil.data.folder import read_split
from timm_miil.data.hierarchy import TREE_FILE, ClassTree, read_class_tree, write_class_tree
from timm_miil.data.shards import write_shards

__all__ = [
    'RELEASES', 'In21kReport', 'Omission', 'Release', 'check_in21k', 'prepare_in21k', 'read_is_a', 'read_words']

MIN_IMAGES, VAL_IMAGES, SIZE_PX = 500, 50, 224
REPORT_FILE, SHARDS_FOLDER = 'report.json', 'shards'
SHARDS_SEED = 0
LOCK_SECONDS = 5.0
LEFTOVERS = '.*.json*-*'  # of `whole_file`, when it was killed

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class In21kReport:
    """What a preparation has made.

    Args:
        release: 'fall11', 'winter21' or 'custom'.
        settings: Size, resize, min_images, val_images, JPEG quality and format.
        classes: Of each class, by name: picture files found, pictures in train, pictures in val.
        dropped: Synsets that are no classes, and how many picture files each has.
        omissions: Files that were left out: of each its name, kind and reason.
        damaged: Tar files that are not whole, and why; pictures before the damage are there.
        passed_over: Names in the source that are no synsets.
        has_tree: Whether there is a tree.
    """
    release: str
    settings: Mapping[str, object]
    classes: Mapping[str, tuple[int, int, int]]
    dropped: Mapping[str, int]
    omissions: tuple[Omission, ...]
    damaged: Mapping[str, str]
    passed_over: tuple[str, ...]
    has_tree: bool

    @property
    def num_train(self) -> int:
        """Pictures to train on."""
        return sum(train for _, train, _ in self.classes.values())

    @property
    def num_val(self) -> int:
        """Pictures to validate on."""
        return sum(val for _, _, val in self.classes.values())

    def to_json(self) -> str:
        """All of it, and the same text for the same pictures and settings."""
        fields = asdict(self) | {
            'num_classes': len(self.classes), 'num_train': self.num_train, 'num_val': self.num_val,
            'omissions': [omission._asdict() for omission in self.omissions],
            'omissions_of_kind': dict(sorted(Counter(omission.kind for omission in self.omissions).items()))}
        return json.dumps(fields, indent=1) + '\n'


def prepare_in21k(
        source: str | os.PathLike[str],
        out: str | os.PathLike[str],
        *,
        release: str = 'fall11',
        size: int = SIZE_PX,
        resize: Literal['squish', 'short_edge'] = 'squish',
        min_images: int = MIN_IMAGES,
        val_images: int = VAL_IMAGES,
        tree: str | os.PathLike[str] | None = None,
        is_a: str | os.PathLike[str] | None = None,
        words: str | os.PathLike[str] | None = None,
        shards: bool = False,
        images_per_shard: int = 1000,
        workers: int | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
) -> In21kReport:
    """Make ImageNet-21K-P of a release of ImageNet-21K.

    `out` gets `train/<synset>/*.jpg` and `val/<synset>/*.jpg`, which the format 'folder' reads, and those of timm and
    torchvision; `report.json`; `tree.json`; `manifest.jsonl` with size and SHA-256 of every picture, for `check_in21k`,
    which is there when all this is; and, if asked for, the same pictures once more in `shards/`. Everything is decided
    by the source and the settings, to the byte, with one version of Pillow.

    Each synset is made in a hidden folder and moved when it is whole. A run that was interrupted, by whatever, goes on
    with the synsets that are not finished; a finished one stays, also if its source is gone. It is made again if its
    tar file was damaged or has another size now, if its folder has more files, and if it has not as many pictures in
    `out` as were made: to have one made again, as after pictures were mended in the source, delete its folders there.

    Args:
        source: Folder with a folder `n01440764` or a tar file `n01440764.tar` for each synset, mixed if need be, there
            or in folders one below. Nothing in it is changed.
        out: Folder to write into, made if needed.
        release: 'fall11' or 'winter21', whose number of classes is checked, or 'custom'.
        size: Side of the square, or the shorter side, in pixels.
        resize: 'squish' to the square whatever the picture's sides; 'short_edge' to keep their ratio, for which the
            authors take size 256.
        min_images: A class has more picture files than this.
        val_images: How many of each class are for validation, the first by name.
        tree: File of the published tree, or another that `read_class_tree` reads. A release must have its very
            classes; 'custom' may have some of them. Without it and `is_a` the tree of an earlier run stays, if its
            classes are these.
        is_a: WordNet's `wordnet.is_a.txt`, of which the tree is made; see `read_is_a`.
        words: With `is_a`: `words.txt`, for descriptions; see `read_words`.
        shards: Whether to write shards too.
        images_per_shard: Pictures of each but the last.
        workers: Processes; None for one a core, 0 for this one.
        on_progress: Called with what is counted ('synsets', 'train' or 'val' for shards), how many are done, and how
            many there are in all.

    Returns:
        The report, as it was written.

    Raises:
        BlockingIOError: If another process prepares the same folder.
        CheckpointError: If `tree` is no tree file.
        FileExistsError: If `out` has other things in it, or was made with other settings.
        FileNotFoundError: If a file is missing, or there are no synsets.
        NotADirectoryError: If source is a file.
        OSError: If something cannot be read or written, such as on a full disk.
        PermissionError: If some synsets may not be read.
        RuntimeError: If a process is killed.
        TypeError: If a number is no int.
        ValueError: If a setting is out of range, a synset is there twice, or the classes are not those of the release
            or of the tree; the report is written all the same, and what is finished is kept.

    Example:
        report = prepare_in21k('winter21_whole', 'imagenet21k-p', release='winter21', tree='tree.pth')
        open_split('imagenet21k-p', 'train')
    """
    _check_settings(release, resize, min_images, tree, is_a, words)
    check_folder(out=out)
    check_positive(size=size, images_per_shard=images_per_shard)
    check_not_negative(val_images=val_images)
    workers = count_cores() if workers is None else workers
    check_not_negative(workers=workers)
    if min_images < val_images:
        raise ValueError(f'min_images must be at least val_images, got {min_images} and {val_images}.')
    settings = Settings(size, resize, min_images, val_images)
    maker = TreeMaker.read(release, tree, is_a, words)
    source, place = Path(source), Workplace(Path(out))
    if not source.exists():
        raise FileNotFoundError(f'source must be the folder of a release, got {str(source)!r}, where nothing is.')
    synsets, others = find_synsets(source, out=place.out)
    if place.out.exists() and os.path.samefile(source, place.out):
        raise ValueError(f'out must be another folder than source, got {place.out} for both.')
    _check_out(place)
    place.hidden.mkdir(parents=True, exist_ok=True)
    busy = f'{place.out} is being prepared by another process; wait for its end, or choose another folder.'
    with locked(place.hidden / 'lock', seconds=LOCK_SECONDS, words=busy):
        _open(place, settings)
        known = _find_known(place, synsets)
        maker.check_can_be(known.keys() | synsets.keys())
        records = dict(known)
        todo = [synsets[synset] for synset in synsets if synset not in known]
        if todo and (place.out / MANIFEST_FILE).exists():
            os.replace(place.out / MANIFEST_FILE, place.hidden / MANIFEST_FILE)  # with it, all would seem finished
        _tell(on_progress, 'synsets', len(records), len(records) + len(todo))
        for _, record in run_jobs((SynsetJob(one, place, settings) for one in todo), workers):
            records[record.synset] = record
            _tell(on_progress, 'synsets', len(records), len(known) + len(todo))
        classes = sorted(synset for synset, record in records.items() if record.is_class)
        kept = None if maker.has_tree else _tree_of_before(place, classes)
        report = _report(
            [records[synset] for synset in sorted(records)], release, settings, others,
            has_tree=maker.has_tree or kept is not None)
        try:
            write_file(place.out / REPORT_FILE, report.to_json())
            class_tree = maker.make(classes, place.out / REPORT_FILE) or kept
            if class_tree is None:
                (place.out / TREE_FILE).unlink(missing_ok=True)
            else:
                write_class_tree(class_tree, place.out / TREE_FILE)
            are_others = _write_manifest(place, classes)
        except OSError as error:
            raise OSError(
                f'cannot write the lists in {place.out} ({cut(str(error))}); all pictures are there, run it again to '
                f'go on.') from error
        shutil.rmtree(place.unfinished, ignore_errors=True)
        if are_others and not shards:
            _logger.warning(
                '%s has the pictures of before; delete it, or have it made again.', place.out / SHARDS_FOLDER)
        if shards:
            _write_shards(place, classes, class_tree, images_per_shard, workers, on_progress)
    return report


def _check_settings(
        release: str, resize: str, min_images: int, tree: object, is_a: object, words: object,
) -> None:
    check_choice(release=release, choices=(*RELEASES, CUSTOM))
    check_choice(resize=resize, choices=RESIZE)
    check_not_negative(min_images=min_images)
    if release != CUSTOM and min_images != MIN_IMAGES:
        raise ValueError(
            f'min_images must be {MIN_IMAGES} for the {RELEASES[release].classes} classes of {release}, got '
            f'{min_images}; take release={CUSTOM!r} for another number.')
    if tree is not None and is_a is not None:
        raise ValueError('tree and is_a must not both be given: either is a tree.')
    if words is not None and is_a is None:
        raise ValueError('words needs is_a: a tree file has its own descriptions.')


def _check_out(place: Workplace) -> None:
    if place.out.exists() and not (place.hidden / 'settings.json').exists():
        if others := sorted(name for name in os.listdir(place.out) if name != place.hidden.name):
            raise FileExistsError(
                f'{place.out} has other things in it ({few(map(shown, others), len(others))}); choose a new folder.')


def _open(place: Workplace, settings: Settings) -> None:
    """Make the folders, or see that they are of these settings."""
    content, path = json.dumps(asdict(settings)), place.hidden / 'settings.json'
    if path.exists() and (there := path.read_text(encoding='utf-8')) != content:
        raise FileExistsError(
            f'{place.out} was made with other settings, {there} where {content} are asked for; choose another folder, '
            f'or delete it.')
    if not path.exists():
        write_file(path, content)  # first: without it, a folder with anything in it is someone else's
    splits = SPLITS if settings.val_images else SPLITS[:1]  # an empty folder would be a split without pictures
    for folder in (*(place.out / split for split in splits), place.records):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place.unfinished, ignore_errors=True)
    for folder in (place.out, place.hidden, place.records):
        for leftover in folder.glob(LEFTOVERS):
            leftover.unlink()


def _find_known(place: Workplace, synsets: Mapping[str, SynsetSource]) -> dict[str, SynsetRecord]:
    """The finished synsets; one that is not whole any more, or whose source is another, is left out."""
    known = {}
    lost = []
    for path in sorted(place.records.glob('n*.json')):
        source = synsets.get(path.stem)
        try:
            record = SynsetRecord.read(path)
        except ValueError:
            if source is None:
                raise
            continue  # as a power cut leaves it
        synset = record.synset
        counts = [_count(place.folder(split, synset)) for split in SPLITS]
        if counts != [record.train, record.val]:
            if source is None:
                lost.append(synset)
        elif source is None or not record.is_out_of_date(source):
            known[synset] = record
    if lost:
        raise FileNotFoundError(
            f'{place.out} has lost pictures of {len(lost)} synsets that are not in source: {few(lost, len(lost))}; '
            f'bring these back to have them made again.')
    return known


def _count(folder: Path) -> int:
    return sum(1 for name in os.listdir(folder) if not name.startswith('.')) if folder.is_dir() else 0


def _tree_of_before(place: Workplace, classes: list[str]) -> ClassTree | None:
    """What an earlier run has written, if it fits."""
    try:
        tree = read_class_tree(place.out / TREE_FILE)
    except (CheckpointError, FileNotFoundError):
        return None
    return tree if list(tree.class_names) == classes else None


def _write_manifest(place: Workplace, classes: list[str]) -> bool:
    """Put the synsets' lines together; whether there are shards and they are of another manifest."""
    path, old = place.out / MANIFEST_FILE, place.hidden / MANIFEST_FILE
    earlier = path if path.exists() else old
    before = hash_file(earlier) if earlier.exists() and (place.out / SHARDS_FOLDER).exists() else ''
    with whole_file(path) as manifest:
        for split in SPLITS:
            for synset in classes:
                if place.part(split, synset).exists():
                    manifest.write(place.part(split, synset).read_bytes())
    old.unlink(missing_ok=True)
    return bool(before) and hash_file(path) != before


def _report(
        records: list[SynsetRecord], release: str, settings: Settings, others: list[str], *, has_tree: bool,
) -> In21kReport:
    return In21kReport(
        release, asdict(settings),
        {record.synset: (record.found, record.train, record.val) for record in records if record.is_class},
        {record.synset: record.found for record in records if not record.is_class},
        tuple(
            omission._replace(file=f'{record.synset}/{omission.file}')
            for record in records for omission in record.omissions),
        {record.synset: record.damage for record in records if record.damage},
        tuple(others), has_tree)


def _write_shards(
        place: Workplace, classes: list[str], tree: ClassTree | None, images_per_shard: int, workers: int,
        on_progress: Callable[[str, int, int], None] | None,
) -> None:
    folder = place.out / SHARDS_FOLDER
    for split in SPLITS:
        if any(place.part(split, synset).exists() for synset in classes):
            write_shards(
                read_split(place.out, split, labels=classes), folder, split=split, images_per_shard=images_per_shard,
                seed=SHARDS_SEED, workers=workers, check_images=False,  # each has just been written
                on_progress=lambda done, total: _tell(on_progress, split, done, total))
    if tree is not None:
        write_class_tree(tree, folder / TREE_FILE)


def _tell(on_progress: Callable[[str, int, int], None] | None, what: str, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(what, done, total)
