"""What a run delivers, with every aggregator, task and scenario; and the command line around it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ot_federated.config import parse_run_config
from simulations.command_line import main
from simulations.scenario_files import list_scenarios, simulation_keys
from strategies.aggregators import aggregator_names
from tests.families import save_family_model, save_image_model
from tests.federations import (
    Federation,
    build_questions,
    is_train_reply,
    prepare_federation,
    run_federation,
    write_rows,
)

# ---- Strategies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(aggregator_names))
def test_every_aggregator_gives_a_finite_adapter_that_moved(name: str, llama_directory: Path, tmp_path: Path) -> None:
    num_clients = {"bulyan": 7, "krum": 5, "multikrum": 5}.get(name, 3)
    federation = run_federation(
        tmp_path,
        llama_directory,
        num_clients=num_clients,
        num_rows=4 * num_clients,
        settings={"strategy.name": name, "num-server-rounds": 2, "train.proximal-mu": 0.1},
    )
    assert [federation.rounds[number]["num_replies"] for number in (1, 2)] == [num_clients] * 2
    source = load_file(llama_directory / "model.safetensors")
    for tensor_name, tensor in federation.adapter.items():
        assert torch.isfinite(tensor).all()
        assert not torch.equal(tensor, source[tensor_name])
    assert federation.summary["rows"]["plug_in"]["loss"] < federation.summary["rows"]["full_zero_shot"]["loss"]


def test_some_clients_a_round(llama_directory: Path, tmp_path: Path) -> None:
    settings = {"num-server-rounds": 4, "strategy.fraction-train": 0.25, "strategy.min-nodes": 2}
    federation = run_federation(tmp_path, llama_directory, num_clients=8, settings=settings)
    chosen = [tuple(federation.rounds[number]["clients"]) for number in (1, 2, 3, 4)]
    assert all(len(set(names)) == 2 for names in chosen)
    assert len(set(chosen)) > 1
    assert federation.grid.num_messages["train"] == 8
    shown, asked = federation.summary["federation"], len({name for names in chosen for name in names})
    assert (shown["num_clients"], shown["num_clients_asked"]) == (8, asked)
    assert 2 < asked < 8
    assert f"{asked} of 8 connected data owners" in (federation.output / "model" / "README.md").read_text()


@pytest.mark.parametrize(("placement", "block"), [("bottom", 0), ("top", 7)])
def test_placement_ships_and_changes_one_side_only(
    placement: str, block: int, llama_directory: Path, tmp_path: Path
) -> None:
    names: set[str] = set()

    def note(reply: Message) -> list[Message]:
        if is_train_reply(reply):
            names.update(reply.content.array_records["arrays"])
        return [reply]

    settings = {"tuning.placement": placement, "num-server-rounds": 2}
    federation = run_federation(tmp_path, llama_directory, settings=settings, on_reply=note)
    assert {name.split(".")[0] for name in names} == {placement}
    assert {name.split(".")[2] for name in federation.adapter} == {str(block)}
    source, delivered = (
        load_file(path / "model.safetensors") for path in (llama_directory, federation.output / "model")
    )
    changed = {name for name, tensor in delivered.items() if not torch.equal(tensor, source[name])}
    assert changed == set(federation.adapter)


# ---- What is delivered ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def delivered(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A run with everything switched on: influence, bridges, full fine-tuning, plot."""
    directory = tmp_path_factory.mktemp("delivered")
    text = [{"passage": "Public text of the owner, long enough for a few windows of tokens. " * 4}] * 40
    settings = {
        "num-server-rounds": 2,
        "seed": 5,
        "offsite.keep": "influence",
        "offsite.gaps": "bridge",
        "offsite.public-text": str(write_rows(directory / "public.jsonl", text)),
        "offsite.public-text-column": "passage",
        "offsite.calibration-tokens": 2048,
        "evaluation.full-fine-tuning": True,
        "evaluation.full-learning-rate": 1e-3,
    }
    return run_federation(directory, llama_directory, settings=settings, draw=True)


