"""Networks; importing this registers them with timm."""
from timm_miil.models import miil_tresnet, mldecoder, mldecoder_zero_shot
from timm_miil.models.mldecoder import MLDecoderClassifier
from timm_miil.models.mldecoder_zero_shot import ZeroShotClassifier

__all__ = ['MLDecoderClassifier', 'ZeroShotClassifier', 'miil_tresnet', 'mldecoder', 'mldecoder_zero_shot']
