"""Loaders: determinism, resuming, augmentation, normalisation."""

from __future__ import annotations

import math

import pytest
import torch

from dcx_kernels.data import ImageData, Loader, eval_loader, train_loader
from dcx_kernels.data.augment import PADDING, augment_batch
from dcx_kernels.data.colour import BRIGHTNESS, HUE, SATURATION, shift_colours

N = 23


def images(n=N, size=8):
    generator = torch.Generator().manual_seed(0)
    # no zero: the padding is recognisable
    return torch.randint(1, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def loader(**changes):
    options = {"batch_size": 5, "mean": (0.0,) * 3, "std": (1 / 255,) * 3, "drop_last": False}
    # with this mean and std a batch holds the pixels as they are; the label is the image's number
    return Loader(images(), torch.arange(N), **{**options, **changes})


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_every_image_comes_once_an_epoch():
    batches = list(loader().batches(0))
    assert [len(x) for x, _ in batches] == [5, 5, 5, 5, 3]
    labels = torch.cat([y for _, y in batches])
    assert sorted(labels.tolist()) == list(range(N))
    assert labels.tolist() != list(range(N))
    pixels = torch.cat([x for x, _ in batches])
    assert torch.equal(pixels.round().to(torch.uint8), images()[labels])


@pytest.mark.parametrize(("drop_last", "length"), [(True, 4), (False, 5)])
def test_len_is_the_number_of_batches(drop_last, length):
    made = loader(drop_last=drop_last)
    assert len(made) == len(list(made.batches(0))) == length


def test_len_without_remainder():
    assert len(loader(batch_size=N)) == len(loader(batch_size=N, drop_last=True)) == 1


@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip", "flip-colour"])
def test_batches_from_a_step_equal_the_uninterrupted_run(augment):
    whole = list(loader(augment=augment).batches(3))
    for step in range(len(whole) + 1):
        assert equal(list(loader(augment=augment).batches(3, start_step=step)), whole[step:])


def test_epoch_and_seed_change_order_and_augmentation():
    made = loader(augment="crop")
    first = list(made.batches(0))
    assert equal(first, list(made.batches(0)))
    assert not equal(first, list(made.batches(1)))
    assert not equal(first, list(loader(augment="crop", seed=1).batches(0)))
    assert made.order(0).tolist() != made.order(1).tolist()
    # neighbouring (seed, epoch) do not share draws
    assert made.order(1).tolist() != loader(seed=1).order(0).tolist()


def test_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(augment="crop-flip").batches(0))
    assert torch.equal(before, torch.get_rng_state())


def windows_of(image):
    """Return every crop of the padded image, by slicing."""
    _, h, w = image.shape
    padded = torch.zeros(3, h + 2 * PADDING, w + 2 * PADDING, dtype=image.dtype)
    padded[:, PADDING : PADDING + h, PADDING : PADDING + w] = image
    offsets = range(2 * PADDING + 1)
    return {(r, c): padded[:, r : r + h, c : c + w] for r in offsets for c in offsets}


@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
def test_augmented_image_is_a_window_of_the_padded_one(augment):
    batch = images(400)
    result = augment_batch(batch, augment, torch.Generator().manual_seed(0))
    offsets, flipped = [], 0
    for image, got in zip(batch, result, strict=True):
        crops = windows_of(image)
        plain = [at for at, crop in crops.items() if torch.equal(crop, got)]
        mirrored = [at for at, crop in crops.items() if torch.equal(crop.flip(-1), got)]
        assert len(plain) + len(mirrored) == 1
        flipped += len(mirrored)
        offsets += plain + mirrored
    # all offsets occur, rows and columns independently
    assert {r for r, _ in offsets} == {c for _, c in offsets} == set(range(2 * PADDING + 1))
    assert len(set(offsets)) > 60
    assert flipped == 0 if augment == "crop" else 150 < flipped < 250


def test_augment_none_is_the_identity():
    batch = images()
    assert augment_batch(batch, "none", torch.Generator()) is batch


def test_normalisation_comes_after_the_padding():
    # a padded border is black, and black is normalised like every other pixel
    made = Loader(
        torch.full((64, 3, 8, 8), 255, dtype=torch.uint8),
        torch.zeros(64, dtype=torch.int64),
        64,
        mean=(0.5, 0.25, 0.0),
        std=(0.5, 0.25, 1.0),
        augment="crop",
    )
    ((x, _),) = made.batches(0)
    for channel, (black, white) in enumerate([(-1.0, 1.0), (-1.0, 3.0), (0.0, 1.0)]):
        assert set(x[:, channel].unique().tolist()) == {black, white}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtype_and_memory_format(dtype, channels_last):
    options = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "augment": "crop-flip"}
    made = loader(dtype=dtype, channels_last=channels_last, **options)
    exact = loader(dtype=torch.float64, **options)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tolerance = {"rtol": torch.finfo(dtype).eps * 2, "atol": torch.finfo(dtype).eps * 4}
    for (x, _), (want, _) in zip(made.batches(0), exact.batches(0), strict=True):
        assert x.dtype == dtype and x.is_contiguous(memory_format=layout)
        torch.testing.assert_close(x.double(), want, **tolerance)


