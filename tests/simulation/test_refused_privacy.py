"""What cannot be private is refused, with the reason and the remedy: nothing is trained, and nothing is spent.

Each case is a whole federation, whose server learns why (but for what stands in a data owner's own files).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import FedProx
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaMLP

from ot_federated.data_owner import private_tuning
from ot_federated.data_owner.privacy_ledger import PrivacyLedger, ledger_root, list_ledgers
from strategies.offsite_tuning import AggregationError
from tests.federations import Federation, build_questions, prepare_federation, start, write_rows

private = {
    "privacy.mode": "example",
    "privacy.target-epsilon": 4.0,
    "privacy.engine": "loop",
    "train.max-steps": 3,
}


@pytest.fixture(autouse=True)
def own_ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OT_FEDERATED_LEDGERS", str(tmp_path / "ledgers"))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every private training that begins."""
    begun: list[str] = []
    plain = private_tuning.train_privately

    def train(*arguments: Any, **others: Any) -> Any:
        begun.append("began")
        return plain(*arguments, **others)

    monkeypatch.setattr(private_tuning, "train_privately", train)
    return begun


Prepare = Callable[..., Federation]


@pytest.fixture
def prepare(tmp_path: Path, llama_directory: Path) -> Prepare:
    """Return what prepares a private run, each in a directory of its own, with a policy of the given lines."""
    count = 0

    def build(settings: dict[str, Any] | None = None, *, policy: str = "", **arguments: Any) -> Federation:
        nonlocal count
        count += 1
        directory = tmp_path / f"run-{count}"
        directory.mkdir()
        file = directory / "policy.toml"
        file.write_text(policy)
        node_config = {"policy": str(file)} | arguments.pop("node_config", {})
        return prepare_federation(
            directory,
            llama_directory,
            num_rows=24,
            settings=private | (settings or {}),
            node_config=node_config,
            **arguments,
        )

    return build


def ledger_files() -> dict[str, bytes]:
    """Return every file below the ledgers, locks left out."""
    files = [path for path in ledger_root().rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files if path.name != "lock" and path.parent.name != "turns"}


def refuse(federation: Federation, trainings: list[str]) -> str:
    """Run a federation that must fail without training or spending anything; return the reason that is left of it."""
    before = ledger_files()
    trainings.clear()
    with pytest.raises(AggregationError):
        start(federation)
    assert trainings == []
    assert ledger_files() == before
    assert not (federation.output / "adapter").exists()
    return (federation.output / "failure.txt").read_text()


def test_what_is_refused_below_is_refused_for_what_is_wrong_with_it(prepare: Prepare, trainings: list[str]) -> None:
    """Guards the tests here: a run with nothing wrong trains and spends."""
    start(prepare())
    assert trainings == ["began"] * 2
    assert len(list_ledgers(ledger_root())) == 2


