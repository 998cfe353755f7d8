"""Messages over a socket, cut into objects and put together again by Flower's own code, copies and threads included.

What is left out of a deployment is HTTP and what stands between the two ends: SuperLink and SuperNode, processes of
their own that hold the serialised objects of a message until they have been fetched.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter

from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse, PushObjectRequest
from flwr.proto.message_pb2 import PushObjectResponse as Stored
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects


def send(link: socket.socket, message: Message) -> None:
    """Send a message as Flower's grid and its ClientApp process do."""
    lock = threading.Lock()

    def push(request: PushObjectRequest) -> Stored:
        data = request.SerializeToString(deterministic=True)
        with lock:
            _write(link, request.object_id.encode(), data)
        return Stored(stored=True)

    with no_object_id_recompute():
        _write(link, message.object_id.encode(), get_object_tree(message).SerializeToString())
        push_objects(
            get_all_nested_objects(message), make_push_object_fn_protobuf(push, Node(), run_id=1, session_id="")
        )


def receive(link: socket.socket) -> Message:
    """Receive a message as Flower's ClientApp process does.

    Raises:
        ConnectionError: If the other side has hung up.
    """
    message_id, data = _read_frame(link)
    tree = ObjectTree.FromString(data)
    lock, early = threading.Lock(), dict[str, bytes]()
    # An object that is in the message twice comes once, and is pulled twice.
    num_pulls = Counter(node.object_id for node in iterate_object_tree(tree))

    def pull(request: PullObjectRequest) -> PullObjectResponse:
        wanted = request.object_id
        with lock:
            while wanted not in early:
                object_id, content = _read_frame(link)
                early[object_id] = content
            num_pulls[wanted] -= 1
            data = early[wanted] if num_pulls[wanted] else early.pop(wanted)
        content = PushObjectRequest.FromString(data).object_content
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    message = pull_and_inflate_object_from_tree(
        tree, make_pull_object_fn_protobuf(pull, Node(), run_id=1), lambda _: None, return_type=Message
    )
    message.metadata.__dict__["_message_id"] = message_id
    return message


def _write(link: socket.socket, object_id: bytes, data: bytes) -> None:
    link.sendall(object_id + struct.pack("<Q", len(data)))
    link.sendall(data)


def _read_frame(link: socket.socket) -> tuple[str, bytes]:
    head = _read(link, 72)
    (length,) = struct.unpack("<Q", head[64:])
    return head[:64].decode(), bytes(_read(link, length))


def _read(link: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        received = link.recv_into(view)
        if not received:
            raise ConnectionError("the other side has hung up")
        view = view[received:]
    return data
