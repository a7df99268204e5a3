"""Data files: where they are, and errors for missing or broken ones."""

from __future__ import annotations

import math
import os
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_advbayes.given import need_extra

DATA_VARIABLE = "PYRO_ADVBAYES_DATA"
EXPANDED = 2**28  # bytes to which an array of any file may expand


def find_file(root: str | Path | None, file: str, *, remedy: str) -> Path:
    """The path of a data file.

    :param root: the data folder; ``None`` reads it from the environment variable ``PYRO_ADVBAYES_DATA``.
    :param file: the file's path below that folder.
    :param remedy: a sentence for the error, how to get the file; ``{root}`` in it becomes the data folder.
    :raises FileNotFoundError: if there is no such file, or no folder was named.
    """
    root = root if root is not None else os.environ.get(DATA_VARIABLE)
    if not root:
        raise FileNotFoundError(
            f"no data folder to look for {file} in: pass root=, or set the environment variable {DATA_VARIABLE}. "
            + remedy.format(root="<root>")
        )
    path = Path(root) / file
    if not path.is_file():
        raise FileNotFoundError(f"{file} is not in the data folder {root}. " + remedy.format(root=str(root)))
    return path


def read_idx(path: Path, num_dims: int) -> Tensor:
    """The uint8 array in an unpacked idx file (MNIST's format).

    :param path: the file.
    :param num_dims: 3 for images, 1 for labels.
    :raises ValueError: if the file is truncated, or holds something else.
    """
    mnist = need_extra("torchvision.datasets.mnist", "images")
    try:
        return mnist.read_image_file(path) if num_dims == 3 else mnist.read_label_file(path)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:  # torchvision raises any of these
        raise ValueError(
            f"{path} is not a whole, unpacked idx file of {num_dims}-dimensional uint8 data ({error or 'bad header'}): "
            "delete it and download it again"
        ) from error


def read_npz(path: Path, num_dims: dict[str, int]) -> dict[str, Tensor]:
    """Chosen integer arrays of an npz file; nothing in it is unpickled.

    :param path: the file.
    :param num_dims: the arrays to read, by name, with the number of dimensions that each must have.
    :raises ValueError: if the file is truncated, or an array is absent, of another rank, or not of integers; and, before any memory is
        allocated, if an array would take over 256 MiB and a hundred times its size in the file.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a whole npz file: delete it and download it again")
    try:
        with np.load(path, allow_pickle=False) as file:
            if absent := sorted(set(num_dims) - set(file.files)):
                raise ValueError(f"it has no array {', '.join(absent)}; it has {', '.join(file.files)}")
            for name in num_dims:
                _check_member(file.zip, name, num_dims[name])
            arrays = {name: file[name] for name in num_dims}
    except (EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a file of this data set: {error}") from error
    return {name: torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False)) for name, array in arrays.items()}


def _check_member(file: zipfile.ZipFile, name: str, num_dims: int) -> None:
    """Refuses an array by its header."""
    member = f"{name}.npy" if f"{name}.npy" in file.namelist() else name
    with file.open(member) as array:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(array)
        if version not in readers:
            raise ValueError(f"{name} is of version {version} of the format; integers are of version 1.0 or 2.0")
        shape, _, dtype = readers[version](array)
        start = array.tell()
    if dtype.hasobject:
        return  # NumPy refuses to unpickle it
    if dtype.kind not in "iu" or len(shape) != num_dims:
        raise ValueError(f"{name} must be {num_dims}-dimensional integers, not {dtype}{list(shape)}")
    size, info = start + math.prod(shape) * dtype.itemsize, file.getinfo(member)
    if size != info.file_size:
        raise ValueError(f"{name} of shape {list(shape)} takes {size} bytes, and it holds {info.file_size}")
    if size > EXPANDED and size > 100 * info.compress_size:
        raise ValueError(f"{name} would expand from {info.compress_size} bytes to {size}")


def read_table(path: Path) -> np.ndarray:
    """
    The numbers in a text file, float64 ``[rows, columns]``, separated by white space.

    :raises ValueError: if the file is empty, ragged, or holds something else, NaN and infinity included.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty file is refused below
        try:
            table = np.loadtxt(path, ndmin=2)
        except ValueError as error:
            raise ValueError(f"{path} is not a table of numbers ({error}): download it again") from error
    if table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"{path} {'is empty' if table.size == 0 else 'has entries that are NaN or infinite'}: download it again")
    return table


def check_labels(path: Path, labels: Tensor, num_rows: int, num_classes: int | None) -> None:
    """Checks the labels of ``num_rows`` inputs.

    :param path: the file that the labels come from, for the error.
    :raises ValueError: if their number differs, or one is outside 0 .. ``num_classes`` - 1.
    """
    if len(labels) != num_rows:
        raise ValueError(f"{path} has {len(labels)} labels for {num_rows} images: the files do not belong together")
    if num_classes is None or not num_rows:
        return
    low, high = int(labels.long().min()), int(labels.long().max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"{path} has labels from {low} to {high}; {num_classes} classes are 0 to {num_classes - 1}")
