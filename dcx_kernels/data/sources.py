"""From a name or a path to a data set."""

from __future__ import annotations

from pathlib import Path

from dcx_kernels.data.cifar import FOLDERS, read_cifar
from dcx_kernels.data.digits import read_digits
from dcx_kernels.data.image_data import ImageData
from dcx_kernels.data.npz import read_npz
from dcx_kernels.errors import DataError, expected

__all__ = ["ACCEPTED", "load"]

ACCEPTED = (
    "'digits'",
    "a folder 'cifar-10-batches-py' or 'cifar-100-python', or the folder that holds one",
    "an .npz file with train_images, train_labels, test_images, test_labels",
)


def load(source: str | Path, *, image_size: int | None = 32, seed: int = 0) -> ImageData:
    """Read a data set into memory. Nothing is ever downloaded.

    Args:
        source: one of

            - ``"digits"``: scikit-learn's 1797 handwritten digits, as RGB;
            - a folder ``cifar-10-batches-py`` or ``cifar-100-python`` as torchvision unpacks it, or
              the folder that holds one of them;
            - an ``.npz`` file with ``train_images`` (uint8, N H W C with 1 or 3 channels; one is
              repeated to three), ``train_labels``, ``test_images``, ``test_labels`` and, optional,
              ``classes`` (names).
        image_size: images of another size are scaled to this height and width; None keeps the
            data's own size (digits: 8).
        seed: of the train/test split of the digits; other data sets bring theirs.

    Raises:
        DataError: if there is no such source (the message lists the accepted forms), or it does
            not hold what its format promises.
    """
    if str(source) == "digits":
        return read_digits(image_size, seed)
    path = Path(source).expanduser()
    if not path.exists():
        raise _unknown(source, "which does not exist")
    if path.is_dir():
        folder = _cifar_folder(path)
        if folder is None:
            raise _unknown(source, "a folder with neither CIFAR data set in it")
        return read_cifar(folder, image_size)
    if path.suffix == ".npz":
        return read_npz(path, image_size)
    raise _unknown(source, f"a file that ends in {path.suffix!r}")


def _cifar_folder(path: Path) -> Path | None:
    # resolved, so that "." inside of the folder has a name too
    if path.resolve().name in FOLDERS:
        return path.resolve()
    found = [path / name for name in FOLDERS if (path / name).is_dir()]
    if len(found) > 1:
        names = " and ".join(folder.name for folder in found)
        raise DataError(expected("the folder of one data set", f"{names} in it", where=str(path)))
    return found[0] if found else None


def _unknown(source: str | Path, reason: str) -> DataError:
    forms = "; ".join(f"({i}) {form}" for i, form in enumerate(ACCEPTED, 1))
    return DataError(expected(f"a data set: {forms}", f"{str(source)!r}, {reason}"))
