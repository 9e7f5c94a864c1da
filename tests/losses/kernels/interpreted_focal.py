"""Compares the fused kernels with the formula, run by triton's interpreter on the CPU: a process of its own, because
triton decides at its import. Prints what differs, and at last the number of comparisons; with the argument `few` it
makes fewer."""
import itertools
import os
import sys
import warnings

os.environ['TRITON_INTERPRET'] = '1'
import torch  # noqa: E402

from timm_miil.losses._focal import Focal, Weights, element_loss  # noqa: E402
from timm_miil.losses.kernels import focal as kernels  # noqa: E402

ROWS, NUM_CLASSES = 3, 401  # two blocks, the second not full
GAMMAS = [(4.0, 0.0, 0.0), (2.5, 0.5, 1.0), (0.0, 0.0, 0.0)]
TOLERANCE = {torch.float32: dict(rtol=1e-4, atol=1e-6), torch.bfloat16: dict(rtol=1e-2, atol=1e-4)}


def draw(kind: str, unknown: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, NUM_CLASSES, generator=generator) * 4 - 2
    logits[0, :6] = torch.tensor([50.0, -50.0, 1e4, -1e4, -2.94, -2.95])
    targets = (torch.rand(ROWS, NUM_CLASSES, generator=generator) < 0.3).float()
    if kind == 'soft':
        targets[1:] = targets[1:] * 0.7 + 0.1
    if unknown and kind != 'bool':
        targets[torch.rand(ROWS, NUM_CLASSES, generator=generator) < 0.3] = -1
    kinds = {'bool': torch.bool, 'int8': torch.int8}
    return logits.to(dtype), targets.to(kinds.get(kind, torch.float32))


def draw_weights() -> Weights:
    generator = torch.Generator().manual_seed(1)
    per_class = (torch.rand(NUM_CLASSES, generator=generator) for _ in range(3))
    return Weights(*per_class, torch.rand(ROWS, 1, generator=generator), torch.tensor([3, 77, 500, 1202]))


def compare(gammas, clip, detach, unknown, kind, dtype, weighted) -> None:
    logits, targets = draw(kind, unknown, dtype)
    focal = Focal(
        *gammas, alpha_neg=1.0, alpha_pos=2.0, alpha_unknown=0.5, clip=clip, detach=detach, unknown=unknown, soft=True)
    weights = draw_weights() if weighted else Weights()
    x = logits.double().requires_grad_()
    wide = Weights(*(
        value.double() if value is not None and value.is_floating_point() else value for value in weights.tensors()))
    want = element_loss(x, targets, focal, wide).sum() * 0.5
    want_grad, = torch.autograd.grad(want, x)
    total, grad = kernels.fused_sum(logits, targets, focal, weights, 0.5, needs_grad=True)
    torch.testing.assert_close(total.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), want_grad, **TOLERANCE[dtype])
    alone, nothing = kernels.fused_sum(logits, targets, focal, weights, 0.5, needs_grad=False)
    assert torch.equal(alone, total) and nothing is None


def refuses() -> None:
    logits, targets = torch.zeros(2, 3), torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.0, 2.0]])
    for focal in Focal(4.0, 0.0, soft=True), Focal(4.0, 0.0):
        total, grad = kernels.fused_sum(logits, targets, focal, Weights(), 1.0, needs_grad=True)
        assert total.isnan() and grad.isnan().tolist() == [[False, False, True]] * 2


def scales() -> None:
    grad = torch.randn(1500, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(kernels.scale_(grad.clone(), torch.tensor(1.0)), grad)
    torch.testing.assert_close(kernels.scale_(grad.clone(), torch.tensor(0.3)), (grad.float() * 0.3).bfloat16())


def main() -> None:
    warnings.simplefilter('ignore', RuntimeWarning)  # the interpreter's numpy computes what `where` throws away
    cases = list(itertools.product(
        GAMMAS, [0.0, 0.05], [True, False], [False, True], ['bool', 'int8', 'float', 'soft'], TOLERANCE, [False, True]))
    # All of them would take half a minute: each value of each setting is met, the usual ones in all combinations.
    cases = [
        case for number, case in enumerate(cases)
        if number % 3 == 0 or case[0] == GAMMAS[0] and case[5] == torch.float32]
    if 'few' in sys.argv:
        cases = cases[::7]
    for case in cases:
        try:
            compare(*case)
        except AssertionError as error:
            print(*case, error)
    refuses()
    scales()
    print(len(cases))


if __name__ == '__main__':
    main()