@pytest.mark.parametrize("mu", [math.nan, math.inf, -1.0])
def test_proximal_weight_that_no_honest_server_sends(
    mu: float, prepare: Prepare, trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a round that is paid, and fails in its first step."""
    plain = FedProx.configure_train

    def configure(strategy: FedProx, *arguments: Any) -> Any:
        strategy.proximal_mu = mu
        return plain(strategy, *arguments)

    monkeypatch.setattr(FedProx, "configure_train", configure)
    failure = refuse(prepare({"strategy.name": "fedprox", "train.proximal-mu": 0.1}), trainings)
    assert f"'proximal-mu' is {mu}, not a finite number of at least 0" in failure


@pytest.mark.parametrize(
    ("settings", "policy", "reason"),
    [
        pytest.param(
            {"privacy.mode": "none"},
            "",
            "training without example-level privacy (require-privacy = true)",
            id="privacy",
        ),
        pytest.param(
            {"privacy.noise-multiplier": 0.5},
            "min-noise-multiplier = 0.6",
            "noise multiplier 0.5 (min-noise-multiplier = 0.6)",
            id="sigma",
        ),
        pytest.param(
            {"privacy.max-grad-norm": 1e9}, "max-grad-norm = 2", "clipping norm 1e+09 (max-grad-norm = 2)", id="C"
        ),
        pytest.param(
            {"train.batch-size": 12}, "max-sample-rate = 0.4", "sample rate 1 (max-sample-rate = 0.4)", id="q"
        ),
        pytest.param({"num-server-rounds": 9}, "max-rounds = 8", "9 rounds (max-rounds = 8)", id="rounds"),
        pytest.param(
            {"train.max-steps": 0, "train.local-epochs": 3},
            "max-steps-per-round = 8",
            "9 steps in a round (max-steps-per-round = 8)",
            id="steps",
        ),
        pytest.param({"privacy.target-epsilon": 9.0}, "max-epsilon = 3", "epsilon 9 (max-epsilon = 3)", id="epsilon"),
        pytest.param({"privacy.target-delta": 0.01}, "delta = 1e-4", "delta 0.01 (delta = 0.0001)", id="delta"),
        pytest.param({}, "min-examples = 13", "training on fewer examples than min-examples = 13", id="examples"),
        pytest.param({}, 'allowed-tasks = ["causal-lm"]', "task 'multiple-choice' (allowed: causal-lm)", id="task"),
    ],
)
def test_a_server_that_asks_for_weaker_privacy(
    settings: dict[str, Any], policy: str, reason: str, prepare: Prepare, trainings: list[str]
) -> None:
    failure = refuse(prepare(settings, policy=policy), trainings)
    assert reason in failure
    assert "Nothing was trained or spent. Change the run config, or agree on another policy" in failure
    assert list_ledgers(ledger_root()) == []


def test_a_server_that_weakens_everything_is_told_everything(prepare: Prepare, trainings: list[str]) -> None:
    weak = {"privacy.noise-multiplier": 1e-3, "privacy.max-grad-norm": 1e9, "train.batch-size": 1000}
    failure = refuse(prepare(weak), trainings)
    for limit in ("min-noise-multiplier = 0.3", "max-grad-norm = 10", "max-sample-rate = 0.5"):
        assert limit in failure


def test_delta_that_allows_to_publish_an_example(prepare: Prepare, trainings: list[str]) -> None:
    """Twelve examples a client, and a policy whose owner took delta for a small epsilon."""
    failure = refuse(prepare({"privacy.target-delta": 0.09}, policy="delta = 0.09"), trainings)
    assert "delta=0.09 is not below 1 over this client's number of examples" in failure
    assert "Set a smaller delta in the data owner's policy file, and privacy.target-delta to at most that" in failure
    # How many there are is nobody's business.
    assert not re.search(r"\b(12|24)\b", failure)


def test_budget_that_is_spent(prepare: Prepare, trainings: list[str]) -> None:
    start(prepare(policy="max-epsilon = 4"))
    failure = refuse(prepare(policy="max-epsilon = 4"), trainings)
    assert "over its budget of 4; 3.9" in failure or "over its budget of 4; 4 is spent" in failure
    assert "Ask for more noise, fewer steps or a smaller sample rate" in failure
    assert "let the data owner raise max-epsilon" in failure
    start(prepare(policy="max-epsilon = 9"))  # the remedy holds


def edit_the_noise(ledger: PrivacyLedger) -> None:
    path = ledger.directory / "ledger.jsonl"
    fields = json.loads(path.read_text())
    path.write_text(
        json.dumps(fields | {"noise_multiplier": 99.0}, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"
    )


def forget_a_line(ledger: PrivacyLedger) -> None:
    (ledger.directory / "ledger.jsonl").write_bytes(b"")


def remove_the_anchor(ledger: PrivacyLedger) -> None:
    (ledger.directory / "anchor.json").unlink()


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (edit_the_noise, "line 1 was edited"),
        (forget_a_line, "line 1 is missing"),
        (remove_the_anchor, "anchor.json is missing"),
    ],
)
def test_ledger_that_was_altered(
    alter: Callable[[PrivacyLedger], None],
    reason: str,
    prepare: Prepare,
    trainings: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    start(prepare())
    for dataset in list_ledgers(ledger_root()):
        alter(PrivacyLedger.open(ledger_root(), dataset_id=dataset))
    capfd.readouterr()
    failure = refuse(prepare(), trainings)
    # The server learns that it is the ledger; where it lies and what is wrong with it, its owner alone.
    assert "LedgerError; the client's log has the details" in failure
    assert str(ledger_root()) not in failure
    told = capfd.readouterr().err
    assert reason in told
    assert "Restore ledger.jsonl and anchor.json together from a backup" in told


def test_ledger_of_other_data(prepare: Prepare, trainings: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    one = {"num_clients": 1, "settings": {"strategy.min-nodes": 1}}
    start(prepare(node_config={"dataset": "ward-7"}, **one))
    (ledger_root() / "ward-7").rename(ledger_root() / "ward-8")
    refuse(prepare(node_config={"dataset": "ward-8"}, **one), trainings)
    assert "line 1 belongs to the data set 'ward-7', not to 'ward-8'" in capfd.readouterr().err


def test_settings_of_the_server_begin_no_new_ledger(prepare: Prepare, tmp_path: Path) -> None:
    """Catches a data set that is known by what the server makes of it: every run is paid from the same budget."""
    data = write_rows(tmp_path / "own.jsonl", [row | {"hint": row["question"][::-1]} for row in build_questions(24)])
    for number, settings in enumerate(
        (
            {},
            {"seed": 7, "data.max-train-examples": 20},
            {"data.max-length": 16},
            {"data.partitioner": "dirichlet"},
            {"data.question-column": "hint", "data.validation": str(data), "data.test": str(data)},
        ),
        start=1,
    ):
        own = {"data-path": str(data)}
        start(prepare({"strategy.min-nodes": 1, **settings}, policy="max-epsilon = 50", num_clients=1, node_config=own))
        (dataset,) = list_ledgers(ledger_root())
        assert len(PrivacyLedger.open(ledger_root(), dataset_id=dataset).entries) == number


def use_weight_beside_its_layer(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    gate = self.gate_proj(x) + functional.linear(x, self.gate_proj.weight)
    return self.down_proj(self.act_fn(gate) * self.up_proj(x))


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
def test_family_without_correct_per_example_gradients(
    engine: str, prepare: Prepare, trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that uses a weight beside its layer: Opacus gives gradients of the right shape, with a part missing."""
    monkeypatch.setattr(LlamaMLP, "forward", use_weight_beside_its_layer)
    failure = refuse(prepare({"privacy.engine": engine}), trainings)
    assert f"with privacy.engine={engine} the clipped gradients of this llama model differ by" in failure
    assert "Set privacy.engine=loop." in failure
    start(prepare({"privacy.engine": "loop"}))  # the remedy holds
    assert trainings == ["began"] * 2


@pytest.mark.parametrize("engine", ["hooks", "ghost", "loop"])
def test_every_engine_trains_on_a_bundle_in_bfloat16(engine: str, prepare: Prepare, trainings: list[str]) -> None:
    start(prepare({"privacy.engine": engine, "model.dtype": "bfloat16"}))
    assert trainings == ["began"] * 2
