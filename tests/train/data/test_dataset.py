"""Sample order, augmentation, splits and encoded shards, against numpy and Pillow."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.errors import UserError
from tests.conftest import make_config
from tests.train.tasks.test_tasks import image_bytes
from train.config import Augment, Stage
from train.data import batch_sampler, dataset, splits
from train.data.augment import WHOLE, Augmentation
from train.data.reading import sources


@pytest.mark.parametrize(("num_samples", "batch_size"), [(1, 64), (63, 64), (1000, 64), (97, 10)])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3])
def test_every_sample_is_seen_once_per_epoch(num_samples, batch_size, num_micro_batches):
    seen = [
        sample
        for batch in batch_sampler.epoch_batches(7, 3, num_samples, batch_size)
        for micro_batch in batch_sampler.split_micro_batches(batch, num_micro_batches)
        for sample in micro_batch
    ]
    assert sorted(seen) == list(range(num_samples))


def test_batches_differ_by_at_most_one_sample():
    sizes = {len(batch) for batch in batch_sampler.epoch_batches(0, 0, 1290, 64)}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) == batch_sampler.smallest_batch(1290, 64)
    assert abs(max(sizes) - 64) <= 1


def test_the_order_depends_on_seed_and_epoch_alone():
    def first(seed, epoch):
        return batch_sampler.epoch_batches(seed, epoch, 100, 10)[0].tolist()

    assert first(1, 2) == first(1, 2)
    assert first(1, 2) != first(1, 3)
    assert first(1, 2) != first(2, 2)


def shifted(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Return the image shifted with numpy's reflection padding."""
    reach = max(abs(dy), abs(dx), 1)
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    height, width = image.shape[:2]
    return padded[reach + dy : reach + dy + height, reach + dx : reach + dx + width]


def test_shift_and_flip_agree_with_numpy(rng):
    images = rng.integers(0, 256, (20, 7, 6, 3), dtype=np.uint8)
    augmentation = Augmentation(Augment(flip=True, translate=2), seed=5, num_samples=20)
    augmentation.start_epoch(0)
    ids = np.arange(20)
    varied = augmentation.apply(torch.from_numpy(images), ids).numpy()
    candidates = {
        (dy, dx, mirrored): np.stack(
            [shifted(image[:, ::-1] if mirrored else image, dy, dx) for image in images]
        )
        for dy in range(-2, 3)
        for dx in range(-2, 3)
        for mirrored in (False, True)
    }
    kinds = [
        {key for key, images_ in candidates.items() if np.array_equal(images_[i], varied[i])}
        for i in range(20)
    ]
    assert all(kinds), "each image is one of the 50 possible variations of itself"
    assert len(set.union(*kinds)) > 10


def test_a_crop_is_a_window_of_the_shifted_image(rng):
    images = rng.integers(0, 256, (40, 8, 12, 3), dtype=np.uint8)
    stage = Stage(crop=0.5)
    cropped = varied(Augment(translate=1, stages=[stage]), images, stage=stage)
    assert cropped.shape == (40, 4, 6, 3)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    places = [
        [
            (y, x)
            for y in range(7)
            for x in range(9)
            if np.array_equal(padded[i, y : y + 4, x : x + 6], cropped[i])
        ]
        for i in range(40)
    ]
    assert all(places)
    assert len({place for (place,) in places}) > 20


