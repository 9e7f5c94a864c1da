"""Signals that ask a run to stop, heard where it can."""
import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TypeVar

import torch

from timm_miil.train._host import Host

__all__ = ['StopRequest', 'Stopped']

STOP_EVERY_BATCHES = 8  # of several processes, which wait for each other to know of a signal

_T = TypeVar('_T')


class Stopped(Exception):
    """A signal came while pictures were scored."""


class StopRequest:
    """Whether SIGTERM or SIGINT came since `heard` was entered; a second SIGINT is a KeyboardInterrupt at once.

    Attributes:
        signal_name: 'SIGTERM' or 'SIGINT'; '' as long as nothing came.
    """

    def __init__(self) -> None:
        self.signal_name = ''

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Listen, where Python lets us: in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def watch(self, batches: Iterator[_T], host: Host) -> Iterator[_T]:
        """The batches, of which processes may have different numbers.

        Raises:
            Stopped: In all processes, after a signal to any.
        """
        is_going = True
        while is_going:
            some = list(itertools.islice(batches, STOP_EVERY_BATCHES if host.share.count > 1 else 1))
            yield from some
            own = torch.tensor([int(bool(self.signal_name)), len(some)], device=host.device)
            is_stopped, is_going = host.total(own).bool().tolist()
            if is_stopped:
                raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
