"""Where the time of a case goes, by operator."""
import torch
from torch.profiler import ProfilerActivity, profile

from timm_miil._checks import check_positive
from timm_miil.bench.cases import Case
from timm_miil.bench.contestants import Optimize, build_run, compiled_or_failed

__all__ = ['profile_case']


def profile_case(
        case: Case, device: torch.device, *, optimize: Optimize | None = None, top: int = 15,
) -> list[dict[str, object]]:
    """Profile one batch of a case, after one that is not looked at.

    Args:
        case: What to run.
        device: Where.
        optimize: Makes the 'optimized' variant.
        top: Operators, those that take most time themselves.

    Returns:
        One row an operator: the case, its name, calls, milliseconds of its own and their share of all operators'.
        On a CUDA device the time is that of its kernels; a replayed graph has kernels only, which are listed instead.

    Raises:
        UnsupportedCase: If the case cannot be run there.
    """
    check_positive(top=top)
    is_cuda = device.type == 'cuda'
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with compiled_or_failed(device):
        run = build_run(case, device, optimize=optimize)
        run()
        with profile(activities=activities) as found:
            run()
            if is_cuda:
                torch.cuda.synchronize(device)
    kind = 'CUDA' if case.mode == 'graphs' else 'CPU'  # operators have the time of their kernels, which follow them
    times = [
        (float(event.self_device_time_total if is_cuda else event.self_cpu_time_total), event.count, event.key)
        for event in found.key_averages() if event.device_type.name == kind]
    total = sum(taken for taken, _, _ in times) or 1.0
    times.sort(reverse=True)
    return [
        case.columns | {'operator': name, 'calls': count, 'self_ms': round(taken / 1e3, 4),
                        'share': round(taken / total, 4)}
        for taken, count, name in times[:top]]
