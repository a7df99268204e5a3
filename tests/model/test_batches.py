"""Minibatches: shuffled epochs that never miss or repeat a row, and loaders that can be gone on with where they were left."""

from __future__ import annotations

import warnings

import pyro
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pyro_advbayes.model.batches import Arguments, FullData, Permutations, PlateIndices, TensorRows, in_words
from pyro_advbayes.model.loader import Loader, is_loader
from tests.small_models import data

X, Y = data()
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------ shuffled epochs


@pytest.mark.parametrize("num_data,batch_size", [(12, 4), (12, 5), (7, 7), (7, 1), (5, 4), (11, 6), (1, 1)])
@pytest.mark.parametrize("num_chains", [1, 3])
def test_every_epoch_holds_every_row_once_and_the_rest_of_one_goes_into_the_next(num_data, batch_size, num_chains):
    rows = Permutations(num_data, batch_size, num_chains, seed=3)
    batches = [rows.next().reshape(num_chains, -1) for _ in range(4 * num_data)]
    assert all(batch.shape == (num_chains, batch_size) for batch in batches)
    stream = torch.cat(batches, dim=1)
    epochs = stream[:, : 4 * batch_size * num_data].reshape(num_chains, -1, num_data)
    assert torch.equal(epochs.sort().values, torch.arange(num_data).expand_as(epochs))


def test_epochs_and_chains_are_shuffled_apart():
    rows = Permutations(50, 50, 3, seed=0)
    first, second = rows.next(), rows.next()
    assert len(torch.unique(torch.cat([first, second]), dim=0)) == 6


def test_every_place_of_an_epoch_holds_every_row_equally_often():
    counts = torch.zeros(5, 5)
    for seed in range(2000):
        counts[torch.arange(5), Permutations(5, 5, 1, seed).next()] += 1
    statistic = ((counts - 400).square() / 400).sum()  # chi-square with 16 degrees of freedom
    assert statistic < 40


def test_a_stream_depends_on_its_seed_and_position_alone():
    one, other = Permutations(9, 4, 2, seed=1), Permutations(9, 4, 2, seed=1)
    torch.manual_seed(5)
    ours = [one.next() for _ in range(6)]
    torch.manual_seed(6)
    other.position = 3
    assert torch.equal(other.next(), ours[3]) and torch.equal(other.next(), ours[4])
    assert not torch.equal(Permutations(9, 4, 2, seed=2).next(), ours[0])


def test_many_epochs_are_not_kept():
    rows = Permutations(10, 5, 1, seed=0)
    for _ in range(100):
        rows.next()
    assert len(rows._epochs) <= 2


@pytest.mark.parametrize("num_chains", [1, 2])
def test_rows_of_all_tensors_stay_together(num_chains):
    numbers = torch.arange(10)
    batches = TensorRows([numbers, 10.0 * numbers.unsqueeze(-1).expand(10, 2)], 4, num_chains, seed=0)
    for _ in range(5):
        first, second = batches.next()
        assert first.shape == ((4,) if num_chains == 1 else (2, 4)) and second.shape == (*first.shape, 2)
        assert torch.equal(second[..., 0], 10.0 * first) and torch.equal(second[..., 1], 10.0 * first)
    assert batches.per_chain == (num_chains > 1)


@pytest.mark.parametrize("batch_size,sizes", [(4, [4, 4, 2]), (5, [5, 5]), (10, [10])])
def test_an_epoch_in_order_holds_every_row_once(batch_size, sizes):
    epoch = list(TensorRows([torch.arange(10)], batch_size, 1, seed=0).epoch())
    assert [rows for _, rows in epoch] == sizes
    assert torch.equal(torch.cat([batch[0] for batch, _ in epoch]), torch.arange(10))


