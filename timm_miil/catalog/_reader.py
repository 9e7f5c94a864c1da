"""The reader of the catalogue's files: whatever it does not know is an error that names file, table and key.

Files, below one root folder (the package itself, except in tests):
`catalog/papers.toml`, `catalog/datasets.toml`, `catalog/labels.toml`, `catalog/labels/<name>.txt`,
`catalog/weights/<family>.toml`.

A family file has one table `[weights."architecture.tag"]` a file of weights. Facts of the whole family stand once
in `[defaults]`; an entry may say otherwise, and one with `inherit = false` takes none of them. `[defaults.metric]` does
the same for metrics, but for those that state their own origin. `[timm]` has the keys of `TimmFacts`, and
`[timm.<name>]` refines it for an architecture.
"""
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from timm_miil._checks import nearest
from timm_miil._errors import CatalogError
from timm_miil.catalog._records import (
    CROP_MODES, HEADS, INTERPOLATIONS, METRICS, ORIGINS, PROBLEM_TYPES, DataSet, LabelSet, Metric, Paper, TimmFacts,
    Unsettled, Weights,
)
from timm_miil.catalog._table import (
    ARXIV, CROP_PCT, DASHED, DATE, HTTPS, MEAN, MODULES, NAME, NAME_TAG, PACKAGED, PERCENT, REPO, SHA256, SHAPE, STD,
    TABLE, TABLES, TEXT, TEXTS, WHOLE, YEAR, YES_NO, Table, load, one_of,
)

__all__ = ['family_names', 'read_all_weights', 'read_data_sets', 'read_family', 'read_label_sets', 'read_papers']


def read_papers(root: Path) -> Mapping[str, Paper]:
    """Papers by id.

    Args:
        root: Folder with `catalog/papers.toml`.

    Raises:
        CatalogError: If the file is missing or wrong in any way.
    """
    file = root / 'catalog' / 'papers.toml'
    return MappingProxyType({id: _paper(id, Table(file, id, values)) for id, values in load(file).items()})


def _paper(id: str, table: Table) -> Paper:
    if NAME.convert(id) is None:
        raise CatalogError(f'{table.file}: [{id}]: got {id!r} as an id, expected {NAME.expected}.')
    paper = Paper(
        id=id,
        title=table.required('title', TEXT),
        authors=table.required('authors', TEXTS),
        year=table.required('year', YEAR),
        arxiv=table.optional('arxiv', ARXIV),
        venue=table.optional('venue', TEXT),
        repository=table.optional('repository', HTTPS),
        code_licence=table.optional('code_licence', TEXT),
    )
    table.close()
    return paper


def read_data_sets(root: Path) -> Mapping[str, DataSet]:
    """Data sets by name.

    Args:
        root: Folder with `catalog/datasets.toml`.

    Raises:
        CatalogError: If the file is missing or wrong in any way.
    """
    file = root / 'catalog' / 'datasets.toml'
    return MappingProxyType({name: _data_set(name, Table(file, name, values)) for name, values in load(file).items()})


def _data_set(name: str, table: Table) -> DataSet:
    if DASHED.convert(name) is None:
        raise CatalogError(f'{table.file}: [{name}]: got {name!r} as a name, expected {DASHED.expected}.')
    data_set = DataSet(
        name=name,
        title=table.required('title', TEXT),
        contents=table.required('contents', TEXT),
        limits=table.required('limits', TEXTS),
        items=table.optional('items', TEXT) or 'pictures',
        use=table.optional('use', TEXT),
        timm_names=table.optional('timm_names', TEXT),
        hub_id=table.optional('hub_id', REPO),
        homepage=table.optional('homepage', HTTPS),
    )
    table.close()
    return data_set


def read_label_sets(root: Path) -> Mapping[str, LabelSet]:
    """Label sets by name.

    Args:
        root: Folder with `catalog/labels.toml` and, for each of its tables, `catalog/labels/<name>.txt`, one
            label a line.

    Raises:
        CatalogError: If a file is missing or wrong in any way, or a list of labels has no table.
    """
    file, folder = root / 'catalog' / 'labels.toml', root / 'catalog' / 'labels'
    tables = load(file)
    for path in sorted(folder.glob('*')):
        if path.suffix != '.txt' or path.stem not in tables:
            raise CatalogError(f'{path}: got a file without a table in {file}, expected [{path.stem}] there.')
    return MappingProxyType(
        {name: _label_set(name, folder, Table(file, name, values)) for name, values in tables.items()})


def _label_set(name: str, folder: Path, table: Table) -> LabelSet:
    label_set = LabelSet(
        name=name,
        labels=_labels(folder / f'{name}.txt', table),
        source=table.required('source', TEXT),
        licence=table.optional('licence', TEXT),
    )
    table.close()
    return label_set


