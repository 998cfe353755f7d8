"""A run that was stopped and resumed ends in the same adapter, bit for bit, as one that was never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from ot_federated.errors import CheckpointError
from ot_federated.model_owner import server_app
from tests.families import save_family_model
from tests.federations import Federation, is_train_reply, prepare_federation, run_federation, start


class PowerCutError(Exception):
    """What stops a run here."""


def stop_in_round(server_round: int, directory: Path, model: Path, settings: dict[str, Any], **arguments: Any) -> None:
    """Start a run and cut it off when the first reply of a round arrives."""

    def cut(reply: Message) -> list[Message]:
        if is_train_reply(reply, server_round=server_round):
            raise PowerCutError
        return [reply]

    with pytest.raises(PowerCutError):
        start(prepare_federation(directory, model, settings=settings, on_reply=cut, **arguments))


def resume(directory: Path, model: Path, settings: dict[str, Any], **arguments: Any) -> Federation:
    return run_federation(directory, model, settings=settings | {"resume": True}, **arguments)


def strip_times(federation: Federation) -> list[dict[str, Any]]:
    """Return the metrics without what differs between any two runs: time, and who has the bundle already."""
    excluded = ("seconds", "bundle_bytes", "wire_bytes_to_clients", "wire_bytes_to_server")
    return [{key: value for key, value in line.items() if key not in excluded} for line in federation.rounds.values()]


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_resumed_is_uninterrupted(name: str, llama_directory: Path, tmp_path: Path) -> None:
    settings = {"strategy.name": name, "num-server-rounds": 3}
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings)
    stop_in_round(2, tmp_path / "cut", llama_directory, settings)
    assert not (tmp_path / "cut" / "run" / "summary.json").exists()
    resumed = resume(tmp_path / "cut", llama_directory, settings)
    assert resumed.grid.num_messages["train"] == 4  # rounds 2 and 3 of two clients: round 1 was not done again
    assert resumed.digest == whole.digest
    assert strip_times(resumed) == strip_times(whole)


def test_the_aggregators_memory_matters_here(llama_directory: Path, tmp_path: Path) -> None:
    """Guards the test above: a resumed FedAdam that forgot its momenta ends elsewhere."""
    settings = {"strategy.name": "fedadam", "num-server-rounds": 3}
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings)
    stop_in_round(2, tmp_path / "cut", llama_directory, settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_app, "restore_aggregator", lambda *_: None)
        forgetful = resume(tmp_path / "cut", llama_directory, settings)
    assert forgetful.digest != whole.digest


def test_cut_between_checkpoint_and_evaluation(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"strategy.name": "fedavgm", "num-server-rounds": 3}
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings)
    evaluate = server_app.evaluate_round

    def cut(owner: Any, server_round: int, arrays: Any) -> Any:
        if server_round == 2:
            raise PowerCutError
        return evaluate(owner, server_round, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(server_app, "evaluate_round", cut)
        with pytest.raises(PowerCutError):
            run_federation(tmp_path / "cut", llama_directory, settings=settings)
    resumed = resume(tmp_path / "cut", llama_directory, settings)
    assert resumed.grid.num_messages["train"] == 2
    assert resumed.digest == whole.digest
    assert strip_times(resumed) == strip_times(whole)  # round 2 was evaluated after all


def test_cut_before_the_first_checkpoint(llama_directory: Path, tmp_path: Path) -> None:
    settings = {"num-server-rounds": 2}
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings)
    stop_in_round(1, tmp_path / "cut", llama_directory, settings)
    resumed = resume(tmp_path / "cut", llama_directory, settings)
    assert resumed.digest == whole.digest
    assert strip_times(resumed) == strip_times(whole)


def test_cut_twice(llama_directory: Path, tmp_path: Path) -> None:
    settings = {"strategy.name": "fedyogi", "num-server-rounds": 4}
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings)
    stop_in_round(2, tmp_path / "cut", llama_directory, settings)
    stop_in_round(4, tmp_path / "cut", llama_directory, settings | {"resume": True})
    assert resume(tmp_path / "cut", llama_directory, settings).digest == whole.digest


def test_a_finished_run_is_delivered_again(llama_directory: Path, tmp_path: Path) -> None:
    settings = {"num-server-rounds": 2}
    first = run_federation(tmp_path, llama_directory, settings=settings)
    digest, lines = first.digest, strip_times(first)
    again = resume(tmp_path, llama_directory, settings)
    assert again.grid.num_messages["train"] == 0
    assert again.digest == digest
    assert strip_times(again) == lines


def test_resumed_with_chosen_clients_parts_of_passes_and_dropout(tmp_path: Path) -> None:
    """What is drawn (clients, batches, GPT-2's dropout) must not depend on what ran before in the process."""
    model = save_family_model(tmp_path / "model", "gpt2")
    settings = {
        "num-server-rounds": 3,
        "strategy.fraction-train": 0.5,
        "train.max-steps": 2,
        "train.lr-schedule": "cosine",
        "strategy.update-dtype": "bfloat16",
    }
    arguments = {"num_clients": 4, "num_rows": 50}
    whole = run_federation(tmp_path / "whole", model, settings=settings, **arguments)
    stop_in_round(2, tmp_path / "cut", model, settings, **arguments)
    resumed = resume(tmp_path / "cut", model, settings, **arguments)
    assert resumed.digest == whole.digest
    assert strip_times(resumed) == strip_times(whole)


def test_seed_decides_the_result(llama_directory: Path, tmp_path: Path) -> None:
    digests = [
        run_federation(tmp_path / str(number), llama_directory, settings={"seed": seed}).digest
        for number, seed in enumerate((3, 3, 4))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_resume_with_another_setting_is_refused_and_the_run_stays_resumable(
    llama_directory: Path, tmp_path: Path
) -> None:
    settings = {"num-server-rounds": 2}
    stop_in_round(2, tmp_path, llama_directory, settings)
    with pytest.raises(
        CheckpointError, match=r"train\.learning-rate=0\.5.*has 0\.001.*Set train\.learning-rate=0\.001"
    ):
        resume(tmp_path, llama_directory, settings | {"train.learning-rate": 0.5})
    resume(tmp_path, llama_directory, settings)


def test_resume_with_another_model_under_the_same_name_is_refused(tmp_path: Path) -> None:
    model = save_family_model(tmp_path / "model")
    settings = {"num-server-rounds": 2}
    stop_in_round(2, tmp_path, model, settings)
    save_family_model(tmp_path / "model", seed=1)
    with pytest.raises(CheckpointError, match=r"belongs to the bundle.*Start a new run"):
        resume(tmp_path, model, settings)


def test_resume_of_a_damaged_checkpoint_is_refused_with_the_remedy(llama_directory: Path, tmp_path: Path) -> None:
    settings = {"num-server-rounds": 3}
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings)
    stop_in_round(3, tmp_path / "cut", llama_directory, settings)
    last = tmp_path / "cut" / "run" / "checkpoints" / "round-0002"
    (last / "state.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError, match=r"round-0002.*Delete it to continue"):
        resume(tmp_path / "cut", llama_directory, settings)
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    resumed = resume(tmp_path / "cut", llama_directory, settings)
    assert resumed.grid.num_messages["train"] == 4
    assert resumed.digest == whole.digest


def test_killed_between_metrics_and_checkpoint(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round is done again, and its line in the metrics is not lost or doubled."""
    settings = {"num-server-rounds": 2}
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings)
    saved = []

    def die_once(*args: object, **kwargs: object) -> None:
        saved.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ot_federated.model_owner.server_app.save_checkpoint", die_once)
        with pytest.raises(KeyboardInterrupt):
            run_federation(tmp_path / "cut", llama_directory, settings=settings)
    resumed = run_federation(tmp_path / "cut", llama_directory, settings={**settings, "resume": True})
    assert saved == [1]
    assert resumed.digest == whole.digest
    assert resumed.summary["federation"] == whole.summary["federation"]
    killed, last = json.loads((resumed.output / "seconds.json").read_text())
    assert killed["total"] + last["setup"] < resumed.summary["seconds"]["total"] + 0.1
    assert resumed.summary["seconds"]["setup"] == pytest.approx(killed["setup"] + last["setup"], abs=0.06)
    assert sorted(resumed.rounds) == [0, 1, 2]


def test_the_result_survives_a_failing_upper_bound(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full fine-tuning needs the most memory and is the least important."""

    def run_out(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    settings = {"evaluation.full-fine-tuning": True}
    with monkeypatch.context() as patch:
        patch.setattr("ot_federated.model_owner.results.fine_tune_full_model", run_out)
        with pytest.raises(torch.OutOfMemoryError):
            run_federation(tmp_path, llama_directory, settings=settings)
    output = tmp_path / "run"
    assert (output / "model" / "README.md").exists()
    assert (output / "summary.json").exists()
    assert "model.device=cpu" in (output / "failure.txt").read_text()
    again = {"evaluation.full-fine-tuning": False, "resume": True}
    assert run_federation(tmp_path, llama_directory, settings=again).summary["rows"]["plug_in"]
