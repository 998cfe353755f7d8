"""The rows that the cells of one task and seed share: the full model before, and after full fine-tuning."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ot_federated.cache import atomic_write_text, file_lock
from ot_federated.config import parse_run_config
from ot_federated.errors import ConfigError
from ot_federated.model_owner.evaluation import score_with_progress
from ot_federated.model_owner.owner import Owner
from ot_federated.model_owner.results import fine_tuned_full_model
from ot_federated.settings import Scalar
from ot_federated.sources import draw_rows, load_table
from simulations.benchmarks.recovery_plan import FullFineTuning, cut_prefix

# What the full model's rows depend on, besides the settings of full fine-tuning itself.
_shared_tables = ("task.", "model.", "data.", "evaluation.")
# What of these concerns the clients, or the plug-in's delivery, alone.
_other_keys = (
    "data.partitioner",
    "data.dirichlet-alpha",
    "data.partition-column",
    "evaluation.every-rounds",
    "evaluation.alphas",
    "evaluation.alpha-every-round",
    "evaluation.deliver",
)
_optimizer_keys = ("train.batch-size", "train.weight-decay", "train.warmup-fraction", "train.lr-schedule")


def shared_settings(settings: Mapping[str, Scalar], full: FullFineTuning) -> dict[str, Scalar]:
    """Return the settings of a cell on which the shared rows depend."""
    wanted = {**settings, **full.settings}
    return {
        key: value
        for key, value in wanted.items()
        if key == "seed"
        or key in (*_optimizer_keys, "train.max-grad-norm")
        or (key.startswith(_shared_tables) and key not in _other_keys)
    }


def shared_path(settings: Mapping[str, Scalar], full: FullFineTuning, *, task: str, directory: Path) -> Path:
    """Return the file of the shared rows of a cell; another one where anything they depend on is another."""
    key = json.dumps([shared_settings(settings, full), list(map(dict, full.candidates))], sort_keys=True)
    return directory / f"{task}_seed={settings['seed']}_{hashlib.sha256(key.encode()).hexdigest()[:10]}.json"


def shared_rows(
    owner: Owner,
    settings: Mapping[str, Scalar],
    full: FullFineTuning,
    *,
    task: str,
    first_seed: int,
    zero_shot: Mapping[str, Any],
    directory: Path,
) -> dict[str, Any]:
    """Return the shared rows of a cell, measured once and then read from ``directory``.

    ``zero_shot`` is the full model's row before tuning, which every run measures.

    At the task's first seed full fine-tuning is done with every candidate, and the one with the smallest loss on
    validation data is scored on test data; other seeds take that candidate.

    Returns:
        ``rows`` with ``full_zero_shot`` and ``full_fine_tuned``; ``chosen``, the candidate; ``candidates``, each with
        its ``validation_loss``; ``settings``, on which they depend; ``seconds``.
    """
    path = shared_path(settings, full, task=task, directory=directory)
    # Another process may be measuring the same rows for another cell.
    with file_lock(path.with_suffix(".lock")):
        if not path.exists():
            result = _measure(owner, settings, full, task=task, first_seed=first_seed, directory=directory)
            result["rows"] = {"full_zero_shot": dict(zero_shot), **result["rows"]}
            atomic_write_text(path, json.dumps(result, indent=1) + "\n")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _measure(
    owner: Owner,
    settings: Mapping[str, Scalar],
    full: FullFineTuning,
    *,
    task: str,
    first_seed: int,
    directory: Path,
) -> dict[str, Any]:
    """Fine-tune the full model with the candidates, and return the result without the row before it."""
    first = shared_path({**settings, "seed": first_seed}, full, task=task, directory=directory)
    candidates = [json.loads(first.read_text(encoding="utf-8"))["chosen"]] if first.exists() else full.candidates
    began = time.monotonic()
    shared = shared_settings(settings, full)
    tried: list[dict[str, Any]] = []
    best_model, chosen, smallest = owner.model, dict[str, Scalar](), math.inf
    for candidate in candidates:
        changed = {key: value for key, value in candidate.items() if key != "epochs"}
        tuned_owner = replace(owner, config=parse_run_config({**shared, **changed}))
        num_steps = int(candidate["epochs"]) * count_steps(tuned_owner)
        model = fine_tuned_full_model(tuned_owner, num_steps=num_steps)
        score = score_with_progress(owner.task, model, owner.validation, title="full fine-tuned, validation")
        tried.append({**candidate, "num_steps": num_steps, "validation_loss": score.loss})
        if score.loss < smallest:
            best_model, chosen, smallest = model, dict(candidate), score.loss
    test = score_with_progress(owner.task, best_model, owner.test, title="full fine-tuned")
    return {
        "rows": {"full_fine_tuned": test.to_dict()},
        "chosen": chosen,
        "candidates": tried,
        "seconds": round(time.monotonic() - began, 1),
        "settings": shared,
    }


def count_steps(owner: Owner) -> int:
    """Return the steps of one pass over the training data."""
    config = owner.config
    table = load_table(config.data.train, split="train", columns=list(config.columns.values()))
    drawn = draw_rows(table.num_rows, max_rows=config.data.max_train_examples, seed=config.seed)
    return math.ceil(len(owner.task.encode(table.select(drawn))) / config.train.batch_size)


def cut_set(cut: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Divide a set that has one split into train, validation and test files, the same ones every time.

    Rows are drawn, but for running text (a set of texts alone), which is not to be torn apart.

    Args:
        cut: ``source``, and how many rows each part gets.
        directory: Where the files go.

    Returns:
        The files by ``cut:train``, ``cut:validation`` and ``cut:test``.

    Raises:
        ConfigError: If the set has fewer rows.
    """
    parts = ("train", "validation", "test")
    paths = {part: directory / f"{part}-{cut[part]}.jsonl" for part in parts}
    if not all(path.exists() for path in paths.values()):
        table = load_table(str(cut["source"]), split=None)
        wanted, is_text = sum(cut[part] for part in parts), table.column_names == ["text"]
        if wanted > table.num_rows:
            raise ConfigError(f"{cut['source']!r} has {table.num_rows} rows; the cut wants {wanted}.")
        order = list(range(wanted)) if is_text else np.random.default_rng(0).permutation(table.num_rows).tolist()
        directory.mkdir(parents=True, exist_ok=True)
        for part in parts:
            rows, order = order[: cut[part]], order[cut[part] :]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table.select(rows).to_list()]
            atomic_write_text(paths[part], "".join(lines))
    return {cut_prefix + part: str(path.absolute()) for part, path in paths.items()}
