"""What a model owner should know of its side: keys, SuperLink, and above all who can reach what."""

from __future__ import annotations

import ipaddress
import json
import shutil
import subprocess
from pathlib import Path

import psutil

from ot_federated.health import (
    Finding,
    ask,
    check_certificate,
    check_device,
    check_disk,
    check_pair,
    check_secret,
    check_time_service,
    check_versions,
    explain_connection,
    gather,
    split_address,
    well,
)

fleet_call, control_call = "/v1/fleet/pull-messages", "/v1/control/list-runs"
# Other spellings of the address of the Control API, which only decode to a SuperNode's call.
disguised_calls = ("/v1/control/..%2ffleet/list-runs", "/v1/fleet/../control/list-runs", "//v1/control/list-runs")


def examine_model_owner(
    keys: Path, *, superlink: str, proxy: str, state: Path, output: Path, connection: str = ""
) -> list[Finding]:
    """Look at the model owner's side.

    Args:
        keys: Directory of ``ca.crt``, ``server.crt`` and ``server.key``, and of ``ca.key`` where it is kept here.
        superlink: ``HOST:PORT`` of the SuperLink.
        proxy: ``HOST:PORT`` by which data owners come in; empty: it is not tried.
        state: Directory of the SuperLink's database.
        output: Where runs write.
        connection: The SuperLink's name in Flower's configuration; empty: its nodes are not looked at.
    """
    ca, certificate, key = keys / "ca.crt", keys / "server.crt", keys / "server.key"
    new_certificate = f"Move server.key and server.crt away, run ot-federated keys server {keys} HOST, restart both."
    new_authority = "Make a new authority (ot-federated keys ca) and give its ca.crt to every data owner beforehand."
    return gather(
        [
            ("versions", check_versions),
            ("authority", lambda: check_certificate(ca, check="authority", remedy=new_authority)),
            ("authority's key", lambda: check_authority_key(keys / "ca.key")),
            ("certificate", lambda: check_certificate(certificate, check="certificate", remedy=new_certificate)),
            ("certificate's key", lambda: check_secret(key, check="certificate's key")),
            ("certificate's authority", lambda: check_pair(key, certificate, ca)),
            ("superlink", lambda: check_superlink(superlink, ca)),
            ("loopback", lambda: check_loopback(split_address(superlink)[1])),
            ("door", lambda: check_door(proxy, ca) if proxy else []),
            ("nodes", lambda: check_nodes(connection) if connection else []),
            ("device", check_device),
            ("database's disk", lambda: check_disk(state, check="database's disk")),
            ("runs' disk", lambda: check_disk(output, check="runs' disk")),
            ("time service", check_time_service),
        ]
    )


def check_authority_key(path: Path) -> list[Finding]:
    """Look at the authority's key, where it is kept on this machine."""
    return check_secret(path, check="authority's key") if path.exists() else [well("authority's key", "not kept here")]


def check_superlink(address: str, authority: Path) -> list[Finding]:
    """Call the SuperLink where only this machine can."""
    try:
        answer = ask(address, authority=authority, path="/health", method="GET")
    except OSError as error:
        found, _ = explain_connection(error)
        remedy = "Start it (deploy/owner/superlink.sh), and look at its log."
        return [Finding(check="superlink", level="error", found=f"{address}: {found}", remedy=remedy)]
    return [well("superlink", f"{address} answers with {answer.status}")]


def check_loopback(port: int) -> list[Finding]:
    """Check that the SuperLink's port is open on this machine alone."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        remedy = "Run the doctor as root to have this checked, or look at: ss -ltn."
        return [
            Finding(check="loopback", level="warning", found="other processes' ports cannot be seen", remedy=remedy)
        ]
    listening = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port}
    exposed = sorted(ip for ip in listening if not ipaddress.ip_address(ip).is_loopback)
    if exposed:
        found = f"port {port} is open on {', '.join(exposed)}: whoever reaches it registers nodes and runs code on all"
        remedy = "Start flower-superlink with --host 127.0.0.1, and let data owners come in through nginx."
        return [Finding(check="loopback", level="error", found=found, remedy=remedy)]
    return [well("loopback", f"port {port} is open on this machine alone")]


def check_door(proxy: str, authority: Path) -> list[Finding]:
    """Call through the proxy as a stranger would: SuperNodes' calls come through, no other does."""
    try:
        passed = ask(proxy, authority=authority, path=fleet_call)
        others = {path: ask(proxy, authority=authority, path=path).status for path in (control_call, *disguised_calls)}
    except OSError as error:
        found, remedy = explain_connection(error)
        return [Finding(check="door", level="error", found=f"{proxy}: {found}", remedy=remedy)]
    findings = []
    if passed.status in (403, 404, 502, 503, 504):
        found = f"{proxy} does not bring SuperNodes' calls to the SuperLink ({passed.status})"
        remedy = "Compare its configuration with deploy/owner/nginx.conf; 502 is a SuperLink that does not run."
        findings.append(Finding(check="door", level="error", found=found, remedy=remedy))
    # The SuperLink itself never says 403 to a call that is as empty as these.
    opened = [f"{path} ({status})" for path, status in others.items() if status not in (400, 403)]
    if opened:
        found = f"{proxy} lets through {', '.join(opened)}: whoever reaches it may run code on every SuperNode"
        remedy = "Put deploy/owner/nginx.conf in place of its configuration, at once."
        findings.append(Finding(check="door", level="error", found=found, remedy=remedy))
    return findings or [well("door", f"{proxy} passes SuperNodes' calls and refuses the Control API")]


def check_nodes(connection: str) -> list[Finding]:
    """Ask the SuperLink which nodes are registered, and which are there."""
    command = shutil.which("flwr")
    if not command:
        return [Finding(check="nodes", level="error", found="flwr is missing", remedy="pip install ot-federated")]
    done = subprocess.run(
        [command, "supernode", "list", connection, "--format", "json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    try:
        nodes = json.loads(done.stdout)["nodes"]
        online = [str(node["node-id"]) for node in nodes if node["status"] == "online"]
    except (ValueError, LookupError, TypeError):
        remedy = f"Check that Flower's configuration has a connection {connection!r} (deploy/owner/flower-config.toml)."
        found = "flwr supernode list gives no list"
        return [Finding(check="nodes", level="error", found=found, remedy=remedy)]
    if not online:
        remedy = "Register them (deploy/owner/register.sh), and have each data owner run its own doctor."
        found = f"{len(nodes)} are registered and none is online"
        return [Finding(check="nodes", level="warning", found=found, remedy=remedy)]
    return [well("nodes", f"{len(online)} of {len(nodes)} online: {', '.join(sorted(online))}")]
