"""Classification heads: torch only, usable on any features."""
from timm_miil.heads.attach import BackboneWithHead, attach_head
from timm_miil.heads.ml_decoder import MLDecoder, convert_original_state_dict
from timm_miil.heads.text import embed_characters
from timm_miil.heads.zero_shot import ZeroShotMLDecoder

__all__ = [
    'BackboneWithHead', 'MLDecoder', 'ZeroShotMLDecoder', 'attach_head', 'convert_original_state_dict',
    'embed_characters',
]
