"""A run's metrics for Prometheus. The only module that imports prometheus_client, the optional extra ``metrics``.

Off unless ``OT_FEDERATED_METRICS=HOST:PORT`` is in the ServerApp's environment; a ServerApp inherits that of its
SuperLink. The endpoint lives as long as its run. Its numbers begin with zero when a run is resumed, as counters do
when a process is restarted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ot_federated.errors import ConfigError
from ot_federated.logs import logger

address_variable = "OT_FEDERATED_METRICS"
rejected_prefix = "rejected"

Tell = Callable[[Mapping[str, Any]], None]


@contextmanager
def serve_metrics(*, run: str) -> Iterator[Tell | None]:
    """Serve metrics while the block lasts; yield what wants to be told every line of ``metrics.jsonl``.

    None where no address is set, or where another run has it: a run does not fail for want of its metrics.

    Args:
        run: The run, as ``flwr list`` has it.

    Raises:
        ConfigError: If the address is none, or prometheus_client is missing.
    """
    text = os.environ.get(address_variable)
    if not text:
        yield None
        return
    host, port = parse_address(text)
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise ConfigError(
            f"{address_variable} is set, but prometheus_client is missing: pip install 'ot-federated[metrics]'"
        ) from error
    registry = CollectorRegistry()
    tell = count_rounds(registry, run=run)
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        logger.warning("no metrics are served: %s=%s cannot be used (%s)", address_variable, text, error)
        yield None
        return
    logger.info("metrics at http://%s:%d/metrics", host, port)
    try:
        yield tell
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``.

    Raises:
        ConfigError: If it is something else.
    """
    found = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.\-]+):(\d{1,5})", text)
    if not found or not 0 < int(found[2]) < 2**16:
        raise ConfigError(f"{address_variable}={text!r} is not HOST:PORT, such as 127.0.0.1:9464.")
    return found[1].strip("[]"), int(found[2])


def count_rounds(registry: Any, *, run: str) -> Tell:
    """Return a function that takes a round's metrics into ``registry``; a round that is told again counts once."""
    from prometheus_client import Counter, Gauge, Info, Summary

    Info("ot_federated_run", "The run", registry=registry).info({"run": run})
    last = Gauge("ot_federated_round", "Last finished round", registry=registry)
    replies = Counter("ot_federated_replies", "Clients' replies to train", ["result"], registry=registry)
    sent = Counter("ot_federated_bytes", "Bytes of arrays on the wire", ["what"], registry=registry)
    seconds = Summary("ot_federated_round_seconds", "Seconds of a round without evaluation", registry=registry)
    texts = {
        "train_loss": "The clients' mean training loss in nats per token",
        "epsilon": "Largest epsilon that a client told of",
        "delta": "The delta of that epsilon",
        "plug_in_loss": "The plug-in's loss per token on the owner's validation data",
        "plug_in_accuracy": "Its accuracy",
    }
    gauges: dict[str, Gauge] = {}
    for result in ("valid", "rejected", "failed"):
        replies.labels(result)
    told = 0

    def tell(line: Mapping[str, Any]) -> None:
        nonlocal told
        # A round without clients is the evaluation before the first.
        if line["round"] > told and "clients" in line:
            told = line["round"]
            last.set(told)
            seconds.observe(line["seconds"])
            reasons = line["failures"].values()
            rejected = sum(reason.startswith(rejected_prefix) for reason in reasons)
            counts = {"valid": line["num_replies"], "rejected": rejected, "failed": len(reasons) - rejected}
            for result, count in counts.items():
                replies.labels(result).inc(count)
            for what in ("bundle_bytes", "bytes_to_clients", "bytes_to_server"):
                sent.labels(what).inc(line[what])
        plug_in = line.get("plug_in") or {}
        measured = {f"plug_in_{name}": plug_in.get(name) for name in ("loss", "accuracy")}
        for name, text in texts.items():
            if (value := measured.get(name, line.get(name))) is not None:
                # Not before there is a value: a gauge begins with 0, and an epsilon of 0 would be a claim.
                if name not in gauges:
                    gauges[name] = Gauge(f"ot_federated_{name}", text, registry=registry)
                gauges[name].set(value)

    return tell
