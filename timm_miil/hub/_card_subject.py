"""What a card of the catalogue's weights is about: the entry, and what is known of a converted file."""
import dataclasses
from collections.abc import Mapping
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from timm_miil import catalog

__all__ = ['Subject']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What a card is about.

    Attributes:
        entry: Its entry of the catalogue.
        paper: Paper of the entry.
        data_set: Data set of the entry.
        repo_id: Repository on the Hub that the card is for, if it is for one.
        is_converted: Whether the card is of a file of our own making, and not of the published one.
        architecture: Name of the network in timm's registry, of the file where it is known.
        model_args: Further arguments of the network.
        num_classes: Number of classes; None when only the file can tell, as the next.
        num_params: Number of parameters.
        label_names: Names of the classes; None when they are not known.
        has_network: Whether a registered network holds the weights.
        is_ours: Whether the network is of this package.
        is_named: Whether `timm.create_model(name, pretrained=True)` knows the weights.
        source_sha256: SHA-256 of the file that was converted; None when nobody said.
        source_name: Its name or URL.
    """

    entry: catalog.Weights
    paper: catalog.Paper
    data_set: catalog.DataSet
    repo_id: str | None
    is_converted: bool
    architecture: str
    model_args: Mapping[str, Any]
    num_classes: int | None
    num_params: int | None
    label_names: tuple[str, ...] | None
    has_network: bool
    is_ours: bool
    is_named: bool
    source_sha256: str | None
    source_name: str | None

    @property
    def is_multi_label(self) -> bool:
        """Whether the classes are independent."""
        return self.entry.problem_type == 'multi_label_classification'

    @property
    def kind(self) -> str:
        """'multi-label' or 'single-label'."""
        return 'multi-label' if self.is_multi_label else 'single-label'

    @property
    def timm_names(self) -> str | None:
        """timm's name of the list of these very classes, if it has one."""
        subset = infer_imagenet_subset({'num_classes': self.num_classes})
        if subset is None or subset != self.data_set.timm_names:
            return None
        is_timms = self.label_names is None or self.label_names == tuple(ImageNetInfo(subset).label_names())
        return subset if is_timms else None

    @property
    def gives_words(self) -> bool:
        """Whether the output lies in the space of word vectors and is no score of a class."""
        return self.entry.head == 'sdl_embedding'

    @property
    def unsettled(self) -> catalog.Unsettled:
        """What is still open: nothing of a file that was converted."""
        return catalog.Unsettled() if self.is_converted else self.entry.unsettled

    @property
    def is_published_file(self) -> bool | None:
        """Whether the converted file is the published one; None when that cannot be told."""
        if self.source_sha256 is None or self.entry.sha256 is None:
            return None
        return self.source_sha256 == self.entry.sha256
