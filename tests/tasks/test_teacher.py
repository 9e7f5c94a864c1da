"""The teacher: it sees the student's pictures as it is used to, and nothing changes it."""
import copy

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_miil.losses import renormalize
from timm_miil.tasks import Teacher, TeacherCache, teacher_fingerprint

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Stub(nn.Module):
    """Gives the mean of each channel, after a layer that is neither convolution nor product, and keeps what it saw."""

    def __init__(self, **config):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm1d(3)
        if config:
            self.pretrained_cfg = config

    def forward(self, images):
        self.seen = images
        return self.norm(images.mean((2, 3)) * self.scale)


def small(name='test_resnet', classes=5):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=classes)


def raw_pictures(side=24, size=2):
    """Pixels in [0, 1], smooth enough for a resize not to leave that range by much."""
    return torch.rand(size, 3, side, side, generator=torch.Generator().manual_seed(0))


def normalized(images, mean=MEAN, std=STD):
    return torch.stack([(images[:, i] - mean[i]) / std[i] for i in range(3)], dim=1)


@pytest.mark.parametrize('size', [(10, 10), (37, 50)])
def test_pictures_are_resized_and_normalised_as_if_for_it(size):
    model = Stub(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2), input_size=(3, *size))
    teacher, raw = Teacher(model, mean=MEAN, std=STD), raw_pictures()
    teacher(normalized(raw))
    by_hand = torch.stack([torch.stack([torch.from_numpy(np.array(
        Image.fromarray(channel.numpy()).resize(size[::-1], Image.Resampling.BICUBIC))) for channel in picture])
        for picture in raw])
    torch.testing.assert_close(
        teacher.model.seen, normalized(by_hand, (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)), rtol=0, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_renormalised_pictures_keep_dtype_and_layout(dtype, layout):
    own = {'mean': (0.0, 0.1, 0.2), 'std': (1.0, 0.9, 0.8)}
    images = normalized(raw_pictures()).to(dtype, memory_format=layout)
    teacher = Teacher(Stub(**own), mean=MEAN, std=STD)
    for _ in range(2):
        seen = teacher.prepare(images)
        want = renormalize(images, mean=MEAN, std=STD, teacher_mean=own['mean'], teacher_std=own['std'])
        torch.testing.assert_close(seen, want)  # which compares dtypes
        assert seen.is_contiguous(memory_format=layout)


@pytest.mark.parametrize('image_size, seen', [
    (None, (16, 16)), ('student', (24, 24)), (32, (32, 32)), ((8, 12), (8, 12)), (24, (24, 24))])
def test_the_size_can_be_chosen(image_size, seen):
    teacher = Teacher(Stub(mean=MEAN, std=STD, input_size=(3, 16, 16)), mean=MEAN, std=STD, image_size=image_size)
    teacher(raw_pictures())
    assert teacher.model.seen.shape[-2:] == seen
    assert teacher.image_size == (None if image_size == 'student' else seen)


def test_equal_statistics_and_size_leave_pictures_as_they_are():
    teacher, images = Teacher(Stub(mean=MEAN, std=STD, input_size=(3, 24, 24)), mean=MEAN, std=STD), raw_pictures()
    teacher(images)
    assert teacher.model.seen is images


def test_a_network_that_tells_nothing_gets_the_students_pictures():
    teacher, images = Teacher(Stub(), mean=MEAN, std=STD), raw_pictures()
    teacher(images)
    assert teacher.model.seen is images and teacher.num_classes is None


def test_columns_are_the_students_classes():
    model, images = small(), raw_pictures(32)
    whole = Teacher(model, mean=MEAN, std=STD)(images)
    chosen = Teacher(model, mean=MEAN, std=STD, columns=[4, 0, 2])
    assert torch.equal(chosen(images), whole[:, [4, 0, 2]]) and chosen.num_classes == 3


def test_it_stays_in_evaluation_mode_and_teaches_without_gradients():
    parent = nn.ModuleList([Teacher(Stub(), mean=MEAN, std=STD)]).train()
    [teacher] = parent
    assert parent.training and not any(module.training for module in teacher.modules())
    images = raw_pictures().requires_grad_()
    before = copy.deepcopy(teacher.model.state_dict())
    assert not teacher(images).requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_callers_network_is_left_as_it_is():
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    Teacher(model, mean=MEAN, std=STD, precision=torch.bfloat16)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype, name


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet'])
def test_low_precision_is_autocasts_to_the_bit(name):
    model = small(name).eval()
    exact = Teacher(model, mean=MEAN, std=STD, image_size=model.pretrained_cfg['input_size'][-1])
    teacher = Teacher(model, mean=MEAN, std=STD, precision=torch.bfloat16)
    images = normalized(raw_pictures(teacher.image_size[0]))
    logits = teacher(images)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        want = model(exact.prepare(images))
    assert want.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, want.float())
    # bfloat16 has 8 bits, 2^-8 = 0.004; some of them are lost on the way.
    full = exact(images)
    assert (logits - full).abs().max() < 0.02 * full.abs().max()
    assert {tensor.dtype for tensor in teacher.model.parameters()} == {torch.bfloat16, torch.float32}


def test_its_precision_is_its_own_where_the_student_is_under_autocast():
    model, images = small().eval(), raw_pictures(32)
    teacher = Teacher(model, mean=MEAN, std=STD, image_size='student')
    with torch.no_grad():
        want = model(teacher.prepare(images))
    with torch.autocast('cpu', torch.bfloat16):
        got = teacher(images)
    assert torch.equal(got, want) and got.dtype == torch.float32


