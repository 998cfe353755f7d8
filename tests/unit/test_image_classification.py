"""Images as data: folders, modes, sizes, labels; what is refused and how."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from ot_federated.data_owner.dataset_identity import identify_dataset
from ot_federated.errors import ConfigError, DataError, SourceError
from ot_federated.model_owner.head_start import fit_head
from ot_federated.sources import list_files, load_table
from ot_federated.tasks.base import LabelledImage
from ot_federated.tasks.image_classification import ImageClassification, convert_image
from ot_federated.tasks.labels import list_classes
from simulations.image_folders import main as unpack
from tests.families import save_image_model


def encode(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form)
    return buffer.getvalue()


@pytest.fixture
def task() -> ImageClassification:
    return ImageClassification(ViTImageProcessorPil(size={"height": 28, "width": 28}), classes=("cat", "dog"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16"])
@pytest.mark.parametrize("size", [(28, 28), (40, 7), (3, 90)])
def test_every_mode_and_size_becomes_the_models(task: ImageClassification, mode: str, size: tuple[int, int]) -> None:
    (example,) = task.encode([{"image": Image.new(mode, size), "label": "dog"}])
    assert example.label == 1
    assert example.read().shape == (3, 28, 28)


def test_what_modes_mean() -> None:
    def pixel(image: Image.Image) -> tuple[int, ...]:
        return convert_image(image, row=0).getpixel((0, 0))

    assert pixel(Image.new("RGBA", (1, 1), (255, 0, 0, 0))) == (255, 255, 255), "transparent shows white"
    assert pixel(Image.fromarray(np.full((1, 1), 65535, np.uint16))) == (255, 255, 255)
    assert pixel(Image.fromarray(np.full((1, 1), 0.5, np.float32))) == (128, 128, 128)
    assert pixel(Image.new("CMYK", (1, 1), (0, 255, 255, 0)))[0] > pixel(Image.new("CMYK", (1, 1), (0, 255, 255, 0)))[1]
    with pytest.raises(DataError, match="Row 0.*mode F.*from 0 to 1"):
        convert_image(Image.fromarray(np.full((1, 1), 300.0, np.float32)), row=0)


def test_a_strip_and_an_empty_label_are_refused(task: ImageClassification) -> None:
    task.encode([{"image": Image.new("L", (2, 100)), "label": "cat"}])
    with pytest.raises(DataError, match=r"Row 0: the image has 2 x 101 pixels.*at most 50 times"):
        task.encode([{"image": encode(Image.new("L", (2, 101))), "label": "cat"}])
    with pytest.raises(ConfigError, match=r"empty label in its column 'label'.*Label these rows"):
        list_classes(["cat", " ", "dog"], column="label")


@pytest.mark.parametrize(
    "value", [b"not an image", encode(Image.new("RGB", (9, 9)))[:20], "a.jpg", None, {"path": "x"}]
)
def test_what_is_no_image_is_refused_with_its_row(task: ImageClassification, value: object) -> None:
    good = {"image": encode(Image.new("RGB", (9, 9))), "label": "cat"}
    with pytest.raises(DataError, match="Row 1.*(image|bytes)"):
        task.encode([good, {"image": value, "label": "cat"}])


def test_a_cut_image_is_refused_when_it_is_read(task: ImageClassification) -> None:
    whole = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    (example,) = task.encode([{"image": whole[: len(whole) // 2], "label": 0}])
    with pytest.raises(DataError, match="Row 0: the image is damaged"):
        example.read()


@pytest.mark.parametrize("label", ["bird", 2, None, True])
def test_unknown_classes_are_refused_without_telling_them(task: ImageClassification, label: object) -> None:
    with pytest.raises(DataError, match="Row 0.*must be one of 0, 1, cat, dog") as caught:
        task.encode([{"image": encode(Image.new("RGB", (9, 9))), "label": label}])
    assert "bird" not in str(caught.value)


def write_folder(directory: Path, names: dict[str, int]) -> Path:
    for name, num in names.items():
        (directory / name).mkdir(parents=True)
        for index in range(num):
            (directory / name / f"{index}.png").write_bytes(encode(Image.new("L", (8, 8), 9 * index)))
    return directory


def test_a_folder_of_classes_is_a_table(tmp_path: Path) -> None:
    table = load_table(
        str(write_folder(tmp_path / "a", {"dog": 2, "cat": 1})), split="train", columns=["image", "label"]
    )
    assert table["label"][:] == ["cat", "dog", "dog"]
    write_folder(tmp_path / "b" / "train", {"cat": 1, "dog": 1})
    write_folder(tmp_path / "b" / "test", {"cat": 2, "dog": 3})
    assert load_table(str(tmp_path / "b"), split="test").num_rows == 5
    assert len(list_files(str(tmp_path / "b"))) == 2
    (tmp_path / "text").mkdir()
    with pytest.raises(SourceError, match=r"is a directory.*folder of images for each class"):
        load_table(str(tmp_path / "text"), split="train")


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class 'owl'.*has no images"):
        load_table(str(write_folder(tmp_path, {"cat": 1, "owl": 0})), split="train")


def test_a_data_set_of_images_is_known_by_content(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"cat": 2, "dog": 1})
    write_folder(tmp_path / "b", {"cat": 2, "dog": 1})
    first, second = (identify_dataset(load_table(str(tmp_path / name), split="train")) for name in "ab")
    (tmp_path / "b" / "cat" / "1.png").write_bytes(encode(Image.new("L", (8, 8), 77)))
    assert first == second
    assert identify_dataset(load_table(str(tmp_path / "b"), split="train")) != first


def test_classes_of_public_data() -> None:
    assert list_classes([10, 2, 2], column="label") == ("2", "10")
    assert list_classes(["dog", "cat"], column="label") == ("cat", "dog")
    with pytest.raises(ConfigError, match="has 1 classes"):
        list_classes(["cat"], column="label")


def test_digits_split_without_overlap() -> None:
    pytest.importorskip("sklearn")
    tables = {split: load_table("sklearn:digits", split=split) for split in ("train", "public", "validation", "test")}
    assert sum(table.num_rows for table in tables.values()) == 1797
    assert load_table("sklearn:digits:public", split="train").num_rows == 200
    assert set(tables["test"]["label"]) == set("0123456789")
    with pytest.raises(SourceError, match="no known set"):
        load_table("sklearn:iris", split="train")


def test_a_head_is_fitted_to_labels(tmp_path: Path) -> None:
    from ot_federated.model_owner.full_model import load_full_model
    from ot_federated.tasks.classification_model import score_classes

    model, _ = load_full_model(
        str(save_image_model(tmp_path / "vit")), dtype=torch.float32, device="cpu", reads="image", classes=("a", "b")
    )
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(3, 28, 28, generator=generator) for _ in range(24)]
    examples = [
        LabelledImage(lambda pixels=pixels, index=index: pixels + 3 * (index % 2), index % 2)
        for index, pixels in enumerate(noise)
    ]
    fit_head(model, examples, classes=("a", "b"))
    score = score_classes(model, examples, batch_size=8)
    assert score.accuracy == 1.0
    assert score.loss < 0.3
    with pytest.raises(DataError, match="no example of c"):
        fit_head(model, examples, classes=("a", "b", "c"))


def test_archives_become_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tarfile

    write_folder(tmp_path / "images", {"cat": 5, "dog": 6})
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "images", arcname=".")
    arguments = [str(tmp_path / "all.tar.gz")] * 2 + ["--output-dir", str(tmp_path / "out")]
    assert unpack([*arguments, "--num-public", "1", "--num-validation", "2"]) == 0
    counts = {
        part: load_table(str(tmp_path / "out" / part), split=None).num_rows for part in ("train", "public", "test")
    }
    assert counts == {"train": 5, "public": 2, "test": 11}
    assert unpack([*arguments, "--num-public", "9"]) == 1
    assert "too few" in capsys.readouterr().err
