"""SIGTERM and Ctrl-C: a run ends where it can write a checkpoint, or without one when that takes too long.

A second signal ends it at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.util
import os
import signal
import time
from collections.abc import Iterator


class Stopped(KeyboardInterrupt):
    """Ends the program with exit code 128 + signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.folder = folder  # of the run that can be gone on with


asked = 0  # signal that came while a run can end at its next update
since = 0.0  # when it came, by the monotonic clock
PATIENCE = 15.0  # seconds: clusters give 30 before they kill
echo = 0.0  # seconds within which a second signal is the first one, passed on: torchrun does that
can_wait = False  # a run is between its first and its last update
folder = ""  # its folder, once that holds a checkpoint


def listen() -> None:
    """From now on, SIGTERM and Ctrl-C end the program as this module says."""
    signal.signal(signal.SIGTERM, receive)
    signal.signal(signal.SIGINT, receive)


def receive(number: int, frame) -> None:
    global asked, since
    if asked and time.monotonic() - since < echo:
        return
    if asked or not can_wait:
        raise Stopped(number)
    asked = number
    since = time.monotonic()
    # Not by print: the signal may have come within one, which can't be entered twice.
    os.write(2, b"\nending at the next checkpoint, within 15 seconds; once more ends at once\n")


def over() -> None:
    """The program is at its end: a signal that comes now makes it shorter, without a word."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(128 + number))


def check_patience() -> None:
    """Between two updates, where no checkpoint can be written: don't wait for ever. Raises: Stopped."""
    if asked and time.monotonic() - since > PATIENCE:
        raise Stopped(asked)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started here never hear of Ctrl-C, which a terminal sends to all: this one tells them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave(number: int, frame) -> None:
    """In a worker process: end at once, with its own workers, and leave no semaphores behind."""
    for child in multiprocessing.active_children():
        child.kill()
    multiprocessing.util._exit_function()
    os._exit(128 + number)


def follow_parent() -> None:
    """In a worker process: end with its parent, however that ends, and leave Ctrl-C to it (Linux)."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if not parent.is_alive():  # it has ended already
        os._exit(1)
