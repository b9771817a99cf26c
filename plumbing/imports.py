"""Ctrl-C while libraries are imported, which takes seconds: one line, in the place of a traceback out of their middle."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def leave(number: int, frame) -> None:
    if multiprocessing.parent_process() is None:  # workers leave the line to the program
        os.write(2, b"stopped by SIGINT\n")
    os._exit(128 + number)


def begin() -> None:
    """From here to `end`, Ctrl-C ends the program at once."""
    global before
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, leave)


def end() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, before)


begin()
