"""The command line ``ot-federated``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ot_federated.cli import main
from ot_federated.data_owner.privacy_ledger import PrivacyLedger, Release


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Two ledgers: of three rounds and of one."""
    root = tmp_path / "ledgers"
    monkeypatch.setenv("OT_FEDERATED_LEDGERS", str(root))
    for dataset_id, num_rounds in (("ward-7", 3), ("ward-8", 1)):
        ledger = PrivacyLedger.open(root, dataset_id=dataset_id)
        for server_round in range(1, num_rounds + 1):
            release = Release(
                run="run-a",
                server_round=server_round,
                client="hospital-1",
                noise_multiplier=2.0,
                sample_rate=0.05,
                num_steps=20,
                max_grad_norm=0.5,
                num_examples=2000,
            )
            ledger.spend(release, budget_epsilon=8, delta=1e-5)
    return root


def test_show_writes_a_table_with_epsilon_after_every_round(root, capsys):
    assert main(["ledger", "show", "--dataset", "ward-7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ledger = PrivacyLedger.open(root, dataset_id="ward-7")
    epsilon = ledger.epsilon(delta=1e-5)
    assert lines[0] == (
        f"data set ward-7: 3 entries, epsilon {epsilon:.4f} at delta 1e-05 "
        "(unit: example, adjacency: add-remove-one, sampling: poisson)"
    )
    assert lines[1].split() == [
        "#",
        "time",
        "(UTC)",
        "run",
        "round",
        "client",
        "sigma",
        "q",
        "steps",
        "C",
        "N",
        "epsilon",
    ]
    assert lines[4].split()[3:] == ["run-a", "3", "hospital-1", "2", "0.05", "20", "0.5", "2000", f"{epsilon:.4f}"]
    column = [float(line.split()[-1]) for line in lines[2:]]
    assert column == sorted(column)
    assert len(column) == 3


def test_show_takes_another_delta_and_fewer_rows(root, capsys):
    assert main(["ledger", "show", "--dataset", "ward-7", "--delta", "1e-7", "--last", "1"]) == 0
    out = capsys.readouterr().out
    assert "at delta 1e-07" in out
    assert len(out.splitlines()) == 3
    assert out.splitlines()[2].startswith("3 ")


def test_without_a_choice_all_ledgers_are_meant(root, capsys):
    assert main(["ledger", "show"]) == 0
    out = capsys.readouterr().out
    assert "data set ward-7: 3 entries" in out
    assert "data set ward-8: 1 entries" in out
    assert main(["ledger", "verify"]) == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [
        ["ok", "ward-7", "3"],
        ["ok", "ward-8", "1"],
    ]


def test_verify_exits_with_1_and_names_the_line(root, capsys):
    path = root / "ward-7" / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"round":2', b'"round":9'))
    assert main(["ledger", "verify"]) == 1
    out = capsys.readouterr().out
    assert "BAD  ward-7" in out
    assert "line 2 was edited" in out
    assert "ok   ward-8" in out
    assert main(["ledger", "show", "--dataset", "ward-7"]) == 1
    assert "line 2 was edited" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "ledger.jsonl"])
def test_a_copy_anywhere_can_be_checked(root, tmp_path, capsys, name):
    copy = tmp_path / "backup"
    (root / "ward-8").rename(copy)
    assert main(["ledger", "verify", "--path", str(copy / name)]) == 0
    assert "ok   ward-8  1 entries" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "--dataset", "ward-9"], "no ledger of the data set 'ward-9'. It has those of ward-7, ward-8."),
        (["verify", "--root", "empty"], "empty has no ledgers. Give --root or --path"),
        (["verify", "--path", "empty"], "empty holds no privacy ledger"),
        (["show", "--last", "-1"], "--last=-1 must be at least 0"),
        (["show", "--delta", "2"], "delta=2 must be"),
    ],
)
def test_mistakes_are_explained(root, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["ledger", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["ledger"], ["ledger", "show", "--dataset", "a", "--path", "b"], ["leger"]])
def test_wrong_commands_exit_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_help_is_quick_and_the_module_runs():
    code = "import sys, ot_federated.cli; print({'torch', 'flwr', 'scipy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
    command = [sys.executable, "-m", "ot_federated.cli", "ledger", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "verify" in result.stdout


def test_only_commands_that_hand_options_on_take_unknown_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["trail", "show", "--superlink", "x"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --superlink x" in capsys.readouterr().err
    assert main(["supernode", "--superlink", "x", "--insecure", "--allow-runtime-dependency-installation"]) == 1
    assert "packages that nobody approved" in capsys.readouterr().err
