"""What a data owner should know before its SuperNode runs: everything it needs, looked at without touching it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ot_federated.data_owner.approved_code import ApprovedCode
from ot_federated.data_owner.audit_trail import choose_trail, read_trail, trail_key
from ot_federated.data_owner.bundle_cache import BundleCache
from ot_federated.data_owner.ledger_entries import check_dataset_id
from ot_federated.data_owner.node_config import message_limit
from ot_federated.data_owner.policy import load_policy
from ot_federated.data_owner.privacy_ledger import PrivacyLedger, ledger_root, list_ledgers
from ot_federated.errors import ConfigError, DataError, OtFederatedError, SourceError, nearest_match
from ot_federated.health import (
    Finding,
    ask,
    check_certificate,
    check_clock,
    check_device,
    check_disk,
    check_secret,
    check_time_service,
    check_versions,
    explain_connection,
    gather,
    well,
)
from ot_federated.sources import is_local_source, list_files

known_keys = (
    *("name", "data-path", "device", "cache-dir", "cache-max-bytes", "bundle-path", "max-message-bytes", "policy"),
    *("dataset", trail_key),
)
# A call of SuperNodes. Empty as it is, it is refused behind the door, by the SuperLink.
fleet_call = "/v1/fleet/pull-messages"


def examine_data_owner(directory: Path, *, superlink: str) -> list[Finding]:
    """Look at a data owner's side.

    Args:
        directory: Holds ``node.toml``, ``ca.crt``, ``node.key`` and ``approved.json``.
        superlink: ``HOST:PORT`` of the model owner; empty: connections are not tried.
    """
    config: dict[str, Any] = {}

    def read_config() -> list[Finding]:
        config.update(read_node_config(directory / "node.toml"))
        return [well("node config", f"{directory / 'node.toml'}: {', '.join(config)}")]

    ca, get_new = directory / "ca.crt", "Ask the model owner for its present ca.crt."
    return gather(
        [
            ("versions", check_versions),
            ("node config", read_config),
            ("data", lambda: check_data(config)),
            ("data set", lambda: check_dataset(config)),
            ("policy", lambda: check_policy(config)),
            ("device", lambda: check_device(str(config.get("device", "auto")))),
            ("approved code", lambda: check_approved(directory / "approved.json")),
            ("ledgers", check_ledgers),
            ("audit trail", lambda: check_trail(config)),
            ("bundle cache", lambda: check_cache(config)),
            ("node key", lambda: check_secret(directory / "node.key", check="node key")),
            ("authority", lambda: check_certificate(ca, check="authority", remedy=get_new)),
            ("time service", check_time_service),
            ("model owner", lambda: check_door(superlink, ca) if superlink else []),
        ]
    )


def read_node_config(path: Path) -> dict[str, Any]:
    """Read a node config.

    Raises:
        ConfigError: If it cannot be read, or has a key that is not known or a limit that is none.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The node config {path} cannot be read ({error}). Give a TOML file of key = value."
        ) from error
    for key in values:
        if key not in known_keys:
            known = ", ".join(known_keys)
            raise ConfigError(f"{path}: unknown key {key!r}{nearest_match(key, known_keys)}. The keys are {known}.")
    message_limit(values)
    return values


def check_data(config: Mapping[str, Any]) -> list[Finding]:
    """Look whether the data is there; not into it."""
    source = str(config.get("data-path", ""))
    if not source:
        remedy = 'Name the local data in node.toml: data-path = "/srv/train.jsonl".'
        return [Finding(check="data", level="error", found="no data-path", remedy=remedy)]
    if not is_local_source(source):
        return [well("data", f"{source}, which is no local file")]
    try:
        files = list_files(source)
    except (SourceError, DataError) as error:
        remedy = "Correct data-path in node.toml."
        return [Finding(check="data", level="error", found=str(error), remedy=remedy)]
    unreadable = [str(file) for file in files if not os.access(file, os.R_OK)]
    if unreadable:
        remedy = "Let the user that runs the SuperNode read it."
        return [Finding(check="data", level="error", found=f"{unreadable[0]} cannot be read", remedy=remedy)]
    num_bytes = sum(file.stat().st_size for file in files)
    return [well("data", f"{source}: {len(files)} files, {num_bytes:,} bytes")]


def check_dataset(config: Mapping[str, Any]) -> list[Finding]:
    """Look whether the data set has a name, under which its ledger goes on when records are added."""
    name = str(config.get("dataset", ""))
    if not name:
        found = "no dataset: one record more or less begins a new privacy ledger, as if nothing had been spent"
        remedy = 'Name the data set in node.toml, once and for good: dataset = "ward-7". See ot-federated ledger show.'
        return [Finding(check="data set", level="warning", found=found, remedy=remedy)]
    return [well("data set", f"{check_dataset_id(name)}, in the privacy ledger")]


