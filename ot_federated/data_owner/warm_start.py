"""Processes that answer messages, started warm: a fork of one that has imported what every message needs.

Flower starts a new Python for each message, which then imports Flower, torch and transformers: seven seconds of
computing for an answer that may need none, and on a busy machine more than the 30 s after which Flower gives a message
up. Here one process imports them once, when the SuperNode starts; a message gets a fork of it. Flower is none the
wiser: it runs ``flwr-clientapp``, which is found in a directory of this SuperNode's own, and is a few lines that hand
arguments, environment and output on to the fork, and end as it ends.

Nothing of a run is imported beforehand, and of this project nothing at all: a fork imports the run's approved code as a
new process would. Where a fork would not be safe (another system than Linux, threads, a GPU in use) or the warm process
is gone, ``flwr-clientapp`` becomes Flower's own.

This file runs as a program of its own, and therefore imports nothing of this project::

    python -P warm_start.py serve                                in the directory of the socket, until its parent ends
    python -IS warm_start.py run DIRECTORY COLD ARGUMENT ...     the stand-in for flwr-clientapp
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any, NoReturn

socket_name = "warm.sock"
header_bytes = 8
# What messages need, heaviest first. Of transformers what loads a model, whatever its family.
preloaded = (
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "datasets.packaged_modules.json.json",
    "peft",
    "flwr.clientapp",
    "flwr.supernode.cli",
)
own_packages = ("ot_federated", "strategies")


def main() -> None:
    """Serve, or stand in for ``flwr-clientapp``."""
    if sys.argv[1] == "serve":
        serve()
    else:
        run(sys.argv[2], sys.argv[3], sys.argv[4:])


def run(directory: str, cold: str, arguments: list[str]) -> NoReturn:
    """Have a fork run ``flwr-clientapp`` with these arguments, and end as it does.

    Args:
        directory: Where the socket is.
        cold: Flower's own ``flwr-clientapp``, for when there is no warm process.
        arguments: Its arguments.
    """
    here = os.getcwd()  # noqa: PTH109 - pathlib takes as long to import as all the rest
    request = {"arguments": arguments, "directory": here, "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        started = b""
        with contextlib.suppress(OSError):
            # Relative: the path of a socket may have 107 characters at most.
            os.chdir(directory)
            server.connect(socket_name)
            data = json.dumps(request).encode()
            socket.send_fds(server, [len(data).to_bytes(header_bytes, "big")], [1, 2])
            server.sendall(data)
            started = server.recv(1)
        if started:
            code = b""
            with contextlib.suppress(OSError):
                code = server.recv(1)
            sys.exit(code[0] if code else 1)
        os.chdir(here)
    os.execv(cold, [cold, *arguments])


def serve() -> None:
    """Answer requests by forks until the parent ends; returns in a fork, once it has done its work."""
    parent = os.getppid()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(socket_name)
    # Before anything is imported: who comes early waits.
    listener.listen(64)
    if not (sys.platform == "linux" and preload()):
        return
    # Whose stand-in is connected, by the fork's process id.
    waiting: dict[int, socket.socket] = {}
    listener.settimeout(0.1)
    while os.getppid() == parent:
        connection = None
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
        end_forks(waiting)
        if connection is None:
            continue
        try:
            request, files = receive(connection)
        except (OSError, ValueError):
            connection.close()
            continue
        process_id = os.fork()
        if process_id == 0:
            for inherited in (listener, connection, *waiting.values()):
                inherited.close()
            become_client_app(request, files)
            return
        for file in files:
            os.close(file)
        connection.setblocking(False)
        waiting[process_id] = connection
        with contextlib.suppress(OSError):
            connection.send(b"\x01")


def preload() -> bool:
    """Import what messages need, and say whether forks of this process are sound."""
    import gc
    import importlib
    import threading

    # torch asks the driver's library for GPUs, and leaves CUDA itself alone: a fork could not use it any more.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    for name in preloaded:
        # What is not installed, or not where this release of a package has it, a fork imports itself if it needs it.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    torch: Any = sys.modules.get("torch")
    gc.collect()
    # So that a fork's garbage collector does not touch, and thereby copy, the memory that it shares.
    gc.freeze()
    return (
        threading.active_count() == 1
        and not (torch is not None and torch.cuda.is_initialized())
        and not any(name in sys.modules for name in own_packages)
    )


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return a request, and the files for its output.

    Raises:
        OSError: If the connection breaks.
        ValueError: If it is no request.
    """
    connection.settimeout(10)
    header, files, _, _ = socket.recv_fds(connection, header_bytes, 2)
    size, data = int.from_bytes(header, "big"), b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ValueError("The request is cut short.")
        data += part
    request = json.loads(data)
    if len(files) != 2 or not isinstance(request, dict):
        raise ValueError("The request is none.")
    return request, files


def end_forks(waiting: dict[int, socket.socket]) -> None:
    """Tell the stand-ins of forks that have ended, and end forks whose stand-in has."""
    for process_id, connection in list(waiting.items()):
        ended, status = os.waitpid(process_id, os.WNOHANG)
        if ended:
            with contextlib.suppress(OSError):
                connection.send((os.waitstatus_to_exitcode(status) & 255).to_bytes(1, "big"))
        else:
            try:
                gone = connection.recv(1) == b""
            except BlockingIOError:
                gone = False
            except OSError:
                gone = True
            if not gone:
                continue
            os.kill(process_id, signal.SIGKILL)
            os.waitpid(process_id, 0)
        connection.close()
        del waiting[process_id]


def become_client_app(request: dict[str, Any], files: list[int]) -> None:
    """Be ``flwr-clientapp`` with the request's arguments, directory, environment and output."""
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.argv = ["flwr-clientapp", *request["arguments"]]
    # Forks begin with the same state of every generator but Python's own. Nothing secret is drawn from these.
    numpy: Any = sys.modules.get("numpy")
    torch: Any = sys.modules.get("torch")
    if numpy is not None:
        numpy.random.seed()
    if torch is not None:
        torch.seed()
    from flwr.supernode.cli import flwr_clientapp

    flwr_clientapp()


if __name__ == "__main__":
    main()
