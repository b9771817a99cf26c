"""The loop of a program that is compared: it is told how many updates to do, and says how many seconds they took."""

import sys
import time

# The sizes of all networks and batches; those of the action are each comparison's own.
FEATURES = 256
HIDDEN = 256
BATCH = 256
CRITICS = 2
SAMPLES = 10  # of each kind in a conservative term


def serve(update) -> None:
    """Update a few times, so that all is compiled and allocated, and then as told. CPU seconds of all threads."""
    for _ in range(3):
        update()
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.process_time()
        for _ in range(int(line)):
            update()
        print(time.process_time() - began, flush=True)