def test_a_plates_indices_are_an_epoch_only_where_they_divide_it():
    epoch = list(PlateIndices(10, 5, 1, 0, CPU).epoch())
    assert torch.equal(torch.cat([batch[0] for batch, _ in epoch]), torch.arange(10)) and [rows for _, rows in epoch] == [5, 5]
    with pytest.raises(ValueError, match=r"subsamples 4 of 10 rows.*must divide"):
        list(PlateIndices(10, 4, 1, 0, CPU).epoch())


@pytest.mark.parametrize("make", [lambda seed: TensorRows([X, Y], 7, 2, seed), lambda seed: PlateIndices(60, 7, 2, seed, CPU)])
def test_a_stream_goes_on_from_its_state(make):
    batches, other = make(1), make(2)
    for _ in range(11):
        batches.next()
    other.next()
    other.load(batches.state())
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(batches.next(), other.next(), strict=True))


def test_the_full_data_is_one_batch_with_nothing_to_replace():
    assert FullData().next() == () and list(FullData().epoch()) == [((), 1)] and FullData().state() == {}


# ------------------------------------------------------------------------------------------------------------------ loaders


class Noisy(Dataset):
    """Rows with a draw from PyTorch's global generator added, as data augmentation does."""

    def __len__(self):
        return 20

    def __getitem__(self, row):
        return torch.tensor(float(row)) + 0.1 * torch.rand(()), torch.tensor(row)


class Odd(Sampler):
    """Every other row of twenty."""

    def __len__(self):
        return 10

    def __iter__(self):
        return iter(range(1, 20, 2))


def generator():
    return torch.Generator().manual_seed(8)


def rows(dataset=None):
    return TensorDataset(torch.arange(20)) if dataset is None else dataset


LOADERS = {
    "in order": lambda: DataLoader(rows(), 5),
    "in order, last batch dropped": lambda: DataLoader(rows(), 6, drop_last=True),
    "shuffled": lambda: DataLoader(rows(), 6, shuffle=True),
    "shuffled, last batch dropped": lambda: DataLoader(rows(), 6, shuffle=True, drop_last=True),
    "its own generator": lambda: DataLoader(rows(), 6, shuffle=True, generator=generator()),
    "its sampler's generator": lambda: DataLoader(rows(), 6, sampler=RandomSampler(rows(), generator=generator())),
    "its batch sampler's": lambda: DataLoader(rows(), batch_sampler=BatchSampler(RandomSampler(rows(), generator=generator()), 6, False)),
    "a part of the rows": lambda: DataLoader(rows(), 6, sampler=SubsetRandomSampler(range(15))),
    "rows with noise": lambda: DataLoader(Noisy(), 6, shuffle=True),
    "a list": lambda: [(part,) for part in torch.arange(20).split(5)],
}


def take(batches, count):
    """Batches, with the draws of a sampler between them."""
    taken = []
    for _ in range(count):
        taken.append((batches.next(), torch.randn(3)))
    return taken


