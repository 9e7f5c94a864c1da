"""Classification heads: torch only, usable on any features."""
from timm_miil.heads.attach import BackboneWithHead, attach_head
from timm_miil.heads.csra import CSRA
from timm_miil.heads.factory import create_head, list_heads
from timm_miil.heads.gap import GAPHead
from timm_miil.heads.ml_decoder import MLDecoder, convert_original_state_dict
from timm_miil.heads.query2label import Query2Label
from timm_miil.heads.semantic_embedding import SemanticEmbeddingHead
from timm_miil.heads.text import embed_characters
from timm_miil.heads.zero_shot import ZeroShotMLDecoder

__all__ = [
    'BackboneWithHead', 'CSRA', 'GAPHead', 'MLDecoder', 'Query2Label', 'SemanticEmbeddingHead', 'ZeroShotMLDecoder',
    'attach_head', 'convert_original_state_dict', 'create_head', 'embed_characters', 'list_heads',
]
