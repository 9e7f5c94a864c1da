"""Data: readers of multi-label pictures, and the offline data set."""
from timm_miil.data.coco import read_coco
from timm_miil.data.hf import read_hf
from timm_miil.data.hierarchy import TREE_FILE, ClassTree, read_class_tree, with_ancestors, write_class_tree
from timm_miil.data.identities import IdentityConfig, make_identities
from timm_miil.data.images import IMAGE_SUFFIXES, decode_image, find_images, load_image
from timm_miil.data.in21k import In21kReport, check_in21k, prepare_in21k
from timm_miil.data.partial import fixed_per_class, labelled_per_class, positives_only, random_per_sample
from timm_miil.data.records import ImageStream, LabelledImages, MultiLabelDataset, MultiLabelRecords
from timm_miil.data.robust_sampler import RobustQuerySampler, query_gains, robust_query_prob
from timm_miil.data.scenes import SceneConfig, make_scenes
from timm_miil.data.seeding import mix_seed, seeded
from timm_miil.data.shards import index_shards, read_shards, write_shards
from timm_miil.data.splits import find_format, has_split, list_formats, list_splits, open_split, read_label_set
from timm_miil.data.statistics import LabelStatistics, label_statistics, source_statistics
from timm_miil.data.tar_images import TarImage, list_tar_images, load_tar_image
from timm_miil.data.targets import Indices, SparseTargets
from timm_miil.data.text_encoder import embed_text
from timm_miil.data.transforms import create_paper_transform
from timm_miil.data.tree_scenes import TreeSceneConfig, make_tree_scenes
from timm_miil.data.zero_shot import read_labels, read_word_vectors, save_word_vectors

__all__ = [
    'ClassTree', 'IMAGE_SUFFIXES', 'IdentityConfig', 'ImageStream', 'In21kReport', 'Indices', 'LabelStatistics',
    'LabelledImages', 'MultiLabelDataset', 'MultiLabelRecords', 'RobustQuerySampler', 'SceneConfig', 'SparseTargets',
    'TREE_FILE', 'TarImage', 'TreeSceneConfig', 'check_in21k', 'create_paper_transform', 'decode_image', 'embed_text',
    'find_format', 'find_images', 'fixed_per_class', 'has_split', 'index_shards', 'label_statistics',
    'labelled_per_class', 'list_formats', 'list_splits', 'list_tar_images', 'load_image', 'load_tar_image',
    'make_identities', 'make_scenes', 'make_tree_scenes', 'mix_seed', 'open_split', 'positives_only', 'prepare_in21k',
    'query_gains', 'random_per_sample', 'read_class_tree', 'read_coco', 'read_hf', 'read_label_set', 'read_labels',
    'read_shards', 'read_word_vectors', 'robust_query_prob', 'save_word_vectors', 'seeded', 'source_statistics',
    'with_ancestors', 'write_class_tree', 'write_shards',
]
