"""SDL networks: vectors and scores, label sets by name and by word vectors, saved folders, the published layout."""
import pytest
import timm
import torch

from timm_miil.heads import embed_characters
from timm_miil.losses import semantic_scores

LABELS = ['red 7', 'blue 3', 'digit 7']
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def build(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('miil_sdl', **{'backbone': 'test_resnet', 'text_dim': 20, 'num_rows': 3, **kwargs}).eval()


def published(**kwargs):
    torch.manual_seed(0)
    args = dict(layers=[1, 1, 1, 1], width_factor=0.25, text_dim=20, num_classes=60)
    return timm.create_model('miil_sdl_tresnet_m', **args | kwargs).eval()


def save(model, path):
    timm.models.save_for_hf(model, path, safe_serialization=True)
    return f'local-dir:{path}'


def load(source, **kwargs):
    return timm.create_model(source, pretrained=True, **kwargs).eval()


@torch.no_grad()
def out(model):
    return model(IMAGES)


def test_scores_are_those_of_the_loss_on_the_vectors():
    for model in (build(), published()):
        rows = out(model)
        assert rows.shape == (2, 60) and torch.equal(model.embed(IMAGES), rows)
        words = torch.randn(5, 20)
        model.set_queries(words)
        assert model.num_classes == 5
        torch.testing.assert_close(out(model), semantic_scores(rows, words, num_rows=3))
        assert torch.equal(model.embed(IMAGES), rows)


def test_names_are_the_embeddings_of_their_characters():
    by_name, by_vector = build(labels=LABELS), build()
    by_vector.set_queries(embed_characters(LABELS, 20))
    assert torch.equal(out(by_name), out(by_vector))
    assert by_name.labels == tuple(LABELS) and by_vector.labels is None
    before = out(by_name)
    by_name.set_labels(['other', *LABELS])
    torch.testing.assert_close(out(by_name)[:, 1:], before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('labels', [LABELS, None])
def test_a_saved_folder_gives_the_same(labels, tmp_path):
    model = build(labels=labels)
    again = load(save(model, tmp_path))
    assert type(again) is type(model) and again.labels == model.labels and again.num_classes == model.num_classes
    assert torch.equal(out(again), out(model))
    assert out(load(f'local-dir:{tmp_path}', labels=['a', 'b'])).shape == (2, 2)


def test_prefix_tokens_are_left_out_of_the_mean():
    model = timm.create_model('miil_sdl', backbone='test_vit', text_dim=20, num_rows=3).eval()
    with torch.no_grad():
        tokens = model.forward_features(torch.rand(1, 3, 160, 160))
        torch.testing.assert_close(model.forward_head(tokens), tokens[:, 1:].mean(1) @ model.head.weight.T)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))


def test_the_published_network_is_saved_without_the_label_set(tmp_path):
    model = published()
    rows = out(model)
    model.set_queries(torch.randn(5, 20))
    again = load(save(model, tmp_path))
    assert again.num_classes == 60 and torch.equal(out(again), rows)
    again.set_queries(model.embedding.text_embeddings)
    assert torch.equal(out(again), out(model))
    features = load(f'local-dir:{tmp_path}', num_classes=0)
    assert features.num_classes == 0 and out(features).shape == (2, features.num_features)


def test_the_published_network_takes_other_rows_or_plain_classes(tmp_path):
    assert published(num_classes=40).embedding.num_rows == 2
    model = published()
    model.set_queries(torch.randn(5, 20))
    model.reset_classifier(7)
    assert out(load(save(model, tmp_path))).shape == (2, 7)
    for change in (lambda: model.set_queries(torch.randn(5, 20)), lambda: model.embed(IMAGES)):
        with pytest.raises(TypeError, match='num_classes must be a multiple of text_dim=20 for a label set, got 7'):
            change()


def test_its_keys_are_those_of_the_file():
    with torch.device('meta'):
        model = timm.create_model('miil_sdl_tresnet_m')
    assert {key: tuple(model.state_dict()[key].shape) for key in model.state_dict() if 'body' not in key} == {
        'embedding.weight': (2100, 2048)}


def test_bad_label_sets_change_nothing():
    model = build(labels=LABELS)
    before = out(model)
    with pytest.raises(ValueError, match=r'embeddings must have shape \(K, 20\)'):
        model.set_queries(torch.zeros(3, 19))
    with pytest.raises(ValueError, match='num_classes=4 contradicts the 3 labels'):
        build(labels=LABELS, num_classes=4)
    assert torch.equal(out(model), before) and model.labels == tuple(LABELS)
