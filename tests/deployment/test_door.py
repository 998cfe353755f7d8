"""nginx as ``deploy/`` configures it, before a server that answers everything: what reaches it, and what does not."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ot_federated.certificates import make_authority
from ot_federated.data_owner.doctor import check_door as check_from_outside
from ot_federated.model_owner.doctor import check_door, disguised_calls
from tests.parties import needs_real_processes
from tests.real_federation import RealFederation

pytestmark = needs_real_processes


class Door:
    """A SuperLink's stand-in, which says 200 to all, and nginx before it."""

    def __init__(self, federation: RealFederation) -> None:
        self.federation = federation
        self.reached: list[str] = []
        reached = self.reached

        class Everything(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                reached.append(self.path)
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(200)
                self.send_header("Content-Length", "6")
                self.end_headers()
                self.wfile.write(b"behind")

            do_GET = do_POST  # noqa: N815 - the name is http.server's

            def log_message(self, *arguments: Any) -> None: ...

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(federation.keys / "server.crt", federation.keys / "server.key")
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", federation.superlink.port), Everything)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.federation.proxy.port}"

    def call(self, path: str, *, method: str = "POST", body: bytes = b"") -> tuple[int, str]:
        """Call through nginx, the path byte for byte."""
        context = ssl.create_default_context(cafile=str(self.federation.keys / "ca.crt"))
        plain = socket.create_connection(("127.0.0.1", self.federation.proxy.port), timeout=30)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode())
            # nginx may have said no, and closed.
            with contextlib.suppress(OSError):
                connection.sendall(body)
            response = http.client.HTTPResponse(connection)
            response.begin()
            return response.status, response.read().decode(errors="replace")


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    federation = RealFederation(tmp_path_factory.mktemp("door"), model=Path("none"), num_nodes=0)
    built = Door(federation)
    federation.proxy.start()
    yield built
    federation.proxy.stop()
    built.server.shutdown()


def test_calls_of_supernodes_pass(door: Door) -> None:
    for name in ("activate-node", "pull-messages", "push-object", "send-node-heartbeat"):
        assert door.call(f"/v1/fleet/{name}", body=b"x" * 1000) == (200, "behind")
        assert door.reached[-1] == f"/v1/fleet/{name}"
    # 5 MB is the most that Flower sends at once.
    assert door.call("/v1/fleet/push-object", body=bytes(6 * 2**20))[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/control/list-runs", "/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/pull-messages"),
        *("/", "/health", "/docs", "/openapi.json", "/v1/fleet/", "/v1/fleet", "/v1/fleetx/pull-messages"),
        *("/v1/fleet/../control/list-runs", "/v1/fleet/..%2fcontrol/list-runs", "/v1/fleet/%2e%2e/control/list-runs"),
        *("/v1/control/../fleet/pull-messages", "/v1/control/..%2ffleet/pull-messages", "//v1/control/list-runs"),
        *("/v1/fleet/pull-messages?a=b", "/v1/fleet/pull-messages/", "/V1/FLEET/pull-messages", *disguised_calls),
        "https://127.0.0.1/v1/control/list-runs",
    ],
)
def test_nothing_else_does(door: Door, path: str) -> None:
    num_reached = len(door.reached)
    status, text = door.call(path)
    assert status in (400, 403)
    assert "behind" not in text
    assert len(door.reached) == num_reached


def test_other_methods_and_sizes_do_not(door: Door) -> None:
    num_reached = len(door.reached)
    assert door.call("/v1/fleet/pull-messages", method="GET")[0] == 403
    assert door.call("/v1/fleet/push-object", body=bytes(17 * 2**20))[0] == 413
    assert len(door.reached) == num_reached


def test_a_client_without_the_authority_refuses_before_it_says_a_word(door: Door, tmp_path: Path) -> None:
    make_authority(tmp_path)
    num_reached = len(door.reached)
    (finding,) = check_from_outside(door.address, tmp_path / "ca.crt")
    assert finding.level == "error"
    assert "not trusted" in finding.found
    assert len(door.reached) == num_reached


def test_the_doctor_tells_a_good_door_from_none(door: Door) -> None:
    authority = door.federation.keys / "ca.crt"
    assert [finding.level for finding in check_door(door.address, authority)] == ["ok"]
    findings = check_from_outside(door.address, authority)
    assert {finding.check: finding.level for finding in findings} == {"model owner": "ok", "clock": "ok"}
    # Without nginx, all that is asked for is reached.
    (finding,) = check_door(f"127.0.0.1:{door.federation.superlink.port}", authority)
    assert finding.level == "error"
    assert "at once" in finding.remedy
