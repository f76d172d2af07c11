"""Folders of class folders: which images train, how they are cut, and every way to be wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dcx_kernels.data import ImageData, load, train_loader
from dcx_kernels.data.augment import augment_batch
from dcx_kernels.errors import DataError

pytest.importorskip("torchvision")


def write(path: Path, width: int = 24, height: int = 20, seed: int = 0) -> Any:
    """Write one noisy image; return it."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(noise)
    image.save(path)
    return image


def write_tree(folder: Path, second: str = "val") -> None:
    for index, name in enumerate(["train/bee", "train/ant", f"{second}/ant", f"{second}/bee"]):
        for number in range(3):
            write(folder / name / f"{number}.png", seed=10 * index + number)


@pytest.mark.parametrize("second", ["val", "test"])
def test_train_and_val_folders_are_the_splits(tmp_path: Path, second: str) -> None:
    write_tree(tmp_path, second)
    data = load(f"folder:{tmp_path}", image_size=8)
    assert data.classes == ("ant", "bee")  # sorted, whatever the file system says
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.image_shape == (3, 8, 8) and data.augment == "resized-crop-flip"
    with Image.open(tmp_path / "train" / "bee" / "1.png") as image:
        fitted = ImageOps.fit(image, (8, 8), Image.Resampling.BILINEAR)
    assert torch.equal(data.train_images[4], torch.from_numpy(np.array(fitted)).permute(2, 0, 1))


def test_the_centre_is_cut_out(tmp_path: Path) -> None:
    """30x10 pixels, red, green and blue thirds: the central square is green."""
    stripes = np.zeros((10, 30, 3), np.uint8)
    for third in range(3):
        stripes[:, 10 * third : 10 * third + 10, third] = 200
    for name in ("a/0.png", "a/1.png"):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(stripes).save(tmp_path / name)
    image = load(f"folder:{tmp_path}", image_size=10).train_images[0]
    assert image[1].eq(200).all() and not image[0].any() and not image[2].any()


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    write_tree(tmp_path)
    Image.new("L", (24, 20), 77).save(tmp_path / "train" / "ant" / "0.png")
    Image.new("RGBA", (24, 20), (1, 2, 3, 200)).save(tmp_path / "train" / "ant" / "1.png")
    images = load(f"folder:{tmp_path}", image_size=4).train_images
    assert images[0].eq(77).all() and images[1, :, 0, 0].tolist() == [1, 2, 3]


def test_class_folders_alone_hold_a_fifth_of_each_class_out(tmp_path: Path) -> None:
    for name, count in (("ant", 10), ("bee", 3)):
        for number in range(count):
            write(tmp_path / name / f"{number:02}.png", seed=number + 100 * count)
    data = load(f"folder:{tmp_path}", image_size=8)
    assert data.train_labels.bincount().tolist() == [8, 2]
    assert data.test_labels.bincount().tolist() == [2, 1]
    everything = torch.cat([data.train_images, data.test_images]).flatten(1)
    assert len(everything.unique(dim=0)) == 13
    again = load(f"folder:{tmp_path}", image_size=8)
    assert torch.equal(data.test_images, again.test_images)
    others = [load(f"folder:{tmp_path}", image_size=8, seed=s).test_images for s in range(1, 4)]
    assert any(not torch.equal(data.test_images, other) for other in others)


