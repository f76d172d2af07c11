"""From a name or a path to a data set."""

from __future__ import annotations

from pathlib import Path

from dcx_kernels.data.cifar import FOLDERS, read_cifar
from dcx_kernels.data.digits import read_digits
from dcx_kernels.data.folder import read_folder
from dcx_kernels.data.image_data import ImageData
from dcx_kernels.data.npz import read_npz
from dcx_kernels.data.svhn import download_svhn, read_svhn
from dcx_kernels.errors import DataError, expected

__all__ = ["ACCEPTED", "download", "load"]

ACCEPTED = (
    "'digits'",
    "a folder 'cifar-10-batches-py' or 'cifar-100-python', or the folder that holds one",
    "an .npz file with train_images, train_labels, test_images, test_labels",
    "svhn:PATH, a folder with train_32x32.mat, extra_32x32.mat, test_32x32.mat",
    "svhn-train:PATH, the same without extra",
    "folder:PATH, a folder with train/CLASS and val/CLASS folders of images, or CLASS folders only",
)
_SVHN = ("svhn", "svhn-train")


def load(source: str | Path, *, image_size: int | None = 32, seed: int = 0) -> ImageData:
    """Read a data set into memory. Nothing is downloaded here, see `download`.

    Args:
        source: one of

            - ``"digits"``: scikit-learn's 1797 handwritten digits, as RGB;
            - a folder ``cifar-10-batches-py`` or ``cifar-100-python`` as torchvision unpacks it, or
              the folder that holds one of them;
            - an ``.npz`` file with ``train_images`` (uint8, N H W C with 1 or 3 channels; one is
              repeated to three), ``train_labels``, ``test_images``, ``test_labels`` and, optional,
              ``classes`` (names);
            - ``"svhn:PATH"``: SVHN's ``.mat`` files, training on train and extra, as the papers;
              ``"svhn-train:PATH"``: on train only;
            - ``"folder:PATH"``: image files in class folders, see `read_folder`.
        image_size: images of another size are scaled to this height and width; None keeps the
            data's own size (digits: 8).
        seed: of the train/test split of the digits, and of a folder without one; other data sets
            bring theirs.

    Raises:
        DataError: if there is no such source (the message lists the accepted forms), or it does
            not hold what its format promises.
    """
    if str(source) == "digits":
        return read_digits(image_size, seed)
    kind, path = _prefix(source)
    if kind in _SVHN:
        return read_svhn(path, image_size, extra=kind == "svhn")
    if kind == "folder":
        return read_folder(path, image_size, seed)
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


def download(source: str | Path) -> list[Path]:
    """Download what is missing of ``svhn:PATH`` or ``svhn-train:PATH``; return the new files.

    Raises:
        DataError: if another source is asked for, or naming the file that could not be downloaded.
    """
    kind, folder = _prefix(source)
    if kind not in _SVHN:
        raise DataError(expected("svhn:PATH or svhn-train:PATH to download", repr(str(source))))
    return download_svhn(folder, extra=kind == "svhn")


def _prefix(source: str | Path) -> tuple[str, Path]:
    """Split ``kind:PATH``; the kind is empty where there is none that we know."""
    kind, colon, rest = str(source).partition(":")
    if not colon or kind not in (*_SVHN, "folder") or isinstance(source, Path):
        return "", Path(source).expanduser()
    if not rest:
        raise DataError(expected(f"a path behind {kind}:", repr(str(source))))
    return kind, Path(rest).expanduser()


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
