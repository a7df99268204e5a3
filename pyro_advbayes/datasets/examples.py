"""The return value of data sets, and the scaling of pixels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SPLITS = ("train", "test")


class Examples(NamedTuple):
    """Inputs and labels of one split, in this order, so that ``x, y = mnist()`` and ``mcmc.run(*mnist())`` work.

    :ivar x: inputs, float32, ``[N, ...]``.
    :ivar y: labels, int64, ``[N]``.
    """

    x: Tensor
    y: Tensor


def check_split(split: str) -> bool:
    """Whether ``split`` is the training split.

    :raises ValueError: if it is neither ``"train"`` nor ``"test"``.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    return split == "train"


def split_first(load: Callable[..., Examples]) -> Callable[..., Examples]:
    """
    A function of ``(split, root, ...)`` that also understands the order of earlier versions, folder first, where that is clear: a split is
    in the second place or has its name, or a folder is alone.
    """

    @functools.wraps(load)
    def wrapper(*args: Any, **kwargs: Any) -> Examples:
        if args and "split" in kwargs:
            args = (kwargs.pop("split"), *args)
        elif len(args) > 1 and args[0] not in SPLITS and args[1] in SPLITS:
            args = (args[1], args[0], *args[2:])
        elif (
            len(args) == 1 and "root" not in kwargs and args[0] not in SPLITS and isinstance(args[0], str | Path) and Path(args[0]).is_dir()
        ):
            args = ("train", *args)
        return load(*args, **kwargs)

    return wrapper


def image_examples(pixels: Tensor, labels: Tensor, *, white: int, scale: tuple[float, float], flatten: bool) -> Examples:
    """Images as network inputs, ``x = low + (high - low) pixel / white``.

    :param pixels: ``[N, H, W]`` or ``[N, C, H, W]``, from 0 to ``white``.
    :param labels: ``[N]``, integers.
    :param white: the largest value that a pixel can take.
    :param scale: ``(low, high)``, the values of pixels 0 and ``white``.
    :param flatten: one row per image, ``[N, C*H*W]``, instead of ``[N, C, H, W]``.
    :raises ValueError: if ``scale`` is not two finite numbers, the smaller first.
    """
    if len(scale) != 2 or not all(map(math.isfinite, scale)) or scale[0] >= scale[1]:
        raise ValueError(f"scale must be (low, high), finite and in this order, got {scale!r}")
    low, high = scale
    # Dividing first and lerp give low at 0 and high at white to the last bit. In place, since sets are large.
    x = pixels.to(torch.float32, copy=True).div_(white)
    torch.lerp(x.new_tensor(low), x.new_tensor(high), x, out=x)
    if x.dim() == 3:
        x = x.unsqueeze(1)
    return Examples(x.flatten(1) if flatten else x, labels.to(torch.int64))
