"""A service manager's SIGTERM and a terminal's SIGHUP end a command as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_names = ("SIGTERM", "SIGHUP")
_again_after_seconds = 0.1


@contextmanager
def ending_signals_interrupt() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` in the main thread at SIGTERM and SIGHUP, until it is heard.

    An exception raised in a finaliser or in the callback of a weak reference is printed and dropped by Python, and
    torch and matplotlib have many of these: the process would go on as if nobody had asked it to end. The signal is
    sent once more then.
    """

    def interrupt(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    def hear_dropped(dropped: Any) -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            # Later: raised from here it would be dropped again.
            timer = threading.Timer(_again_after_seconds, os.kill, (os.getpid(), signal.SIGTERM))
            timer.daemon = True
            timer.start()
        else:
            previous_hook(dropped)

    numbers = [getattr(signal, name) for name in _names if hasattr(signal, name)]
    previous_hook = sys.unraisablehook
    sys.unraisablehook = hear_dropped
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = previous_hook
