"""The run directory: who may write into it, and that a continued run is the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ot_federated.errors import CheckpointError, ConfigError
from ot_federated.reporting.run_directory import (
    BusyRunError,
    RunDirectory,
    config_file,
    failure_file,
    hold_directory,
    lock_file,
    metrics_file,
)

config: dict[str, Any] = {"seed": 0, "train.learning-rate": 2e-4, "resume": False, "output-dir": "x"}


def open_run(path: Path, *, resume: bool = False, **changes: Any) -> RunDirectory:
    settings = config | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return RunDirectory.open(str(path), settings, resume=resume)


def test_new_run_notes_its_config(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    assert json.loads((run.path / config_file).read_text()) == config


def test_existing_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    open_run(tmp_path / "run")
    before = (tmp_path / "run" / config_file).read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a run.*resume=true, or choose another output directory"):
        open_run(tmp_path / "run", seed=1)
    assert (tmp_path / "run" / config_file).read_bytes() == before


def test_directory_with_other_files_may_become_a_run(tmp_path: Path) -> None:
    (tmp_path / "simulation.log").write_text("started")
    open_run(tmp_path)
    assert (tmp_path / "simulation.log").read_text() == "started"


def test_empty_name_is_below_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory.open("", config, resume=False)
    assert run.path.parent == tmp_path / "runs"


@pytest.mark.parametrize(("name", "value"), [("seed", 7), ("train.learning-rate", 1e-3)])
def test_resume_with_another_config_names_key_values_and_remedy(tmp_path: Path, name: str, value: Any) -> None:
    open_run(tmp_path / "run")
    changed = {name.replace(".", "__").replace("-", "_"): value}
    with pytest.raises(CheckpointError) as caught:
        open_run(tmp_path / "run", resume=True, **changed)
    message = str(caught.value)
    assert f"{name}={value!r}" in message
    assert f"has {config[name]!r}" in message
    assert f"Set {name}={config[name]!r}, or start a new run" in message


def test_resume_with_a_key_that_the_run_did_not_have(tmp_path: Path) -> None:
    open_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"train\.momentum"):
        open_run(tmp_path / "run", resume=True, train__momentum=0.9)


def test_resume_may_change_what_does_not_change_the_result(tmp_path: Path) -> None:
    open_run(tmp_path / "run")
    run = open_run(tmp_path / "run", resume=True, output_dir="elsewhere", strategy__round_timeout_seconds=5.0)
    assert json.loads((run.path / config_file).read_text())["output-dir"] == "x"


scaled = {"evaluation.alpha-every-round": True, "evaluation.alphas": "0.5,1", "evaluation.max-validation-examples": 9}


@pytest.mark.parametrize(
    ("before", "changes", "named"),
    [
        ({}, scaled, "evaluation.alpha-every-round"),
        (scaled, {"evaluation.alpha-every-round": False}, "evaluation.alpha-every-round"),
        (scaled, {"evaluation.alphas": "1"}, "evaluation.alphas"),
        (scaled, {"evaluation.max-validation-examples": 8}, "evaluation.max-validation-examples"),
    ],
)
def test_what_scales_every_rounds_update_stays(
    tmp_path: Path, before: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    off = {"evaluation.alpha-every-round": False, "evaluation.alphas": "", "evaluation.max-validation-examples": 9}
    first = config | off | before
    RunDirectory.open(str(tmp_path / "run"), first, resume=False)
    with pytest.raises(CheckpointError, match=f"resume=true with {named}="):
        RunDirectory.open(str(tmp_path / "run"), first | changes, resume=True)
    RunDirectory.open(str(tmp_path / "run"), first | {"evaluation.every-rounds": 2}, resume=True)


def test_alphas_at_delivery_may_change(tmp_path: Path) -> None:
    first = config | scaled | {"evaluation.alpha-every-round": False}
    RunDirectory.open(str(tmp_path / "run"), first, resume=False)
    changed = {"evaluation.alphas": "1", "evaluation.max-validation-examples": 8}
    RunDirectory.open(str(tmp_path / "run"), first | changed, resume=True)


def test_resume_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no run. Set output-dir"):
        open_run(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("text", ["", '{"seed": 0', "[]", "7", "null"])
def test_resume_of_a_damaged_config(tmp_path: Path, text: str) -> None:
    open_run(tmp_path / "run")
    (tmp_path / "run" / config_file).write_text(text)
    with pytest.raises(CheckpointError, match=r"run_config.json is damaged"):
        open_run(tmp_path / "run", resume=True)


def test_failure_of_the_last_attempt_is_forgotten(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.write_failure("too few clients\n\n")
    assert (run.path / failure_file).read_text() == "too few clients\n"
    open_run(tmp_path / "run", resume=True)
    assert not (run.path / failure_file).exists()


def test_metrics_of_a_round_are_replaced_and_sorted(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for line in ({"round": 2, "loss": 1.0}, {"round": 0, "loss": 3.0}, {"round": 2, "loss": 0.5, "plug_in": {}}):
        run.append_metrics(line)
    assert run.read_metrics() == [{"round": 0, "loss": 3.0}, {"round": 2, "loss": 0.5, "plug_in": {}}]
    assert len((tmp_path / metrics_file).read_text().splitlines()) == 2


def test_rounds_that_are_done_again_are_forgotten(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.forget_rounds_after(0)
    for number in range(4):
        run.append_metrics({"round": number})
    run.forget_rounds_after(1)
    assert [line["round"] for line in run.read_metrics()] == [0, 1]
    run.forget_rounds_after(-1)
    assert run.read_metrics() == []
    assert not (tmp_path / metrics_file).exists()


def test_json_files(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_json("summary.json") is None
    run.write_json("summary.json", {"a": ["ü", None]})
    assert run.read_json("summary.json") == {"a": ["ü", None]}
    assert "ü" in (tmp_path / "summary.json").read_text()


@pytest.mark.skipif(os.name != "posix", reason="POSIX record locks")
def test_a_second_process_is_kept_out_until_the_first_one_dies(tmp_path: Path) -> None:
    code = "import sys, fcntl\nf = open(sys.argv[1], 'a')\nfcntl.lockf(f, fcntl.LOCK_EX)\nprint(1, flush=True)\ninput()"
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "run" / lock_file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with (
            pytest.raises(BusyRunError, match=r"at work on the run in .*Wait until it has ended"),
            hold_directory(str(tmp_path / "run")),
        ):
            pass
        other.kill()
    with hold_directory(str(tmp_path / "run")) as held:
        assert held == tmp_path / "run"
