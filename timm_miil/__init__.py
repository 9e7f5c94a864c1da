"""timm-miil: multi-label recognition, distillation and large-scale pretraining for timm.

Importing this package registers its models with timm and does nothing else.
"""
from timm_miil import models
from timm_miil._version import __version__

__all__ = ['__version__', 'models']
