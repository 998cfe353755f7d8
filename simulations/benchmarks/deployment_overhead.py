"""What a round costs beyond Flower's own: ``python -m simulations.benchmarks.deployment_overhead``.

A real federation on loopback (SuperLink, nginx, SuperNodes with TLS and keys: the test suite's). First an empty Flower
app on Flower's own SuperNodes sends every node arrays as large as an adapter and gets as many back; then this project
runs on ``ot-federated supernode``, same nodes, same sizes, with one step of training, which on this small model takes
milliseconds. Compared is the median duration of a round, the first ones left out: there the bundle travels, and
programs start.

``--cold``: the same again with SuperNodes of ours that start a new Python for each message, as Flower's own do.

Every part is measured at another moment, so the machine should have nothing else to do; the load that there was stands
beside the figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from simulations.benchmarks.environment import write_results

results = Path(__file__).parent.parent / "results" / "deployment_overhead.json"
target_fraction = 0.10

pyproject = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "empty"
version = "1.0.0"
[tool.flwr.app]
publisher = "ot-federated"
[tool.flwr.app.components]
serverapp = "empty.app:server"
clientapp = "empty.app:client"
[tool.flwr.app.config]
output = ""
num-rounds = 1
num-nodes = 1
num-arrays = 1
array-numbers = 1
"""
app = """
import json, time
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()

@client.train()
def train(message, context):
    arrays = message.content["arrays"]
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

@server.main()
def main(grid, context):
    config, seconds = context.run_config, []
    while len(nodes := list(grid.get_node_ids())) < config["num-nodes"]:
        time.sleep(0.2)
    for number in range(config["num-rounds"]):
        shape, values = config["array-numbers"], np.random.default_rng(number)
        record = ArrayRecord({f"a{i}": Array(values.random(shape, np.float32).astype("float16"))
                              for i in range(config["num-arrays"])})
        began = time.monotonic()
        replies = grid.send_and_receive([Message(RecordDict({"arrays": record}), node, "train") for node in nodes])
        assert not any(reply.has_error() for reply in replies)
        seconds.append(time.monotonic() - began)
    Path(config["output"]).write_text(json.dumps(seconds))
"""


def main() -> None:
    """Measure both, and write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8, help="of each, the first of which are left out")
    parser.add_argument("--left-out", type=int, default=2)
    parser.add_argument(
        "--cold", action="store_true", help="also with a new Python for each message, as Flower does it"
    )
    parser.add_argument("--output", type=Path, default=results)
    parsed = parser.parse_args()
    # The federation is the test suite's, which stands in the checkout beside this package.
    real_federation: Any = importlib.import_module("tests.real_federation")
    parties: Any = importlib.import_module("tests.parties")
    families: Any = importlib.import_module("tests.families")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model = families.save_family_model(root / "model")
        federation = real_federation.RealFederation(root / "federation", model=model, num_nodes=parsed.nodes)
        rounds: dict[str, list[float]] = {}
        loads: dict[str, float] = {}
        settings = {
            "num-server-rounds": parsed.rounds,
            "train.max-steps": 1,
            "evaluation.max-validation-examples": 1,
        }
        with federation.running():
            for starts in ("warm", "cold") if parsed.cold else ("warm",):
                if starts == "cold":
                    for node in federation.nodes:
                        node.stop()
                        node.start("--cold")
                outcome = federation.run(settings, seconds=1800)
                rounds[starts] = [line["seconds"] for line in outcome.rounds]
                loads[starts] = os.getloadavg()[1]
                print(f"{starts}: {rounds[starts]}", flush=True)
            update_bytes = outcome.summary["bytes"]["update_per_client_round"]
            layout = adapter_layout(outcome.output / "adapter" / "adapter.safetensors")
            for node in federation.nodes:
                node.stop()
                options = ["--superlink", f"127.0.0.1:{federation.proxy.port}", "--host", "127.0.0.1"]
                options += ["--port", str(node.host.choose_port(9094)), "--root-certificates", str(node.etc / "ca.crt")]
                node.launch(["flower-supernode", *options, "--auth-supernode-private-key", str(node.private_key)])
            rounds["empty_app"] = run_empty(
                federation, root / "empty", num_rounds=parsed.rounds, layout=layout, parties=parties
            )
            loads["empty_app"] = os.getloadavg()[1]
    medians = {name: median(seconds[parsed.left_out :]) for name, seconds in rounds.items()}
    empty = medians["empty_app"]
    overhead = {name: round(seconds / empty - 1, 3) for name, seconds in medians.items() if name != "empty_app"}
    write_results(
        parsed.output,
        command=shlex.join(["python", "-m", "simulations.benchmarks.deployment_overhead", *sys.argv[1:]]),
        num_nodes=parsed.nodes,
        update_bytes=update_bytes,
        num_arrays=layout[0],
        seconds_of_rounds=rounds,
        num_rounds_left_out=parsed.left_out,
        median_seconds=medians,
        load_average_over_5_minutes=loads,
        overhead_fraction=overhead,
        target_fraction=target_fraction,
        met={name: fraction <= target_fraction for name, fraction in overhead.items()},
    )
    for name, fraction in overhead.items():
        print(f"a round, {name}: {medians[name]:.2f} s, an empty app {empty:.2f} s, overhead {fraction:+.0%}")


def adapter_layout(path: Path) -> tuple[int, int]:
    """Return how many arrays an adapter has, and how many numbers each one has in the mean."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        numbers = 1
        for size in shape:
            numbers *= size
        total += numbers
    return len(shapes), total // len(shapes)


def run_empty(
    federation: Any, directory: Path, *, num_rounds: int, layout: tuple[int, int], parties: Any
) -> list[float]:
    """Run the empty app and return the seconds of its rounds."""
    package, output = directory / "empty", directory / "seconds.json"
    package.mkdir(parents=True)
    (directory / "pyproject.toml").write_text(pyproject)
    (package / "__init__.py").touch()
    (package / "app.py").write_text(app)
    config = {
        "output": str(output),
        "num-rounds": num_rounds,
        "num-nodes": len(federation.nodes),
        "num-arrays": layout[0],
        "array-numbers": layout[1],
    }
    words = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    federation.execute("flwr", "run", str(directory), "owner", "--run-config", words)
    parties.wait_until(output.is_file, seconds=1800, what=federation.logs)
    seconds: list[float] = json.loads(output.read_text())
    return seconds


if __name__ == "__main__":
    main()
