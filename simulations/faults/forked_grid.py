"""A grid whose clients are processes: each message is handled by a new one, as in a deployment, and may be killed.

A client's process is forked from this one, which has imported everything, so that a schedule takes seconds. Its reply
comes back through a pipe as Flower's serialised objects; a process that dies gives what a SuperLink would report.
"""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Callable
from typing import Any, NoReturn, cast

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from simulations.in_process import InProcessGrid

Writer = Callable[[bytes], None]


def kill_this_process() -> NoReturn:
    """Die as a process does that is killed: nothing is flushed, nothing is caught."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


class ForkedGrid(InProcessGrid):
    """A grid that forks a process for each message.

    Subclasses overwrite :meth:`in_client` and :meth:`upload` to make things go wrong there.
    """

    def _execute(self, message: Message) -> Message:
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(receive)
                self.in_client(message)
                self.upload(message, dump_message(super()._execute(message)), lambda data: write_all(send, data))
                os._exit(0)
            finally:
                os._exit(1)
        os.close(send)
        with os.fdopen(receive, "rb") as stream:
            data = stream.read()
        _, status = os.waitpid(pid, 0)
        if status or not data:
            what = f"the client's process ended with status {status}"
            return Message(Error(code=ErrorCode.CLIENT_APP_CRASHED, reason=what), reply_to=message)
        return load_message(data)

    def in_client(self, message: Message) -> None:
        """Do something in the client's process before it handles a message."""

    def upload(self, message: Message, data: bytes, write: Writer) -> None:
        """Send the reply from the client's process."""
        write(data)


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything to a pipe."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def dump_message(message: Message) -> bytes:
    """Return a message as its Flower objects, one after the other, behind their ids and lengths."""
    contents = {object_id: item.deflate() for object_id, item in get_all_nested_objects(message).items()}
    head = json.dumps([message.object_id, [[name, len(content)] for name, content in contents.items()]]).encode()
    return b"".join([struct.pack("<Q", len(head)), head, *contents.values()])


def load_message(data: bytes) -> Message:
    """Return the message that :func:`dump_message` wrote."""
    (length,) = struct.unpack_from("<Q", data)
    message_id, sizes = json.loads(data[8 : 8 + length])
    contents: dict[str, Any] = {}
    start = 8 + length
    for name, size in sizes:
        contents[name] = data[start : start + size]
        start += size
    return cast(Message, inflate_object_from_contents(message_id, contents))
