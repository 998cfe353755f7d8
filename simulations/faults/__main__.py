"""Play schedules of faults: ``python -m simulations.faults [--schedules 50] [--first-seed 0]``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from simulations.benchmarks.fault_results import results, update_results
from simulations.faults.player import (
    check,
    clear,
    digest_delivered,
    import_what_was_needed,
    play,
)
from simulations.faults.schedules import Schedule, draw_schedule, stage_schedules
from simulations.small_model import save_small_model
from simulations.small_runs import build_questions, write_rows


def play_all(
    schedules: Sequence[Schedule], directory: Path, *, num_jobs: int = 1, keep_failed: bool = False
) -> list[dict[str, Any]]:
    """Play schedules and return their outcomes; each is compared with a run without faults."""
    # Forked processes must not find threads that are not theirs.
    torch.set_num_threads(1)
    model = save_small_model(directory / "model")
    data = write_rows(directory / "questions.jsonl", build_questions(36))
    references: dict[str, dict[str, str]] = {}
    for aggregator in sorted({schedule.aggregator for schedule in schedules}):
        place = directory / f"whole-{aggregator}"
        whole = play(Schedule(-1, aggregator, ()), place, model=model, data=data)
        references[aggregator] = digest_delivered(place)
        if not check(whole, place, reference=references[aggregator])["correct"]:
            raise RuntimeError(f"The run without faults did not end well: {whole}, {place / 'log.txt'}")
        import_what_was_needed(place)
    jobs = []
    for job in range(num_jobs):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for schedule in schedules[job::num_jobs]:
                    place = directory / f"seed-{schedule.seed}"
                    outcome = play(schedule, place, model=model, data=data)
                    outcome = check(outcome, place, reference=references[schedule.aggregator])
                    print(format_outcome(outcome), flush=True)
                    (directory / f"outcome-{schedule.seed}.json").write_text(json.dumps(outcome))
                    if outcome["correct"] or not keep_failed:
                        clear(place)
                status = 0
            finally:
                os._exit(status)
        jobs.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in jobs]
    if any(statuses):
        raise RuntimeError(f"Not all schedules were played to their end: {statuses}.")
    return [json.loads((directory / f"outcome-{schedule.seed}.json").read_text()) for schedule in schedules]


def format_outcome(outcome: dict[str, Any]) -> str:
    """Return an outcome as a line."""
    head = f"seed {outcome['seed']:>3}  {'correct' if outcome['correct'] else 'WRONG':<8}{outcome['seconds']:>6.1f} s"
    died = f"server killed {outcome['server_killed']}, gave up {outcome['server_gave_up']}"
    return f"{head}  {outcome['aggregator']:<8}  {died}  {'; '.join(outcome['events'])}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Play, write the table and the result file; 1 where an end was not correct."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m simulations.faults", description=__doc__)
    parser.add_argument("--schedules", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--stages", action="store_true", help="in place of seeds: the server dies at each of its stages"
    )
    parser.add_argument("--jobs", type=int, default=1, help="schedules that are played at the same time")
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--keep", type=Path, help="a directory for the files of schedules that end wrongly")
    parsed = parser.parse_args(words)
    seeds = range(parsed.first_seed, parsed.first_seed + parsed.schedules)
    schedules = stage_schedules() if parsed.stages else [draw_schedule(seed) for seed in seeds]
    with tempfile.TemporaryDirectory() as temporary:
        directory = parsed.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        outcomes = play_all(schedules, directory, num_jobs=parsed.jobs, keep_failed=parsed.keep is not None)
    # Where the files go is no part of what was measured.
    what = ["--stages"] if parsed.stages else ["--schedules", parsed.schedules, "--first-seed", parsed.first_seed]
    command = shlex.join(["python", "-m", "simulations.faults", *map(str, what), "--jobs", str(parsed.jobs)])
    update_results("stages" if parsed.stages else "schedules", outcomes, command=command, path=parsed.output)
    num_correct = sum(outcome["correct"] for outcome in outcomes)
    lost, doubled = (sum(outcome[name] for outcome in outcomes) for name in ("lost_updates", "doubled_updates"))
    print(f"{num_correct} of {len(outcomes)} schedules end correctly; {lost} updates lost, {doubled} doubled")
    return int(num_correct < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
