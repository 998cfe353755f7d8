"""Fuzz the parsers of foreign bytes: ``python -m tests.fuzzing [TARGET ...] [--executions N] [--corpus DIR]``.

Coverage-guided by atheris (libFuzzer under Python; the extra ``fuzz``), one process for each target. Inputs that
reached something new are kept in the corpus, minimised at the end of a run; ``test_corpus.py`` beside this file gives
all of them to their targets in every test run. What crashes, hangs or eats memory stops its target and stays in
``--crashes`` for a regression test. Totals go to simulations/results/faults.json with ``--results``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.fuzzing.targets import Parser, targets

corpus_root = Path(__file__).parent / "corpus"
instrumented = ["ot_federated", "strategies", "tomllib", "zipfile"]
hang_seconds, memory_mib = 10, 3000


def build_checked(name: str) -> Callable[[bytes], None]:
    """Return a target as a function that returns for what it accepts and what it refuses, and raises at a crash."""
    parse: Parser = targets[name].build()
    from ot_federated.errors import OtFederatedError

    def check(data: bytes) -> None:
        try:
            parse(data)
        except OtFederatedError as error:
            # A refusal is shown to people and may travel: it must be text, and of a size that one reads.
            assert len(str(error).encode()) < 20_000, f"{type(error).__name__} of {len(str(error))} characters"

    return check


def fuzz_here(name: str, arguments: Sequence[str]) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=instrumented):
        check = build_checked(name)
        for data in targets[name].seeds():
            check(data)  # what is imported or built at the first call would be taken for a hang
    atheris.Setup([sys.argv[0], *arguments], check)
    atheris.Fuzz()


def run_target(name: str, *, executions: int, corpus: Path, crashes: Path, seed: int) -> dict[str, Any]:
    """Fuzz a target in a process of its own and return its row of the result."""
    target, began = targets[name], time.monotonic()
    crashes.mkdir(parents=True, exist_ok=True)
    kept = corpus / name
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        seeds, found = Path(directory) / "seeds", Path(directory) / "found"
        seeds.mkdir(), found.mkdir()
        for number, data in enumerate(target.seeds()):
            (seeds / f"{number:03d}").write_bytes(data)
        options = [
            f"-runs={executions}",
            f"-max_len={target.max_bytes}",
            f"-timeout={hang_seconds}",
            f"-rss_limit_mb={memory_mib}",
            f"-artifact_prefix={crashes}/{name}-",
            f"-seed={seed}",
            "-print_final_stats=1",
        ]
        shown = call_libfuzzer(name, [*options, str(found), str(kept), str(seeds)])
        merged = Path(directory) / "merged"
        merged.mkdir()
        call_libfuzzer(name, ["-merge=1", f"-max_len={target.max_bytes}", *map(str, (merged, kept, found))])
        small = sorted((path for path in merged.iterdir()), key=lambda path: path.stat().st_size)
        if small:
            shutil.rmtree(kept)
            kept.mkdir()
            for path in small:
                shutil.copyfile(path, kept / path.name)
    done = re.search(r"stat::number_of_executed_units:\s*(\d+)", shown)
    hang = "libFuzzer: timeout" in shown
    stopped = bool(re.search(r"ERROR: libFuzzer|Uncaught Python exception|artifact_prefix=.*Test unit written", shown))
    if stopped:
        (crashes / f"{name}.log").write_text(shown)
    return {
        "target": name,
        "executions": int(done[1]) if done else 0,
        "crashes": int(stopped and not hang),
        "hangs": int(hang),
        "seconds": round(time.monotonic() - began, 1),
    }


def call_libfuzzer(name: str, arguments: Sequence[str]) -> str:
    """Run one target's fuzzer in a process of its own and return what it printed."""
    command = [sys.executable, "-m", "tests.fuzzing", "--in-process", name, "--", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return done.stdout + done.stderr


def main() -> int:
    """Fuzz what the command line names; the exit status is 1 where something crashed or hung."""
    if sys.argv[1:2] == ["--in-process"]:
        fuzz_here(sys.argv[2], sys.argv[4:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="*", choices=[*targets, []], metavar="TARGET", help=", ".join(targets))
    parser.add_argument("--executions", type=int, default=100_000, help="of a target whose share is 1")
    parser.add_argument("--corpus", type=Path, default=corpus_root)
    parser.add_argument("--crashes", type=Path, default=Path("fuzzing-crashes"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", action="store_true", help="keep the totals in simulations/results/faults.json")
    asked = parser.parse_args()
    rows = []
    for name in asked.target or targets:
        executions = max(1000, round(asked.executions * targets[name].share))
        row = run_target(
            name, executions=executions, corpus=asked.corpus, crashes=asked.crashes.absolute(), seed=asked.seed
        )
        rows.append(row)
        rate = row["executions"] / max(row["seconds"], 0.1)
        print(
            f"{name:14} {row['executions']:>10,} executions  {row['crashes']} crashes  {row['hangs']} hangs  "
            f"{row['seconds']:>7.0f} s  {rate:>7,.0f}/s",
            flush=True,
        )
    if asked.results:
        from simulations.benchmarks.fault_results import update_results

        update_results("fuzzing", rows, command=f"python -m tests.fuzzing --executions {asked.executions} --results")
    return int(any(row["crashes"] or row["hangs"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
