"""What the cards of the catalogue's weights say, section by section."""
import math
from collections.abc import Iterator

from timm.data import ImageNetInfo

from timm_miil import catalog
from timm_miil.hub._card_subject import Subject
from timm_miil.hub._card_text import as_code, as_text, loading_code
from timm_miil.models.download import name_hash

__all__ = ['conversion', 'details', 'intended_use', 'limits', 'remarks', 'results', 'summary', 'word_code']

NAMED_LABELS = 12
WORD_DIMS = 300
ORIGINS = {'paper': 'the authors', 'measured': 'measured by us'}
HUB, GITHUB, ARXIV = 'https://huggingface.co', 'https://github.com', 'https://arxiv.org/abs'


def summary(subject: Subject) -> Iterator[str]:
    """What these weights are, and where they come from."""
    entry = subject.entry
    if entry.file is not None:
        yield ' '.join(map(as_text, entry.notes))
        return
    has_count = subject.num_classes is not None and not subject.gives_words
    count = f' with {_number(subject.num_classes or 0)} classes' if has_count else ''
    paper = f'[{as_text(subject.paper.title)}]({ARXIV}/{subject.paper.arxiv})'
    what = (
        f'{as_code(subject.architecture)} for {subject.kind} classification{count}, trained on '
        f'{subject.data_set.title}.')
    if entry.url is None:
        yield f'{what} Its network or its making is described in {paper}.'
    else:
        yield (
            f'{what} The authors of {paper} published {"weights" if _is_in_doubt(subject) else "these weights"} as '
            f'{as_code(entry.file_name or "")}{_converted_from(subject)}')
    if entry.hf_hub_id is not None and not subject.is_converted:
        yield (
            f'They are on the Hub as [{entry.hf_hub_id}]({HUB}/{entry.hf_hub_id}), whose own card is the one to read '
            f'first; nothing is hosted a second time.')
    elif entry.licence is None:
        yield f'**These weights must not be published again**: {entry.why_not_publish}.'


def details(subject: Subject) -> Iterator[tuple[str, str]]:
    """Name and value of every fact, for a list."""
    entry = subject.entry
    yield 'Model type', f'{subject.kind} classification of {subject.data_set.items}, and features'
    yield 'Architecture', _architecture(subject)
    if entry.source_architecture is not None:
        yield "Authors' name of the network", as_code(entry.source_architecture)
    yield 'Head', _head(subject)
    yield 'Parameters', (
        f'{subject.num_params / 1e6:.2f} M' if subject.num_params is not None
        else as_text(
            subject.unsettled.num_params
            or 'not known until the file is opened, as they depend on its number of classes, which is not published'))
    yield 'Input', _input(entry)
    yield 'Preprocessing', preprocessing(entry)
    yield 'Classes', _classes(subject)
    yield 'Data set', (
        f'{_linked(subject.data_set.title, subject.data_set.homepage)}: {as_text(subject.data_set.contents)}')
    if entry.base is not None:
        base = catalog.weight(entry.base)
        yield 'Fine-tuned from', _linked(f'`{base.name}`', base.hf_hub_id and f'{HUB}/{base.hf_hub_id}')
    yield 'Paper', f'{as_text(subject.paper.title)}, [arXiv:{subject.paper.arxiv}]({ARXIV}/{subject.paper.arxiv})'
    if entry.url is not None:
        yield 'Published file', (
            f'[{entry.file_name}]({entry.url}), linked in {as_code(entry.published_in or "")} of '
            f'[{entry.source_repo}]({GITHUB}/{entry.source_repo})')
        if entry.sha256 is not None:
            yield 'SHA-256 of that file', as_code(entry.sha256)
    if subject.source_sha256 is not None:
        yield 'Converted from', _source(subject)
    yield 'Licence', _licence(subject)


def _is_in_doubt(subject: Subject) -> bool:
    """Whether a file was converted that is not known to be the published one."""
    return (
        subject.source_sha256 is not None and not subject.is_published_file
        and (subject.is_published_file is False or subject.source_name != subject.entry.url))


def _converted_from(subject: Subject) -> str:
    """How the sentence about the published file ends."""
    if not subject.is_converted:
        return '.'
    if subject.is_published_file is False:
        return '. **What is here was converted from another file than that**, as its SHA-256 shows.'
    if _is_in_doubt(subject):
        return '; what is here was converted to what timm loads, from a file that was given as that one.'
    return '; here they are converted to what timm loads.'


def _source(subject: Subject) -> str:
    """Which file was converted, and what the catalogue knows of it."""
    entry, digest = subject.entry, subject.source_sha256 or ''
    begins = name_hash(entry.file_name or '')
    if subject.is_published_file:
        known = 'which the catalogue knows as that of the published file'
    elif subject.is_published_file is False:
        known = 'which is not that of the published file'
    elif begins and digest.startswith(begins):
        known = 'which the catalogue does not know; it begins as the name of the published file says'
    elif begins:
        known = f'which the catalogue does not know; by its name, that of the published file begins with `{begins}`'
    else:
        known = 'which the catalogue does not know, as it has none to compare it with'
    if subject.source_name is not None and subject.source_name == entry.url:
        name = 'that file, as it was downloaded from there,'
    else:
        name = f'{as_code(subject.source_name)}, a file' if subject.source_name else 'a file'
    return f'{name} with the SHA-256 {as_code(digest)}, {known}'


