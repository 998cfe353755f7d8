"""One client is centralised training; several are the weighted mean of theirs."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from ot_federated.bundle import read_manifest
from ot_federated.data_owner.partitioning import partition_indices
from ot_federated.emulated_model import adapter_parameters, load_emulated_model
from ot_federated.model_owner.plug_in import full_model_names
from ot_federated.tasks.multiple_choice import MultipleChoice
from ot_federated.training import OptimizerSettings, draw_batches, train
from tests.families import build_family_model, byte_tokenizer
from tests.federations import Federation, build_questions, is_train_reply, partition_of, run_federation, write_rows

num_rows, batch_size = 24, 4


def train_centrally(bundle: Path, *, client: str, num_rounds: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Train the bundle's emulated model on all rows as one data owner would, without any federation."""
    manifest = read_manifest(bundle)
    model = load_emulated_model(bundle, manifest)
    examples = MultipleChoice(byte_tokenizer()).encode(build_questions(num_rows))
    # The client's shard of one is all rows, in the order that the division gave them.
    (order,) = partition_indices(num_rows, num_partitions=1, method="iid", seed=seed)
    examples = [examples[index] for index in order]
    num_steps = math.ceil(num_rows / batch_size)
    weights = None
    for server_round in range(num_rounds):
        result = train(
            model,
            adapter_parameters(model, manifest),
            examples,
            start=weights,
            batches=draw_batches(
                [len(example.input_ids) for example in examples],
                batch_size=batch_size,
                first_step=server_round * num_steps,
                num_steps=num_steps,
                seed=[seed, zlib.crc32(client.encode())],
            ),
            first_step=server_round * num_steps,
            num_steps=num_steps,
            total_steps=num_rounds * num_steps,
            optimizer=OptimizerSettings(
                learning_rate=1e-3, lr_schedule="linear", warmup_fraction=0.1, weight_decay=0.0
            ),
            max_grad_norm=1.0,
        )
        weights = result.weights
    assert weights is not None
    names = full_model_names(build_family_model("llama"), manifest.stack)
    return {names[name]: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(("num_rounds", "tolerance"), [(1, 5e-7), (3, 2e-5)])
def test_one_client_is_centralised_training(
    num_rounds: int,
    tolerance: float,
    llama_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OT_FEDERATED_CACHE", str(tmp_path / "cache"))
    settings = {"strategy.update-dtype": "float32", "num-server-rounds": num_rounds}
    federation = run_federation(tmp_path, llama_directory, num_clients=1, num_rows=num_rows, settings=settings)
    (bundle,) = (tmp_path / "cache" / "bundles").iterdir()
    central = train_centrally(bundle, client="client-0000", num_rounds=num_rounds)
    assert federation.adapter.keys() == central.keys()
    source = load_file(llama_directory / "model.safetensors")
    moved = max(float((tensor - source[name]).abs().max()) for name, tensor in central.items())
    assert moved > 1e-3
    for name, tensor in central.items():
        # A weight travels as a difference and is added again: after one round a few units in the last place of
        # numbers near 1. Later rounds train on from there, and AdamW divides tiny gradients by their own size.
        torch.testing.assert_close(federation.adapter[name], tensor, rtol=0, atol=tolerance)


class Recorder:
    """Keeps what each client sent."""

    def __init__(self) -> None:
        self.updates: dict[int, dict[str, np.ndarray]] = {}
        self.num_examples: dict[int, int] = {}

    def __call__(self, reply: Message) -> list[Message]:
        if is_train_reply(reply):
            arrays = reply.content.array_records["arrays"]
            self.updates[partition_of(reply)] = {name: array.numpy() for name, array in arrays.items()}
            self.num_examples[partition_of(reply)] = int(reply.content.metric_records["metrics"]["num-examples"])
        return [reply]


def files_of(directory: Path, *sizes: int) -> str:
    for number, size in enumerate(sizes):
        write_rows(directory / "files" / f"{number}.jsonl", build_questions(size, start=100 * number))
    return str(directory / "files" / "*.jsonl")


def test_fedavg_is_the_mean_weighted_by_examples(llama_directory: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    settings = {
        "data.train": files_of(tmp_path, 4, 12),
        "data.partitioner": "files",
        "strategy.update-dtype": "float32",
    }
    federation = run_federation(tmp_path, llama_directory, settings=settings, on_reply=recorder)
    assert recorder.num_examples == {0: 4, 1: 12}
    source = load_file(llama_directory / "model.safetensors")
    for name, tensor in federation.adapter.items():
        _, _, block, rest = name.split(".", 3)
        role = f"{'bottom' if block == '0' else 'top'}.0.{rest}"
        first, second = (recorder.updates[number][role].astype(np.float64) for number in (0, 1))
        assert not np.array_equal(first, second)
        expected = source[name].double().numpy() + (4 * first + 12 * second) / 16
        # fp32: a unit in the last place of numbers below 1 for each of five operations.
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=6e-7)


def test_order_of_replies_does_not_matter(llama_directory: Path, tmp_path: Path) -> None:
    """Adding floats is not commutative over three numbers, so the order must be the clients', not the network's."""
    arrived: list[list[int]] = [[], []]

    def note(run: int, replies: list[Message]) -> list[Message]:
        arrived[run] += [partition_of(reply) for reply in replies if is_train_reply(reply)]
        return replies

    kept: list[Message] = []

    def last_first(reply: Message) -> list[Message]:
        if not is_train_reply(reply):
            return [reply]
        kept.append(reply)
        if len(kept) < 4:
            return []
        replies = [kept.pop() for _ in range(4)]
        return note(1, replies)

    runs = [
        run_federation(tmp_path / str(number), llama_directory, num_clients=4, num_rows=14, on_reply=hook)
        for number, hook in enumerate([lambda reply: note(0, [reply]), last_first])
    ]
    assert sorted(arrived[0][:4]) == [0, 1, 2, 3]
    assert arrived[0][:4] == arrived[1][:4][::-1]
    assert runs[0].digest == runs[1].digest


@pytest.mark.parametrize("update_dtype", ["float16", "bfloat16"])
def test_rounding_of_updates_does_not_add_up_over_rounds(
    update_dtype: str, llama_directory: Path, tmp_path: Path
) -> None:
    """What travels in 16 bits is a difference, so it stays close to what fp32 gives."""
    settings = {"num-server-rounds": 3}
    runs = [
        run_federation(tmp_path / dtype, llama_directory, settings=settings | {"strategy.update-dtype": dtype})
        for dtype in ("float32", update_dtype)
    ]
    source = load_file(llama_directory / "model.safetensors")
    for name, tensor in runs[0].adapter.items():
        moved = (tensor - source[name]).norm()
        # bfloat16 has 8 bits: half a unit is 0.2 % each way and round; the gradients of later rounds differ a little.
        assert (runs[1].adapter[name] - tensor).norm() < 0.05 * moved


def test_fedprox_keeps_clients_nearer_to_the_round(llama_directory: Path, tmp_path: Path) -> None:
    runs = {
        mu: run_federation(
            tmp_path / str(mu),
            llama_directory,
            settings={"strategy.name": "fedprox", "train.proximal-mu": mu, "train.local-epochs": 3},
        )
        for mu in (0.001, 10.0)
    }
    source = load_file(llama_directory / "model.safetensors")

    def distance(federation: Federation) -> float:
        return math.sqrt(sum(float((t - source[n]).square().sum()) for n, t in federation.adapter.items()))

    assert distance(runs[10.0]) < 0.9 * distance(runs[0.001])


def test_mu_is_the_same_whether_the_server_or_the_config_tells_it(llama_directory: Path, tmp_path: Path) -> None:
    digests = {
        name: run_federation(
            tmp_path / name,
            llama_directory,
            settings={"strategy.name": name, "train.proximal-mu": 0.5, "train.local-epochs": 2},
        ).digest
        for name in ("fedavg", "fedprox")
    }
    assert digests["fedavg"] == digests["fedprox"]