def _labels(path: Path, table: Table) -> tuple[str, ...]:
    try:
        labels = path.read_text(encoding='utf-8').removesuffix('\n').split('\n')
    except FileNotFoundError:
        raise CatalogError(
            f'{table.file}: [{table.name}]: got no file {path}, expected one label a line there.') from None
    except UnicodeDecodeError as error:
        raise CatalogError(f'{path}: got {error}, expected UTF-8.') from error
    for line, label in enumerate(labels, start=1):
        if TEXT.convert(label) is None or label in labels[:line - 1]:
            raise CatalogError(
                f'{path}: line {line}: got {label!r}, expected a label without outer blanks, only once.')
    return tuple(labels)


def family_names(root: Path) -> tuple[str, ...]:
    """Names of the family files below `root`, sorted."""
    return tuple(sorted(path.stem for path in (root / 'catalog' / 'weights').glob('*.toml')))


def read_all_weights(
        root: Path, papers: Mapping[str, Paper], label_sets: Mapping[str, LabelSet]) -> Mapping[str, Weights]:
    """The entries of all families by name; arguments as in `read_family`.

    Raises:
        CatalogError: If a file is wrong, or two families have an entry of the same name.
    """
    entries: dict[str, Weights] = {}
    for family in family_names(root):
        for name, entry in read_family(root, family, papers, label_sets).items():
            if name in entries:
                raise CatalogError(
                    f'{_family_file(root, family)}: [weights."{name}"]: got a name that the family '
                    f'{entries[name].family!r} has too, expected a name used once.')
            entries[name] = entry
    return MappingProxyType(entries)


def _family_file(root: Path, family: str) -> Path:
    return root / 'catalog' / 'weights' / f'{family}.toml'


def read_family(
        root: Path,
        family: str,
        papers: Mapping[str, Paper],
        label_sets: Mapping[str, LabelSet],
) -> Mapping[str, Weights]:
    """The entries of one family by name.

    Args:
        root: Folder with `catalog/weights/<family>.toml`; packaged files are looked for below it.
        family: Name of the file without its suffix.
        papers: Known papers; every entry cites one.
        label_sets: Known label sets; an entry may use one with as many labels as it has classes.

    Raises:
        CatalogError: If a file is missing or wrong in any way.
    """
    file = _family_file(root, family)
    top = Table(file, family, load(file))
    defaults = dict(top.optional('defaults', TABLE) or {})
    shared_metric = Table(file, 'defaults.metric', defaults.pop('metric', {}))
    shared = Table(file, 'defaults', defaults)
    timm_tables = top.optional('timm', TABLE) or {}
    tables = top.required('weights', TABLE)
    top.close()

    timm_facts = _timm_facts(file, timm_tables, architectures={name.partition('.')[0] for name in tables})
    entries = {}
    for name, values in tables.items():
        table = Table(file, f'weights."{name}"', values)
        if NAME_TAG.convert(name) is None:
            raise CatalogError(f'{file}: [{table.name}]: got {name!r}, expected {NAME_TAG.expected}.')
        inherits = table.optional('inherit', YES_NO) is not False
        if inherits:
            table.inherit(shared)
        entries[name] = _entry(
            name, family, table,
            metrics=_metrics(table, shared_metric if inherits else None),
            timm_facts=timm_facts[name.partition('.')[0]],
        )
        table.close()
        _check_entry(entries[name], table, root, papers, label_sets)
    return MappingProxyType(entries)


def _timm_facts(file: Path, values: Mapping[str, object], architectures: set[str]) -> dict[str, TimmFacts]:
    """Facts for timm by architecture: the family's, refined by the table of the architecture."""
    shared = Table(file, 'timm', {key: value for key, value in values.items() if not isinstance(value, dict)})
    refined = {key: value for key, value in values.items() if isinstance(value, dict)}
    for key in refined:
        if key not in architectures:
            raise CatalogError(f'{file}: [timm.{key}]: unknown architecture; {nearest(key, architectures)}')
    facts = {}
    for architecture in sorted(architectures):
        table = Table(file, f'timm.{architecture}', refined.get(architecture, {}))
        table.inherit(shared)
        facts[architecture] = TimmFacts(
            body=table.optional('body', NAME),
            first_conv=table.optional('first_conv', MODULES) or (),
            classifier=table.optional('classifier', MODULES) or (),
            pool_stride=table.optional('pool_stride', WHOLE),
            fixed_input_size=table.optional('fixed_input_size', YES_NO) or False,
            loadable=table.optional('loadable', YES_NO) is not False,
        )
        table.close()
    return facts


def _metrics(entry: Table, shared: Table | None) -> tuple[Metric, ...]:
    metrics = []
    for index, values in enumerate(entry.optional('metrics', TABLES) or ()):
        table = Table(entry.file, f'{entry.name}.metrics[{index}]', values)
        if shared is not None and 'origin' not in table:
            table.inherit(shared)
        metrics.append(_metric(table))
    return tuple(metrics)


