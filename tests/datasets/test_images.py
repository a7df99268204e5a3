"""The loaders, on small files written here and, where ``PYRO_ADVBAYES_DATA`` names a folder, on the real ones."""

from __future__ import annotations

import io
import os
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_advbayes import datasets
from pyro_advbayes.datasets import files

REAL = os.environ.get("PYRO_ADVBAYES_DATA")
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)
PIXELS[0, 0, :2] = 0, 255
LABELS = np.array([3, 1, 4, 1, 9], dtype=np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_idx_set(root: Path, folder: str, prefix: str) -> None:
    write_idx(root / folder / "raw" / f"{prefix}-images-idx3-ubyte", PIXELS)
    write_idx(root / folder / "raw" / f"{prefix}-labels-idx1-ubyte", LABELS)


def write_grey(root: Path) -> None:
    np.savez(root / "cifar10bw28.npz", images=PIXELS, labels=LABELS)


def write_omniglot(root: Path) -> None:
    np.savez(root / "omniglot28.npz", images=PIXELS, character_id=LABELS.astype(np.int16), alphabet=np.array(["A"] * 5))


COLOURS = np.stack([np.full((32, 32, 3), 40 * i, dtype=np.uint8) for i in range(5)])
COLOURS += np.array([0, 20, 40], dtype=np.uint8)  # so that a mix-up of channels shows


def cifar_arrays() -> dict[str, np.ndarray]:
    files = []
    for image in COLOURS:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    return {
        "jpeg": np.frombuffer(b"".join(files), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": LABELS,
        "n_train": np.array(3),
    }


def write_cifar(root: Path, **changes) -> None:
    np.savez(root / "cifar10.npz", **(cifar_arrays() | changes))


IDX_SETS = [
    (datasets.mnist, "MNIST", {"split": "train"}, "train"),
    (datasets.mnist, "MNIST", {"split": "test"}, "t10k"),
    (datasets.fashion_mnist, "FashionMNIST", {"split": "train"}, "train"),
    (datasets.fashion_mnist, "FashionMNIST", {"split": "test"}, "t10k"),
    (datasets.notmnist, "notMNIST", {}, "t10k"),
]


@pytest.mark.parametrize(("load", "folder", "split", "prefix"), IDX_SETS)
def test_idx_sets_give_the_bytes_of_the_file_as_inputs(tmp_path, load, folder, split, prefix):
    write_idx_set(tmp_path, folder, prefix)
    x, y = load(tmp_path, **split)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal(x, torch.from_numpy(PIXELS).unsqueeze(1) / 255)
    assert y.tolist() == LABELS.tolist()


@pytest.mark.parametrize(("load", "write"), [(datasets.omniglot, write_omniglot), (datasets.cifar10_grey, write_grey)])
def test_grey_npz_sets_give_the_bytes_of_the_file_as_inputs(tmp_path, load, write):
    write(tmp_path)
    x, y = load(tmp_path)
    assert torch.equal(x, torch.from_numpy(PIXELS).unsqueeze(1) / 255)
    assert y.dtype == torch.int64 and y.tolist() == LABELS.tolist()


def test_cifar10_decodes_the_images_of_its_split(tmp_path):
    write_cifar(tmp_path)
    for split, rows in [("train", slice(0, 3)), ("test", slice(3, 5))]:
        x, y = datasets.cifar10(split, tmp_path)
        assert x.shape == (len(LABELS[rows]), 3, 32, 32) and x.dtype == torch.float32
        wanted = torch.from_numpy(COLOURS[rows]).permute(0, 3, 1, 2) / 255
        assert (x - wanted).abs().max() < 4 / 255  # JPEG, one colour per image
        assert y.tolist() == LABELS[rows].tolist()


def test_scale_and_flatten_change_range_and_shape_only(tmp_path):
    write_idx_set(tmp_path, "MNIST", "t10k")
    plain, scaled = (datasets.mnist("test", tmp_path, **o).x for o in ({}, {"scale": (-1.0, 1.0), "flatten": True}))
    assert scaled.shape == (5, 784)
    assert scaled.min() == -1 and scaled.max() == 1
    torch.testing.assert_close(scaled, 2 * plain.flatten(1) - 1)


def test_a_split_comes_first_and_the_order_of_earlier_versions_is_understood(tmp_path, monkeypatch):
    write_idx_set(tmp_path, "MNIST", "t10k")
    write_idx_set(tmp_path, "MNIST", "train")
    pixels = {split: datasets.mnist(split, tmp_path).x for split in ("train", "test")}
    for found in (datasets.mnist(tmp_path, "test"), datasets.mnist(tmp_path, split="test"), datasets.mnist(split="test", root=tmp_path)):
        assert torch.equal(found.x, pixels["test"])
    for folder in (tmp_path, str(tmp_path)):
        assert torch.equal(datasets.mnist(folder).x, pixels["train"])
    monkeypatch.setenv("PYRO_ADVBAYES_DATA", str(tmp_path))
    assert torch.equal(datasets.mnist("test").x, pixels["test"])
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'tets'"):
        datasets.mnist("tets")


def test_the_environment_names_the_data_folder_and_an_argument_overrides_it(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    write_grey(tmp_path)
    monkeypatch.setenv("PYRO_ADVBAYES_DATA", str(tmp_path))
    assert len(datasets.cifar10_grey().x) == 5
    with pytest.raises(FileNotFoundError, match="empty"):
        datasets.cifar10_grey(tmp_path / "empty")


ALL_SETS = [
    (datasets.mnist, "MNIST/raw/train-images-idx3-ubyte", "torchvision.datasets.MNIST"),
    (datasets.fashion_mnist, "FashionMNIST/raw/train-images-idx3-ubyte", "torchvision.datasets.FashionMNIST"),
    (datasets.notmnist, "notMNIST/raw/t10k-images-idx3-ubyte", "notMNIST-to-MNIST"),
    (datasets.omniglot, "omniglot28.npz", "numpy.savez"),
    (datasets.cifar10, "cifar10.npz", "numpy.savez"),
    (datasets.cifar10_grey, "cifar10bw28.npz", "numpy.savez"),
]


@pytest.mark.parametrize(("load", "file", "remedy"), ALL_SETS)
def test_a_missing_set_says_which_file_where_and_how_to_get_it(tmp_path, monkeypatch, load, file, remedy):
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path)
    message = str(error.value)
    assert file in message and str(tmp_path) in message and remedy in message
    monkeypatch.delenv("PYRO_ADVBAYES_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="PYRO_ADVBAYES_DATA") as error:
        load()
    assert file in str(error.value) and remedy in str(error.value)
    assert "{" not in message + str(error.value)  # every place-holder was filled


def test_a_split_of_another_name_is_refused_before_any_file_is_opened():
    for load in (datasets.mnist, datasets.fashion_mnist, datasets.cifar10):
        with pytest.raises(ValueError, match="split"):
            load("/nowhere", split="val")


IMAGES, LABEL_FILE = "MNIST/raw/t10k-images-idx3-ubyte", "MNIST/raw/t10k-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (IMAGES, lambda path: path.write_bytes(b"")),
        (IMAGES, lambda path: path.write_bytes(path.read_bytes()[:10])),
        (IMAGES, lambda path: path.write_bytes(path.read_bytes()[:-1])),
        (IMAGES, lambda path: path.write_bytes(b"\x1f\x8b\x08\x08" + path.read_bytes())),
        (IMAGES, lambda path: write_idx(path, LABELS)),
        (IMAGES, lambda path: write_idx(path, PIXELS[:, :14])),
        (IMAGES, lambda path: write_idx(path, PIXELS[:0])),
        (LABEL_FILE, lambda path: write_idx(path, LABELS[:-1])),
        (LABEL_FILE, lambda path: write_idx(path, LABELS + 5)),
        (LABEL_FILE, lambda path: write_idx(path, PIXELS)),
    ],
    ids=["empty", "cut-header", "cut-data", "gzip", "labels", "14x28", "no-rows", "too-few", "label-14", "images"],
)
def test_a_broken_idx_file_is_named(tmp_path, file, damage):
    write_idx_set(tmp_path, "MNIST", "t10k")
    damage(tmp_path / file)
    with pytest.raises(ValueError, match="idx"):
        datasets.mnist("test", tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "not a whole npz"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "not a whole npz"),
        (lambda path: path.write_bytes(path.read_bytes().replace(PIXELS.tobytes(), PIXELS[::-1].tobytes())), "CRC"),
        (lambda path: np.savez(path, pixels=PIXELS, labels=LABELS), "it has no array images; it has pixels, labels"),
        (lambda path: np.savez(path, images=PIXELS.astype(object), labels=LABELS), "allow_pickle"),
        (lambda path: np.savez(path, images=PIXELS / 255, labels=LABELS), "images must be 3-dimensional integers"),
        (lambda path: np.savez(path, images=PIXELS[0], labels=LABELS), "images must be 3-dimensional integers"),
        (lambda path: np.savez(path, images=PIXELS.astype(int), labels=LABELS), "uint8"),
        (lambda path: np.savez(path, images=PIXELS[:0], labels=LABELS[:0]), r"\[0, 28, 28\]"),
        (lambda path: np.savez(path, images=PIXELS, labels=LABELS[1:]), "4 labels for 5 images"),
        (lambda path: np.savez(path, images=PIXELS, labels=LABELS.astype(int) - 2), "labels from -1 to 7"),
    ],
    ids=["empty", "cut", "flipped", "keys", "pickled", "floats", "rank", "int64", "no-rows", "too-few", "negative"],
)
def test_a_broken_npz_file_is_named_with_the_reason(tmp_path, damage, reason):
    write_grey(tmp_path)
    damage(tmp_path / "cifar10bw28.npz")
    with pytest.raises(ValueError, match=reason) as error:
        datasets.cifar10_grey(tmp_path)
    assert "cifar10bw28.npz" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"offsets": cifar_arrays()["offsets"] + 1}, "offsets"),
        ({"offsets": np.array([1, *cifar_arrays()["offsets"][1:]])}, "offsets"),
        ({"offsets": np.array([0, 5, 3, 7, 9, len(cifar_arrays()["jpeg"])])}, "offsets"),
        ({"n_train": np.array(5)}, "n_train"),
        ({"labels": LABELS[:2]}, "2 labels for 5 images"),
        ({"jpeg": np.zeros_like(cifar_arrays()["jpeg"])}, "image 0 is not a whole JPEG"),
    ],
)
def test_a_broken_cifar_file_is_named_with_the_reason(tmp_path, changes, reason):
    write_cifar(tmp_path, **changes)
    with pytest.raises(ValueError, match=reason) as error:
        datasets.cifar10(root=tmp_path)
    assert "cifar10.npz" in str(error.value)


