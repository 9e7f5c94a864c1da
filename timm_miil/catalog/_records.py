"""The records of the catalogue: frozen, typed, without behaviour beyond what follows from their facts."""
import dataclasses

__all__ = [
    'CROP_MODES', 'HEADS', 'INTERPOLATIONS', 'METRICS', 'ORIGINS', 'PROBLEM_TYPES', 'DataSet', 'LabelSet', 'Metric',
    'Paper', 'TimmFacts', 'Unsettled', 'Weights',
]

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'lanczos')      # timm's words
CROP_MODES = ('center', 'squash', 'border')                         # timm's words
ORIGINS = ('paper', 'measured')
PROBLEM_TYPES = ('multi_label_classification', 'single_label_classification')

HEADS = {
    'fc': 'one linear layer on pooled features',
    'ml_decoder': 'ML-Decoder: cross-attention of one query a group of classes',
    'sdl_embedding': 'linear layer to several vectors in word-vector space, one score a word',
    'zero_shot_ml_decoder': 'ML-Decoder whose queries are embeddings of the labels, one score a label',
}

METRICS = {
    'mAP': 'mean over classes of average precision, percent',
    'top1': 'top-1 accuracy, percent',
    'semantic_top1': 'top-1 accuracy averaged over the levels of the label tree, percent',
    'unseen_mAP': 'mean over labels that were not trained on of average precision, percent',
}

TIMM_NAMESPACE = 'timm'                                             # of timm's own repositories on the Hub

_LATEX = str.maketrans({char: f'\\{char}' for char in '&%$#_'})


@dataclasses.dataclass(frozen=True, slots=True)
class Paper:
    """A publication.

    Attributes:
        id: Short name; also the key of its BibTeX entry.
        title: Title as published.
        authors: Full names in the published order.
        year: Year of the venue, or of the first arXiv version when there is none.
        arxiv: arXiv identifier without a version, such as '2111.12933'.
        venue: Conference it appeared at; None when it is a preprint or we are not sure.
        repository: The authors' code, a URL.
        code_licence: SPDX identifier of that code; None when the repository states none.
    """

    id: str
    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str | None = None
    venue: str | None = None
    repository: str | None = None
    code_licence: str | None = None

    @property
    def bibtex(self) -> str:
        """A BibTeX entry made of the facts above; capitals of the title are protected."""
        fields = {
            'title': f'{{{self.title.translate(_LATEX)}}}',
            'author': ' and '.join(self.authors).translate(_LATEX),
            'booktitle': self.venue and self.venue.translate(_LATEX),
            'year': str(self.year),
            'eprint': self.arxiv,
            'archivePrefix': self.arxiv and 'arXiv',
            'url': self.arxiv and f'https://arxiv.org/abs/{self.arxiv}',
        }
        lines = [f'  {key} = {{{value}}},' for key, value in fields.items() if value is not None]
        return '\n'.join([f'@{"inproceedings" if self.venue else "misc"}{{{self.id},', *lines, '}'])