def _head(subject: Subject) -> str:
    """What scores the classes: of the network, where it is known, as a name can mislead."""
    if subject.unsettled.head is not None:
        return as_text(subject.unsettled.head)
    if subject.architecture.endswith('_bottleneck'):
        return 'two linear layers on pooled features, with 512 numbers between them'
    is_fc = subject.entry.head == 'fc'
    return catalog.HEADS['ml_decoder' if is_fc and subject.architecture.startswith('mldecoder') else subject.entry.head]


def _architecture(subject: Subject) -> str:
    text = as_code(subject.architecture)
    if subject.has_network:
        text += ' of timm-miil' if subject.is_ours else ' of timm'
    if subject.model_args:
        text += ' with ' + ', '.join(as_code(f'{key}={value!r}') for key, value in sorted(subject.model_args.items()))
    if subject.architecture != subject.entry.architecture:
        text += f'; the catalogue calls it {as_code(subject.entry.architecture)}, but the tensors of the file decide'
    if subject.unsettled.architecture is not None:
        text += f', {as_text(subject.unsettled.architecture)}'
    return text


def _input(entry: catalog.Weights) -> str:
    channels, height, width = entry.input_size
    size = f'{channels} x {height} x {width}'
    return size if entry.frames is None else f'{entry.frames} pictures of {size}'


def preprocessing(entry: catalog.Weights) -> str:
    """What a picture goes through before the network, in words."""
    _, height, width = entry.input_size
    if entry.crop_pct is None and entry.mean is None:
        return 'not published: the code uses what timm assumes for the network'
    if entry.crop_pct is None:
        resize = 'how pictures are resized is not published'
    elif entry.crop_mode == 'squash':
        resize = f'resized to {height} x {width} pixels whatever its shape, without a crop'
    else:
        resize = (
            f'shorter side resized to {math.floor(height / entry.crop_pct)} pixels, then the middle {height} x {width} '
            f'cut out')
    filtering = f' ({entry.interpolation})' if entry.interpolation and entry.crop_pct is not None else ''
    if entry.mean is None or entry.std is None:
        values = 'how values are normalised is not published: the code uses what timm assumes for the network'
    elif set(entry.mean) == {0.0} and set(entry.std) == {1.0}:
        values = 'values divided by 255 and not normalised any further'
    else:
        values = (
            f'values divided by 255, then normalised with mean {_listed(entry.mean)} and standard deviation '
            f'{_listed(entry.std)}')
    return f'{resize}{filtering}; {values}'


def _classes(subject: Subject) -> str:
    if subject.gives_words:
        columns = (subject.num_classes or 0) // WORD_DIMS
        return (
            f'any that have a word vector; the output is a matrix of {WORD_DIMS} x {columns}, whose {columns} columns '
            f'are vectors of {WORD_DIMS} numbers')
    open_count = as_text(subject.unsettled.num_classes) if subject.unsettled.num_classes else None
    if subject.num_classes is None:
        return open_count or 'as many as the file has; the number is not published'
    count = _number(subject.num_classes) + (f', {open_count}' if open_count else '')
    if subject.timm_names is not None:
        info = ImageNetInfo(subject.timm_names)
        names = [
            f'{as_code(name)} ({as_text(info.index_to_description(index).split(",")[0])})'
            for index, name in enumerate(info.label_names()[:NAMED_LABELS])]
        where = f"timm's list `{subject.timm_names}`"
    elif subject.label_names is not None:
        names = list(map(as_code, subject.label_names[:NAMED_LABELS]))
        where = f"timm-miil's label set `{subject.entry.labels}`" if not subject.is_converted else '`config.json`'
    else:
        return count
    listed = ', '.join(names)
    rest = subject.num_classes - NAMED_LABELS
    return f'{count}: {listed}' + (f', and {_number(rest)} more in {where}' if rest > 0 else '')


def _licence(subject: Subject) -> str:
    entry = subject.entry
    if entry.licence is None:
        return (
            'unknown: the repository states none. Without one only the authors may pass these weights on; ask them '
            'before you do anything with a copy')
    if entry.source_repo is None:
        return f'{entry.licence}' + (', as its repository on the Hub says' if entry.hf_hub_id else '')
    return f'{entry.licence}, that of the repository that publishes the file'


def intended_use(subject: Subject) -> str:
    """What it is good for, and what it is not for."""
    data_set = subject.data_set
    if not subject.entry.timm.loadable:
        use = 'Research on architecture search: these are the shared weights of all networks of a search space.'
    elif subject.gives_words:
        use = 'Scoring how well words fit a picture, also words that were not trained on, given their word vectors.'
    elif data_set.use is not None:
        use = as_text(data_set.use)
    else:
        what = 'all classes' if subject.is_multi_label else 'the one class'
        use = f'Naming {what} of {data_set.title} that {data_set.items} show.'
    return (
        f'{use} It is not for decisions about people, nor for anything where a wrong or missing name does harm and '
        f'nobody looks twice.')


