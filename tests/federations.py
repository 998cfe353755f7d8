"""Whole federations in one process on small random models, for tests to run and to look into."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from ot_federated.data_owner.client_app import app as client_app
from ot_federated.messages import arrays_key
from ot_federated.model_owner.server_app import app as server_app
from ot_federated.settings import Scalar
from simulations.in_process import InProcessGrid, node_id_of
from simulations.small_runs import build_questions, small_settings, write_rows

ReplyHook = Callable[[Message], list[Message]]


@dataclass(frozen=True, kw_only=True)
class Federation:
    """A run that was started: its directory, and the grid with the traffic it counted."""

    output: Path
    grid: InProcessGrid

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.output / "summary.json").read_text())

    @property
    def rounds(self) -> dict[int, dict[str, Any]]:
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return {line["round"]: line for line in map(json.loads, lines)}

    @property
    def digest(self) -> str:
        """The SHA-256 of the final adapter."""
        return self.summary["adapter_sha256"]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        """The final adapter in fp32, by the full model's parameter names."""
        return load_file(self.output / "adapter" / "adapter.safetensors")


def prepare_federation(
    directory: Path,
    model: Path,
    *,
    settings: Mapping[str, Scalar] | None = None,
    num_clients: int = 2,
    num_rows: int = 16,
    on_reply: ReplyHook | None = None,
    node_config: Mapping[str, Scalar] | None = None,
    app: ClientApp = client_app,
) -> Federation:
    """Write the data of a federation into ``directory`` and connect its clients; nothing runs yet.

    Unless ``settings`` says otherwise: one round, a 1-2-1 split, gaps empty, fp32, two clients, four test rows.
    """
    data = write_rows(directory / "questions.jsonl", build_questions(num_rows))
    config = small_settings(model, data=data, output=directory / "run")
    config["strategy.min-nodes"] = min(2, num_clients)
    config |= settings or {}
    grid = InProcessGrid(app, run_config=config, num_clients=num_clients, node_config=node_config, on_reply=on_reply)
    return Federation(output=Path(str(config["output-dir"])), grid=grid)


def start(federation: Federation, *, draw: bool = False) -> Federation:
    """Run the ServerApp; its exceptions propagate. ``draw`` also draws the plot, which takes longer than a round."""
    with pytest.MonkeyPatch.context() as patch:
        # A bundle cache of this run's own, shared by its clients.
        patch.setenv("OT_FEDERATED_BUNDLE_CACHE", str(federation.output.parent / "received-bundles"))
        if not draw:
            patch.setattr("ot_federated.model_owner.results.plot_rounds", lambda *_, **__: None)
        federation.grid.run_server_app(server_app)
    return federation


def run_federation(directory: Path, model: Path, *, draw: bool = False, **arguments: Any) -> Federation:
    """Prepare and start a federation: see :func:`prepare_federation`."""
    return start(prepare_federation(directory, model, **arguments), draw=draw)


def partition_of(reply: Message) -> int:
    """Return the number of the client that sent a reply."""
    return next(number for number in range(1000) if node_id_of(number) == reply.metadata.src_node_id)


def crash(reply: Message) -> Message:
    """Return what Flower reports when a ClientApp raised."""
    error = Message(Error(code=2, reason="<class 'MemoryError'>"), reply_to=reply)
    for name in ("_reply_to_message_id", "_src_node_id", "_dst_node_id"):  # those of the reply in whose place it is
        error.metadata.__dict__[name] = reply.metadata.__dict__[name]
    return error


def is_train_reply(reply: Message, *, server_round: int | None = None, partition: int | None = None) -> bool:
    """Say whether a reply is a successful one to ``train``, of one round or client where they are given."""
    if reply.metadata.message_type != "train" or reply.has_error() or arrays_key not in reply.content:
        return False
    return server_round in (None, reply.content.config_records["config"]["server-round"]) and partition in (
        None,
        partition_of(reply),
    )
