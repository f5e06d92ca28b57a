"""Datasets: which objects and views they give, batches of them, and their order."""

import csv
import json
import shutil
import traceback
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.camera import Camera
from tests.helpers.datasets import (
    AA,
    BB,
    CC,
    CHANNELS,
    DD,
    EE,
    RES,
    make,
    opened,
    view_number,
    write_metadata,
)
from train.data.batch import Batch, collate
from train.data.dataset import EMBEDDED, EMBEDDED_32, Dataset, embedded
from train.data.loader import loader
from train.data.sampler import Sampler


def metadata(root):
    with (root / "metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_objects_of_other_channels_name_both_files(tmp_path):
    root = make(tmp_path)
    file = root / "features" / f"rgb_{RES}" / f"{BB}.npz"
    with np.load(file) as content:
        arrays = dict(content)
    np.savez(file, indices=arrays["indices"], patchtokens=arrays["patchtokens"][:, :4])
    data = opened(root)
    data.item(CC)
    with pytest.raises(
        ValueError, match=rf"bb.npz has 4 feature channels, but .*aa.npz has {CHANNELS}"
    ):
        data.item(BB)


def test_random_views_depend_on_seed_draw_and_object_and_never_touch_held_out_ones(tmp_path):
    root = make(tmp_path)
    data = opened(root, holdout_views=2)
    drawn = [view_number(data[0, draw].image[0]) for draw in range(40)]
    assert set(drawn) == {0, 1, 2}
    state = torch.get_rng_state()
    assert drawn == [
        view_number(opened(root, holdout_views=2)[0, draw].image[0]) for draw in range(40)
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert drawn != [
        view_number(opened(root, holdout_views=2, seed=1)[0, draw].image[0]) for draw in range(40)
    ]
    assert drawn != [view_number(data[1, draw].image[0]) for draw in range(40)]
    held = opened(root, holdout_views=2, views="holdout")
    assert {view_number(held[0, draw].image[0]) for draw in range(40)} == {3, 4}
    assert [view_number(image) for image in held.item(AA).image] == [3, 4]
    assert view_number(held.item(0, [1]).image[0]) == 4
    for draw in range(10):
        two = opened(root, num_views=2)[2, draw]
        assert (
            len(two.image) == len(two.camera) == 2
            and len({view_number(image) for image in two.image}) == 2
        )
    with pytest.raises(ValueError, match=r"aa.transforms.json: 3 train views, 4 wanted"):
        opened(root, holdout_views=2, num_views=4)[0]


def test_filters_count_what_they_leave_out(tmp_path):
    names = [str(i) * 64 for i in range(8)]
    root = make(
        tmp_path,
        names,
        aesthetic_score=["4.5", "", "4.49", "nan", "6", "6", "6", "6"],
        rendered=["True", "", "True", "True", "False", "True", "True", "True"],
        split=["", "train", "train", "train", "train", "test", "train", "train"],
    )
    rows = metadata(root)
    rows[6][f"feature_rgb_{RES}"] = ""
    write_metadata(root, rows)
    data = opened(root, max_voxels=14)  # object i has 9 + i
    assert data.names == [names[i] for i in (0, 1, 3)]
    reasons = (
        "of aesthetic score below 4.5",
        "without views",
        "of another split",
        "without features",
        "over 14 voxels",
    )
    assert data.skipped == dict.fromkeys(reasons, 1)
    assert data.summary().startswith("3 of 8 objects (") and data.summary().endswith(f") in {root}")
    assert all(f"1 {reason}" in data.summary() for reason in reasons)
    assert (
        opened(root, split="test").names == names[5:6]
        and names[5] in opened(root, split=None).names
    )
    with pytest.raises(
        ValueError, match="no object is left: 0 of 8 objects .*of aesthetic score below 9"
    ):
        opened(root, min_aesthetic=9.0, split="test")


def test_without_optional_columns_everything_is_a_training_object(tmp_path):
    root = make(tmp_path)
    write_metadata(root, [{"sha256": name, f"feature_rgb_{RES}": "1"} for name in (AA, BB)])
    assert opened(root).names == [AA, BB] and len(opened(root)[1].coords) == 10
    assert len(opened(root, split="test", required=False)) == 0
    with pytest.raises(ValueError, match=r"bb.npz has 10 voxels, over the limit of 9"):
        opened(root, max_voxels=9)[1]


def test_several_folders_and_the_layout_of_64(tmp_path):
    one, two = make(tmp_path / "one", [AA, BB]), make(tmp_path / "two", [BB, DD])
    data = opened(one, two)
    assert (
        data.names == [AA, BB, DD]
        and data.skipped == {"listed twice": 1}
        and len(data.item(DD).coords) == 10
    )
    three = make(tmp_path / "three", [EE], resolution=64)
    (three / "features" / "rgb_64").rename(three / "features" / "rgb")
    write_metadata(three, [{"sha256": EE, "feature_rgb": "True", "num_voxels": "9.0"}])
    assert (
        len(opened(three, resolution=64)[0].coords) == 9
        and opened(three, resolution=64).channels == CHANNELS
    )


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="absent is not a folder"):
        opened(tmp_path / "absent")
    with pytest.raises(ValueError, match="lists 5 frames: 5 held-out views leave none"):
        opened(make(tmp_path), holdout_views=5)[0]
    with pytest.raises(ValueError, match="holdout_views 0 at least 1"):
        opened(tmp_path, views="holdout")


def record_holdout(root, name, value):
    file = root / "renders" / name / "transforms.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"holdout": value}))


def test_no_more_views_are_held_out_than_the_features_never_saw(tmp_path):
    root = make(tmp_path / "one")
    other = make(tmp_path / "two", [DD, EE])
    # the published layout does not say what features saw
    assert len(opened(root, holdout_views=4)) == 3
    for name in (AA, BB):
        record_holdout(root, name, 2)
    assert len(opened(root, holdout_views=2, views="holdout").item(AA).image) == 2
    assert len(opened(root, holdout_views=1).item(AA).image) == 4
    message = (
        r"aa.transforms.json: 3 held-out views, but its rgb features were made without "
        r"only 2 of 5 frames: use .* 2 or"
    )
    for views in ("train", "holdout"):
        with pytest.raises(ValueError, match=message):
            opened(root, holdout_views=3, views=views)
    shutil.copytree(root / "features" / f"rgb_{RES}", root / "features" / f"dino_{RES}")
    rows = [{"sha256": AA, f"feature_dino_{RES}": "True", f"feature_rgb_{RES}": "True"}]
    write_metadata(root, rows)
    assert opened(root, features="dino", holdout_views=2).names == [AA]
    with pytest.raises(ValueError, match=message.replace("rgb", "dino")):
        opened(root, features="dino", holdout_views=3)
    write_metadata(root, rows + [rows[0] | {"sha256": BB}])
    record_holdout(root, BB, 1)
    data = opened(root, holdout_views=2)
    with pytest.raises(
        ValueError, match="bb.transforms.json: 2 held-out views, but .* only 1 of 5 frames"
    ):
        data[1]
    record_holdout(other, DD, 0)
    with pytest.raises(
        ValueError,
        match="dd.transforms.json: .* only 0 of 5 .* prepare it again with train.prepare",
    ):
        opened(root, other, holdout_views=2)
    for value in (-1, 6, True, "2", 1.0):
        record_holdout(other, DD, value)
        with pytest.raises(
            ValueError,
            match=rf"dd.transforms.json: holdout {value!r} is not a number of its 5 frames",
        ):
            opened(other)


def test_collate_adds_the_batch_column_and_keeps_views_with_their_objects(tmp_path):
    data = opened(make(tmp_path), num_views=2)
    items = [data[i] for i in (2, 0)]
    batch = collate(items)
    assert batch.names == [CC, AA] and batch.batch_size == 2 and batch.view_scene == [0, 0, 1, 1]
    assert batch.coords.dtype == torch.int32 and batch.coords[:, 0].tolist() == [0] * 11 + [1] * 9
    assert torch.equal(batch.coords[11:, 1:], items[1].coords) and torch.equal(
        batch.features[:11], items[0].features
    )
    assert torch.equal(batch.image[2:], items[1].image)
    assert torch.equal(batch.camera.extrinsics[2:], items[1].camera.extrinsics)
    moved = batch.to("meta")
    tensors = (
        moved.features,
        moved.coords,
        moved.image,
        moved.camera.extrinsics,
        moved.camera.intrinsics,
    )
    assert {t.device.type for t in tensors} == {"meta"}
    assert moved.view_scene == batch.view_scene
    with pytest.raises(
        ValueError,
        match=r"\[N, 4\], not \[20, 3\] \(the batch column is missing: .*pad\(coords, \(1, 0\)",
    ):
        replace(batch, coords=batch.coords[:, 1:])
    with pytest.raises(ValueError, match="object c{64} has 6 channels, but a{64} has 5"):
        collate([items[0], replace(items[1], features=items[1].features[:, :5])])
    with pytest.raises(ValueError, match="at least one object"):
        collate([])


def take(sampler, count):
    stream = iter(sampler)
    return [next(stream) for _ in range(count)]


def test_every_epoch_takes_every_object_once_in_a_new_order():
    keys = [key for batch in take(Sampler(10, 4, seed=3), 5) for key in batch]
    epochs = [[i for i, epoch in keys if epoch == e] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]
    assert keys != [key for batch in take(Sampler(10, 4, seed=4), 5) for key in batch]
    small = take(Sampler(3, 8), 2)  # fewer objects than the batch takes: several epochs in a step
    assert [len(batch) for batch in small] == [8, 8] and len(set(small[0] + small[1])) == 16


def test_ranks_share_no_object_and_together_take_what_one_rank_takes():
    alone = take(Sampler(24, 12, seed=1), 4)
    ranks = [take(Sampler(24, 12, seed=1, rank=r, world=3, micro_batch=2), 8) for r in range(3)]
    for step, whole in enumerate(alone):
        shares = [ranks[r][2 * step] + ranks[r][2 * step + 1] for r in range(3)]
        assert (
            [len(share) for share in shares] == [4, 4, 4]
            and sum(shares, []) == whole
            and len(set(whole)) == 12
        )


def test_the_order_resumes_exactly():
    whole, first, second = Sampler(7, 4, seed=5), Sampler(7, 4, seed=5), Sampler(7, 4, seed=5)
    expected, begun = take(whole, 9), take(first, 4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + take(second, 5) == expected
    # the loader had fetched two steps ahead of training
    second.load_state_dict(first.state_dict(step=2))
    assert take(second, 3) == expected[2:5]
    for name, value in (("length", 8), ("batch_size", 8), ("seed", 6)):
        what = "number of objects" if name == "length" else name
        with pytest.raises(ValueError, match=rf"{what} \d is not the saved order's {value}"):
            first.load_state_dict(first.state_dict() | {name: value})


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(length=0, batch_size=4), "from 0 objects"),
        (dict(length=9, batch_size=4, world=3), "batch_size 4 is not a multiple of 3 ranks"),
        (
            dict(length=9, batch_size=6, micro_batch=4),
            "6 objects of a step are not a multiple of micro_batch 4",
        ),
    ],
)
def test_sampler_names_sizes_that_do_not_divide(sizes, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**sizes)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 about fork
def test_workers_read_the_same_batches_and_name_what_is_broken(tmp_path):
    root = make(tmp_path)
    state = torch.get_rng_state()
    here, there = (iter(loader(opened(root), Sampler(3, 2), workers)) for workers in (0, 2))
    for _ in range(3):
        a, b = next(here), next(there)
        assert isinstance(b, Batch) and a.names == b.names and a.view_scene == b.view_scene
        assert all(
            torch.equal(getattr(a, name), getattr(b, name))
            for name in ("coords", "features", "image")
        )
    assert torch.equal(state, torch.get_rng_state())
    (root / "renders" / BB / "transforms.json").unlink()
    broken = iter(loader(opened(root), Sampler(3, 3), 1))
    with pytest.raises(ValueError, match=r"renders.b{64}.transforms.json is missing") as caught:
        next(broken)
    # they hold the workers, which the garbage collector takes five seconds each to end
    traceback.clear_frames(caught.tb)
    del caught


