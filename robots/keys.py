"""A person's keys, in the terminal that the program was started from: success, failure, emergency stop."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import sys
import termios
import tty

from plumbing.flags import UserError

SUCCESS = "s"
FAILURE = "f"
STOP = " "
READY = "\n"
MEANING = "s: success   f: failure, ends the episode   space: emergency stop   Enter: ready"


class Keys:
    """Single keys, without Enter. The terminal is put back when the program ends."""

    def __init__(self):
        """Raises: UserError where standard input is no terminal."""
        try:
            self.number = sys.stdin.fileno()
            self.before = termios.tcgetattr(self.number)
        except (OSError, ValueError, termios.error) as error:
            raise UserError("a robot needs a terminal for the keys of whoever watches it: no nohup, no pipe") from error
        tty.setcbreak(self.number)
        atexit.register(self.close)
        print(f"keys in this terminal   {MEANING}", file=sys.stderr)

    def pressed(self) -> str:
        """All keys since the last call."""
        found = ""
        while select.select([self.number], [], [], 0)[0]:
            read = os.read(self.number, 100).decode(errors="ignore")
            if not read:
                raise UserError("the terminal has gone, and with it the emergency stop's key")
            found += read
        return found

    def close(self) -> None:
        with contextlib.suppress(termios.error):  # the terminal has gone
            termios.tcsetattr(self.number, termios.TCSADRAIN, self.before)
        atexit.unregister(self.close)
