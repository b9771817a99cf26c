"""A stand-in for the robot's server, its arm and a camera, on loopback, with faults to switch on.

`python tests/fake_franka.py --port 5000` serves until it is ended: a rehearsal of docs/franka.md without a robot. The
camera is at http://127.0.0.1:5000/camera; it shows where the hand is, seen from above.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
from scipy.spatial.transform import Rotation, Slerp

START = [0.45, 0.0, 0.25, 1.0, 0.0, 0.0, 0.0]  # hand: metres, quaternion x y z w


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        fake = self.server.fake
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fake.open.wait()  # closed: the server is silent
        time.sleep(fake.delay)
        if fake.random.random() < fake.drop:
            self.close_connection = True
            self.connection.close()
            return
        route = self.path.strip("/")
        with fake.guard:
            fake.calls.append((time.monotonic(), route, json.loads(body) if body else None))
            answer = fake.answer(route, json.loads(body) if body else None)
        content = json.dumps(answer).encode() if isinstance(answer, dict) else answer.encode()
        self.send_response(fake.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):  # the camera: a stream of JPEG pictures
        fake = self.server.fake
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        while not fake.over:
            fake.shutter.wait()
            picture = cv2.imencode(".jpg", fake.picture())[1].tobytes()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
            self.wfile.write(head.encode() + picture + b"\r\n")
            time.sleep(1 / 30)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # who asked has given up


class FakeFranka:
    """The arm goes to the last pose it was told, within a few hundredths of a second, at 0.25 m/s at most."""

    def __init__(self, port: int = 0):
        self.pose = np.array(START)
        self.goal = self.pose.copy()
        self.gripper = 1.0
        self.calls = []  # (time, route, body)
        self.path = []  # (time, position)
        self.open, self.shutter = threading.Event(), threading.Event()
        self.open.set()
        self.shutter.set()
        self.delay, self.drop, self.status, self.stuck, self.wrong, self.over = 0.0, 0.0, 200, False, None, False
        self.random = np.random.default_rng(0)
        self.guard = threading.RLock()
        self.http = Server(("127.0.0.1", port), Handler)
        self.http.fake = self
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        threading.Thread(target=self.live, daemon=True).start()

    def answer(self, route: str, body):
        if route == "getstate":
            state = dict(pose=self.pose.tolist(), vel=[0.0] * 6, force=[0.0] * 3, torque=[0.0] * 3, q=[0.1] * 7)
            state |= dict(dq=[0.0] * 7, jacobian=[[0.0] * 7] * 6, gripper_pos=self.gripper)
            return state if self.wrong is None else self.wrong
        if route == "pose":
            self.goal = np.array(body["arr"])
            assert self.goal.shape == (7,)
        if route == "told":  # for tests, where this is a process of its own
            return {"poses": self.poses().tolist()}
        if route == "stopimp":
            self.goal = self.pose.copy()
        if route in ("open_gripper", "close_gripper"):
            self.gripper = float(route == "open_gripper")
        return "done"

    def live(self):
        while not self.over:
            time.sleep(0.01)
            with self.guard:
                way = self.goal[:3] - self.pose[:3]
                step = way * min(0.3, 0.0025 / max(np.linalg.norm(way), 1e-9))
                if not self.stuck:
                    self.pose[:3] += step
                if not self.stuck and np.abs(self.pose[3:] - self.goal[3:]).max() > 1e-6:
                    turns = Slerp([0, 1], Rotation.from_quat([self.pose[3:], self.goal[3:]]))
                    self.pose[3:] = turns(0.3).as_quat()
                self.path.append((time.monotonic(), self.pose[:3].copy()))

    def picture(self) -> np.ndarray:
        picture = np.full((120, 160, 3), 200, np.uint8)
        x, y = self.pose[:2]
        cv2.circle(picture, (int(80 - 400 * y), int(60 - 400 * (x - 0.45))), 10, (0, 0, 255), -1)
        return picture

    def poses(self) -> np.ndarray:
        """All that it was told to go to, [n, 7]."""
        return np.array([body["arr"] for _, route, body in self.calls if route == "pose"])

    def close(self):
        self.over = True
        self.open.set()
        self.shutter.set()
        self.http.shutdown()
        self.http.server_close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=5000, help="on loopback")
    robot = FakeFranka(parser.parse_args().port)
    print(f"serving at {robot.url}, camera at {robot.url}/camera", flush=True)
    threading.Event().wait()
