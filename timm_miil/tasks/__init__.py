"""Tasks in timm's shape: a module that maps a batch to {'loss', 'output'}."""
from timm_miil.tasks.classifier_sharing import (
    ClassifierSharingTask, SharedHeadModel, SharingModel, freeze_head, merge_adapter)
from timm_miil.tasks.comic import ComicModel, ComicTask
from timm_miil.tasks.distillation import MultiLabelDistillationTask, SupervisedDistillationTask
from timm_miil.tasks.dual_head import DualHead, DualHeadTask, fit_dual_head
from timm_miil.tasks.label_augmentation import (
    NUM_TRANSFORMS, LabelAugmentation, LabelAugmentationTask, aggregate_logits, joint_cross_entropy, transform_images)
from timm_miil.tasks.label_injection import LabelInjectionTask
from timm_miil.tasks.multi_label import MultiLabelTask
from timm_miil.tasks.positive_unlabeled import PositiveUnlabeledTask
from timm_miil.tasks.rotation import RotationHead, RotationTask
from timm_miil.tasks.self_supervised import SimSiam, SimSiamTask
from timm_miil.tasks.semantic_diversity import SemanticDiversityTask
from timm_miil.tasks.semantic_pretrain import SemanticPretrainTask
from timm_miil.tasks.single_label import SingleLabelTask
from timm_miil.tasks.teacher import Teacher, teacher_fingerprint
from timm_miil.tasks.teacher_cache import TeacherCache
from timm_miil.tasks.training_model import TrainingModel, TrainingModelTask, kept_network
from timm_miil.tasks.verification import MarginSoftmax, VerificationTask
from timm_miil.tasks.zero_shot import ZeroShotTask

__all__ = [
    'ClassifierSharingTask', 'ComicModel', 'ComicTask', 'DualHead', 'DualHeadTask', 'LabelAugmentation',
    'LabelAugmentationTask', 'LabelInjectionTask', 'MarginSoftmax', 'MultiLabelDistillationTask', 'MultiLabelTask',
    'NUM_TRANSFORMS', 'PositiveUnlabeledTask', 'RotationHead', 'RotationTask', 'SemanticDiversityTask',
    'SemanticPretrainTask', 'SharedHeadModel', 'SharingModel', 'SimSiam', 'SimSiamTask', 'SingleLabelTask',
    'SupervisedDistillationTask', 'Teacher', 'TeacherCache', 'TrainingModel', 'TrainingModelTask', 'VerificationTask',
    'ZeroShotTask', 'aggregate_logits', 'fit_dual_head', 'freeze_head', 'joint_cross_entropy', 'kept_network',
    'merge_adapter', 'teacher_fingerprint', 'transform_images',
]