def test_a_cifar_image_of_another_size_is_named(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(COLOURS[0, :16]).save(buffer, "JPEG")
    first = cifar_arrays()["offsets"][1]
    jpeg = np.concatenate([np.frombuffer(buffer.getvalue(), dtype=np.uint8), cifar_arrays()["jpeg"][first:]])
    offsets = cifar_arrays()["offsets"] + len(buffer.getvalue()) - first
    offsets[0] = 0
    write_cifar(tmp_path, jpeg=jpeg, offsets=offsets)
    with pytest.raises(ValueError, match=r"image 0 is \[3, 16, 32\]"):
        datasets.cifar10(root=tmp_path)


@pytest.mark.skipif(not REAL, reason="PYRO_ADVBAYES_DATA does not name a folder with the real sets")
@pytest.mark.parametrize(
    ("load", "shape", "mean", "std", "counts"),
    [
        # Means and standard deviations over all pixels, and the number of labels 0 in the set.
        (lambda: datasets.mnist(), (60_000, 1, 28, 28), 0.1307, 0.3081, 5923),
        (lambda: datasets.mnist(split="test"), (10_000, 1, 28, 28), 0.1325, 0.3105, 980),
        (lambda: datasets.fashion_mnist(), (60_000, 1, 28, 28), 0.2860, 0.3530, 6000),
        (lambda: datasets.fashion_mnist(split="test"), (10_000, 1, 28, 28), 0.2868, 0.3524, 1000),
        (lambda: datasets.notmnist(), (10_000, 1, 28, 28), 0.4266, None, 1000),
        (lambda: datasets.omniglot(), (13_180, 1, 28, 28), 0.0843, None, 0),
        (lambda: datasets.cifar10(split="test"), (10_000, 3, 32, 32), 0.4765, None, 1000),
        (lambda: datasets.cifar10_grey(), (10_000, 1, 28, 28), 0.4840, None, 1000),
    ],
    ids=[
        "mnist-train",
        "mnist-test",
        "fashion-train",
        "fashion-test",
        "notmnist",
        "omniglot",
        "cifar10",
        "cifar10-grey",
    ],
)
def test_the_real_sets_have_their_known_shapes_and_moments(load, shape, mean, std, counts):
    try:
        x, y = load()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert x.shape == shape and int((y == 0).sum()) == counts
    assert x.double().mean().item() == pytest.approx(mean, abs=6e-5)
    if std is not None:
        assert x.double().std().item() == pytest.approx(std, abs=6e-5)


def lying(path, shape):
    """An npz file whose header claims another shape than there are numbers."""
    with zipfile.ZipFile(path, "w") as file, file.open("images.npy", "w") as array:
        np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
        array.write(bytes(12))


@pytest.mark.parametrize("shape", [(10**12, 28, 28), (3, 2, 3), (2, 2, 2)])
def test_a_header_that_lies_is_refused_before_there_is_memory_for_it(tmp_path, shape):
    lying(tmp_path / "set.npz", shape)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"set\.npz is not a file of this data set: images of shape .* takes \d+ bytes, and it holds \d+"):
        files.read_npz(tmp_path / "set.npz", {"images": 3})
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    lying(tmp_path / "set.npz", (3, 2, 2))
    assert files.read_npz(tmp_path / "set.npz", {"images": 3})["images"].shape == (3, 2, 2)


def test_a_small_file_that_expands_to_gigabytes_is_refused_within_a_second_and_a_megabyte(tmp_path):
    path = tmp_path / "set.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file, file.open("images.npy", "w") as array:
        np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (300, 1024, 1024)})
        for _ in range(300):
            array.write(bytes(2**20))
    assert path.stat().st_size < 2**21
    start = time.process_time()
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"set\.npz is not a file of this data set: images would expand from \d+ bytes to \d+"):
        files.read_npz(path, {"images": 3})
    assert time.process_time() - start < 1.0 and tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_what_compresses_well_and_is_no_larger_than_images_are_is_read(tmp_path):
    np.savez_compressed(tmp_path / "set.npz", images=np.zeros((64, 256, 256), np.uint8))
    assert files.read_npz(tmp_path / "set.npz", {"images": 3})["images"].shape == (64, 256, 256)