def test_a_shrunk_image_matches_pillow(rng):
    images = rng.integers(0, 256, (5, 32, 20, 3), dtype=np.uint8)
    stage = Stage(scale=0.75)
    shrunk = varied(Augment(stages=[stage]), images, stage=stage)
    for image, small in zip(images, shrunk, strict=True):
        expected = Image.fromarray(image).resize((15, 24), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(small.astype(int), np.asarray(expected, dtype=int), atol=1)


def test_augmentation_stages_cover_the_whole_run():
    augment = Augment(stages=[{"until": 0.25, "scale": 0.5}, {"until": 1.0}])
    augmentation = Augmentation(augment, seed=0, num_samples=4)
    scales = [augmentation.stage(step / 8).scale for step in range(8)]
    assert scales == [0.5, 0.5, 1, 1, 1, 1, 1, 1]
    for ends in ([0.5], [0.5, 0.25, 1], [1, 1]):
        with pytest.raises(UserError, match=r"augment\.stages.*the last must be 1"):
            make_config(augment={"stages": [{"until": end} for end in ends]})


def test_two_epochs_show_both_sides_of_every_image(rng):
    images = torch.from_numpy(rng.integers(0, 256, (20, 4, 4, 1), dtype=np.uint8))
    augmentation = Augmentation(Augment(flip=True), seed=5, num_samples=20)
    ids = np.arange(20)
    sides = []
    for epoch in (0, 1):
        augmentation.start_epoch(epoch)
        sides.append(augmentation.apply(images, ids))
    np.testing.assert_array_equal(sides[0].numpy(), sides[1].numpy()[:, :, ::-1])


def test_shift_and_flip_do_not_depend_on_the_batch(rng):
    images = torch.from_numpy(rng.integers(0, 256, (20, 6, 6, 3), dtype=np.uint8))
    augmentation = Augmentation(Augment(flip=True, translate=2), seed=5, num_samples=20)
    augmentation.start_epoch(4)
    whole = augmentation.apply(images, np.arange(20))
    some = np.array([3, 17, 5])
    torch.testing.assert_close(augmentation.apply(images[some], some), whole[some])


def varied(config, images, ids=None, stage=WHOLE):
    augmentation = Augmentation(config, seed=5, num_samples=len(images))
    augmentation.start_epoch(1)
    ids = np.arange(len(images)) if ids is None else ids
    return augmentation.apply(torch.from_numpy(images)[ids], ids, stage).numpy()


def test_cutout_greys_one_square_of_each_image(rng):
    images = rng.integers(200, 256, (30, 9, 8, 3), dtype=np.uint8)
    places = set()
    for before, after in zip(images, varied(Augment(cutout=3), images), strict=True):
        changed = (before != after).any(axis=2)
        rows, columns = np.nonzero(changed)
        assert changed.sum() == 9
        assert np.ptp(rows) == np.ptp(columns) == 2
        assert set(after[changed].ravel()) == {127}
        places.add((rows.min(), columns.min()))
    assert len(places) > 5


def test_a_zoom_shows_a_part_of_the_image():
    """A zoomed linear gradient is a linear gradient again, which shows the edges of the crop."""
    slope = np.linspace(0, 255, 32).astype(np.uint8)
    images = np.broadcast_to(slope[None, None, :, None], (40, 32, 32, 1)).copy()
    zoomed = varied(Augment(crop_area=0.5), images)[..., 0]
    spans = (zoomed[:, 16, -2] - zoomed[:, 16, 1]) / (slope[-2].astype(float) - slope[1])
    assert spans.min() ** 2 * 4 / 3 > 0.5 * 3 / 4
    assert spans.max() <= 1.02
    assert spans.std() > 0.02
    np.testing.assert_allclose(zoomed, np.broadcast_to(zoomed[:, :1], zoomed.shape), atol=1e-3)


@pytest.mark.parametrize("config", [Augment(crop_area=0.5), Augment(cutout=3)])
def test_zoom_and_cutout_do_not_depend_on_the_batch(config, rng):
    images = rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    some = np.array([3, 17, 5])
    np.testing.assert_allclose(
        varied(config, images, some), varied(config, images)[some], atol=1e-4
    )


def test_mixup_is_the_weighted_sum_of_its_pairs(rng):
    images = torch.from_numpy(rng.integers(0, 256, (16, 4, 4, 1), dtype=np.uint8))
    targets = torch.arange(16)
    mixed = Augmentation(Augment(mixup=1.0), 5, 16).mix([images], targets, key=3)
    assert 0 < mixed.share < 1
    expected = mixed.share * images + (1 - mixed.share) * images[mixed.others_B]
    torch.testing.assert_close(mixed.inputs[0], expected)
    assert sorted(mixed.others_B.tolist()) == list(range(16))


def test_cutmix_pastes_a_box_and_weighs_labels_by_its_area(rng):
    images = torch.arange(16, dtype=torch.uint8)[:, None, None, None].expand(16, 10, 12, 1).clone()
    augmentation = Augmentation(Augment(cutmix=1.0), 5, 16)
    shares = set()
    for key in range(20):
        mixed = augmentation.mix([images], torch.arange(16), key)
        for image, target, other in zip(
            mixed.inputs[0], mixed.targets_B, mixed.others_B, strict=True
        ):
            if target != other:
                assert float((image == target).float().mean()) == pytest.approx(mixed.share)
                assert set(image.unique().tolist()) <= {int(target), int(other)}
        shares.add(mixed.share)
    assert len(shares) > 10


def assigned(url: str, scratch: Path, **data: object) -> splits.SplitSource:
    """Return the training source and the split of each of its rows."""
    blocks = sources.open_source(sources.find_source(url), str(scratch))
    config = make_config(data={"train": url, **data}).data
    columns = ["image", "label"]
    return splits.assign_splits(config, {"train": blocks}, columns, class_column="label")[0]


def test_splits_cover_all_records_in_the_requested_shares(tmp_path):
    """Each share is within 4 standard deviations of the requested one."""
    counts = np.bincount(assigned("sklearn:digits", tmp_path).codes_N)
    assert counts.sum() == 1797
    shares = np.array([0.7, 0.1, 0.2])
    assert np.all(np.abs(counts - 1797 * shares) < 4 * np.sqrt(1797 * shares * (1 - shares)))


def test_shards_contain_the_encoded_records(digits, tmp_path):
    part = assigned("sklearn:digits", tmp_path)
    columns: dict[str, list] = {"image": [], "label": []}
    for batch in part.blocks[0].read(list(columns)):
        for name, values in sources.batch_columns(batch).items():
            columns[name] += list(values)
    for code, name in enumerate(splits.NAMES):
        inputs, targets = digits.open(name)
        rows = np.flatnonzero(part.codes_N == code)
        chosen = {key: [values[row] for row in rows] for key, values in columns.items()}
        expected, expected_targets = digits.task.encode(chosen)
        np.testing.assert_array_equal(inputs["image"], expected["image"])
        np.testing.assert_array_equal(targets, expected_targets)


def test_shards_are_written_once(config, digits, monkeypatch):
    monkeypatch.setattr(dataset, "_write", lambda *_: pytest.fail("written again"))
    assert dataset.prepare_dataset(config, config.storage.path) == digits


def images(count: int, rng: np.random.Generator) -> list[bytes]:
    return [image_bytes(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(count)]


def test_parquet_image_structs_and_class_names_are_read(write_parquet, rng, tmp_path):
    records = [
        {"img": {"bytes": data, "path": None}, "label": name}
        for data, name in zip(images(30, rng), ["cat", "dog", "emu"] * 10, strict=True)
    ]
    url = write_parquet(records)
    config = make_config(data={"train": url}, features={"img": "image"})
    prepared = dataset.prepare_dataset(config, str(tmp_path))
    assert prepared.task.target.to_dict()["classes"] == ["cat", "dog", "emu"]
    counts = [split["num_records"] for split in prepared.summary["splits"].values()]
    assert sum(counts) == 30
    assert min(counts) >= 3  # one of each class


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], ["no records"]),
        ([{"image": b"", "other": 1}], ["no column 'label'", "'image', 'other'"]),
        ([{"image": b"", "label": 1}], ["1 records", "at least 2"]),
        ("one class", ["only the value ['0']"]),
        ("damaged", ["row 17", "not a PNG, JPEG"]),
        ("unlabelled", ["row ", "missing"]),
    ],
)
def test_errors_name_the_source_and_row_of_bad_data(write_parquet, rng, tmp_path, records, words):
    if isinstance(records, str):
        rows = [{"image": data, "label": i % 2} for i, data in enumerate(images(30, rng))]
        if records == "one class":
            rows = [{**row, "label": 0} for row in rows]
        elif records == "damaged":
            rows[17]["image"] = b"no image"
        else:
            rows = [{**row, "label": None} for row in rows]
        records = rows
    url = write_parquet(records)
    with pytest.raises(UserError) as caught:
        dataset.prepare_dataset(make_config(data={"train": url}), str(tmp_path / "runs"))
    message = str(caught.value)
    assert "\n" not in message
    for word in (url, *words):
        assert word in message
    written = tmp_path / "runs" / "data"
    assert not written.exists() or not any(written.iterdir()), "no partly written data is left"


