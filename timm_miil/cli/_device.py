"""The words of `--device`, for every verb that has it."""
import torch

__all__ = ['parse_device']


def parse_device(name: str) -> torch.device:
    """The device of this name, seen to work.

    Args:
        name: 'auto' for an accelerator if there is one, else the CPU; or 'cpu', 'cuda', 'cuda:1', ...

    Raises:
        ValueError: If there is no such device here.
    """
    if name == 'auto':
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device('cpu')
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise ValueError(f"--device must be 'auto', 'cpu' or an accelerator here, got {name!r}: {reason}") from error
    return device