def limits(subject: Subject) -> Iterator[str]:
    """What one should know before trusting it: of the data, and of the weights."""
    of_weights = list(_limits_of_weights(subject))
    for what, sentences in (('data', map(as_text, subject.data_set.limits)), ('weights', of_weights)):
        listed = '\n'.join(f'- {sentence}' for sentence in sentences)
        if listed:
            yield f'Of the {what}:\n\n{listed}'


def _limits_of_weights(subject: Subject) -> Iterator[str]:
    entry = subject.entry
    if entry.timm.loadable and not subject.gives_words:
        if subject.is_multi_label:
            yield (
                'Its confidences are not calibrated, and 0.5 is only a place to start: `timm-miil tune` finds a '
                'threshold for each class on pictures of yours.')
        else:
            yield 'Every input gets one of the classes, also one that shows none of them.'
    if subject.label_names is None and not subject.gives_words and subject.timm_names is None:
        yield 'The names of the classes in the order of the output are not known here.'
    if entry.mean is None or entry.crop_pct is None:
        yield 'The preprocessing is not published: try it on pictures whose class you know before you rely on it.'
    if entry.hf_hub_id is not None:
        yield "The code prepares pictures as timm's configuration says, which can differ from what is said above."
    if subject.is_published_file is False:
        yield 'The file that was converted is not the published one: the results below need not be its own.'


def remarks(subject: Subject) -> str | None:
    """What else is known of the file, as a list; None if nothing is."""
    if subject.entry.file is not None or not subject.entry.notes:
        return None
    return '\n'.join(f'- {as_text(note)}' for note in subject.entry.notes)


def results(subject: Subject) -> Iterator[str]:
    """Its numbers, and how they were obtained."""
    entry, title = subject.entry, subject.data_set.title
    own = [metric for metric in entry.metrics if metric.setting is None]
    if own:
        yield '\n'.join([
            '| metric | measured on | value | whose number |', '|---|---|---|---|',
            *(f'| {catalog.METRICS[metric.name]} | {metric.dataset or title} | {metric.value:.2f} | '
              f'{ORIGINS[metric.origin]} |' for metric in own)])
    else:
        yield 'No number for these very weights is published, as far as we know, and nobody here has measured one.'
    sources = dict.fromkeys(metric.source for metric in own if metric.source is not None)
    if sources:
        how = ', prepared as said above' if entry.crop_pct is not None and entry.mean is not None else ''
        yield (
            f'The authors measured it, on the part of {title} that they evaluate on{how}. It was read from the '
            f'{" and the ".join(map(as_text, sources))}, and has not been measured again here.')
    for command, date, hardware in dict.fromkeys(
            (metric.command, metric.date, metric.hardware) for metric in own if metric.command is not None):
        yield f'`{command}` makes the data, trains and measures again what was measured on {date} ({hardware}).'
    for metric in entry.metrics:
        if metric.setting is not None:
            where = catalog.data_set(metric.dataset).title if metric.dataset else title
            yield (
                f'Another number, which is not of these weights but of a network that was {metric.setting} from them '
                f'on {where}: {metric.value:.2f} ({catalog.METRICS[metric.name]}), by the '
                f'{as_text(metric.source or "")}.')


def conversion(subject: Subject) -> str | None:
    """What converting does to the file; None where nothing is converted."""
    entry = subject.entry
    if entry.url is None or not subject.has_network or entry.hf_hub_id is not None and not subject.is_converted:
        return None
    done = 'made these files of' if subject.is_converted else 'makes a folder that timm loads of'
    which = 'the original file' if subject.source_sha256 is None else 'the file said above'
    return ' '.join([
        f'`timm-miil convert {entry.name}` {done} {which}. It runs none of the code that such files can '
        f'hold, gives every tensor its name in timm, refuses a file with a tensor too many or too few, and writes '
        f'safetensors. Nothing is trained or rounded.', *map(as_text, entry.conversion)])


def word_code(source: str, *, is_ours: bool) -> str:
    """Python that gives the vectors of a picture, to be compared with those of words."""
    return loading_code(source, is_ours=is_ours) + f'''\
    vectors = model(transform(picture).unsqueeze(0))[0].reshape({WORD_DIMS}, -1)

# Each column is a word vector. A word fits as well as the best of them says: (word_vector @ vectors).max()
print(vectors.shape)
'''


def _linked(text: str, url: str | None) -> str:
    return f'[{text}]({url})' if url else text


def _listed(numbers: tuple[float, ...]) -> str:
    return '(' + ', '.join(map(str, numbers)) + ')'


def _number(count: int) -> str:
    return f'{count:,}'.replace(',', ' ') if count >= 10_000 else str(count)