def test_own_size_is_kept_if_it_is_one(tmp_path: Path) -> None:
    write_tree(tmp_path)
    assert load(f"folder:{tmp_path}", image_size=None).image_shape == (3, 20, 24)
    write(tmp_path / "val" / "bee" / "2.png", width=25)
    with pytest.raises(DataError, match=r"bee/2.png: expected 24x20 pixels as in .*, got 25x20"):
        load(f"folder:{tmp_path}", image_size=None)


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(DataError, match=message):
            load(f"folder:{folder}")

    refused(tmp_path / "none", "none: expected a folder of class folders, got no folder")
    refused(tmp_path, "expected class folders with image files")
    write(tmp_path / "a" / "train" / "x" / "0.png")
    refused(tmp_path / "a", "expected a folder 'val' or 'test' beside 'train', got neither")
    (tmp_path / "a" / "val" / "y").mkdir(parents=True)
    refused(tmp_path / "a", r"a/val: expected class folders with image files .* y")
    write(tmp_path / "a" / "val" / "y" / "0.png")
    refused(tmp_path / "a", r"a/val: expected the class folders of .*train, got 'x' in one")
    write(tmp_path / "b" / "x" / "0.png")
    refused(tmp_path / "b", r"b/x: expected 2 images or more of a class.*, got 1")


def test_damaged_image_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path)
    path = tmp_path / "val" / "ant" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"val/ant/1.png: expected an undamaged image file, got"):
        load(f"folder:{tmp_path}")


def test_more_than_half_of_the_memory_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 images of 3 x 8 x 8 bytes are 2304 bytes: half of 4608."""
    write_tree(tmp_path)
    memory = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 4608}
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    assert len(load(f"folder:{tmp_path}", image_size=8).train_images) == 6
    memory["SC_PHYS_PAGES"] = 4607
    (tmp_path / "train" / "ant" / "0.png").write_bytes(b"never decoded")
    with pytest.raises(DataError, match=r"half of this machine's .*--image-size.*got 12 of 8x8"):
        load(f"folder:{tmp_path}", image_size=8)


def test_resized_crops_show_windows_of_the_image() -> None:
    """A ramp from left to right: a window of it is a ramp between its edges, mirrored or not."""
    n, size = 400, 32
    ramp = torch.arange(size, dtype=torch.float64) * 8
    images = ramp.expand(n, 3, size, size).to(torch.uint8)
    cut = augment_batch(images, "resized-crop-flip", torch.Generator().manual_seed(3))
    assert cut.shape == images.shape and cut.dtype == torch.uint8
    row = cut[:, 0, 0].double()
    assert cut.eq(cut[:, :1, :1]).all()  # no channel and no row differs from another
    mirrored = row[:, 0] > row[:, -1]
    assert 150 < int(mirrored.sum()) < 250
    # the inner steps are even, but for rounding and the image's border
    slope = (row[:, 8] - row[:, 24]).abs() / 16 / 8  # width of the window as a share of the image
    assert float(slope.min()) > 0.4 and float(slope.max()) < 1.02  # sqrt(0.25 * 3/4) = 0.433
    assert float(slope.std()) > 0.1
    again = augment_batch(images, "resized-crop-flip", torch.Generator().manual_seed(3))
    assert torch.equal(cut, again)


def test_resized_crops_move_in_both_directions() -> None:
    column = torch.arange(32).view(1, 1, 32, 1) * 8
    images = column.expand(300, 1, 32, 32).to(torch.uint8)
    cut = augment_batch(images, "resized-crop-flip", torch.Generator().manual_seed(0))
    centre = cut[:, 0, 15:17, 0].double().mean(1)
    assert cut[:, 0, 0, 0].lt(cut[:, 0, -1, 0]).all()  # never upside down
    assert float(centre.min()) < 90 and float(centre.max()) > 160
    assert abs(float(centre.mean()) - 124) < 8  # where the whole image has its centre


def test_batches_of_a_folder_are_crops_of_its_images(tmp_path: Path) -> None:
    write_tree(tmp_path)
    data: ImageData = load(f"folder:{tmp_path}", image_size=16)
    loader = train_loader(data, 4)
    first, labels = next(iter(loader.batches(0)))
    assert first.shape == (4, 3, 16, 16) and set(labels.tolist()) <= {0, 1}
    assert torch.equal(first, next(iter(loader.batches(0)))[0])
    assert not torch.equal(first, next(iter(train_loader(data, 4, augment="none").batches(0)))[0])
