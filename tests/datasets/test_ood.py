"""The out-of-distribution sets, on small files written here."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_advbayes import datasets

COUNT = 12
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 28, 28), dtype=np.uint8)
PIXELS[:, 0, :2] = 0, 255
PIXELS[:, 0, 2] = 10 * np.arange(COUNT)  # tells the images apart


@pytest.fixture
def root(tmp_path: Path) -> Path:
    raw = tmp_path / "notMNIST" / "raw"
    raw.mkdir(parents=True)
    labels = np.zeros(COUNT, dtype=np.uint8)
    for name, array in (("images-idx3", PIXELS), ("labels-idx1", labels)):
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (raw / f"t10k-{name}-ubyte").write_bytes(header + array.tobytes())
    np.savez(tmp_path / "cifar10bw28.npz", images=PIXELS, labels=labels)
    np.savez(tmp_path / "omniglot28.npz", images=PIXELS, character_id=labels.astype(np.int16))
    return tmp_path


def test_every_set_has_the_range_that_its_scale_says(root):
    ranges = {"notMNIST": (-5, 5), "Omniglot": (-5, 5), "Omniglot in 0..255": (0, 1275), "CIFAR10bw": (-5, 5), "Uniform": (0, 5)}
    sets = datasets.mnist_ood(root, 5.0, num_images=8)
    assert list(sets) == ["notMNIST", "Omniglot", "Omniglot in 0..255", "CIFAR10bw", "Gaussian", "Uniform"]
    for name, images in sets.items():
        assert images.shape == (8, 1, 28, 28) and images.dtype == torch.float32
        if name in ranges:
            low, high = ranges[name]
            assert images.min() == pytest.approx(low, abs=0.01 * high) and images.max() == pytest.approx(high, rel=0.01)
    gaussian = sets["Gaussian"].double()
    count = gaussian.numel()
    assert abs(float(gaussian.mean())) < 4 * 5 / count**0.5 and float(gaussian.std()) == pytest.approx(5, abs=4 * 5 / (2 * count) ** 0.5)


def test_another_scale_multiplies_the_same_images(root):
    one, five = (datasets.mnist_ood(root, scale, num_images=8, flatten=True) for scale in (1.0, 5.0))
    for name, images in one.items():
        assert images.shape == (8, 784)
        torch.testing.assert_close(five[name], 5 * images)


def test_sorted_files_are_drawn_from_and_others_are_taken_from_the_front(root):
    sets = datasets.mnist_ood(root, num_images=6)
    numbers = {name: ((sets[name][:, 0, 0, 2] + 1) * 12.75).round().int().tolist() for name in ("notMNIST", "Omniglot", "CIFAR10bw")}
    assert numbers["notMNIST"] == [0, 1, 2, 3, 4, 5]
    assert len(set(numbers["Omniglot"])) == 6 and numbers["Omniglot"] != sorted(numbers["Omniglot"])
    assert numbers["CIFAR10bw"] != numbers["Omniglot"]
    torch.testing.assert_close(sets["Omniglot in 0..255"], (sets["Omniglot"] + 1) * 127.5, atol=1e-3, rtol=0)
    again = datasets.mnist_ood(root, num_images=6)
    assert all(torch.equal(again[name], images) for name, images in sets.items())
    assert not torch.equal(datasets.mnist_ood(root, num_images=6, seed=1)["CIFAR10bw"], sets["CIFAR10bw"])


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [({"scale": 0.0}, "scale=0.0"), ({"num_images": 0}, "num_images=0"), ({"num_images": 13}, "the files of notMNIST hold 12")],
)
def test_what_is_out_of_range_is_named(root, arguments, culprit):
    with pytest.raises(ValueError, match=culprit):
        datasets.mnist_ood(root, **arguments)


def test_a_missing_file_is_named_with_the_way_to_get_it(root):
    (root / "omniglot28.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"omniglot28\.npz.*torchvision"):
        datasets.mnist_ood(root)
