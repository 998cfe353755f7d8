"""Hostile clients against the real server: one federation in which each client but three attacks in its own way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord

from ot_federated.data_owner.client_app import app as client_app
from ot_federated.messages import arrays_key, config_key, metrics_key
from ot_federated.model_owner.server_app import app as server_app
from ot_federated.reporting.run_directory import rejections_file
from ot_federated.settings import Scalar
from simulations.in_process import node_id_of, run_in_process

Attack = Callable[[Message], None]
num_honest, limit = 3, 2


def set_value(value: float) -> Attack:
    """Return an attack that puts a value into the first array."""

    def attack(reply: Message) -> None:
        arrays = reply.content.array_records[arrays_key]
        name = next(iter(arrays))
        values = arrays[name].numpy().copy()
        values.flat[0] = value
        arrays[name] = Array(values)

    return attack


def change_first(change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Attack:
    """Return an attack that replaces the first array."""

    def attack(reply: Message) -> None:
        arrays = reply.content.array_records[arrays_key]
        name = next(iter(arrays))
        arrays[name] = Array(np.ascontiguousarray(change(arrays[name].numpy())))

    return attack


def scale(factor: float) -> Attack:
    """Return an attack that multiplies the whole update."""

    def attack(reply: Message) -> None:
        arrays = reply.content.array_records[arrays_key]
        for name, array in arrays.items():
            arrays[name] = Array(np.clip(array.numpy().astype(np.float64) * factor, -6e4, 6e4).astype(np.float16))

    return attack


def set_field(name: str, value: Any) -> Attack:
    """Return an attack that changes a field of the reply."""

    def attack(reply: Message) -> None:
        reply.content[config_key] = ConfigRecord({**reply.content.config_records[config_key], name: value})

    return attack


def set_metric(name: str, value: Any) -> Attack:
    """Return an attack that changes a metric."""

    def attack(reply: Message) -> None:
        reply.content[metrics_key] = MetricRecord({**reply.content.metric_records[metrics_key], name: value})

    return attack


def rename(reply: Message) -> None:
    """Name an array of the emulator, which does not train."""
    arrays = reply.content.array_records[arrays_key]
    arrays["emulator.0.mlp.up_proj.weight"] = arrays.pop(next(iter(arrays)))


def drop_arrays(reply: Message) -> None:
    """Send no arrays."""
    reply.content[arrays_key] = ArrayRecord()


def zip_payload(reply: Message) -> None:
    """Send an array whose bytes numpy would open as a zip archive."""
    arrays = reply.content.array_records[arrays_key]
    name = next(iter(arrays))
    right = arrays[name]
    arrays[name] = Array(right.dtype, tuple(right.shape), right.stype, b"PK\x03\x04" + bytes(len(right.data) - 4))


def pickled_payload(reply: Message) -> None:
    """Send an array whose bytes numpy would unpickle."""
    arrays = reply.content.array_records[arrays_key]
    name = next(iter(arrays))
    right = arrays[name]
    header = right.data.replace(b"'<f2'", b"'|O' ", 1)
    arrays[name] = Array(right.dtype, tuple(right.shape), right.stype, header)


def claim_sender(reply: Message) -> None:
    """Claim to be another node."""
    reply.metadata.__dict__["_src_node_id"] = node_id_of(0)


def change_type(reply: Message) -> None:
    """Answer something that was not asked."""
    reply.metadata.__dict__["_message_type"] = "query.shard"


class Replay:
    """Send the reply of the first round in every later one."""

    def __init__(self) -> None:
        self.kept: Any = None

    def __call__(self, reply: Message) -> None:
        """Keep the first content, and put it in the place of every other."""
        self.kept = self.kept or reply.content
        reply.content = self.kept


def list_attacks() -> dict[str, Attack]:
    """Return every attack by its name; each is fresh, as some remember."""
    return {
        "not a number": set_value(math.nan),
        "infinity": set_value(math.inf),
        "wrong shape": change_first(lambda values: values[..., :-1]),
        "more dimensions": change_first(lambda values: values[None]),
        "wrong dtype": change_first(lambda values: values.astype(np.float64)),
        "wrong name": rename,
        "no arrays": drop_arrays,
        "huge norm: update times 1000": scale(1000.0),
        "huge norm: one value of 60000": set_value(6e4),
        "claims 10^12 examples": set_metric("num-examples", 10**12),
        "claims no examples": set_metric("num-examples", 0),
        "loss that is not a number": set_metric("loss", math.nan),
        "replay of an older round": Replay(),
        "reply for another bundle": set_field("bundle-digest", "ab" * 32),
        "reply of another release": set_field("wire-version", 99),
        "zip archive as an array": zip_payload,
        "pickle as an array": pickled_payload,
        "another node as its sender": claim_sender,
        "answers another question": change_type,
    }


def run_hostile_clients(config: Mapping[str, Scalar], directory: Path) -> list[dict[str, Any]]:
    """Run three rounds with every attack at once and return a row for each.

    Args:
        config: Run config of a small federation.
        directory: Where the run is kept.
    """
    attacks = list_attacks()
    attackers = {node_id_of(number + num_honest): attack for number, attack in enumerate(attacks.values())}

    def spoil(reply: Message) -> list[Message]:
        attack = attackers.get(reply.metadata.src_node_id)
        if attack and not reply.has_error() and arrays_key in reply.content and reply.metadata.message_type == "train":
            attack(reply)
        return [reply]

    num_clients = num_honest + len(attacks)
    settings: dict[str, Scalar] = {
        "num-server-rounds": limit + 2,
        "output-dir": str(directory),
        "strategy.min-nodes": num_honest,
        "strategy.max-rejections": limit,
        "strategy.max-norm-ratio": 10.0,
        "evaluation.every-rounds": limit + 2,
    }
    run_in_process(server_app, client_app, run_config={**config, **settings}, num_clients=num_clients, on_reply=spoil)
    saved = json.loads((directory / rejections_file).read_text())
    offenders = {offender["name"]: offender for offender in saved["offenders"]}
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    last = max(lines, key=lambda line: line["round"])
    rows = []
    for number, name in enumerate(attacks):
        client = f"client-{number + num_honest:04d}"
        offender = offenders.get(client)
        aside = client in last["put_aside"] and client not in last["clients"]
        rejected = len(offender["rejections"]) if offender else 0
        rows.append(
            {
                "peer": "client",
                "attack": name,
                "outcome": f"{rejected} replies rejected" + (", then put aside" if aside else "")
                if rejected
                else "taken",
                "refused": bool(offender and aside),
                "detail": offender["rejections"][-1]["reason"] if offender else "",
            }
        )
    honest = {f"client-{number:04d}" for number in range(num_honest)}
    assert set(last["clients"]) >= honest
    assert not honest & offenders.keys()
    return rows