def test_delivered_model_is_the_plugged_in_model(delivered: Federation, llama_directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(delivered.output / "model", dtype=torch.float32)
    plugged = AutoModelForCausalLM.from_pretrained(llama_directory, dtype=torch.float32)
    ids = torch.randint(4, 260, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = plugged(ids).logits
        parameters = dict(plugged.named_parameters())
        for name, tensor in delivered.adapter.items():
            parameters[name].copy_(tensor)
        assert torch.equal(model(ids).logits, plugged(ids).logits)
        assert not torch.equal(model(ids).logits, before)
    tokenizer = AutoTokenizer.from_pretrained(delivered.output / "model")
    assert tokenizer.decode(tokenizer("What is 3?")["input_ids"]) == "What is 3?"


def test_delivered_adapter_says_what_it_belongs_to(delivered: Federation) -> None:
    from ot_federated.cache import file_sha256

    described = json.loads((delivered.output / "adapter" / "adapter.json").read_text())
    assert described["sha256"] == file_sha256(delivered.output / "adapter" / "adapter.safetensors") == delivered.digest
    assert described["bundle_digest"] == delivered.summary["offsite"]["bundle_digest"]
    assert {name.split(".")[2] for name in delivered.adapter} == {"0", "7"}
    assert {tensor.dtype for tensor in delivered.adapter.values()} == {torch.float32}


def test_summary_has_exactly_the_keys_of_the_interface(delivered: Federation) -> None:
    """Other tools read it. A key that is added here is a promise; one that is missing breaks them."""
    summary = delivered.summary
    assert summary.keys() == {
        *("scenario", "command", "versions", "device", "seed", "model", "offsite", "rows", "recovery"),
        *("federation", "bytes", "seconds", "privacy"),
        *("dtype", "adapter_sha256", "delivered", "harness"),  # beyond the interface
    }
    assert summary["model"].keys() == {"source", "num_parameters", "num_blocks"}
    assert summary["offsite"].keys() == {
        *("bottom", "emulator", "top", "compression", "emulator_bytes", "middle_bytes", "exact_weight_fraction"),
        *("kept_blocks", "spread", "bundle_digest"),  # beyond the interface
    }
    names = ("full_zero_shot", "emulator_zero_shot", "emulator_fine_tuned", "plug_in", "full_fine_tuned")
    assert tuple(summary["rows"]) == names
    for row in summary["rows"].values():
        assert row.keys() == {
            *("loss", "loss_interval", "num_examples", "accuracy", "accuracy_interval", "accuracy_normalised"),
        }
        assert row["num_examples"] == 4
    assert summary["recovery"].keys() == {"loss", "accuracy"}
    assert summary["federation"].keys() == {
        "engine",
        "num_clients",
        "num_clients_asked",
        "num_rounds",
        "num_replies",
        "num_failures",
        "failed_clients",
    }
    assert summary["bytes"].keys() == {
        *("bundle_per_client", "update_per_client_round", "full_model", "wire_to_clients", "wire_to_server"),
        "realignment_per_client",  # beyond the interface
    }
    assert summary["seconds"].keys() == {"total", "setup", "rounds"}


def test_summary_counts_what_happened(delivered: Federation) -> None:
    summary = delivered.summary
    shown = summary["federation"]
    assert (shown["num_clients"], shown["num_rounds"], shown["num_replies"], shown["num_failures"]) == (2, 2, 4, 0)
    source = load_file(Path(summary["model"]["source"]) / "model.safetensors")
    # The head is tied, and saved once.
    num_parameters = sum(tensor.numel() for tensor in source.values())
    assert summary["model"]["num_parameters"] == num_parameters
    assert summary["model"]["num_blocks"] == 8
    assert summary["bytes"]["full_model"] == 4 * num_parameters
    block = sum(tensor.numel() for name, tensor in source.items() if name.startswith("model.layers.3."))
    assert summary["offsite"]["middle_bytes"] == 6 * 4 * block
    assert summary["offsite"]["exact_weight_fraction"] == pytest.approx((num_parameters - 4 * block) / num_parameters)
    assert summary["offsite"]["emulator_bytes"] >= 2 * 4 * block
    assert summary["seed"] == 5
    assert summary["device"] == "cpu"
    assert len(summary["seconds"]["rounds"]) == 2
    rows = summary["rows"]
    gain = rows["full_zero_shot"]["loss"] - rows["full_fine_tuned"]["loss"]
    assert summary["recovery"]["loss"] == pytest.approx(
        (rows["full_zero_shot"]["loss"] - rows["plug_in"]["loss"]) / gain
    )


def test_metrics_have_a_line_for_each_round(delivered: Federation) -> None:
    assert sorted(delivered.rounds) == [0, 1, 2]
    assert delivered.rounds[0].keys() == {"round", "plug_in"}
    for number in (1, 2):
        line = delivered.rounds[number]
        assert line["clients"] == ["client-0000", "client-0001"]
        assert line["plug_in"]["num_examples"] == 4
        # 8 examples at each client in batches of 4.
        assert (line["num_examples"], line["num_steps"]) == (16, 4)
        assert line["num_tokens"] > 16 * 10
    assert delivered.rounds[2]["plug_in"]["loss"] < delivered.rounds[0]["plug_in"]["loss"]


def test_plot_card_config_and_checkpoints_are_there(delivered: Federation) -> None:
    assert (delivered.output / "rounds.png").read_bytes().startswith(b"\x89PNG")
    card = (delivered.output / "model" / "README.md").read_text()
    assert card.startswith("---\n")
    for word in ("library_name: transformers", "2 data owners", "influence+bridge", "plug in", "Seed | 5"):
        assert word in card
    config = json.loads((delivered.output / "run_config.json").read_text())
    assert parse_run_config(config).seed == 5
    assert sorted(path.name for path in (delivered.output / "checkpoints").iterdir()) == ["round-0001", "round-0002"]
    leftovers = [path for path in delivered.output.rglob("*") if path.name.startswith(".")]
    assert leftovers == []
    assert not (delivered.output / "failure.txt").exists()


def test_causal_language_modelling_end_to_end(llama_directory: Path, tmp_path: Path) -> None:
    data = str(write_rows(tmp_path / "text.jsonl", [{"text": f"The number {i} is a number. " * 3} for i in range(40)]))
    settings = {
        "task.name": "causal-lm",
        "data.train": data,
        "data.validation": data,
        "data.test": data,
        "data.max-length": 64,
        "num-server-rounds": 2,
    }
    federation = run_federation(tmp_path, llama_directory, settings=settings)
    rows = federation.summary["rows"]
    for row in (rows["full_zero_shot"], rows["plug_in"]):
        assert row["perplexity"] == pytest.approx(np.exp(row["loss"]))
        assert "accuracy" not in row
    assert rows["plug_in"]["loss"] < rows["full_zero_shot"]["loss"]
    assert rows["full_fine_tuned"] is None
    assert federation.summary["recovery"] is None


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma3_text"])
def test_other_families_end_to_end(family: str, tmp_path: Path) -> None:
    source = save_family_model(tmp_path / "model", family, tied=False)
    federation = run_federation(tmp_path, source)
    assert federation.summary["rows"]["plug_in"]["loss"] < federation.summary["rows"]["full_zero_shot"]["loss"]
    AutoModelForCausalLM.from_pretrained(federation.output / "model")


@pytest.mark.parametrize("placement", ["bottom", "top"])
def test_adapter_on_one_side_only(placement: str, llama_directory: Path, tmp_path: Path) -> None:
    other = {"bottom": "top", "top": "bottom"}[placement]
    text = [{"passage": "Public text of the owner, long enough for a window. " * 4}] * 10
    settings = {
        f"offsite.{other}-blocks": 0,
        "offsite.gaps": "bridge",
        "offsite.keep": "influence",
        "offsite.emulator-blocks": 3,
        "offsite.public-text": str(write_rows(tmp_path / "public.jsonl", text)),
        "offsite.public-text-column": "passage",
        "offsite.calibration-tokens": 512,
    }
    federation = run_federation(tmp_path, llama_directory, settings=settings)
    assert {name.split(".")[2] for name in federation.adapter} == {"0" if placement == "bottom" else "7"}


# ---- The command line -----------------------------------------------------------------------------------------


def arguments(federation: Federation, *more: str) -> list[str]:
    """Return the command line of a prepared federation."""
    config = federation.grid._run_config
    words = [f"{key}={value}" for key, value in config.items() if key != "output-dir" and value != ""]
    # TOML writes them in lower case.
    words = [word.replace("=True", "=true").replace("=False", "=false") for word in words]
    return [*words, "num-clients=2", "--engine", "in-process", "--output", str(federation.output), *more]


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ot_federated.model_owner.results.plot_rounds", lambda *_, **__: None)


@pytest.mark.usefixtures("no_plot")
def test_exit_status_zero_and_the_command_in_the_summary(llama_directory: Path, tmp_path: Path) -> None:
    federation = prepare_federation(tmp_path, llama_directory)
    assert main(arguments(federation)) == 0
    assert federation.summary["scenario"] == "default"
    assert federation.summary["command"].startswith("python run_sim.py ")
    assert f"model.source={llama_directory}" in federation.summary["command"]
    assert federation.summary["federation"]["engine"] == "in-process"


def test_exit_status_of_a_failed_run(llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    federation = prepare_federation(tmp_path, llama_directory, settings={"train.learning-rate": 1e30})
    assert main(arguments(federation)) == 1
    shown = capsys.readouterr().err
    assert "Lower train.learning-rate" in shown
    assert "Traceback" not in shown
    assert "Lower train.learning-rate" in (federation.output / "failure.txt").read_text()


@pytest.mark.usefixtures("no_plot")
def test_finished_run_is_not_overwritten(
    llama_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = prepare_federation(tmp_path, llama_directory)
    assert main(arguments(federation)) == 0
    before = {path: path.read_bytes() for path in federation.output.rglob("*") if path.is_file()}
    assert main(arguments(federation)) != 0
    assert "already holds a run" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in federation.output.rglob("*") if path.is_file()}
    after.pop(federation.output / "failure.txt", None)  # how Flower's process tells the launcher the reason
    assert after == before


@pytest.mark.parametrize("name", sorted(list_scenarios()))
def test_scenario_parses_and_its_settings_fit_together(name: str) -> None:
    scenario = list_scenarios()[name]
    settings = {key: value for key, value in scenario.settings.items() if key not in simulation_keys}
    config = parse_run_config(settings)
    num_clients = scenario.settings.get("num-clients", simulation_keys["num-clients"].default)
    assert num_clients >= config.strategy.min_nodes
    assert scenario.description
    assert "\n" not in scenario.description


@pytest.mark.parametrize("name", sorted(list_scenarios()))
def test_scenario_runs_on_a_small_model_and_own_data(name: str, llama_directory: Path, tmp_path: Path) -> None:
    """The scenario's own settings, except for what takes long: model, data, rounds, sizes."""
    scenario = list_scenarios()[name]
    small = prepare_federation(tmp_path / "plain", llama_directory, num_rows=32).grid._run_config
    # Has the task's columns and a text column: a scenario may read it either way.
    rows = [{**row, "text": row["question"], "passage": row["question"]} for row in build_questions(60)]
    public = str(write_rows(tmp_path / "public.jsonl", rows))
    own = {
        key: small[key]
        for key in ("model.source", "model.dtype", "data.train", "data.validation", "data.test", "output-dir")
    }
    shrunk = {
        "num-server-rounds": 2,
        "offsite.bottom-blocks": 1,
        "offsite.emulator-blocks": 2,
        "offsite.top-blocks": 1,
        "offsite.public-text": public,
        "offsite.calibration-tokens": 512,
        "data.max-length": 128,
        "train.max-steps": 2,
        # A small share of the rows: the default policy refuses batches of more than half of them.
        "train.batch-size": 4,
        "evaluation.max-examples": 4,
        "evaluation.max-validation-examples": 4,
        "strategy.shard-bytes": 65536,
    }
    settings = {key: value for key, value in scenario.settings.items() if key not in simulation_keys} | own | shrunk
    num_clients = min(int(scenario.settings.get("num-clients", 4)), 8)
    if settings.get("task.name") == "image-classification":
        settings |= {key: scenario.settings[key] for key in own if key in scenario.settings and key.startswith("data.")}
        settings |= {"model.source": str(save_image_model(tmp_path / "vit")), "data.image-size": 28}
        settings |= {"offsite.public-text": scenario.settings["offsite.public-text"]}
    if settings.get("task.name") == "instruction":
        pairs = write_rows(tmp_path / "pairs.jsonl", [{**row, "answer": "It is so."} for row in rows])
        settings |= dict.fromkeys(("data.train", "data.validation", "data.test", "offsite.public-text"), str(pairs))
    if settings.get("task.classifier") == "head":
        data = write_rows(
            tmp_path / "labelled.jsonl", [{**row, "label": number % 2} for number, row in enumerate(rows)]
        )
        labelled = ("data.train", "data.validation", "data.test", "offsite.public-text")
        settings |= dict.fromkeys(labelled, str(data))
    federation = run_federation(tmp_path, llama_directory, settings=settings, num_clients=num_clients)
    assert federation.summary["federation"]["num_replies"] == 2 * num_clients
    assert federation.summary["federation"]["num_failures"] == 0
