"""Networks; importing this registers them with timm."""
from timm_miil.models import miil_tresnet, mldecoder
from timm_miil.models.mldecoder import MLDecoderClassifier

__all__ = ['MLDecoderClassifier', 'miil_tresnet', 'mldecoder']
