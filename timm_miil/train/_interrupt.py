"""Signals that ask a run to stop, heard where it can."""
import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ['StopRequest']


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

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
