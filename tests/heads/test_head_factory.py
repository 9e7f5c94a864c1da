"""Heads by name: every head of a fixed number of classes is listed and made with its settings."""
import inspect

import pytest
import torch

import timm_miil.heads
from timm_miil.heads import CSRA, GAPHead, MLDecoder, Query2Label, create_head, list_heads


def test_every_head_for_a_number_of_classes_is_listed():
    made = {type(create_head(name, 8, 3)) for name in list_heads()}
    public = [getattr(timm_miil.heads, name) for name in timm_miil.heads.__all__]
    heads = {kind for kind in public if isinstance(kind, type) and {'in_features', 'num_classes'} <= set(
        inspect.signature(kind).parameters)}
    assert made == heads == {CSRA, GAPHead, MLDecoder, Query2Label}
    assert list_heads('*2*') == ['query2label'] and list_heads('x*') == []


@pytest.mark.parametrize('name', ['ml_decoder', 'MLDecoder', 'ML-Decoder'])
def test_names_forgive_case_and_dashes(name):
    head = create_head(name, 8, 3, embed_dim=16, dtype=torch.float64, device='meta')
    assert isinstance(head, MLDecoder)
    assert head.embed.weight.shape == (16, 8) and head.embed.weight.dtype == torch.float64 and head.embed.weight.is_meta


def test_gap_is_known_by_its_class_too():
    assert isinstance(create_head('GAPHead', 8, 3), GAPHead)


def test_wrong_names_and_settings():
    with pytest.raises(ValueError, match="unknown head 'crsa'; did you mean 'csra'[?] Known: csra, gap, ml_decoder, q"):
        create_head('crsa', 8, 3)
    for name in (3, None):
        with pytest.raises(TypeError, match=f'^name must be a string, got {type(name).__name__} {name}[.]$'):
            create_head(name, 4, 5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        create_head('csra', 8, 3, heads=4)
    with pytest.raises(ValueError, match='num_classes must be at least 1, got 0'):
        create_head('gap', 8, 0)
