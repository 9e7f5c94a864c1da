"""The fused kernels: by triton's interpreter everywhere, and on a GPU where there is one."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_miil.losses import AsymmetricLoss, ClassAwareSelectiveLoss
from timm_miil.losses.kernels import find_kernels


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton')
@pytest.mark.parametrize(('words', 'compared'), [(['few'], '25'), pytest.param([], '171', marks=pytest.mark.slow)])
def test_interpreted_kernels_give_what_the_formula_gives(words, compared):
    script = Path(__file__).with_name('interpreted_focal.py')
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, compared, '')


def test_host_memory_has_no_kernels():
    assert find_kernels(torch.device('cpu')) is None


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('kind', [torch.bool, torch.int8, torch.float32, 'soft'])
@pytest.mark.parametrize('loss', ['asl', 'coupled', 'csl'])
def test_a_gpu_gives_what_host_memory_gives(dtype, kind, loss):
    criterion = {
        'asl': AsymmetricLoss(reduction='batchmean'), 'coupled': AsymmetricLoss(gamma_pos=1, detach_focal=False),
        'csl': ClassAwareSelectiveLoss(likelihood_topk=2, prior=torch.linspace(0, 1, 1003))}[loss]
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(33, 1003, generator=generator) * 3 - 2).to(dtype)
    if loss == 'csl':
        targets = torch.randint(-1, 2, (33, 1003), generator=generator).float()
        # Distinct logits: of equal ones the budget takes any.
        logits = torch.randperm(33 * 1003, generator=generator).view(33, 1003).div(2000).sub(10)
        dtype = torch.float32
    else:
        targets = (torch.rand(33, 1003, generator=generator) < 0.1).float()
        targets = targets * 0.7 if kind == 'soft' else targets.to(kind)
    assert find_kernels(torch.device('cuda', 0)) is not None
    found = []
    for device in 'cpu', 'cuda':
        x = logits.detach().to(device).requires_grad_()
        total = criterion.to(device)(x, targets.to(device))
        (total * 3).backward()
        found.append((total.detach().cpu(), x.grad.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[1][1], found[0][1], rtol=max(2 * eps, 1e-4), atol=max(eps / 10, 1e-5))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_twice_and_does_not_wait(without_waiting):
    generator = torch.Generator('cuda').manual_seed(0)
    logits = torch.randn(512, 9605, generator=generator, device='cuda', requires_grad=True)
    targets = torch.rand(512, 9605, generator=generator, device='cuda') < 0.01
    criterion = AsymmetricLoss()
    first = criterion(logits, targets)
    with without_waiting():
        second = criterion(logits, targets)
        second.backward()
    assert torch.equal(first, second)