def _metric(table: Table) -> Metric:
    origin = table.required('origin', one_of(ORIGINS))
    measured = origin == 'measured'
    metric = Metric(
        name=table.required('name', one_of(METRICS)),
        value=table.required('value', PERCENT),
        origin=origin,
        source=None if measured else table.required('source', TEXT),
        dataset=table.optional('dataset', TEXT),
        setting=table.optional('setting', TEXT),
        command=table.required('command', TEXT) if measured else None,
        hardware=table.required('hardware', TEXT) if measured else None,
        date=table.required('date', DATE) if measured else None,
    )
    table.close()
    return metric


def _unsettled(entry: Table) -> Unsettled:
    table = Table(entry.file, f'{entry.name}.unsettled', entry.optional('unsettled', TABLE) or {})
    unsettled = Unsettled(
        architecture=table.optional('architecture', TEXT),
        head=table.optional('head', TEXT),
        num_params=table.optional('num_params', TEXT),
        num_classes=table.optional('num_classes', TEXT),
    )
    table.close()
    return unsettled


def _entry(
        name: str,
        family: str,
        table: Table,
        *,
        metrics: tuple[Metric, ...],
        timm_facts: TimmFacts,
) -> Weights:
    return Weights(
        name=name,
        family=family,
        paper=table.required('paper', TEXT),
        dataset=table.required('dataset', TEXT),
        problem_type=table.required('problem_type', one_of(PROBLEM_TYPES)),
        num_classes=table.optional('num_classes', WHOLE),
        num_params=table.optional('num_params', WHOLE),
        input_size=table.required('input_size', SHAPE),
        frames=table.optional('frames', WHOLE),
        mean=table.optional('mean', MEAN),
        std=table.optional('std', STD),
        interpolation=table.optional('interpolation', one_of(INTERPOLATIONS)),
        crop_pct=table.optional('crop_pct', CROP_PCT),
        crop_mode=table.optional('crop_mode', one_of(CROP_MODES)),
        head=table.required('head', one_of(HEADS)),
        num_groups=table.optional('num_groups', WHOLE),
        labels=table.optional('labels', TEXT),
        metrics=metrics,
        url=table.optional('url', HTTPS),
        file=table.optional('file', PACKAGED),
        sha256=table.optional('sha256', SHA256),
        base=table.optional('base', NAME_TAG),
        hf_hub_id=table.optional('hf_hub_id', REPO),
        source_repo=table.optional('source_repo', REPO),
        published_in=table.optional('published_in', TEXT),
        source_architecture=table.optional('source_architecture', TEXT),
        timm_tag=table.optional('timm_tag', NAME_TAG),
        licence=table.optional('licence', TEXT),
        conversion=table.optional('conversion', TEXTS) or (),
        notes=table.optional('notes', TEXTS) or (),
        unsettled=_unsettled(table),
        remarks=table.optional('remarks', TEXTS) or (),
        timm=timm_facts,
    )


def _check_entry(
        entry: Weights,
        table: Table,
        root: Path,
        papers: Mapping[str, Paper],
        label_sets: Mapping[str, LabelSet],
) -> None:
    """What a key alone cannot show: names that must be known, facts that must agree."""
    if entry.paper not in papers:
        raise table.error('paper', f'a paper of papers.toml; {nearest(entry.paper, papers)}')
    if entry.labels is not None:
        if entry.labels not in label_sets:
            raise table.error('labels', f'a label set of labels.toml; {nearest(entry.labels, label_sets)}')
        count = len(label_sets[entry.labels].labels)
        if entry.num_classes != count:
            raise table.error('num_classes', f'{count}, as many as label set {entry.labels!r} has')
    if entry.url is None and entry.file is None and entry.hf_hub_id is None:
        raise table.error('url', 'a URL, unless file or hf_hub_id says where the weights are')
    if entry.url is not None:
        table.required('source_repo', REPO)
        table.required('published_in', TEXT)
    if entry.sha256 is not None and entry.url is None:
        raise table.error('sha256', 'no value, because there is no url whose file it could be of')
    if entry.file is not None and not (root / entry.file).is_file():
        raise table.error('file', f'a file of the package, which {root / entry.file} is not')
    for pair in (('mean', 'std'), ('crop_pct', 'crop_mode')):
        for one, other in (pair, pair[::-1]):
            if getattr(entry, one) is None and getattr(entry, other) is not None:
                raise table.error(one, f'a value, because {other} has one')
    if entry.num_groups is not None and entry.head != 'ml_decoder':
        raise table.error('num_groups', f"no value, because head is {entry.head!r} and not 'ml_decoder'")
