from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from pyro_advbayes.datasets import digits


def rows(x: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, x.flatten(1).tolist()))


def test_the_two_splits_are_disjoint_and_make_up_the_whole_set():
    train, test = digits("train"), digits("test")
    assert len(train.x) == 1437 and len(test.x) == 360
    whole = torch.from_numpy(load_digits().data / 16).float()
    assert rows(torch.cat([train.x, test.x])) == rows(whole)


def test_labels_stay_with_their_images():
    known = {tuple(row): label for row, label in zip(load_digits().data.tolist(), load_digits().target, strict=True)}
    x, y = digits("test", flatten=True)
    assert [known[tuple(row)] for row in (16 * x).tolist()] == y.tolist()


def test_the_cut_is_stratified():
    share = torch.bincount(digits("test").y, minlength=10) / torch.bincount(torch.from_numpy(load_digits().target), minlength=10)
    assert ((share - 0.2).abs() < 1 / 170).all()  # a class has at least 174 images, and a cut is off by less than one


def test_the_cut_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = digits("train", seed=5)
    torch.manual_seed(2)
    assert torch.equal(digits("train", seed=5).x, first.x)
    assert not torch.equal(digits("train", seed=6).x, first.x)
    assert len(digits("test", test_fraction=0.5).x) == 899


def test_digits_are_float32_images_or_rows_in_the_asked_range():
    x, y = digits()
    assert x.shape == (1437, 1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.min() == 0 and x.max() == 1
    flat = digits(scale=(-1.0, 1.0), flatten=True).x
    assert flat.shape == (1437, 64)
    torch.testing.assert_close(flat, 2 * x.flatten(1) - 1)
    assert flat.min() == -1 and flat.max() == 1


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"split": "val"}, "split.*'val'"),
        ({"test_fraction": 0.0}, "test_fraction"),
        ({"test_fraction": 1.5}, "test_fraction"),
        ({"scale": (1.0, 0.0)}, "scale"),
        ({"scale": (0.0, float("inf"))}, "scale"),
        ({"scale": (0.0, 1.0, 2.0)}, "scale"),
    ],
)
def test_bad_digits_arguments_are_named(arguments, culprit):
    with pytest.raises(ValueError, match=culprit):
        digits(**arguments)
