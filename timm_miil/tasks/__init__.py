"""Tasks in timm's shape: a module that maps a batch to {'loss', 'output'}."""
from timm_miil.tasks.multi_label import MultiLabelTask
from timm_miil.tasks.single_label import SingleLabelTask
from timm_miil.tasks.zero_shot import ZeroShotTask

__all__ = ['MultiLabelTask', 'SingleLabelTask', 'ZeroShotTask']
