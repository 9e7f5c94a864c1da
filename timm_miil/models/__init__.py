"""Networks; importing this registers them with timm."""
from timm_miil.models import (
    miil_levit, miil_mobilenet, miil_resnet_cifar, miil_sdl, miil_tresnet, mldecoder, mldecoder_zero_shot,
    multilabel_classifier)
from timm_miil.models._tags import register_authors_names, register_tags
from timm_miil.models.inplace_norm import InplaceNormAct2d, convert_to_inplace_norm
from timm_miil.models.lgconv import LocalGlobalConv, convert_to_lgconv
from timm_miil.models.loading import load_model
from timm_miil.models.miil_sdl import SDLClassifier
from timm_miil.models.mldecoder import MLDecoderClassifier
from timm_miil.models.mldecoder_zero_shot import ZeroShotClassifier
from timm_miil.models.multilabel_classifier import MultiLabelClassifier

__all__ = [
    'InplaceNormAct2d', 'LocalGlobalConv', 'MLDecoderClassifier', 'MultiLabelClassifier', 'SDLClassifier',
    'ZeroShotClassifier', 'convert_to_inplace_norm', 'convert_to_lgconv', 'load_model', 'miil_levit',
    'miil_mobilenet', 'miil_resnet_cifar', 'miil_sdl', 'miil_tresnet', 'mldecoder', 'mldecoder_zero_shot',
    'multilabel_classifier',
]

register_tags()
register_authors_names()
