"""The table of a recipe that shares a classifier between teacher and student."""
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from timm_miil._checks import check_choice, check_positive, check_range

if TYPE_CHECKING:
    from timm_miil.train.recipe import Recipe

__all__ = ['SharingSettings']

SCHEMES = ('thkd', 'shkd', 'frozen_head')


@dataclass(frozen=True)
class SharingSettings:
    """A last layer that teacher and student share, arXiv:2201.06945; see `timm_miil.tasks.ClassifierSharingTask`.

    The weights of labels and of the teacher's logits, and the temperature, are those of the table `teacher`. Of the
    published schemes, 'kdth' is task 1, distill 1.5, head 0.02; 'crdth' is task 0.9, distill 1, head 0.02, contrast
    0.8; the last step of SH-KD is task 1, distill 1, contrast 0.8; the temperature is 4.

    Args:
        scheme: 'thkd', the teacher's last layer on the student; 'shkd', the student's on the teacher: the recipe's
            network is trained alone, in the folder 'student', then the network that `teacher` names with the last layer
            of the first, frozen, in the folder 'teacher', and the main training learns from that; or 'frozen_head',
            which is how that teacher is trained: all but the last layer learns, without a teacher.
        head_loss_weight: Weight of the divergence through the teacher's last layer.
        embedding_loss_weight: Weight of the embeddings' distance (KDE), summed over the batch.
        contrast_loss_weight: Weight of contrastive representation distillation (CRD).
        num_negatives: Pictures that each is contrasted with.
        adapter: Whether a linear layer that learns stands before a last layer of another network, for embeddings of
            other widths: before the student's on the teacher of 'shkd', and where head and embedding loss read the
            student's embedding.
        init_head: Whether the student's last layer starts as the teacher's.
    """
    scheme: str = 'thkd'
    head_loss_weight: float = 0.0
    embedding_loss_weight: float = 0.0
    contrast_loss_weight: float = 0.0
    num_negatives: int = 16384
    adapter: bool = False
    init_head: bool = False

    def __post_init__(self) -> None:
        check_choice(scheme=self.scheme, choices=SCHEMES)
        check_positive(num_negatives=self.num_negatives)
        check_range(
            low=0.0, high=math.inf, head_loss_weight=self.head_loss_weight,
            embedding_loss_weight=self.embedding_loss_weight, contrast_loss_weight=self.contrast_loss_weight)
        if self.adapter and self.scheme == 'thkd' and not self.adapts_student:
            raise ValueError(
                "adapter is for head_loss_weight and embedding_loss_weight, which are 0, with scheme 'thkd'; leave it "
                'out.')
        is_sharing = bool(self.head_loss_weight or self.embedding_loss_weight or self.contrast_loss_weight)
        if self.scheme == 'thkd' and not (is_sharing or self.init_head):
            raise ValueError(
                "scheme 'thkd' shares nothing while all weights are 0; set head_loss_weight (0.02 in the paper), or "
                'leave the table out for plain distillation.')
        if self.scheme == 'frozen_head' and (is_sharing or self.init_head):
            raise ValueError("scheme 'frozen_head' is without a teacher; leave the weights and init_head out.")

    @property
    def adapts_student(self) -> bool:
        """Whether the student's embedding is read through the adapter."""
        return self.adapter and bool(self.head_loss_weight or self.embedding_loss_weight)

    def check(self, recipe: 'Recipe') -> None:
        """Raise ValueError where another setting of the recipe contradicts these."""
        if recipe.task != 'single_label':
            raise ValueError(f"sharing is for task 'single_label', got {recipe.task!r}; leave the table out.")
        if self.adapter and self.scheme != 'thkd' and (recipe.fsdp or recipe.sync_bn):
            raise ValueError(
                f"fsdp and sync_bn must be false with sharing.adapter and scheme {self.scheme!r}, whose network "
                f'has another last layer while it learns.')
        if self.scheme == 'frozen_head':
            if recipe.teacher is not None:
                raise ValueError("sharing.scheme 'frozen_head' is without a teacher; leave the table teacher out.")
            return
        if recipe.teacher is None:
            raise ValueError('sharing needs a table teacher, which names the network to share with.')
        if recipe.teacher.cache and (self.embedding_loss_weight or self.contrast_loss_weight):
            raise ValueError(
                "teacher.cache keeps logits alone: set it to '' where sharing.embedding_loss_weight or "
                'sharing.contrast_loss_weight reads embeddings.')
        if not self.contrast_loss_weight:
            return
        if recipe.fsdp:
            raise ValueError('sharing.contrast_loss_weight must be 0 with fsdp, which shares its memories out.')
        args = recipe.augment.args
        for name in ('mixup', 'aug_repeats'):
            if args.get(name):
                raise ValueError(
                    f'sharing.contrast_loss_weight must be 0 with augment.args.{name}: its memories have one place '
                    f'for each picture.')
