"""The pooled baseline is timm's own classifier in our form."""
import pytest
import timm
import torch

from timm_miil.heads import GAPHead


@pytest.mark.parametrize('backbone, settings', [('resnet18', {}), ('vit_tiny_patch16_224', dict(
    global_pool='avg', class_token=False, fc_norm=False, img_size=32))])
def test_it_is_the_classifier_of_timm(backbone, settings):
    torch.manual_seed(0)
    model = timm.create_model(backbone, num_classes=5, **settings).eval()
    head = GAPHead(model.num_features, 5)
    head.fc.load_state_dict(model.get_classifier().state_dict())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(head(model.forward_features(images)), model(images), rtol=1e-5, atol=1e-6)


def test_prefix_tokens_are_left_out_of_tokens_and_maps_have_none():
    head = GAPHead(4, 3, num_prefix_tokens=2)
    tokens = torch.randn(2, 7, 4)
    assert torch.equal(head(tokens), head.fc(tokens[:, 2:].mean(1)))
    maps = torch.randn(2, 4, 1, 2)
    torch.testing.assert_close(head(maps), head.fc(maps.mean((2, 3))))


def test_dropout_is_in_training_only():
    head = GAPHead(64, 3, drop_rate=0.5)
    tokens = torch.randn(2, 7, 64)
    assert not torch.equal(head(tokens), head(tokens))
    assert torch.equal(head.eval()(tokens), head(tokens))


@pytest.mark.parametrize('wrong, error, message', [
    (lambda: GAPHead(4, 3, num_prefix_tokens=-1), ValueError, 'num_prefix_tokens must be at least 0, got -1'),
    (lambda: GAPHead(4, 3, num_prefix_tokens=1.5), TypeError, 'num_prefix_tokens must be an int'),
    (lambda: GAPHead(4, 3, drop_rate=1.0), ValueError, r'drop_rate must be in \[0, 1\)'),
    (lambda: GAPHead(4, 3, num_prefix_tokens=2)(torch.zeros(1, 2, 4)), ValueError,
     r'more than the 2 prefix tokens, got tokens torch.Size\(\[1, 2, 4\]\)'),
])
def test_wrong_use(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()