def test_double_precision_stays():
    teacher = Teacher(small().double(), mean=MEAN, std=STD)
    assert teacher(raw_pictures(32).double()).dtype == torch.float64


def test_wrappers_are_taken_off():
    model, images = Stub(), raw_pictures(32)
    compiled = Teacher(torch.compile(model, backend='eager'), mean=MEAN, std=STD)
    assert type(compiled.model) is type(model)
    assert torch.equal(compiled(images), Teacher(model, mean=MEAN, std=STD)(images))


def test_it_can_be_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    teacher, images = Teacher(Stub(), mean=MEAN, std=STD), raw_pictures(32)
    want = teacher(images)
    names = list(teacher.state_dict())
    teacher.compile(backend=backend)
    torch.testing.assert_close(teacher(images), want)
    assert len(graphs) == 1 and list(teacher.state_dict()) == names


def test_the_fingerprint_is_of_weights_and_settings():
    model = small()
    own = Teacher(model, mean=MEAN, std=STD).fingerprint()
    assert len(own) == 64 and own == Teacher(copy.deepcopy(model), mean=MEAN, std=STD).fingerprint()
    assert own == teacher_fingerprint(model, mean=MEAN, std=STD)
    others = [
        teacher_fingerprint(model, mean=(0.5, 0.5, 0.5), std=STD), teacher_fingerprint(model, mean=MEAN, std=MEAN),
        teacher_fingerprint(model, mean=MEAN, std=STD, columns=[0, 1]),
        teacher_fingerprint(model, mean=MEAN, std=STD, columns=[1, 0]),
        teacher_fingerprint(model, mean=MEAN, std=STD, image_size=32),
        teacher_fingerprint(model, mean=MEAN, std=STD, precision=torch.bfloat16)]
    model.pretrained_cfg['mean'] = (0.0, 0.0, 0.0)
    others.append(teacher_fingerprint(model, mean=MEAN, std=STD))
    with torch.no_grad():
        model.get_classifier().bias[0] += 1e-6
    others.append(teacher_fingerprint(model, mean=MEAN, std=STD))
    assert len({own, *others}) == 1 + len(others)


@pytest.mark.parametrize('settings, message', [
    ({'precision': torch.float32}, r'precision must be torch.bfloat16, torch.float16 or None, got torch.float32'),
    ({'mean': (0.5,), 'std': (0.5,)}, r'mean and std must have one number a channel, as many as the teacher has'),
    ({'std': (0.5, 0.5, 0.0)}, r'std must be above 0'),
    ({'image_size': 'own'}, r"image_size must be a size in pixels, 'student' or None, got 'own'"),
    ({'image_size': 0}, r'image_height must be at least 1, got 0'),
    ({'columns': [0, 5]}, r"columns must be below the teacher's 5 outputs, got 5"),
    ({'columns': [0, 0]}, r'columns must be outputs of the teacher, one or more, each once, got \[0, 0\]'),
    ({'columns': []}, r'columns must be outputs of the teacher, one or more'),
    ({'columns': [-1]}, r'columns\[0\] must be at least 0, got -1'),
])
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Teacher(small(), **{'mean': MEAN, 'std': STD, **settings})


def test_what_is_no_network_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a module, got str 'resnet50'; create it by timm.create_model"):
        Teacher('resnet50', mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r'the teacher must give logits of shape \(B, K\), got shape \(2, 3, 24, 24\)'):
        Teacher(nn.Identity(), mean=MEAN, std=STD)(raw_pictures())
    cache = TeacherCache(tmp_path, num_classes=6, topk=2, max_bytes=1000, teacher='x')
    with pytest.raises(ValueError, match=r"cache must be of the teacher's 5 classes, got one of 6"):
        Teacher(small(), mean=MEAN, std=STD, cache=cache)


@pytest.mark.gpu
# What the compiler warns of is of its own code, and that float32 products could be in TF32.
@pytest.mark.filterwarnings(
    'ignore::DeprecationWarning', 'ignore::FutureWarning', r'ignore::UserWarning:torch\._inductor')
@pytest.mark.parametrize('precision', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_on_an_accelerator_it_is_autocast_too(precision, layout):
    model = small('test_resnet').cuda().to(memory_format=layout).eval()
    teacher = Teacher(model, mean=MEAN, std=STD, precision=precision, columns=[1, 3])
    images = normalized(raw_pictures(96)).cuda().to(memory_format=layout)
    with torch.no_grad(), torch.autocast('cuda', precision):
        want = model(teacher.prepare(images))[:, [1, 3]].float()
    torch.testing.assert_close(teacher(images), want, rtol=2e-2, atol=2e-2)
    exact = Teacher(model, mean=MEAN, std=STD, columns=[1, 3])(images)
    assert (teacher(images) - exact).abs().max() < 0.03 * exact.abs().max() + 0.01
    compiled = Teacher(model, mean=MEAN, std=STD, precision=precision, columns=[1, 3], compiled=True)
    torch.testing.assert_close(compiled(images), want, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_accelerator(without_waiting):
    teacher = Teacher(small('test_vit').cuda(), mean=MEAN, std=STD, precision=torch.bfloat16, columns=[1, 3])
    images = raw_pictures(96).cuda()
    teacher(images)
    with without_waiting():
        teacher(images)