@dataclasses.dataclass(frozen=True, slots=True)
class LabelSet:
    """The names of a data set's classes.

    Attributes:
        name: Name of the set, such as 'coco_80'.
        labels: One name a class, in the order of the logits.
        source: Where names and order were taken from.
        licence: Terms of that source; None when it states none.
    """

    name: str
    labels: tuple[str, ...]
    source: str
    licence: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class DataSet:
    """Pictures or clips that weights were trained on.

    Attributes:
        name: Short name, such as 'ms-coco-2014'; `Weights.dataset` names it.
        title: What people call it.
        contents: What is in it: a phrase that ends a sentence.
        limits: What it does not show, or shows wrongly, one sentence a line.
        items: What its inputs are, in the plural.
        use: What its networks are good for, a sentence; None for naming its classes.
        timm_names: timm's name of the list of its classes, for `timm.data.ImageNetInfo`; None when timm has none.
        hub_id: Id of its own repository on the Hub; None when it has none, or we are not sure.
        homepage: Its authors' page.
    """

    name: str
    title: str
    contents: str
    limits: tuple[str, ...]
    items: str = 'pictures'
    use: str | None = None
    timm_names: str | None = None
    hub_id: str | None = None
    homepage: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """A number and where it comes from.

    Attributes:
        name: A key of `METRICS`, which says what is measured.
        value: In percent, in [0, 100].
        origin: One of `ORIGINS`: 'paper' when the authors published it, 'measured' when we did.
        source: The table or file it was read from; only with origin 'paper'.
        dataset: Data it was measured on; None means the validation part of the weights' own data set.
        setting: What happened to the weights before measuring, such as 'fine-tuned'; None means nothing.
        command: Command that reproduces it; only with origin 'measured', as the next two.
        hardware: Machine it ran on.
        date: Day it ran, as YYYY-MM-DD.
    """

    name: str
    value: float
    origin: str
    source: str | None = None
    dataset: str | None = None
    setting: str | None = None
    command: str | None = None
    hardware: str | None = None
    date: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class TimmFacts:
    """What only timm needs to know of an architecture.

    Attributes:
        body: timm's name of the network that an architecture of ours is built on; None when there is none.
        first_conv: Dotted names of the input convolutions, which `in_chans` adapts.
        classifier: Dotted names of the modules that depend on the number of classes.
        pool_stride: Input pixels per pixel of the last feature map; None when there is no such map.
        fixed_input_size: Whether the network takes its own input size only.
        loadable: Whether a network of the timm kind can hold the weights; not so for a search supernet.
    """

    body: str | None = None
    first_conv: tuple[str, ...] = ()
    classifier: tuple[str, ...] = ()
    pool_stride: int | None = None
    fixed_input_size: bool = False
    loadable: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Unsettled:
    """What the published facts leave open and the file settles: phrases that stand until somebody has converted it.

    Attributes:
        architecture: What may be another network, added to its name.
        head: What the head is, in the place of the words of `HEADS`.
        num_params: Why the number of parameters is not known.
        num_classes: What is known of the number of classes, or where a number that is not stated is from.
    """

    architecture: str | None = None
    head: str | None = None
    num_params: str | None = None
    num_classes: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One file of weights.

    Attributes:
        name: 'architecture.tag', unique in the catalogue.
        family: Name of the catalogue file that holds the entry.
        paper: Id of the paper it belongs to.
        dataset: Data set of the last training stage, a key of `timm_miil.catalog.data_sets`.
        problem_type: One of `PROBLEM_TYPES`: whether the classes are independent or exclusive.
        num_classes: Size of the output; None when only the file can tell.
        num_params: Number of parameters of the network with this many classes; None when only the file can tell.
        input_size: (channels, height, width) of one picture.
        frames: Pictures of one clip or album; None for single pictures.
        mean: Per-channel mean subtracted from pictures in [0, 1]; None when unknown, as the next four.
        std: Per-channel divisor after that.
        interpolation: One of `INTERPOLATIONS`.
        crop_pct: Input size over resized size, in (0, 1].
        crop_mode: One of `CROP_MODES`; 'squash' resizes both sides, ignoring the aspect ratio.
        head: A key of `HEADS`.
        num_groups: Queries of an ML-Decoder head; None when only the file can tell.
        labels: Name of the label set in class order; None when we ship none.
        metrics: What is known of its quality, the most telling first.
        url: Where the authors published the file.
        file: Path of a file shipped in this package, relative to the package.
        sha256: Checksum of the file at `url`, 64 hexadecimal digits; None until somebody has had it in hand.
        base: Name of the entry whose weights these were fine-tuned from; None when we do not know, or there is none.
        hf_hub_id: Full id of the Hub repository with the converted weights; None until published.
        source_repo: 'owner/name' on GitHub of the authors' repository.
        published_in: File of that repository that gives the URL.
        source_architecture: What the authors call the network, when it is not `architecture`.
        timm_tag: timm's 'architecture.tag' for this very file; None when timm does not have it.
        licence: SPDX identifier of the source repository's licence; None when it has none.
        conversion: What converting the file to timm's layout changes beyond the names of tensors, a sentence each.
        notes: What a user should know, a sentence each, true of the published file and of a converted one.
        unsettled: What the published facts leave open.
        remarks: What a maintainer should know, a sentence each; cards leave it out.
        timm: What timm needs to know of the architecture.
    """

    name: str
    family: str
    paper: str
    dataset: str
    input_size: tuple[int, int, int]
    head: str
    problem_type: str
    num_classes: int | None = None
    num_params: int | None = None
    frames: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    num_groups: int | None = None
    labels: str | None = None
    metrics: tuple[Metric, ...] = ()
    url: str | None = None
    file: str | None = None
    sha256: str | None = None
    base: str | None = None
    hf_hub_id: str | None = None
    source_repo: str | None = None
    published_in: str | None = None
    source_architecture: str | None = None
    timm_tag: str | None = None
    licence: str | None = None
    conversion: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unsettled: Unsettled = Unsettled()
    remarks: tuple[str, ...] = ()
    timm: TimmFacts = TimmFacts()

    @property
    def architecture(self) -> str:
        """Registry name of the network: the name up to the dot."""
        return self.name.partition('.')[0]

    @property
    def tag(self) -> str:
        """Which weights of the architecture these are: the name after the dot."""
        return self.name.partition('.')[2]

    @property
    def file_name(self) -> str | None:
        """Last part of the URL, else of the packaged path; None when the Hub alone has it."""
        where = self.url or self.file
        return where.rpartition('/')[2] if where else None

    @property
    def why_not_publish(self) -> str | None:
        """Why a copy must not go to the Hub: a sentence without its full stop; None when one may go there."""
        if self.hf_hub_id is not None and self.hf_hub_id.startswith(f'{TIMM_NAMESPACE}/'):
            return f'timm has them on the Hub already, as {self.hf_hub_id}, and nothing is hosted twice'
        if self.licence is None:
            return (
                f'{self.source_repo or "their source"} states no licence, which leaves redistribution to its '
                f'authors alone')
        if not self.timm.loadable:
            return 'no network of the timm kind can hold them'
        return None

    @property
    def may_be_published(self) -> bool:
        """Whether anyone may put a copy on the Hub."""
        return self.why_not_publish is None
