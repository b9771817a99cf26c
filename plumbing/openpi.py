"""openpi's protocol for policies, both ends: a websocket, with msgpack messages that hold numpy arrays.

The server begins with what it is (a dict). Then, again and again, the client sends an observation (a dict of arrays
and text) and gets {"actions": [H, A], ..., "server_timing": {"infer_ms": ...}}. A text message in the place of bytes
is an error. Nothing that arrives is executed, and arrays of objects are refused.
"""

from __future__ import annotations

import http
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from plumbing.flags import UserError

LARGEST = 1 << 26  # bytes of a message that is taken
NUMBERS = "biuf"  # kinds of arrays that are taken
LIBRARIES = "serving and asking policies need `pip install websockets msgpack`"


# === Messages ========================================================================================================
def pack(message: dict) -> bytes:
    """A dict of numbers, text, lists, dicts and numpy arrays as bytes."""
    import msgpack

    return msgpack.packb(message, default=from_numpy)


def unpack(content: bytes) -> dict:
    """The dict in bytes from outside. Raises: UserError."""
    import msgpack

    try:
        message = msgpack.unpackb(content, object_hook=to_numpy)
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
        raise UserError(f"that message is no msgpack with numpy arrays ({error!r:.200})") from error
    if not isinstance(message, dict):
        raise UserError(f"that message is a {type(message).__name__}, and not a dict")
    return message


def from_numpy(value):
    kind = getattr(value, "dtype", np.dtype(int)).kind
    if kind not in NUMBERS:
        raise ValueError(f"arrays of {value.dtype} can't be sent")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} can't be sent")


def to_numpy(found: dict):
    if b"__ndarray__" in found:
        array = np.frombuffer(found[b"data"], numeric(found[b"dtype"]))
        return array.reshape([int(side) for side in found[b"shape"]])
    if b"__npgeneric__" in found:
        return numeric(found[b"dtype"]).type(found[b"data"])
    return found


def numeric(name: str) -> np.dtype:
    """Raises: ValueError for a dtype that isn't plain numbers."""
    dtype = np.dtype(name)
    if dtype.kind not in NUMBERS:
        raise ValueError(f"an array of {dtype}")
    return dtype


# === Server ==========================================================================================================
@contextmanager
def server(about: dict, infer: Callable, host: str, port: int) -> Iterator:
    """A server of the library's, listening; its `serve_forever` goes on until its `shutdown`.

    infer(observation) -> answer; one call at a time. What it says by a UserError goes to the client, who may go on.
    Raises: UserError where the address can't be had.
    """
    try:
        from websockets.exceptions import ConnectionClosed
        from websockets.sync.server import serve
    except ImportError as error:
        raise UserError(LIBRARIES) from error
    one = threading.Lock()

    def handle(connection) -> None:
        before = {}
        try:
            connection.send(pack(about))
            while True:
                began = time.monotonic()
                try:
                    observation = unpack(as_bytes(connection.recv()))
                    asked = time.monotonic()
                    with one:
                        answer = infer(observation)
                except UserError as error:
                    connection.send(str(error))
                    continue
                timing = {"infer_ms": 1000 * (time.monotonic() - asked)}
                connection.send(pack(answer | {"server_timing": timing | before}))
                before = {"prev_total_ms": 1000 * (time.monotonic() - began)}
        except ConnectionClosed:
            pass

    def health(connection, request):
        return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None

    try:
        listening = serve(handle, host, port, compression=None, max_size=LARGEST, process_request=health)
    except OSError as error:
        raise UserError(
            f"can't listen on {host}:{port} ({error.strerror or error}): choose another --host or --port"
        ) from error
    with listening as found:
        yield found


def as_bytes(message: bytes | str) -> bytes:
    """Raises: UserError for text."""
    if isinstance(message, str):
        raise UserError("that message is text, and not msgpack")
    return message


# === Client ==========================================================================================================
class Client:
    """Asks a server, ours or openpi's. Attribute: `about`, what it says of itself."""

    def __init__(self, address: str, patience: float = 60.0):
        """address: ws://host:port. patience: seconds to wait for an answer. Raises: UserError."""
        try:
            from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException
            from websockets.sync.client import connect
        except ImportError as error:
            raise UserError(LIBRARIES) from error
        self.address = address
        self.held = ExitStack()
        self.patience = patience
        self.gone = (WebSocketException, OSError, TimeoutError)
        try:
            found = connect(address, compression=None, max_size=None, proxy=None)
            self.connection = self.held.enter_context(found)
            first = self.connection.recv(timeout=patience)
        except (InvalidURI, InvalidHandshake, *self.gone) as error:
            raise UserError(f"no policy answers at {address} ({error}): start it, or correct the address") from error
        self.about = unpack(as_bytes(first))

    def infer(self, observation: dict) -> dict:
        """Raises: UserError where the server reports an error, is gone, or takes longer than `patience`."""
        try:
            self.connection.send(pack(observation))
            answer = self.connection.recv(timeout=self.patience)
        except self.gone as error:
            raise UserError(
                f"the policy at {self.address} is gone or silent ({error or type(error).__name__})"
            ) from error
        if isinstance(answer, str):
            lines = answer.strip().splitlines() or ["no reason"]
            raise UserError(f"the policy at {self.address} reports: {lines[-1][:300]}")
        return unpack(answer)

    def close(self) -> None:
        self.held.close()
