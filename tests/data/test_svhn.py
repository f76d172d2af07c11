"""SVHN's .mat files: which splits train, what their labels mean, and every way to be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcx_kernels.data import download, load
from dcx_kernels.errors import DataError

scipy_io = pytest.importorskip("scipy.io")


def write(folder: Path, split: str, labels: list[int], **changes: Any) -> np.ndarray[Any, Any]:
    """Write a split with these labels; return its images, (H, W, C, N)."""
    generator = np.random.default_rng(len(labels))
    images = generator.integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
    content = {"X": images, "y": np.array(labels, np.uint8)[:, None], **changes}
    scipy_io.savemat(folder / f"{split}_32x32.mat", {k: v for k, v in content.items() if len(v)})
    return images


def write_all(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    labels = {"train": [1, 10, 3], "extra": [9, 10], "test": [2, 10, 10, 4]}
    return {split: write(folder, split, own) for split, own in labels.items()}


def test_training_images_are_train_and_extra(tmp_path: Path) -> None:
    images = write_all(tmp_path)
    data = load(f"svhn:{tmp_path}")
    assert data.train_labels.tolist() == [1, 0, 3, 9, 0]  # 10 stands for the digit 0
    assert data.test_labels.tolist() == [2, 0, 0, 4]
    assert data.classes == tuple("0123456789")
    assert data.augment == "crop-flip"
    wanted = np.concatenate([images["train"], images["extra"]], axis=3)
    # one pixel by its numbers: row 5, column 7, green, of the second image of extra
    assert int(data.train_images[4, 1, 5, 7]) == int(images["extra"][5, 7, 1, 1])
    assert torch.equal(data.train_images, torch.from_numpy(wanted).permute(3, 2, 0, 1))
    assert torch.equal(data.test_images, torch.from_numpy(images["test"]).permute(3, 2, 0, 1))


def test_svhn_train_leaves_extra_out(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "extra_32x32.mat").unlink()
    assert load(f"svhn-train:{tmp_path}").train_labels.tolist() == [1, 0, 3]
    with pytest.raises(DataError, match=r"expected a file 'extra_32x32.mat' .*svhn-train:PATH"):
        load(f"svhn:{tmp_path}")


def test_images_agree_with_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    write_all(tmp_path)
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    theirs = datasets.SVHN(str(tmp_path), "test")
    ours = load(f"svhn:{tmp_path}")
    assert torch.equal(ours.test_images, torch.from_numpy(theirs.data))
    assert ours.test_labels.tolist() == theirs.labels.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": []}, r"test_32x32.mat: expected an array 'X', got only \['y'\]"),
        ({"y": []}, r"test_32x32.mat: expected an array 'y', got only \['X'\]"),
        ({"X": np.zeros((32, 32, 3, 2))}, "uint8 of shape .32, 32, 3, N., got float64"),
        ({"X": np.zeros((2, 32, 32, 3), np.uint8)}, r"got uint8 of shape \(2, 32, 32, 3\)"),
        ({"y": np.ones((3, 1), np.uint8)}, "'y', 2 integer labels, got 3 of dtype uint8"),
        ({"y": np.ones((2, 1))}, "'y', 2 integer labels, got 2 of dtype float64"),
        ({"y": np.array([[1], [11]], np.uint8)}, r"labels 'y' in \[0, 10\], got 11"),
        ({"y": np.array([[-1], [1]], np.int16)}, r"labels 'y' in \[0, 10\], got -1"),
    ],
)
def test_wrong_contents_name_the_file(tmp_path: Path, changes: Any, message: str) -> None:
    write_all(tmp_path)
    write(tmp_path, "test", [1, 2], **changes)
    with pytest.raises(DataError, match=message):
        load(f"svhn:{tmp_path}")


def test_damaged_file_is_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"train_32x32.mat: expected an undamaged .mat file"):
        load(f"svhn:{tmp_path}")


def test_missing_files_are_noticed_before_any_is_read(tmp_path: Path) -> None:
    (tmp_path / "train_32x32.mat").write_bytes(b"never read")
    (tmp_path / "extra_32x32.mat").write_bytes(b"never read")
    with pytest.raises(DataError, match=r"expected a file 'test_32x32.mat' \(--download"):
        load(f"svhn:{tmp_path}")
    with pytest.raises(DataError, match="expected a path behind svhn:, got 'svhn:'"):
        load("svhn:")


def test_download_fetches_what_is_missing_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = pytest.importorskip("torchvision.datasets.utils")
    asked = []

    def fetch(url: str, root: str, name: str, md5: str) -> None:
        asked.append((url.rpartition("/")[2], len(md5)))
        (Path(root) / name).write_bytes(b"x")

    monkeypatch.setattr(utils, "download_url", fetch)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "test_32x32.mat").write_bytes(b"here already")
    assert download(f"svhn-train:{tmp_path}/new") == [tmp_path / "new" / "train_32x32.mat"]
    assert asked == [("train_32x32.mat", 32)]
    assert download(f"svhn:{tmp_path}/new") == [tmp_path / "new" / "extra_32x32.mat"]
    assert download(f"svhn:{tmp_path}/new") == []

    def offline(*arguments: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(utils, "download_url", offline)
    with pytest.raises(DataError, match=r"train_32x32.mat: expected to download .* no route"):
        download(f"svhn:{tmp_path}/other")
    with pytest.raises(DataError, match="expected svhn:PATH or svhn-train:PATH to download"):
        download("digits")
