"""Tasks in timm's shape: a module that maps a batch to {'loss', 'output'}."""
from timm_miil.tasks.distillation import MultiLabelDistillationTask, SupervisedDistillationTask
from timm_miil.tasks.multi_label import MultiLabelTask
from timm_miil.tasks.semantic_pretrain import SemanticPretrainTask
from timm_miil.tasks.single_label import SingleLabelTask
from timm_miil.tasks.teacher import Teacher, teacher_fingerprint
from timm_miil.tasks.teacher_cache import TeacherCache
from timm_miil.tasks.zero_shot import ZeroShotTask

__all__ = [
    'MultiLabelDistillationTask', 'MultiLabelTask', 'SemanticPretrainTask', 'SingleLabelTask',
    'SupervisedDistillationTask', 'Teacher', 'TeacherCache', 'ZeroShotTask', 'teacher_fingerprint',
]
