"""Fuzz the parsers of foreign bytes: ``python -m tests.fuzzing [TARGET ...] [--executions N] [--corpus DIR]``.

Coverage-guided by atheris (libFuzzer under Python; the extra ``fuzz``), one process for each target. Inputs that
reached something new are kept in the corpus, minimised at the end of a run, beside those with a name of their own,
each of which once crashed a parser; ``test_corpus.py`` beside this file gives all of them to their targets in every
test run. What crashes, hangs or eats memory stops its target and stays in ``--crashes`` for a regression test. With
``--results`` a target's row goes to simulations/results/faults.json as soon as it is done, in place of its last one.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
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
# What guides the fuzzer are the branches of this project's parsers, and of zipfile, a mere reader of fields in Python.
instrumented = ["ot_federated", "strategies", "zipfile"]
# Of CPU time, which other work on the machine does not lengthen; of time on the clock, for what only waits.
hang_seconds, wait_seconds, memory_mib = 5, 60, 3000
max_kept, progress_seconds = 300, 30


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

    def check_in_time(data: bytes) -> None:
        began = time.process_time()
        check(data)
        if (seconds := time.process_time() - began) > hang_seconds:
            raise TimeoutError(f"{name} took {seconds:.1f} s for {len(data)} bytes")

    mutate = targets[name].mutate
    # To minimise a corpus libFuzzer starts itself again, by what it takes for its program's name.
    program = shlex.join(fuzzer_command(name))
    atheris.Setup([program, *arguments], check_in_time, **({"custom_mutator": mutate} if mutate else {}))
    atheris.Fuzz()


def run_target(name: str, *, executions: int, corpus: Path, crashes: Path, seed: int) -> dict[str, Any]:
    """Fuzz a target in a process of its own and return its row of the result."""
    target, began = targets[name], time.monotonic()
    crashes.mkdir(parents=True, exist_ok=True)
    kept = corpus / name
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        seeds, found = Path(directory) / "seeds", Path(directory) / "found"
        seeds.mkdir()
        found.mkdir()
        for number, data in enumerate(target.seeds()):
            (seeds / f"{number:03d}").write_bytes(data)
        words = Path(directory) / "words"
        # libFuzzer refuses an empty file.
        words.write_text("".join(f'"{word}"\n' for word in ["format", *list_words(target.seeds())]))
        options = [
            f"-runs={executions}",
            f"-max_len={target.max_bytes}",
            f"-dict={words}",
            "-len_control=100",  # short inputs first, also where a mutator is given
            f"-timeout={wait_seconds}",
            f"-rss_limit_mb={memory_mib}",
            f"-artifact_prefix={crashes}/{name}-",
            f"-seed={seed}",
            "-print_final_stats=1",
        ]
        shown = call_libfuzzer(name, [*options, str(found), str(kept), str(seeds)])
        seconds = time.monotonic() - began
        minimise(name, kept=kept, found=found, seeds=seeds)
    done = re.search(r"stat::number_of_executed_units:\s*(\d+)", shown)
    hang = "libFuzzer: timeout" in shown or "TimeoutError: " in shown
    stopped = bool(re.search(r"ERROR: libFuzzer|Uncaught Python exception|artifact_prefix=.*Test unit written", shown))
    if not done and not stopped:
        raise RuntimeError(f"The fuzzer of {name} did not run; it said: {shown[-2000:]}")
    if stopped:
        (crashes / f"{name}.log").write_text(shown)
    return {
        "target": name,
        "executions": int(done[1]) if done else 0,
        "crashes": int(stopped and not hang),
        "hangs": int(hang),
        "seconds": round(seconds, 1),
    }


def list_words(seeds: Sequence[bytes]) -> list[str]:
    """Return the words of valid inputs, which the fuzzer puts into others: no chance finds ``min-noise-multiplier``."""
    return sorted({word.decode() for data in seeds for word in re.findall(rb"[A-Za-z0-9_.\-]{3,40}", data)})


def minimise(name: str, *, kept: Path, found: Path, seeds: Path) -> None:
    """Leave in ``kept`` the smallest inputs that reach what the seeds and the named inputs do not."""
    with tempfile.TemporaryDirectory() as directory:
        known = [*seeds.iterdir(), *(path for path in kept.iterdir() if not is_found(path))]
        for path in known:
            shutil.copyfile(path, Path(directory) / path.name)
        call_libfuzzer(name, ["-merge=1", f"-max_len={targets[name].max_bytes}", *map(str, (directory, kept, found))])
        new = sorted(filter(is_found, Path(directory).iterdir()), key=lambda path: (path.stat().st_size, path.name))
        for path in filter(is_found, list(kept.iterdir())):
            path.unlink()
        for path in new[:max_kept]:
            shutil.copyfile(path, kept / path.name)


def is_found(path: Path) -> bool:
    """Say whether libFuzzer gave a file its name."""
    return bool(re.fullmatch(r"[0-9a-f]{40}", path.name))


def fuzzer_command(name: str) -> list[str]:
    """Return the command that fuzzes one target in its own process, without libFuzzer's options."""
    return [sys.executable, "-m", "tests.fuzzing", "--in-process", name, "--"]


def call_libfuzzer(name: str, arguments: Sequence[str]) -> str:
    """Run one target's fuzzer in a process of its own and return what it printed; now and then a line is shown."""
    lines, shown = [], time.monotonic()
    with subprocess.Popen(
        [*fuzzer_command(name), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("#") and time.monotonic() - shown > progress_seconds:
                print(f"{name}: {line.strip()}", file=sys.stderr, flush=True)
                shown = time.monotonic()
    return "".join(lines)


def keep_row(row: dict[str, Any], *, command: str) -> None:
    """Put a target's row into faults.json, in place of its last one."""
    from simulations.benchmarks.fault_results import read_part, update_results

    rows = {old["target"]: old for old in read_part("fuzzing") or []} | {row["target"]: row}
    update_results("fuzzing", [rows[name] for name in targets if name in rows], command=command)


def main() -> int:
    """Fuzz what the command line names; the exit status is 1 where something crashed or hung."""
    if sys.argv[1:2] == ["--in-process"]:
        fuzz_here(sys.argv[2], sys.argv[4:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="*", choices=[*targets, []], metavar="TARGET", help=", ".join(targets))
    parser.add_argument("--executions", type=int, default=1_000_000, help="of all targets together")
    parser.add_argument("--corpus", type=Path, default=corpus_root)
    parser.add_argument("--crashes", type=Path, default=Path("fuzzing-crashes"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", action="store_true", help="keep the totals in simulations/results/faults.json")
    asked = parser.parse_args()
    rows = []
    all_shares = sum(target.share for target in targets.values())
    for name in asked.target or targets:
        executions = max(100, math.ceil(asked.executions * targets[name].share / all_shares))
        row = run_target(
            name, executions=executions, corpus=asked.corpus, crashes=asked.crashes.absolute(), seed=asked.seed
        )
        rows.append(row)
        if asked.results:
            keep_row(row, command=f"python -m tests.fuzzing --executions {asked.executions} --results")
        rate = row["executions"] / max(row["seconds"], 0.1)
        print(
            f"{name:14} {row['executions']:>10,} executions  {row['crashes']} crashes  {row['hangs']} hangs  "
            f"{row['seconds']:>7.0f} s  {rate:>7,.0f}/s",
            flush=True,
        )
    return int(any(row["crashes"] or row["hangs"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
