"""Every accepted form of a data set, and every way in which one can be wrong."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dcx_kernels.data import ImageData, load
from dcx_kernels.errors import DataError

RNG = np.random.default_rng(0)


def arrays(n=12, m=6, size=32, channels=3, num_classes=3):
    def images(count):
        return RNG.integers(0, 256, (count, size, size, channels), dtype=np.uint8)

    return {
        "train_images": images(n),
        "train_labels": np.arange(n) % num_classes,
        "test_images": images(m),
        "test_labels": np.arange(m) % num_classes,
    }


def write_npz(folder, **content):
    path = folder / "data.npz"
    np.savez(path, **content)
    return path


def test_digits_are_split_with_equal_class_shares():
    data = load("digits")
    assert data.train_images.shape == (1437, 3, 32, 32) and data.test_images.shape[0] == 360
    assert data.train_images.dtype == torch.uint8
    assert data.classes == tuple("0123456789") and data.num_classes == 10
    assert data.image_shape == (3, 32, 32)
    shares = torch.bincount(data.train_labels) / torch.bincount(data.test_labels)
    assert float((shares - 4).abs().max()) < 0.2
    # grey: all channels equal, using the whole range
    assert torch.equal(data.train_images[:, 0], data.train_images[:, 2])
    assert int(data.train_images.max()) == 255 and int(data.train_images.min()) == 0
    assert data.augment == "crop"


def test_digits_split_follows_the_seed():
    one, again, other = load("digits"), load("digits"), load("digits", seed=1)
    assert torch.equal(one.train_images, again.train_images)
    assert not torch.equal(one.train_labels, other.train_labels)


def test_digits_train_and_test_share_no_image():
    data = load("digits", image_size=None)
    assert data.train_images.shape[2:] == (8, 8)
    everything = torch.cat([data.train_images, data.test_images])[:, 0].flatten(1)
    assert len(everything.unique(dim=0)) == 1797


def test_mean_and_std_are_those_of_the_training_images(tmp_path):
    content = arrays()
    data = load(write_npz(tmp_path, **content))
    pixels = content["train_images"].astype(np.float64) / 255
    assert data.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-12)


def test_constant_channel_has_std_one(tmp_path):
    content = arrays()
    content["train_images"][..., 1] = 7
    assert load(write_npz(tmp_path, **content)).std[1] == 1.0


def test_npz_round_trip(tmp_path):
    content = arrays()
    data = load(str(write_npz(tmp_path, **content, classes=np.array(["ant", "bee", "cat"]))))
    assert torch.equal(
        data.train_images, torch.from_numpy(content["train_images"]).permute(0, 3, 1, 2)
    )
    assert data.train_images.is_contiguous()
    assert data.test_labels.tolist() == content["test_labels"].tolist()
    assert data.classes == ("ant", "bee", "cat")
    assert data.augment == "crop"


def test_npz_without_classes_counts_the_labels(tmp_path):
    assert load(write_npz(tmp_path, **arrays(num_classes=3))).classes == ("0", "1", "2")


def test_npz_labels_may_have_any_integer_dtype(tmp_path):
    content = arrays()
    content["train_labels"] = content["train_labels"].astype(np.uint8)
    assert load(write_npz(tmp_path, **content)).train_labels.dtype == torch.int64


def test_npz_grey_images_become_rgb_of_the_wanted_size(tmp_path):
    path = write_npz(tmp_path, **arrays(size=28, channels=1))
    data = load(path)
    assert data.image_shape == (3, 32, 32)
    assert torch.equal(data.train_images[:, 0], data.train_images[:, 1])
    assert load(path, image_size=None).image_shape == (3, 28, 28)


def changed(**changes):
    content = {**arrays(), **changes}
    return {key: value for key, value in content.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(test_labels=None), r"an array 'test_labels', got only \['test_images'"),
        (changed(train_images=np.zeros((12, 32, 32, 3))), "train_images of dtype uint8, got float"),
        (changed(train_images=np.zeros((12, 32, 32), np.uint8)), r"train_images of shape \(N, H"),
        (changed(train_images=np.zeros((12, 3, 32, 32), np.uint8)), r"got \(12, 3, 32, 32\)"),
        (changed(test_images=np.zeros((0, 32, 32, 3), np.uint8)), r"got \(0, 32, 32, 3\)"),
        (changed(test_images=np.zeros((6, 16, 16, 3), np.uint8)), None),
        (changed(train_labels=np.zeros(12)), "train_labels of an integer dtype, got float64"),
        (
            changed(train_labels=np.zeros((12, 1), int)),
            r"train_labels of shape \(N,\), got \(12, 1",
        ),
        (changed(train_labels=np.zeros(11, int)), "each of the 12 train_images, got 11 labels"),
        (changed(test_labels=np.full(6, 3)), r"test_labels in \[0, 3\) .*largest .*, got 3"),
        (changed(train_labels=np.full(12, -1)), r"train_labels in \[0, 1\) .*got -1"),
        (changed(classes=np.array(["a", "b"])), r"\[0, 2\) \(from 'classes'\), got 2"),
        (changed(classes=np.arange(3)), "classes to be a 1-D array of strings, got int64"),
        (changed(classes=np.array([["a", "b", "c"]])), "classes to be a 1-D array of strings"),
        (changed(train_labels=np.array([{}] * 12)), "an undamaged .npz archive of plain arrays"),
    ],
)
def test_npz_refuses(tmp_path, content, message):
    path = write_npz(tmp_path, **content)
    if message is None:  # sizes differ: only without scaling is that an error
        load(path)
        with pytest.raises(DataError, match=r"test images of the training images' shape \(3, 32"):
            load(path, image_size=None)
        return
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 0.5, 0.99])
def test_npz_truncated_is_a_data_error(tmp_path, kept):
    path = write_npz(tmp_path, **arrays())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(DataError, match=r"an undamaged \.npz archive"):
        load(path)


def test_npz_damaged_is_a_data_error_or_harmless(tmp_path):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays(n=3, m=3, size=4))
    content = bytearray(stream.getvalue())
    path = tmp_path / "data.npz"
    refused = 0
    for position in range(0, len(content), 7):
        damaged = content.copy()
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            load(path)
        except DataError:
            refused += 1
    assert refused > 50


def test_npz_that_is_a_single_array(tmp_path):
    path = tmp_path / "data.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=r"an \.npz archive"):
        load(path)


# cifar: small files of the real form


def write_cifar10(root, n=4):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = {}
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        data = RNG.integers(0, 256, (n, 3072), dtype=np.uint8)
        pixels[name] = data
        content = {"data": data, "labels": [(i + j) % 10 for j in range(n)], "batch_label": name}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder, pixels


def write_cifar100(root):
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        data = RNG.integers(0, 256, (5, 3072), dtype=np.uint8)
        content = {"data": data, "fine_labels": [0, 99, 3, 4, 5], "coarse_labels": [0] * 5}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": ["x"]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder


@pytest.mark.parametrize("inside", [True, False])
def test_cifar10_reads_torchvisions_folder(tmp_path, inside):
    folder, pixels = write_cifar10(tmp_path)
    data = load(folder if inside else tmp_path)
    assert data.train_images.shape == (20, 3, 32, 32)
    assert data.train_images[4].flatten().tolist() == pixels["data_batch_2"][0].tolist()
    assert data.test_images[1].flatten().tolist() == pixels["test_batch"][1].tolist()
    assert data.train_labels[:5].tolist() == [0, 1, 2, 3, 1]
    assert data.classes[3] == "class3" and data.augment == "crop-flip"


def test_cifar10_agrees_with_torchvision(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    write_cifar10(tmp_path)
    # its checksums are those of the real files
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    theirs = datasets.CIFAR10(str(tmp_path), train=True, download=False)
    ours = load(tmp_path)
    assert np.array_equal(ours.train_images.permute(0, 2, 3, 1).numpy(), theirs.data)
    assert ours.train_labels.tolist() == theirs.targets
    assert list(ours.classes) == theirs.classes


def test_cifar10_written_by_numpy_1(tmp_path):
    folder, pixels = write_cifar10(tmp_path)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    assert b"numpy.core.multiarray" in (folder / "test_batch").read_bytes()
    assert load(folder).test_images[0].flatten().tolist() == pixels["test_batch"][0].tolist()


def test_cifar100_uses_fine_labels(tmp_path):
    data = load(write_cifar100(tmp_path))
    assert data.num_classes == 100
    assert data.train_labels.tolist() == [0, 99, 3, 4, 5]


def test_folder_with_both_cifar_sets_is_ambiguous(tmp_path):
    write_cifar10(tmp_path)
    write_cifar100(tmp_path)
    with pytest.raises(DataError, match="cifar-10-batches-py and cifar-100-python in it"):
        load(tmp_path)


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("never"),)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test_batch", None, "a file 'test_batch', got none"),
        ("data_batch_3", b"", "an undamaged CIFAR file, got EOFError"),
        ("data_batch_3", b"\x80\x02}q\x00", "an undamaged CIFAR file"),
        ("data_batch_3", pickle.dumps([1]), "a dictionary, got list"),
        ("data_batch_3", pickle.dumps({}), r"'data', uint8 of shape \(N, 3072\), got NoneType"),
        (
            "data_batch_3",
            pickle.dumps({"data": np.zeros((2, 3000), np.uint8), "labels": [0, 1]}),
            r"got uint8 of shape \(2, 3000\)",
        ),
        (
            "data_batch_3",
            pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}),
            "a list of 2 labels, got 1 labels",
        ),
        (
            "data_batch_3",
            pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["x"]}),
            "'labels' to be ints",
        ),
        (
            "data_batch_3",
            pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}),
            r"train labels in \[0, 10\), got 10",
        ),
        ("data_batch_3", pickle.dumps({"data": Attack()}), "does not belong into a CIFAR file"),
        ("batches.meta", pickle.dumps({}), "a list of strings 'label_names', got NoneType"),
    ],
)
def test_cifar_refuses(tmp_path, monkeypatch, file, content, message):
    monkeypatch.chdir(tmp_path)
    folder, _ = write_cifar10(tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert not Path("never").exists()


# unknown sources


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no-such-thing", "which does not exist"),
        ("", "a folder with neither CIFAR data set in it"),
        ("notes.txt", r"a file that ends in '\.txt'"),
    ],
)
def test_unknown_source_lists_what_is_accepted(tmp_path, name, reason):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=reason) as caught:
        load(tmp_path / name)
    for form in ("'digits'", "cifar-10-batches-py", "cifar-100-python", ".npz"):
        assert form in str(caught.value)


def test_image_size_is_checked():
    with pytest.raises(ValueError, match="image_size to be None or a positive int, got 0"):
        load("digits", image_size=0)


# the data class itself, for data that comes from elsewhere


def image_data(**changes):
    arguments = {
        "name": "mine",
        "train_images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        "train_labels": torch.tensor([0, 1, 0, 1]),
        "test_images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        "test_labels": torch.tensor([0, 1]),
        "classes": ("a", "b"),
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
    }
    return ImageData(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": torch.zeros(4, 3, 8, 8)}, "mine: expected train images, uint8"),
        ({"test_labels": torch.tensor([0.0, 1.0])}, "test labels, int64"),
        ({"test_labels": torch.tensor([0])}, r"test labels, int64 of shape \(2,\)"),
        ({"train_labels": torch.tensor([0, 1, 2, 1])}, r"train labels in \[0, 2\), got 2"),
        ({"test_images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "the training images' shape"),
        ({"augment": "mixup"}, "augment to be one of .* got 'mixup'"),
    ],
)
def test_image_data_refuses(changes, message):
    image_data()
    with pytest.raises(ValueError, match=message):
        image_data(**changes)


def test_image_data_repr_is_short():
    assert len(repr(image_data())) < 200
