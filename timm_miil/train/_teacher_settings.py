"""The table of a recipe that names a teacher."""
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import is_model, list_models

from timm_miil._checks import check_choice, check_not_negative, check_positive, check_range, nearest, shown
from timm_miil.train._settings import DECIDED_MODEL, MOST_PIXELS, check_undecided

__all__ = ['TEACHER_PRECISIONS', 'TeacherSettings']

TEACHER_PRECISIONS = ('fp32', 'bf16', 'fp16')
TEMPERATURES = (1e-3, 1e3)


@dataclass(frozen=True)
class TeacherSettings:
    """A trained network whose answers the student learns beside the labels; it sees the same pictures, mixed ones too.

    The loss of a picture is task_loss_weight times the recipe's loss plus distill_loss_weight times the distance of the
    student's answer from the teacher's. The defaults are those of USI, arXiv:2204.03475.

    Args:
        name: A registered name, such as 'tresnet_v2_l.miil_in21k_ft_in1k', or where it lies ('hf-hub:', 'local-dir:').
            Its classes must hold the labels of the data.
        args: Keyword arguments of `timm.create_model`.
        pretrained: Load its weights.
        task_loss_weight: Weight of the recipe's own loss, at least 0; with 0 the teacher alone is learnt from.
        distill_loss_weight: Weight of the teacher, at least 0.
        temperature: Softens both answers, in [0.001, 1000].
        precision: 'fp32', 'bf16' or 'fp16' for the teacher's arithmetic; its answers are float32.
        image_size: Side in pixels of what it sees; 0 takes its own, to which the student's pictures are resized.
        torchcompile: Compile the teacher, also where the student is not.
        cache: Folder to keep its answers in for the next training; '' keeps none. Only pictures that come again to the
            bit are found again.
        cache_topk: Classes of an answer that are kept, the likeliest, at least 1; for the task 'semantic' all.
        cache_gb: Most gigabytes (10^9 bytes) of the folder, above 0.
    """
    name: str
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: bool = True
    task_loss_weight: float = 1.0
    distill_loss_weight: float = 5.0
    temperature: float = 1.0
    precision: str = 'bf16'
    image_size: int = 0
    torchcompile: bool = False
    cache: str = ''
    cache_topk: int = 100
    cache_gb: float = 10.0

    def __post_init__(self) -> None:
        if ':' not in self.name and not is_model(self.name):
            raise ValueError(
                f'name must be a model of timm, got {shown(self.name)}; {nearest(self.name, list_models())}')
        check_undecided(self.args, DECIDED_MODEL)
        check_range(task_loss_weight=self.task_loss_weight, low=0.0, high=math.inf)
        check_range(distill_loss_weight=self.distill_loss_weight, low=0.0, high=math.inf)
        if not self.distill_loss_weight:
            raise ValueError(
                'distill_loss_weight must be above 0, got 0, which asks the teacher nothing; leave the teacher out.')
        check_range(temperature=self.temperature, low=TEMPERATURES[0], high=TEMPERATURES[1], closed=True)
        check_choice(precision=self.precision, choices=TEACHER_PRECISIONS)
        check_not_negative(image_size=self.image_size)
        check_range(image_size=self.image_size, low=0, high=MOST_PIXELS, closed=True)
        check_positive(cache_topk=self.cache_topk)
        check_range(cache_gb=self.cache_gb, low=math.ulp(0.0), high=math.inf)
