"""Text that a model's vocabulary does not hold: an error before anything is trained, at both parties."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ot_federated.errors import DataError, OtFederatedError
from ot_federated.tasks.base import Example, LabelledImage
from ot_federated.tasks.vocabulary import check_vocabulary
from tests.families import build_family_model
from tests.federations import run_federation


def test_tokens_without_an_embedding_and_unknown_text_are_refused() -> None:
    model = build_family_model("llama")
    size = model.get_input_embeddings().weight.shape[0]
    fits, too_large = Example((1, 2, size - 1), 1), Example((1, size), 1)
    check_vocabulary([fits], model, what="data", unknown=None)
    check_vocabulary([LabelledImage(lambda: pytest.fail("an image was read"), 0)], model, what="data")
    check_vocabulary([], model, what="data")
    with pytest.raises(DataError, match=f"gives data the token {size}.*vocabulary has {size}.*another model's"):
        check_vocabulary([fits, too_large], model, what="data")
    check_vocabulary([Example((3, 3, 1, 2), 1)], model, what="data", unknown=3)
    with pytest.raises(DataError, match=r"4 tokens 3 are unknown"):
        check_vocabulary([Example((3, 3, 1, 3), 1)], model, what="data", unknown=3)


def test_a_run_with_another_models_tokenizer_ends_before_it_begins(llama_directory: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_directory)
    model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(llama_directory).save_pretrained(tmp_path / "small")
    settings = {"offsite.keep": "uniform", "offsite.gaps": "empty"}  # no public text is read
    with pytest.raises(OtFederatedError, match=r"data\.validation the token \d+, and the model's vocabulary has 40"):
        run_federation(tmp_path / "run", tmp_path / "small", settings=settings)
