"""Cameras by OpenCV: threads that keep the newest picture."""

from __future__ import annotations

import threading
import time

import numpy as np

from operators.devices import Gone, optional
from plumbing.flags import UserError
from robots.config import Camera


class LiveCamera:
    """Reads all the time, since a driver's queue would hand out pictures that are a second old."""

    def __init__(self, name: str, settings: Camera, frozen: float):
        """frozen: seconds without a new picture that are too many. Raises: UserError if it delivers none."""
        self.cv2 = optional("cv2")
        self.name = name
        self.settings = settings
        self.frozen = frozen
        self.picture = None  # [h, w, 3] uint8, blue green red
        self.time = 0.0
        self.closing = False
        self.capture = self.opened()
        self.thread = threading.Thread(target=self.follow, daemon=True)
        self.thread.start()
        patience = time.monotonic() + 5
        while self.picture is None and time.monotonic() < patience:
            time.sleep(0.02)
        if self.picture is None:
            self.close()
            raise UserError(f"camera {name} ({settings.source}) delivers no picture")
        self.check_crop()

    def opened(self):
        source = self.settings.source
        capture = self.cv2.VideoCapture(int(source) if source.isdigit() else source)
        if not capture.isOpened():
            raise UserError(f"camera {self.name}: {source} can't be opened (v4l2-ctl --list-devices names them)")
        if source.isdigit():
            capture.set(self.cv2.CAP_PROP_FRAME_WIDTH, self.settings.width)
            capture.set(self.cv2.CAP_PROP_FRAME_HEIGHT, self.settings.height)
            capture.set(self.cv2.CAP_PROP_BUFFERSIZE, 1)
        return capture

    def check_crop(self) -> None:
        height, width = self.picture.shape[:2]
        if self.settings.crop:
            x, y, w, h = self.settings.crop
            fits = x + w <= width and y + h <= height
            if not fits or w == 0 or h == 0:
                self.close()
                raise UserError(f"camera {self.name}: crop {self.settings.crop} doesn't fit into {width} x {height}")

    def follow(self) -> None:
        """The thread. A picture that can't be read is none; `read` sees how old the last one is."""
        while not self.closing:
            there, picture = self.capture.read()
            if there:
                self.picture = picture
                self.time = time.monotonic()
            else:
                time.sleep(0.02)

    def read(self, side: int) -> np.ndarray:
        """The newest picture, cropped and shrunk: [side, side, 3] uint8, red green blue. Raises: Gone."""
        age = time.monotonic() - self.time
        if age > self.frozen:
            raise Gone(f"camera {self.name} has delivered no picture for {age:.1f} s")
        picture = self.picture
        x, y, w, h = self.settings.crop or middle(picture)
        part = picture[y : y + h, x : x + w]
        small = self.cv2.resize(part, (side, side), interpolation=self.cv2.INTER_AREA)
        return np.ascontiguousarray(small[..., ::-1])

    def close(self) -> None:
        self.closing = True
        self.thread.join(timeout=1)
        if not self.thread.is_alive():  # else it waits for a driver; releasing under it would crash
            self.capture.release()


def middle(picture: np.ndarray) -> tuple[int, int, int, int]:
    """The largest square in the middle of a picture: x, y, width, height."""
    height, width = picture.shape[:2]
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side, side