def test_a_label_of_signs_and_digits_is_a_name(write_parquet, rng, tmp_path):
    rows = [{"image": data, "label": ["--5", "a"][i % 2]} for i, data in enumerate(images(30, rng))]
    prepared = dataset.prepare_dataset(
        make_config(data={"train": write_parquet(rows)}), str(tmp_path)
    )
    assert prepared.task.target.to_dict()["classes"] == ["--5", "a"]


def test_the_error_names_the_row_of_an_unreadable_first_image(write_parquet, rng, tmp_path):
    rows = [{"image": data, "label": i % 2} for i, data in enumerate(images(30, rng))]
    part = assigned(write_parquet(rows), tmp_path)
    first = int(np.flatnonzero(part.codes_N == splits.TRAIN)[0])
    rows[first]["image"] = b"?"
    config = make_config(data={"train": write_parquet(rows)})
    with pytest.raises(UserError, match=f"row {first}: .*not a PNG, JPEG"):
        dataset.prepare_dataset(config, str(tmp_path))


def test_the_error_names_a_class_unseen_in_training(write_parquet, rng, tmp_path):
    rows = [{"image": data, "label": i % 2} for i, data in enumerate(images(30, rng))]
    test = write_parquet([*rows[:4], {**rows[4], "label": 7}], "test.parquet")
    config = make_config(data={"train": write_parquet(rows), "test": test})
    with pytest.raises(UserError, match=r"test\.parquet', row 4: .*'7'.*known are 0, 1"):
        dataset.prepare_dataset(config, str(tmp_path))


@pytest.mark.parametrize("name", ["missing.parquet", "nosuch://bucket/data.parquet"])
def test_the_error_names_a_missing_source(name, tmp_path):
    with pytest.raises(UserError, match=name.split(":")[0]):
        dataset.prepare_dataset(make_config(data={"train": name}), str(tmp_path))


def test_the_error_names_a_file_that_is_not_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"data\.parquet' cannot be read: Parquet"):
        dataset.prepare_dataset(make_config(data={"train": str(path)}), str(tmp_path))
