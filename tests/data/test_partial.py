"""Simulated partial annotation: how many labels stay, which, and that a seed says so."""
import pytest
import torch

from timm_miil.data import fixed_per_class, labelled_per_class, positives_only, random_per_sample


def draw(num_samples=400, num_classes=5):
    prob = torch.tensor([0.0, 0.005, 0.2, 0.5, 1.0])[:num_classes]
    return (torch.rand(num_samples, num_classes, generator=torch.Generator().manual_seed(0)) < prob).to(torch.int8)


def test_fixed_per_class_keeps_as_many_absent_as_present_labels():
    targets = draw()
    partial = fixed_per_class(targets, 10, seed=1)
    available = (targets == 1).sum(0)
    kept = available.clamp(max=10)
    assert available.tolist() == [0, 2, 92, 201, 400] and kept.tolist() == [0, 2, 10, 10, 10]
    assert torch.equal((partial == 1).sum(0), kept)
    assert (partial == 0).sum(0).tolist() == [0, 2, 10, 10, 0]  # the last class has no absent label
    assert ((partial == targets) | (partial == -1)).all()


def test_random_per_sample_hides_each_label_with_its_probability():
    targets = draw()
    partial = random_per_sample(targets, 0.25, seed=1)
    assert ((partial == targets) | (partial == -1)).all()
    hidden = (partial == -1).float()
    assert hidden.mean().item() == pytest.approx(0.25, abs=3 * (0.25 * 0.75 / 2000) ** 0.5)
    assert (hidden.sum(0) > 50).all()
    assert torch.equal(random_per_sample(targets, 0.0, seed=1), targets)
    assert (random_per_sample(targets, 1.0, seed=1) == -1).all()


def test_positives_only_hides_all_that_is_absent_and_some_that_is_present():
    targets = draw()
    partial = positives_only(targets, 0.25, seed=1)
    assert (partial[targets == 0] == -1).all()
    kept = (partial[targets == 1] == 1).float()
    assert len(kept) == 695 and kept.mean().item() == pytest.approx(0.75, abs=3 * (0.25 * 0.75 / 695) ** 0.5)
    assert torch.equal(positives_only(targets, 0.0, seed=1), targets * 2 - 1)
    assert (positives_only(targets, 1.0, seed=1) == -1).all()


@pytest.mark.parametrize('simulate', [
    lambda targets, seed: fixed_per_class(targets, 10, seed=seed),
    lambda targets, seed: positives_only(targets, 0.5, seed=seed),
    lambda targets, seed: random_per_sample(targets, 0.5, seed=seed)])
def test_a_seed_says_which(simulate):
    targets, state = draw(), torch.get_rng_state()
    before = targets.clone()
    first = simulate(targets, 3)
    assert torch.equal(first, simulate(targets, 3)) and not torch.equal(first, simulate(targets, 4))
    assert torch.equal(targets, before) and torch.equal(torch.get_rng_state(), state)
    assert first.dtype == targets.dtype


@pytest.mark.parametrize('simulate', [
    lambda targets: fixed_per_class(targets, 100, seed=0), lambda targets: positives_only(targets, 0.1, seed=0),
    lambda targets: random_per_sample(targets, 0.1, seed=0)])
def test_what_is_hidden_already_stays_hidden(simulate):
    targets = draw()
    targets[:, 3] = -1
    assert (simulate(targets)[:, 3] == -1).all()


def one_label(num_samples=300):
    return torch.eye(4, dtype=torch.int8)[torch.randint(4, (num_samples,), generator=torch.Generator().manual_seed(0))]


def test_labelled_per_class_keeps_whole_pictures():
    targets = one_label()
    targets = torch.cat([targets, torch.zeros_like(targets[:, :1])], dim=1)  # a class that no picture shows
    partial = labelled_per_class(targets, 7, seed=1)
    is_labelled = (partial != -1).any(1)
    assert torch.equal(partial[is_labelled], targets[is_labelled])
    assert (partial[is_labelled] == 1).sum(0).tolist() == [7, 7, 7, 7, 0]
    assert torch.equal(labelled_per_class(targets, 300, seed=1), targets)


def test_labelled_per_class_by_a_seed():
    targets, state = one_label(), torch.get_rng_state()
    first = labelled_per_class(targets, 7, seed=3)
    assert torch.equal(first, labelled_per_class(targets, 7, seed=3)) and torch.equal(targets, one_label())
    assert not torch.equal(first, labelled_per_class(targets, 7, seed=4)) and first.dtype == torch.int8
    assert torch.equal(torch.get_rng_state(), state)


def test_labelled_per_class_is_for_one_label_a_picture():
    targets = one_label()
    targets[[5, 9]] = torch.tensor([1, 0, 1, 0], dtype=torch.int8)
    with pytest.raises(ValueError, match=r'targets must have exactly one 1 a row, got 2 in row 5'):
        labelled_per_class(targets, 7, seed=0)
    with pytest.raises(ValueError, match=r'num_per_class must be at least 1, got 0'):
        labelled_per_class(one_label(), 0, seed=0)
    with pytest.raises(TypeError, match=r'signed dtype, to hold -1, got torch.uint8'):
        labelled_per_class(one_label().to(torch.uint8), 7, seed=0)


def test_refusals():
    with pytest.raises(TypeError, match=r'signed dtype, to hold -1, got torch.bool; call .to\(torch.int8\)'):
        fixed_per_class(draw().bool(), 1, seed=0)
    with pytest.raises(TypeError, match=r'signed dtype, to hold -1, got torch.uint8'):
        random_per_sample(draw().to(torch.uint8), 0.5, seed=0)
    with pytest.raises(ValueError, match=r'targets must have 2 dimensions, got shape \(5,\)'):
        fixed_per_class(draw()[0], 1, seed=0)
    with pytest.raises(ValueError, match='num_per_class must be at least 1, got 0'):
        fixed_per_class(draw(), 0, seed=0)
    with pytest.raises(ValueError, match=r'drop_prob must be in \[0, 1\], got 1.5'):
        random_per_sample(draw(), 1.5, seed=0)
    with pytest.raises(ValueError, match=r'drop_prob must be in \[0, 1\], got -0.1'):
        positives_only(draw(), -0.1, seed=0)