def data(**changes):
    options = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "augment": "crop", **changes}
    labels = torch.arange(N)
    names = tuple(map(str, range(N)))
    return ImageData("mine", images(), labels, images(7), labels[:7], names, **options)


def test_eval_loader_is_in_order_whole_and_plain():
    made = eval_loader(data(), 3)
    batches = list(made.batches(0))
    assert [len(x) for x, _ in batches] == [3, 3, 1]
    assert torch.cat([y for _, y in batches]).tolist() == list(range(7))
    want = (images(7).double() / 255 - 0.5) / 0.25
    torch.testing.assert_close(torch.cat([x for x, _ in batches]).double(), want, rtol=0, atol=1e-6)
    assert equal(batches, list(made.batches(5)))
    assert len(list(eval_loader(data(), 100, split="train").batches(0))) == 1


def test_train_loader_takes_the_data_sets_augmentation():
    assert train_loader(data(), 4).augment == "crop"
    assert train_loader(data(), 4, augment="none").augment == "none"
    assert train_loader(data(augment="crop-flip"), 4).augment == "crop-flip"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size to be a positive int, got 0"),
        ({"batch_size": 24, "drop_last": True}, "at most the 23 images .*, got 24"),
        ({"augment": "cutout"}, "augment to be one of"),
        ({"mean": (0.5,)}, r"mean of 3 channels, got \(0\.5,\)"),
        ({"std": (1.0, 0.0, 1.0)}, "a positive std"),
        ({"dtype": torch.int64}, "a floating dtype, got torch.int64"),
    ],
)
def test_loader_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        loader(**changes)


def test_loader_refuses_images_and_labels_that_do_not_fit():
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match="uint8 images"):
        Loader(images().float(), torch.arange(N), 4, **options)
    with pytest.raises(ValueError, match=r"int64 labels of shape \(23,\)"):
        Loader(images(), torch.arange(N - 1), 4, **options)


@pytest.mark.parametrize(
    ("epoch", "step", "message"), [(-1, 0, "epoch of at least 0"), (0, 6, r"\[0, 5\], got 6")]
)
def test_batches_refuses_at_once(epoch, step, message):
    with pytest.raises(ValueError, match=message):
        loader().batches(epoch, step)  # before the first batch is asked for


def test_eval_loader_refuses_an_unknown_split():
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        eval_loader(data(), 4, split="val")


# colours


def test_grey_stays_grey_whatever_the_colours_do():
    grey = torch.full((200, 3, 2, 2), 128, dtype=torch.uint8)
    result = shift_colours(grey, torch.Generator().manual_seed(0)).double()
    assert (result.amax(1) - result.amin(1)).max() <= 1  # red, green and blue alike
    light = result.mean((1, 2, 3)) - 128
    assert light.abs().max() <= BRIGHTNESS + 0.5
    assert light.min() < -0.8 * BRIGHTNESS and light.max() > 0.8 * BRIGHTNESS


def test_colours_are_turned_and_stretched_as_drawn():
    """Against the colour plane by hand: its length changes by the saturation, its angle by hue."""
    images = torch.full((400, 3, 1, 1), 120, dtype=torch.float64)
    images[:, 0], images[:, 2] = 150, 100
    result = shift_colours(images, torch.Generator().manual_seed(1)).flatten(1).double()

    def plane(rgb):
        i = rgb @ torch.tensor([0.596, -0.274, -0.322], dtype=torch.float64)
        q = rgb @ torch.tensor([0.211, -0.523, 0.312], dtype=torch.float64)
        return torch.hypot(i, q), torch.atan2(q, i)

    (length, angle), (before, start) = plane(result), plane(images.flatten(1))
    stretched, turned = length / before, (angle - start) / (2 * math.pi)
    slack = 0.03  # of rounding to whole numbers
    assert (stretched - 1).abs().max() < SATURATION + slack
    assert stretched.min() < 1 - 0.8 * SATURATION and stretched.max() > 1 + 0.8 * SATURATION
    assert turned.abs().max() < HUE + slack
    assert turned.min() < -0.8 * HUE and turned.max() > 0.8 * HUE


def test_colours_of_other_images_change_their_brightness_only():
    images = torch.randint(100, 150, (50, 1, 3, 3), dtype=torch.uint8)
    result = shift_colours(images, torch.Generator().manual_seed(0)).int()
    change = (result - images.int()).flatten(1)
    assert (change == change[:, :1]).all() and change.unique().numel() > 20


def test_colours_are_cut_off_and_mirrored_images_stay_in_place():
    images = torch.zeros(100, 3, 4, 4, dtype=torch.uint8)
    images[..., 0], images[..., 3] = 255, 10  # a bright left, a dark right edge
    result = augment_batch(images, "flip-colour", torch.Generator().manual_seed(0))
    assert result.dtype == torch.uint8 and result.shape == images.shape
    left = (result[..., 0].int() > result[..., 3].int()).flatten(1)
    assert (left.all(1) | ~left.any(1)).all()  # as a whole
    assert 30 < int(left.all(1).sum()) < 70
    assert int(result[left.all(1)][..., 0].amax()) == 255
