"""Choices of a federation on equal terms: LoRA's aggregation, realignment, alpha, which blocks are tuned.

    python -m simulations.benchmarks.between_rounds [KEY=VALUE ...] [--seeds 0,1,2] [--only NAME,...]

Every cell is one federation in this process, of the default scenario with ``KEY=VALUE`` for all cells and the cell's
own settings. A cell whose summary is there is not run again, so a benchmark that was stopped goes on. The figures of
all cells go to ``simulations/results/between_rounds.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ot_federated.config import RunConfig, flatten
from ot_federated.settings import Scalar
from simulations.benchmarks.environment import write_results

lora: dict[str, Scalar] = {"tuning.method": "lora", "train.learning-rate": 5e-3}
cells: dict[str, dict[str, Scalar]] = {
    "full": {},
    "full, realigned every round": {"offsite.realign-every-rounds": 1},
    "full, realigned every 2 rounds": {"offsite.realign-every-rounds": 2},
    "full, proximal 0.1": {"train.proximal-mu": 0.1},
    "full, alpha at delivery": {"evaluation.alphas": "0,0.25,0.5,0.75,1,1.25,1.5"},
    "full, alpha every round": {"evaluation.alphas": "0,0.5,0.75,1,1.25,1.5", "evaluation.alpha-every-round": True},
    "full, best round": {"evaluation.deliver": "best"},
    "full, bottom alone": {"tuning.placement": "bottom"},
    "full, top alone": {"tuning.placement": "top"},
    "full, spread alone": {"tuning.placement": "spread", "offsite.spread-blocks": 4},
    "lora, mean": lora,
    "lora, truncated": lora | {"tuning.lora-aggregation": "truncated"},
    "lora, exact": lora | {"tuning.lora-aggregation": "exact"},
    "lora, ffa": lora | {"tuning.freeze-lora-a": True},
}
results = Path(__file__).parent.parent / "results" / "between_rounds.json"


def run_cell(directory: Path, settings: Mapping[str, Scalar], *, num_clients: int) -> dict[str, Any]:
    """Run one federation, or read what it came to before; return its summary and its rounds."""
    from ot_federated.data_owner.client_app import app as client_app
    from ot_federated.model_owner.server_app import app as server_app
    from simulations.in_process import run_in_process

    if not (directory / "summary.json").is_file():
        resumed = (directory / "run_config.json").is_file()
        config = flatten(RunConfig()) | dict(settings) | {"output-dir": str(directory), "resume": resumed}
        run_in_process(server_app, client_app, run_config=config, num_clients=num_clients)
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    rounds = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {**summary, "by_round": [line["plug_in"]["loss"] for line in rounds if line.get("plug_in")]}


def describe_cell(name: str, seed: int, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the result file says of a cell."""
    rows = {row: score and score["loss"] for row, score in summary["rows"].items()}
    accuracies = {row: score and score["accuracy"] for row, score in summary["rows"].items()}
    return {
        "cell": name,
        "seed": seed,
        "loss": rows,
        "accuracy": accuracies,
        "validation_loss_by_round": summary["by_round"],
        "delivered": summary["delivered"],
        "bytes": summary["bytes"],
        "seconds": summary["seconds"]["total"],
    }


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """Print one line a cell: the plug-in's loss on the test data, mean and standard deviation over seeds."""
    for name in dict.fromkeys(cell["cell"] for cell in found):
        same = [cell for cell in found if cell["cell"] == name]
        losses = [cell["loss"]["plug_in"] for cell in same]
        spread = f" +- {stdev(losses):.3f}" if len(losses) > 1 else ""
        gaps = mean(cell["loss"]["emulator_fine_tuned"] - cell["loss"]["plug_in"] for cell in same)
        print(f"{name:<32} plug-in {mean(losses):.3f}{spread}  emulator - plug-in {gaps:+.3f}  ({len(same)} seeds)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that are asked for, and write what all of them came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of all cells")
    parser.add_argument("--seeds", default="0", help="seeds, with commas between them")
    parser.add_argument("--only", default=";".join(cells), help="names of cells, with semicolons between them")
    parser.add_argument("--num-clients", type=int, default=4)
    parser.add_argument("--runs", type=Path, default=Path("runs/between-rounds"), help="where the runs are kept")
    parser.add_argument("--results", type=Path, default=results)
    parsed = parser.parse_args(arguments)
    common = {key: read_scalar(key, value) for key, _, value in (text.partition("=") for text in parsed.settings)}
    found = []
    for seed in map(int, parsed.seeds.split(",")):
        for name in parsed.only.split(";"):
            directory = parsed.runs.absolute() / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            settings = common | cells[name] | {"seed": seed}
            found.append(describe_cell(name, seed, run_cell(directory, settings, num_clients=parsed.num_clients)))
    show(found)
    typed = sys.argv[1:] if arguments is None else list(arguments)
    command = " ".join(["python -m simulations.benchmarks.between_rounds", *typed])
    write_results(parsed.results, command=command, cells=found)


def read_scalar(key: str, text: str) -> Scalar:
    """Return a setting's value in the type of its key."""
    default = flatten(RunConfig())[key]
    if isinstance(default, bool):
        return text == "true"
    return type(default)(text)


if __name__ == "__main__":
    main()
