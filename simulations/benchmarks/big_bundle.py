"""Memory with a bundle of 1.5 GB: ``python -m simulations.benchmarks.big_bundle``.

A random LLaMA becomes a bundle, in bfloat16, or in float32 where bfloat16 is slow (``--dtype``). An owner and a client,
processes of their own, exchange the messages of a round over a socket, as the objects that Flower cuts messages into
and puts together again; between the two there is no SuperLink. Each process samples its own memory.

``owner``            sends hello, every shard, and ``train``
``client, bundle``   stores the shards
``client, train``    a new process, as in a deployment: trains and replies
``training alone``   the same training in a process that does nothing else: what training needs
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from ot_federated.bundle import Manifest, read_manifest, read_tensors
from ot_federated.cache import atomic_write_text
from ot_federated.data_owner.message_limits import allocator_environment
from ot_federated.messages import build_content, encode_update, hello_type, shard_type, train_type
from ot_federated.reporting.plots import plot_memory
from simulations.benchmarks.environment import write_results
from simulations.benchmarks.memory_trace import MemoryTrace
from simulations.benchmarks.message_link import receive, send
from simulations.in_process import identify_as_server
from simulations.small_model import build_byte_tokenizer

results = Path(__file__).parent.parent / "results" / "big_bundle.json"
num_blocks, num_bottom, num_top, num_dropped = 16, 2, 2, 2
run_config: dict[str, Any] = {
    "num-server-rounds": 1,
    "train.batch-size": 1,
    "train.max-steps": 2,
    "data.max-length": 64,
    "data.partitioner": "iid",
}


def prepare(directory: Path, *, hidden: int, dtype: str) -> Manifest:
    """Write the bundle of a random model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ot_federated.model_owner.splitting import plan_stack, write_bundle

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=num_blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    kept = range(num_bottom, num_blocks - num_top - num_dropped)
    stack = plan_stack(num_blocks=num_blocks, bottom=num_bottom, top=num_top, kept=list(kept), bridged=False)
    return write_bundle(
        directory, model=model, tokenizer=build_byte_tokenizer(), stack=stack, bridges={}, compression="uniform+empty"
    )


def play_owner(links: Sequence[socket.socket], directory: Path, *, shard_bytes: int) -> dict[str, Any]:
    """Bring the bundle to the client, then let it train; return the memory trace of the first part."""
    from strategies.conversation import BundleSource

    identify_as_server(1)
    source = BundleSource(directory, read_manifest(directory), shard_bytes)

    def ask(link: socket.socket, content: RecordDict, message_type: str) -> dict[str, Any]:
        send(link, Message(content, 1, message_type, ttl=3600.0))
        del content
        told = dict(receive(link).content.config_records["config"])
        if told["status"] != "ok":
            raise RuntimeError(f"{message_type}: {told['reason']!r}")
        return told

    with MemoryTrace() as trace:
        missing = ask(links[0], source.hello_content(), hello_type)["missing-shards"]
        for index in missing:
            ask(links[0], source.shard_content(index), shard_type)
    links[0].close()
    adapter = read_tensors(directory / "adapter.safetensors")
    fields: dict[str, Any] = {"bundle-digest": source.digest, "server-round": 1, "update-dtype": "float16", "run": "r"}
    ask(links[1], build_content(fields, arrays=encode_update(adapter, adapter, dtype="float16")), train_type)
    links[1].close()
    return {**trace.summary(), "num_shards": len(missing)}


def play_client(link: socket.socket, directory: Path, data: Path) -> dict[str, Any]:
    """Answer every message until the owner hangs up; return the memory trace."""
    from ot_federated.data_owner.client_app import app

    config: dict[str, Any] = {"cache-dir": str(directory), "data-path": str(data), "name": "client", "device": "cpu"}
    with MemoryTrace() as trace:
        while True:
            try:
                message = receive(link)
            except ConnectionError:
                break
            context = Context(
                run_id=1, node_id=1, node_config=dict(config), state=RecordDict(), run_config=dict(run_config)
            )
            reply = app(message, context)
            send(link, reply)
            del message, reply, context
    return trace.summary()


def train_alone(directory: Path, data: Path) -> dict[str, Any]:
    """Train as the client does, from the bundle's own weights, and nothing else; return the memory trace."""
    from ot_federated.config import parse_run_config
    from ot_federated.data_owner.fine_tuning import load_processor_once
    from ot_federated.emulated_model import adapter_parameters, load_emulated_model
    from ot_federated.sources import load_table
    from ot_federated.tasks.registry import build_configured_task
    from ot_federated.training import build_optimizer_settings, train

    config, manifest = parse_run_config(run_config), read_manifest(directory)
    with MemoryTrace() as trace:
        task = build_configured_task(config, load_processor_once(str(directory)))
        examples = task.encode(load_table(str(data), split="train", columns=list(config.columns.values())))
        model = load_emulated_model(directory, manifest)
        train(
            model,
            adapter_parameters(model, manifest),
            examples,
            batches=iter([[0], [1]]),
            num_steps=2,
            total_steps=2,
            optimizer=build_optimizer_settings(config.train),
            max_grad_norm=config.train.max_grad_norm,
        )
    return trace.summary()


