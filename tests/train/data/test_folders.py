"""Image folders: splits, classes, ignored folders and damaged files."""

import numpy as np
import pytest
from PIL import Image

from cluster.errors import UserError
from tests.train.tasks.test_pictures import saved
from train.config import validate_config
from train.data import dataset
from train.data.schema import inference


def write(folder, count, rng):
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (folder / f"{number}.png").write_bytes(saved(Image.fromarray(pixels)))


def prepared(folder, **options):
    config = validate_config({"name": "x", "data": {"train": str(folder), **options}})
    config = inference.complete_config(config).config
    return dataset.prepare_dataset(config, str(folder.parent / "runs"))


@pytest.mark.parametrize("others", [["test"], ["models"], ["test", "docs"]])
def test_other_folders_next_to_splits_are_ignored(others, tmp_path, rng, capsys):
    for label in ("cat", "dog"):
        write(tmp_path / "pets" / "train" / label, 30, rng)
    for other in others:
        write(tmp_path / "pets" / other, 5, rng)
    assert prepared(tmp_path / "pets").task.target.classes == ("cat", "dog")
    assert (
        f"Ignored because they are not splits with class folders: {', '.join(sorted(others))}."
        in " ".join(capsys.readouterr().err.split())
    )


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_error_names_a_truncated_image(share, tmp_path, rng):
    for label in ("cat", "dog"):
        write(tmp_path / "pets" / label, 30, rng)
    damaged = tmp_path / "pets" / "dog" / "7.png"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="damaged PNG file") as caught:
        prepared(tmp_path / "pets")
    assert "7.png" in str(caught.value)
    data = prepared(tmp_path / "pets", bad_records="drop")
    assert sum(split["num_records"] for split in data.summary["splits"].values()) == 59