def test_the_cache_reads_each_file_once_and_changes_nothing(tmp_path):
    root = make(tmp_path)
    plain = opened(root)
    cached = opened(root, cache=True)
    before = [(plain.item(i), cached.item(i)) for i in range(3)]
    for path in (root / "renders").rglob("*.png"):
        path.unlink()
    for i, (a, b) in enumerate(before):
        again = cached.item(i)
        assert (
            torch.equal(a.image, b.image)
            and torch.equal(a.image, again.image)
            and torch.equal(a.features, again.features)
        )
        again.image.zero_(), again.features.zero_()  # what a caller does to an item stays his
        assert torch.equal(cached.item(i).image, a.image) and torch.equal(
            cached.item(i).features, a.features
        )
    with pytest.raises(ValueError, match="is missing"):
        plain.item(0)


# resolution, folder, objects to train on, views to train on
EVERY = [(16, EMBEDDED, 20, 16), (32, EMBEDDED_32, 81, 12)]


@pytest.mark.parametrize("resolution, root, count, views", EVERY)
def test_the_embedded_objects(resolution, root, count, views):
    assert embedded(resolution) == root
    options = dict(resolution=resolution, features="rgb", image_size=128, holdout_views=4)
    train, test, every = (
        Dataset([root], **options, split=split) for split in ("train", "test", None)
    )
    assert (len(train), len(test), len(every)) == (count, 4, count + 4)
    assert not set(train.names) & set(test.names)
    assert train.channels == 50
    held = Dataset([root], **options, split=None, views="holdout")
    for name in every.names[:: count // 20]:
        item = every.item(name)
        assert len(item.image) == views and len(held.item(name).image) == 4
        assert isinstance(item.camera, Camera)
        turn = item.camera.extrinsics[:, :3, :3]
        distance = (-turn.mT @ item.camera.extrinsics[:, :3, 3:])[..., 0].norm(dim=1)
        torch.testing.assert_close(distance, torch.full((views,), 2.0))
        coverage = item.image[:, 3].mean((1, 2))
        assert coverage.max() > 0.01 and coverage.min() < 0.9
    lines = (EMBEDDED.parent / "eval_ids.txt").read_text().splitlines()
    forbidden = {line for line in lines if line and not line.startswith("#")}
    models = {row["local_path"] for row in metadata(root)}
    assert len(forbidden) == 40 and len(models) == count + 4 and not models & forbidden


def test_both_embedded_sets_hold_out_the_same_objects_and_name_all_creators():
    held = []
    for root in (EMBEDDED, EMBEDDED_32):
        rows = metadata(root)
        held.append({row["local_path"] for row in rows if row["split"] == "test"})
        credit = (root / "ATTRIBUTION.md").read_text()
        assert all(f"`{row['local_path'].split('/')[-1]}`" in credit for row in rows)
    assert held[0] == held[1]
    chosen = (EMBEDDED.parent / "learning_models.txt").read_text().splitlines()
    to_train = {line.split("\t")[0] for line in chosen if "\ttrain\t" in line}
    trained = {row["local_path"] for row in metadata(EMBEDDED_32) if row["split"] == "train"}
    assert trained <= to_train