@pytest.mark.parametrize("place", [0, 1, 3, 4, 5, 11])
@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_goes_on_where_it_was_left_in_another_process(name, place):
    def start(seed):
        pyro.set_rng_seed(seed)
        return Loader(LOADERS[name](), 20 if name == "a list" else None)

    batches = start(1)
    take(batches, place + 1)
    state, shared = batches.state(), pyro.util.get_rng_state()
    expected = take(batches, 9)
    other = start(77)
    take(other, 2)
    other.load(state)
    pyro.util.set_rng_state(shared)
    for (batch, draw), (again, draw_again) in zip(expected, take(other, 9), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
        assert torch.equal(draw, draw_again)


def test_a_look_at_all_batches_in_between_does_not_move_a_loader():
    """An anchor's gradient is computed over an epoch of its own, which may draw from the loader's generator."""
    loader = Loader(LOADERS["its own generator"](), 20)
    take(loader, 1)
    list(loader.epoch())
    take(loader, 1)
    state, shared = loader.state(), pyro.util.get_rng_state()
    expected = take(loader, 9)
    other = Loader(LOADERS["its own generator"](), 20)
    other.load(state)
    pyro.util.set_rng_state(shared)
    assert all(torch.equal(a[0], b[0]) for (a, _), (b, _) in zip(expected, take(other, 9), strict=True))


def test_every_epoch_of_a_loader_is_complete():
    loader = Loader(DataLoader(rows(), 5, shuffle=True), 20)
    epochs = [torch.cat([loader.next()[0] for _ in range(4)]) for _ in range(3)]
    assert all(torch.equal(epoch.sort().values, torch.arange(20)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("name", ["shuffled", "its batch sampler's", "a part of the rows"])
def test_the_rest_of_a_shuffled_epoch_that_fills_no_batch_is_left_out_except_of_a_run_through_all_rows(name):
    loader = Loader(LOADERS[name](), None)
    full = loader.num_data // 6
    epochs = [torch.cat([loader.next()[0] for _ in range(full)]) for _ in range(50)]
    assert all(len(epoch) == 6 * full == len(epoch.unique()) for epoch in epochs)
    assert torch.equal(torch.cat(epochs).unique(), torch.arange(loader.num_data)), "chance should leave out other rows in every epoch"
    assert [size for _, size in loader.epoch()] == [6] * full + [loader.num_data - 6 * full]


@pytest.mark.parametrize(
    "batches",
    [
        DataLoader(rows(), 6),
        DataLoader(rows(), batch_sampler=BatchSampler(SequentialSampler(range(20)), 6, False)),
        [(part,) for part in torch.arange(20).split(6)],
    ],
)
def test_a_short_batch_in_a_fixed_order_is_refused(batches):
    loader = Loader(batches, 20)
    with pytest.raises(ValueError, match=r"batch 4 of the loader has 2 rows and the first one 6, in a fixed order"):
        loader.check_lengths()
    take(loader, 3)
    with pytest.raises(ValueError, match=r"batch 4 of the loader has 2 rows and the first one 6, in a fixed order.*drop_last=True"):
        loader.next()
    assert sum(size for _, size in loader.epoch()) == 20


@pytest.mark.parametrize("batches", [DataLoader(rows(), 50), DataLoader(rows(), 50, shuffle=True), [(torch.arange(20),)]])
def test_a_data_set_smaller_than_a_batch_is_one_batch(batches):
    loader = Loader(batches, 20)
    assert all(torch.equal(loader.next()[0].sort().values, torch.arange(20)) for _ in range(3))


def test_a_loader_with_other_generators_is_refused():
    state = Loader(LOADERS["its own generator"](), 20).state()
    with pytest.raises(ValueError, match="has 0 random generators of its own: it had 1"):
        Loader(LOADERS["shuffled"](), 20).load(state)


@pytest.mark.parametrize(
    "loader,expected",
    [
        (DataLoader(TensorDataset(X, Y), 8), 60),
        (DataLoader(TensorDataset(X, Y), 8, drop_last=True), 60),
        (DataLoader(TensorDataset(X, Y), 8, sampler=SubsetRandomSampler(range(30))), 30),
        (DataLoader(Noisy(), 8), 20),
        (DataLoader(rows(), batch_sampler=BatchSampler(SubsetRandomSampler(range(15)), 5, False)), 15),
        (DataLoader(rows(), batch_sampler=BatchSampler(RandomSampler(rows()), 5, False)), 20),
        (DataLoader(rows(), 5, sampler=RandomSampler(rows(), num_samples=10)), 20),
        (DataLoader(rows(), 5, sampler=RandomSampler(rows(), replacement=True, num_samples=100)), 20),
        (DataLoader(rows(), 5, sampler=RandomSampler(range(15))), 15),
        (DataLoader(rows(), 5, sampler=WeightedRandomSampler(torch.ones(20), 10)), 20),
        (DataLoader(rows(), 5, sampler=[3, 1, 4, 0, 5]), 5),
        (DataLoader(rows(), 5, sampler=Odd()), 10),
    ],
)
def test_the_rows_behind_a_loader_are_read_off(loader, expected):
    assert Loader(loader, None).num_data == expected


def test_the_rows_behind_custom_batches_must_be_given():
    loader = DataLoader(rows(), batch_sampler=[[0, 1, 2], [3, 4, 5]])
    with pytest.raises(ValueError, match=r"the number of rows behind it must be given, num_data="):
        Loader(loader, None)
    assert Loader(loader, 6).num_data == 6


@pytest.mark.parametrize("sampler", [RandomSampler(range(20)), SubsetRandomSampler(range(20))])
def test_another_number_of_rows_than_a_known_sampler_chooses_from_is_refused(sampler):
    for loader in (DataLoader(rows(), 5, sampler=sampler), DataLoader(rows(), batch_sampler=BatchSampler(sampler, 5, False))):
        with pytest.raises(ValueError, match="num_data=30, but the loader draws from 20 rows"):
            Loader(loader, 30)


def test_the_rows_behind_a_custom_sampler_may_be_given():
    assert Loader(DataLoader(rows(), 5, sampler=Odd()), 20).num_data == 20


def test_a_single_tensor_is_a_tuple_of_one():
    assert [value.shape for value in Loader(DataLoader(X, 8), None).example] == [(8, 3)]


@pytest.mark.parametrize(
    "args,kwargs,expected",
    [
        ((DataLoader(X, 8),), {}, True),
        (([(X, Y)],), {}, True),
        ((X,), {}, False),
        ((X, Y), {}, False),
        ((), {"x": X}, False),
        ((), {}, False),
        (({"x": X},), {}, False),
        (("x",), {}, False),
        ((3.0,), {}, False),
        ((X.numpy(),), {}, False),
        ((torch.nn.Sequential(torch.nn.ReLU()),), {}, False),
    ],
)
def test_one_argument_that_can_be_run_through_is_a_loader(args, kwargs, expected):
    assert is_loader(args, kwargs) is expected


# ---------------------------------------------------------------------------------------------------------------- arguments


def model(x, y=None, *, table=None, strength=1.0):
    return None


def test_tensors_among_the_arguments_can_be_replaced_and_the_rest_stays():
    arguments = Arguments(model, (X, "plain"), {"table": Y, "strength": 2.0})
    assert arguments.labels == ["x", "table"] and arguments.lengths() == {"x": 60, "table": 60}
    args, kwargs = arguments.replace([X[:2], Y[:2]])
    assert torch.equal(args[0], X[:2]) and args[1] == "plain" and torch.equal(kwargs["table"], Y[:2]) and kwargs["strength"] == 2.0


def test_arguments_are_named_as_the_model_names_them():
    class Module(torch.nn.Module):
        def forward(self, inputs, labels):
            return None

    assert Arguments(Module(), (X, Y), {}).labels == ["inputs", "labels"]
    assert Arguments(lambda *args: None, (X, Y), {}).labels == ["args", "args[1]"]


def test_every_tensor_as_long_as_the_first_holds_data():
    arguments = Arguments(model, (X, torch.tensor(1.0), torch.ones(3), Y), {})
    assert arguments.rows(None) == ([0, 3], 60)
    assert Arguments(model, (torch.tensor(1.0), X), {}).rows(None) == ([1], 60)


def test_lengths_in_words():
    assert in_words({"x": 60, "y": 59}) == "x has 60 rows, y has 59 rows"


def test_a_loader_that_draws_rows_with_unequal_weights_is_warned_of():
    """The usual recipe for rare classes samples another posterior: that of data in which they are not rare."""
    y = torch.cat([torch.ones(10), torch.zeros(90)])
    dataset = TensorDataset(torch.randn(100, 2), y)
    even, uneven = (WeightedRandomSampler(weights, 100) for weights in (torch.ones(100), 1.0 + 9.0 * y))
    with pytest.warns(UserWarning, match="rows with unequal weights"):
        Loader(DataLoader(dataset, 20, sampler=uneven), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loader(DataLoader(dataset, 20, sampler=even), None)
