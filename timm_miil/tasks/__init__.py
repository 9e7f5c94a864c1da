"""Tasks in timm's shape: a module that maps a batch to {'loss', 'output'}."""
from timm_miil.tasks.comic import ComicModel, ComicTask
from timm_miil.tasks.distillation import MultiLabelDistillationTask, SupervisedDistillationTask
from timm_miil.tasks.multi_label import MultiLabelTask
from timm_miil.tasks.positive_unlabeled import PositiveUnlabeledTask
from timm_miil.tasks.self_supervised import SimSiam, SimSiamTask
from timm_miil.tasks.semantic_pretrain import SemanticPretrainTask
from timm_miil.tasks.single_label import SingleLabelTask
from timm_miil.tasks.teacher import Teacher, teacher_fingerprint
from timm_miil.tasks.teacher_cache import TeacherCache
from timm_miil.tasks.training_model import TrainingModel, TrainingModelTask, kept_network
from timm_miil.tasks.zero_shot import ZeroShotTask

__all__ = [
    'ComicModel', 'ComicTask', 'MultiLabelDistillationTask', 'MultiLabelTask', 'PositiveUnlabeledTask',
    'SemanticPretrainTask', 'SimSiam', 'SimSiamTask', 'SingleLabelTask', 'SupervisedDistillationTask', 'Teacher', 'TeacherCache', 'TrainingModel',
    'TrainingModelTask', 'ZeroShotTask', 'kept_network', 'teacher_fingerprint',
]