def check_policy(config: Mapping[str, Any]) -> list[Finding]:
    """Read the policy as the client will."""
    if not config.get("policy"):
        found = "no policy file: runs without privacy are allowed"
        remedy = 'Write one and name it in node.toml: policy = "/etc/ot-federated/policy.toml".'
        return [Finding(check="policy", level="warning", found=found, remedy=remedy)]
    policy = load_policy(Path(str(config["policy"])).expanduser())
    private = f"epsilon at most {policy.max_epsilon:g} at delta {policy.delta:g}"
    if not policy.require_privacy:
        found, remedy = (
            f"{private} where a run is private, and runs without privacy are allowed",
            "require-privacy = true",
        )
        return [Finding(check="policy", level="warning", found=found, remedy=f"If that is not meant: {remedy}.")]
    return [well("policy", f"{private}, and no run without privacy")]


def check_approved(path: Path) -> list[Finding]:
    """Look at the list of approved code."""
    approvals = ApprovedCode(path).read()
    if not approvals:
        remedy = f"Take the release's .fab file from the model owner: ot-federated approve --approved {path} FILE."
        return [
            Finding(check="approved code", level="error", found=f"{path} has none: every run is refused", remedy=remedy)
        ]
    differing = [approval for approval in approvals if approval.num_differences]
    if differing:
        found = (
            f"{len(differing)} of {len(approvals)} differ from the release that was installed when they were approved"
        )
        remedy = "If nobody remembers why: ot-federated approve --revoke DIGEST."
        return [Finding(check="approved code", level="warning", found=found, remedy=remedy)]
    last = approvals[-1]
    return [well("approved code", f"{len(approvals)} bundles, the last {last.name} {last.version} {last.sha256[:12]}")]


def check_ledgers() -> list[Finding]:
    """Check the chain of every privacy ledger."""
    root, findings = ledger_root(), []
    names = list_ledgers(root) if root.is_dir() else []
    for name in names:
        try:
            head = PrivacyLedger(root / name, dataset_id=name).head
        except OtFederatedError as error:
            remedy = "Nothing trains on this data until it is right: ot-federated ledger verify."
            findings.append(Finding(check="ledgers", level="error", found=f"{name}: {error}", remedy=remedy))
        else:
            findings.append(well("ledgers", f"{name}: {head.num_entries} entries, intact"))
    return findings or [well("ledgers", f"{root}: nothing was spent")]


def check_trail(config: Mapping[str, Any]) -> list[Finding]:
    """Look whether the audit trail can be kept: without it nothing leaves."""
    path = choose_trail(config)
    if path is None:
        return []
    place = path
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        remedy = f"Let the SuperNode's user write it, or set {trail_key} in node.toml: without it nothing leaves."
        return [Finding(check="audit trail", level="error", found=f"{path} cannot be written", remedy=remedy)]
    if not path.is_file():
        return [well("audit trail", f"{path}: nothing has left")]
    lines = list(read_trail(path))
    damaged = sum(isinstance(line, str) for line in lines)
    if damaged:
        remedy = "A process was killed while it wrote; look with: ot-federated trail show."
        found = f"{path}: {damaged} of {len(lines)} lines are damaged"
        return [Finding(check="audit trail", level="warning", found=found, remedy=remedy)]
    return [well("audit trail", f"{path}: {len(lines)} messages answered")]


def check_cache(config: Mapping[str, Any]) -> list[Finding]:
    """Look at the bundles that were received, and at the disk they are on."""
    directory = config.get("cache-dir")
    root = BundleCache(Path(str(directory)).expanduser() if directory else None).root
    findings = check_disk(root, check="bundle cache")
    if root.is_dir():
        bundles = [path for path in root.iterdir() if path.is_dir() and len(path.name) == 64]
        num_bytes = sum(file.stat().st_size for path in bundles for file in path.iterdir())
        findings.append(well("bundle cache", f"{len(bundles)} bundles, {num_bytes / 1e6:,.0f} MB"))
    return findings


def check_door(superlink: str, authority: Path) -> list[Finding]:
    """Call the model owner: is it reachable and who it says it is, and do the clocks agree?"""
    try:
        answer = ask(superlink, authority=authority, path=fleet_call)
    except OSError as error:
        found, remedy = explain_connection(error)
        return [Finding(check="model owner", level="error", found=f"{superlink}: {found}", remedy=remedy)]
    clock = check_clock(answer.seconds_ahead)
    if answer.status in (502, 503, 504):
        found = f"{superlink}: nginx answers and the SuperLink behind it does not ({answer.status})"
        remedy = "Ask the model owner to start its SuperLink; the SuperNode connects by itself then."
        return [Finding(check="model owner", level="error", found=found, remedy=remedy), *clock]
    if answer.status in (403, 404):
        found = f"{superlink} does not take SuperNodes' calls ({answer.status})"
        remedy = "Check host and port with the model owner: another service may answer there."
        return [Finding(check="model owner", level="error", found=found, remedy=remedy), *clock]
    return [well("model owner", f"{superlink} is reachable, and its certificate is of {authority}"), *clock]