def run_part(part: str, directory: Path, *arguments: str, links: Sequence[socket.socket] = ()) -> subprocess.Popen[str]:
    """Start this module as one of the processes; the data owner's are given what ``ot-federated supernode`` gives."""
    descriptors = [str(link.fileno()) for link in links]
    command = [sys.executable, "-m", "simulations.benchmarks.big_bundle", "--part", part, "--place", str(directory)]
    return subprocess.Popen(
        [*command, *arguments, *(["--links", *descriptors] if descriptors else [])],
        pass_fds=[link.fileno() for link in links],
        env={**({} if part == "owner" else allocator_environment), **os.environ},
        text=True,
    )


def finish(process: subprocess.Popen[str], directory: Path, part: str) -> dict[str, Any]:
    """Wait for a part and return its trace."""
    if process.wait():
        raise RuntimeError(f"{part} ended with status {process.returncode}")
    found: dict[str, Any] = json.loads((directory / f"{part}.json").read_text())
    return found


def measure(directory: Path, *, hidden: int, dtype: str, shard_bytes: int) -> dict[str, Any]:
    """Run all processes and return what they needed."""
    rows = [{"question": f"What is {i}?", "choices": ["one", "two"], "answer": i % 2} for i in range(4)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finish(run_part("prepare", directory, "--hidden", str(hidden), "--dtype", dtype), directory, "prepare")
    manifest = read_manifest(directory / "bundle")
    pairs = [socket.socketpair(), socket.socketpair()]
    size = ("--shard-bytes", str(shard_bytes))
    owner = run_part("owner", directory, *size, links=[pairs[0][0], pairs[1][0]])
    bundle = run_part("client-bundle", directory, links=[pairs[0][1]])
    pairs[0][0].close()
    pairs[0][1].close()
    pairs[1][0].close()
    parts = {"client-bundle": finish(bundle, directory, "client-bundle")}
    # A new process for the next message, as in a deployment; the owner is ready to wait.
    training = run_part("client-train", directory, links=[pairs[1][1]])
    pairs[1][1].close()
    parts["client-train"] = finish(training, directory, "client-train")
    parts["owner"] = finish(owner, directory, "owner")
    parts["training-alone"] = finish(run_part("training-alone", directory), directory, "training-alone")
    shard_mb = shard_bytes / 1e6
    return {
        "bundle_mb": round(manifest.num_bytes / 1e6, 1),
        "adapter_mb": round(manifest.file_bytes("adapter.safetensors") / 1e6, 1),
        "shard_mb": round(shard_mb, 1),
        "num_shards": parts["owner"]["num_shards"],
        "owner_peak_in_shards": _beyond(parts["owner"]) / shard_mb,
        "client_peak_in_shards": _beyond(parts["client-bundle"]) / shard_mb,
        "client_over_training_alone": parts["client-train"]["peak_mb"] / parts["training-alone"]["peak_mb"],
        "targets": {"peak_in_shards": 2.0, "client_over_training_alone": 1.3},
        "processes": parts,
    }


def _beyond(part: dict[str, Any]) -> float:
    """Return the MB by which a process grew beyond what it had before the first message."""
    return float(part["peak_mb"]) - float(part["start_mb"])


def run_as_part(parsed: argparse.Namespace) -> int:
    """Be one of the processes, and leave what it needed in a file."""
    place: Path = parsed.place
    links = [socket.socket(fileno=descriptor) for descriptor in parsed.links]
    if parsed.part == "prepare":
        prepare(place / "bundle", hidden=parsed.hidden, dtype=parsed.dtype)
        found: dict[str, Any] = {}
    elif parsed.part == "owner":
        found = play_owner(links, place / "bundle", shard_bytes=parsed.shard_bytes)
    elif parsed.part == "training-alone":
        found = train_alone(place / "bundle", place / "data.jsonl")
    else:
        os.environ["XDG_STATE_HOME"] = str(place / "state")
        found = play_client(links[0], place / "cache", place / "data.jsonl")
    atomic_write_text(place / f"{parsed.part}.json", json.dumps(found))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write result file and figure; 1 where a target is missed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.big_bundle", description=__doc__)
    parser.add_argument("--hidden", type=int, default=2048, help="width; 1.5 GB are 2048, or 1536 in float32")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the model")
    parser.add_argument("--shard-bytes", type=int, default=64 * 2**20)
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help="where the files of the run go for its time")
    parser.add_argument("--links", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    parsed = parser.parse_args(words)
    if parsed.part:
        return run_as_part(parsed)
    with tempfile.TemporaryDirectory(dir=parsed.place) as temporary:
        found = measure(Path(temporary), hidden=parsed.hidden, dtype=parsed.dtype, shard_bytes=parsed.shard_bytes)
    # Where the files go is no part of what was measured.
    what = ["--hidden", str(parsed.hidden), "--dtype", parsed.dtype, "--shard-bytes", str(parsed.shard_bytes)]
    write_results(
        parsed.output, command=shlex.join(["python", "-m", "simulations.benchmarks.big_bundle", *what]), **found
    )
    traces = {name: part["trace"] for name, part in found["processes"].items()}
    plot_memory(traces, parsed.output.with_suffix(".png"), levels={"the bundle's own bytes": found["bundle_mb"]})
    print(
        f"bundle {found['bundle_mb']:.0f} MB in {found['num_shards']} shards; beyond its start the owner needs "
        f"{found['owner_peak_in_shards']:.2f} shards, the client {found['client_peak_in_shards']:.2f}; a client that "
        f"trains needs {found['client_over_training_alone']:.2f} times what training alone needs"
    )
    missed = max(found["owner_peak_in_shards"], found["client_peak_in_shards"]) > 2
    return int(missed or found["client_over_training_alone"] > 1.3)


if __name__ == "__main__":
    sys.exit(main())
