"""A real pretrained model (TinyStories, 260 000 parameters, 5 blocks): what random weights cannot show.

The model and the text lie beside the checkout where the project is developed; elsewhere these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ot_federated.bundle import Manifest, read_tensors
from ot_federated.emulated_model import load_emulated_model
from ot_federated.model_owner.full_model import load_full_model
from ot_federated.model_owner.plug_in import plug_in
from ot_federated.model_owner.preparation import prepare_bundle
from ot_federated.tasks.causal_lm import CausalLanguageModelling
from tests.federations import run_federation

shared_data = Path(__file__).parents[2] / ".." / "shared" / "data"
model_directory = (shared_data / "stories260k").resolve()
text_directory = (shared_data / "wikitext2").resolve()

pytestmark = pytest.mark.skipif(
    not (model_directory / "model.safetensors").is_file() or not (text_directory / "valid.txt").is_file(),
    reason=f"the small real model and WikiText-2 are not in {shared_data}",
)

# Ours, in the style of what the model was trained on.
story = """Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw
a big red ball under a tree. She wanted to play with it, but a small dog was sitting next to it. "Hello, dog," she said.
"Can I play with your ball?" The dog wagged his tail and gave her the ball. They played together all day. When the sun
went down, Lily said goodbye to her new friend and went home to her mom. Her mom gave her a big hug. They were happy.
Tom and his sister Sue had a toy box. In the box there was a blue car. Tom wanted the car, and Sue wanted it too. "It is
mine," said Tom. Sue was sad and started to cry. Then Tom felt bad. "I am sorry, Sue," he said. "We can share the car."
Sue smiled. They took turns and had a lot of fun. Their mom was very proud of them and gave them both a cookie."""


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_full_model(str(model_directory), dtype=torch.float32, device="cpu")


def prepare(
    loaded: tuple[Any, Any], cache: Path, *, kept: int, gaps: str = "empty", keep: str = "uniform"
) -> tuple[Path, Manifest]:
    """Split the five blocks 1-``kept``-1."""
    model, tokenizer = loaded
    settings: dict[str, Any] = {"bottom": 1, "emulator": kept, "top": 1, "keep": keep, "gaps": gaps, "ridge": 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OT_FEDERATED_CACHE", str(cache))
        return prepare_bundle(
            model,
            tokenizer,
            read_public_text=lambda: (text_directory / "valid.txt").read_text().splitlines(),
            calibration_tokens=8192,
            recipe=settings,
            say=lambda _: None,
            **settings,
        )


def perplexity(model: Any, tokenizer: Any, text: str = story) -> float:
    task = CausalLanguageModelling(tokenizer, text_column="text", max_length=256)
    score = task.score(model, [{"text": text}])
    assert score.perplexity is not None
    return score.perplexity


def test_model_knows_its_language(loaded: tuple[Any, Any]) -> None:
    # It was trained on such stories; a vocabulary of 512 at random would give 512, its own text about 4.
    model, tokenizer = loaded
    assert 2 < perplexity(model, tokenizer) < 8
    shuffled = " ".join(sorted(story.split()))
    assert perplexity(model, tokenizer, shuffled) > 3 * perplexity(model, tokenizer)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_untouched_adapter_plugs_in_bit_identically(loaded: tuple[Any, Any], tmp_path: Path, kept: int) -> None:
    model, tokenizer = loaded
    directory, manifest = prepare(loaded, tmp_path, kept=kept)
    ids = torch.tensor([tokenizer(story)["input_ids"][:200]])
    other, _ = load_full_model(str(model_directory), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        logits = model(ids).logits
        for index in (0, 4):
            for parameter in other.model.layers[index].parameters():
                parameter.zero_()
        assert not torch.equal(other(ids).logits, logits)
        plug_in(other, read_tensors(directory / "adapter.safetensors"), manifest.stack)
        assert torch.equal(other(ids).logits, logits)


def test_the_fewer_blocks_the_worse_the_emulator(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    full = perplexity(model, tokenizer)
    found = []
    for kept in (3, 2, 1, 0):
        directory, manifest = prepare(loaded, tmp_path, kept=kept)
        found.append(perplexity(load_emulated_model(directory, manifest), tokenizer))
    assert found[0] == full  # keeps all: the same numbers, bit for bit
    assert found == sorted(found)
    assert 1.05 * full < found[1]
    assert all(value < float("inf") for value in found)


@pytest.mark.parametrize("kept", [0, 1])
def test_bridges_bring_the_emulator_nearer(loaded: tuple[Any, Any], tmp_path: Path, kept: int) -> None:
    """Fitted on other text (WikiText-2), they help on stories."""
    model, tokenizer = loaded
    scores = {}
    for gaps in ("empty", "bridge"):
        directory, manifest = prepare(loaded, tmp_path, kept=kept, gaps=gaps)
        scores[gaps] = perplexity(load_emulated_model(directory, manifest), tokenizer)
    assert perplexity(model, tokenizer) < scores["bridge"] < 0.8 * scores["empty"]


def test_federation_on_real_text_improves_the_plug_in(tmp_path: Path) -> None:
    """Two data owners with WikiText-2 teach the story teller: the owner's model gains, and beats the emulator."""
    lines = [line for line in (text_directory / "valid.txt").read_text().splitlines() if len(line) > 200]
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("\n".join(lines[:160]))
    test.write_text("\n".join(lines[200:230]))
    settings = {
        "task.name": "causal-lm",
        "data.train": str(train),
        "data.validation": str(test),
        "data.test": str(test),
        "data.max-length": 128,
        "offsite.emulator-blocks": 1,
        "num-server-rounds": 2,
        "train.batch-size": 8,
        "train.learning-rate": 1e-3,
        "train.max-steps": 15,
        "evaluation.max-examples": 0,
        "strategy.shard-bytes": 262144,
    }
    federation = run_federation(tmp_path, model_directory, settings=settings)
    rows = federation.summary["rows"]
    # Far beyond the 95 % intervals: the loss falls by about one nat a token.
    assert rows["plug_in"]["loss_interval"][1] < rows["full_zero_shot"]["loss_interval"][0] - 0.2
    assert rows["plug_in"]["loss"] < rows["emulator_fine_tuned"]["loss"] < rows["emulator_zero_shot"]["loss"]
    assert federation.rounds[2]["plug_in"]["loss"] < federation.rounds[1]["plug_in"]["loss"]
