"""Data: readers of multi-label pictures, and the offline data set."""
from timm_miil.data.coco import read_coco
from timm_miil.data.partial import fixed_per_class, random_per_sample
from timm_miil.data.records import MultiLabelDataset, MultiLabelRecords
from timm_miil.data.scenes import SceneConfig, make_scenes
from timm_miil.data.seeding import mix_seed, seeded
from timm_miil.data.text_encoder import embed_text
from timm_miil.data.zero_shot import read_labels, read_word_vectors

__all__ = [
    'MultiLabelDataset', 'MultiLabelRecords', 'SceneConfig', 'embed_text', 'fixed_per_class', 'make_scenes', 'mix_seed',
    'random_per_sample', 'read_coco', 'read_labels', 'read_word_vectors', 'seeded',
]
