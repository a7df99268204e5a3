"""A run is resumed with the same loader, model and functions, told by what they give and not by what they are called; or not at all."""

from __future__ import annotations

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import pyro_advbayes as ab
from pyro_advbayes.infer.mcmc.adversary import L2, Generator
from tests.small_models import data, logistic, weights

X, Y = data()


def run(checkpoint, kernel, arguments, stop=None, samples=6, **options):
    """Interrupted after so many samples, or finished."""

    def hook(kernel, params, stage, i):
        if kernel.chains.counts.samples == stop:
            raise KeyboardInterrupt

    pyro.set_rng_seed(3)
    files = {} if checkpoint is None else {"checkpoint": checkpoint, "checkpoint_every": 2}
    mcmc = ab.SGMCMC(kernel, samples, 2, 2, disable_progbar=True, hook_fn=hook, **files, **options)
    if stop is None:
        mcmc.run(*arguments)
    else:
        with pytest.raises(KeyboardInterrupt):
            mcmc.run(*arguments)
    return mcmc


def resumed(checkpoint, kernel, arguments):
    pyro.set_rng_seed(12345)
    return ab.SGMCMC.resume(checkpoint, kernel, *arguments, disable_progbar=True)


def sgld(model=logistic, **options):
    return ab.SGLD(model, 1e-3, backend="handlers", **options)


# ------------------------------------------------------------------------------------------------------------------- loaders


class Rows(Dataset):
    """A data set of one's own."""

    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return self.x[row], self.y[row]


class Augmented(Rows):
    """Moves inputs by noise of its own generator, or of PyTorch's."""

    def __init__(self, scale=0.1, seed=None):
        super().__init__()
        self.scale, self.generator = scale, None if seed is None else torch.Generator().manual_seed(seed)

    def __getitem__(self, row):
        return self.x[row] + self.scale * torch.randn(3, generator=self.generator), self.y[row]


class Stream(IterableDataset):
    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __iter__(self):
        return iter([(self.x[row], self.y[row]) for row in torch.randperm(len(self.x))])


def shrunk(items):
    x, y = torch.utils.data.default_collate(items)
    return 0.5 * x, y


def batches(x=X, y=Y, size=20):
    return list(zip(x.split(size), y.split(size), strict=True))


def last_changed():
    """Another label in the very last row."""
    y = Y.clone()
    y[-1] = 1 - y[-1]
    return y


WEIGHTS = torch.ones(60)
OTHER_WEIGHTS = torch.cat([torch.ones(59), torch.tensor([1.00001])])
KERNEL = {"num_data": 60}
LOADERS = {  # the loader, another one of which nothing but the data or the choice of rows differs, options of the kernel
    "data set of one's own": (
        lambda: DataLoader(Rows(), 20, shuffle=True),
        lambda: DataLoader(Rows(y=last_changed()), 20, shuffle=True),
        {},
    ),
    "inputs of one's own": (lambda: DataLoader(Rows(), 20, shuffle=True), lambda: DataLoader(Rows(X + 1e-6), 20, shuffle=True), {}),
    "augmented": (lambda: DataLoader(Augmented(), 20, shuffle=True), lambda: DataLoader(Augmented(0.11), 20, shuffle=True), {}),
    "augmented by its own generator": (
        lambda: DataLoader(Augmented(seed=1), 20, shuffle=True),
        lambda: DataLoader(Augmented(0.11, seed=1), 20, shuffle=True),
        {},
    ),
    "subset": (
        lambda: DataLoader(Subset(TensorDataset(X, Y), range(40)), 20, shuffle=True),
        lambda: DataLoader(Subset(TensorDataset(X, Y), range(1, 41)), 20, shuffle=True),
        {},
    ),
    "subset of a sampler": (
        lambda: DataLoader(TensorDataset(X, Y), 20, sampler=SubsetRandomSampler(range(40))),
        lambda: DataLoader(TensorDataset(X, Y), 20, sampler=SubsetRandomSampler(range(1, 41))),
        {},
    ),
    "stream": (lambda: DataLoader(Stream(), 20), lambda: DataLoader(Stream(y=last_changed()), 20), {}),
    "list": (batches, lambda: batches(y=last_changed()), KERNEL),
    "list of many": (lambda: batches(size=1), lambda: batches(y=last_changed(), size=1), KERNEL),
    "collate_fn": (
        lambda: DataLoader(TensorDataset(X, Y), 20, shuffle=True),
        lambda: DataLoader(TensorDataset(X, Y), 20, shuffle=True, collate_fn=shrunk),
        {},
    ),
    "weights": (
        lambda: DataLoader(TensorDataset(X, Y), 20, sampler=WeightedRandomSampler(WEIGHTS, 60)),
        lambda: DataLoader(TensorDataset(X, Y), 20, sampler=WeightedRandomSampler(OTHER_WEIGHTS, 60)),
        {},
    ),
}


@pytest.mark.filterwarnings("ignore:the loader draws its rows with unequal weights")
@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_is_known_by_what_it_gives(tmp_path, name):
    make, other, options = LOADERS[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the loader cannot be replayed")
        run(tmp_path / "run", sgld(**options), (make(),), stop=3, samples=2)
        with pytest.raises(ValueError, match="run is of another run: its data is"):
            resumed(tmp_path / "run", sgld(**options), (other(),))
        again = resumed(tmp_path / "run", sgld(**options), (make(),))
        if name in ("data set of one's own", "augmented by its own generator", "stream", "list of many"):
            whole = run(None, sgld(**options), (make(),), samples=2)
            assert torch.equal(again.get_samples()["w"], whole.get_samples()["w"]), "looking at a loader changes nothing"


def test_a_loader_with_workers_that_live_on_is_looked_at_and_resumed(tmp_path):
    make = lambda: DataLoader(Rows(), 20, shuffle=True, num_workers=1, persistent_workers=True)  # noqa: E731
    whole = run(None, sgld(), (make(),), samples=2)
    run(tmp_path / "run", sgld(), (make(),), stop=3, samples=2)
    again = resumed(tmp_path / "run", sgld(), (make(),))
    assert torch.equal(again.get_samples()["w"], whole.get_samples()["w"])


class Hidden(Rows):
    """Noise of a generator that nobody can set back."""

    def __init__(self):
        super().__init__()
        self.random = np.random.default_rng(0)

    def __getitem__(self, row):
        return self.x[row] + 0.1 * torch.from_numpy(self.random.standard_normal(3)).float(), self.y[row]


def test_a_loader_that_cannot_be_replayed_is_named_when_the_run_starts(tmp_path):
    seen = []

    def hook(kernel, params, stage, i):
        seen.append(i)

    loader = DataLoader(Hidden(), 20)
    mcmc = ab.SGMCMC(sgld(), 3, 2, 2, disable_progbar=True, hook_fn=hook, checkpoint=tmp_path / "run")
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=r"the loader cannot be replayed: .*Hidden.* gave other batches"):
        warnings.simplefilter("error")
        mcmc.run(loader)
    assert not seen
    with pytest.warns(UserWarning, match="cannot be replayed"):
        run(tmp_path / "other", sgld(), (loader,))
    with pytest.warns(UserWarning, match="cannot be replayed"):
        resumed(tmp_path / "other", sgld(), (DataLoader(Hidden(), 20),))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the loader cannot be replayed")
        run(None, sgld(), (loader,))  # which nobody can resume


def test_a_look_at_a_loader_is_short():
    """At most 16 batches, and no more than 16 MiB after the first."""
    from pyro_advbayes.model.loader import Loader

    taken = []

    class Counted(Rows):
        def __getitem__(self, row):
            taken.append(row)
            return super().__getitem__(row % 60)

        def __len__(self):
            return 10_000

    batches = Loader(DataLoader(Counted(), 10), None)
    taken.clear()
    assert len(list(batches.first_batches())) == 16 and len(taken) == 160
    large = Loader([(torch.zeros(1, 2**22), torch.zeros(1))] * 8, 8)
    assert len(list(large.first_batches())) == 1


# -------------------------------------------------------------------------------------------------------- priors, likelihoods


def named_alike(model):
    model.__qualname__ = model.__name__ = "model"
    return model


def with_prior(make):
    """``make`` is given a number, which is 1.0 or differs from it by 1e-5."""

    def choose(number):
        def model(x, y):
            logits = x @ make(number)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)

        return named_alike(model)

    return choose


def grouped(number):
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    return pyro.sample("w", dist.Normal(torch.zeros(3), number * scale).to_event(1))


def by_factor(number):
    w = pyro.sample("w", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    pyro.factor("prior", -0.5 * number * w.square().sum() - 100.0 * number)
    return w


PRIORS = {
    "scale": lambda number: pyro.sample("w", dist.Normal(torch.zeros(3), number).to_event(1)),
    "location": lambda number: pyro.sample("w", dist.Normal(torch.full((3,), number - 1.0), 1.0).to_event(1)),
    "of one element": lambda number: pyro.sample("w", dist.Normal(0.0, torch.tensor([1.0, 1.0, number])).to_event(1)),
    "hierarchical": grouped,
    "transformed": lambda number: pyro.sample("w", dist.LogNormal(torch.zeros(3), number).to_event(1)),
    "heavy-tailed": lambda number: pyro.sample("w", dist.StudentT(3.0, 0.0, number).expand([3]).to_event(1)),
    "mixture": lambda number: pyro.sample(
        "w", dist.MixtureSameFamily(dist.Categorical(torch.ones(3, 2)), dist.Normal(torch.zeros(3, 2), number)).to_event(1)
    ),
    "correlated": lambda number: pyro.sample("w", dist.MultivariateNormal(torch.zeros(3), scale_tril=number * torch.eye(3))),
    "factor": by_factor,
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_that_differs_by_little_is_another_model(tmp_path, name):
    choose = with_prior(PRIORS[name])
    kernel = lambda number: sgld(choose(number), batch_size=10)  # noqa: E731
    run(tmp_path / "run", kernel(1.0), (X, Y), stop=3, samples=2)
    with pytest.raises(ValueError, match=r"run is of another model: the (prior|density) at site '(w|prior)' is another"):
        resumed(tmp_path / "run", kernel(1.00001), (X, Y))
    resumed(tmp_path / "run", kernel(1.0), (X, Y))


def test_a_likelihood_whose_scale_differs_by_little_is_another_model(tmp_path):
    def with_scale(scale):
        def model(x, y):
            mean = x @ weights()
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(mean, scale), obs=y)

        return sgld(named_alike(model), batch_size=10)

    run(tmp_path / "run", with_scale(1.0), (X, Y), stop=3, samples=2)
    with pytest.raises(ValueError, match=r"run is of another model: (the density at site 'obs' is another|.*energy)"):
        resumed(tmp_path / "run", with_scale(1.00003), (X, Y))


def test_priors_that_differ_by_rounding_are_the_same(tmp_path):
    choose = with_prior(PRIORS["scale"])
    run(tmp_path / "run", sgld(choose(1.0), batch_size=10), (X, Y), stop=3, samples=2)
    resumed(tmp_path / "run", sgld(choose(1.0 + 2e-7), batch_size=10), (X, Y))


# ------------------------------------------------------------------------------------------------------------ functions of BAL


def bal(**options):
    options = {"inputs": ab.SGLD.rule(0.1, 2), "weights": ab.SGLD.rule(1e-4, 2), "cost": L2(1.0), **options}
    return ab.BAL(logistic, "x", 10, backend="handlers", **options)


def quadratic(weight):
    def cost(perturbed, clean):
        return weight * (perturbed - clean).square().sum(-1)

    return cost


def quartic(perturbed, clean):
    return (perturbed - clean).pow(4).sum(-1)


def capped(perturbed, clean):
    """Like the quadratic one near the input alone."""
    return (perturbed - clean).square().sum(-1).clamp_max(1.0)


def margin(weight):
    def loss(model, clean, args, kwargs):
        x, y = args
        return -weight * (2.0 * y - 1.0) * model(x, y)

    return loss


def network(scale, activation=nn.Tanh):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return net


FUNCTIONS = {
    "cost's number": ({"cost": quadratic(1.0)}, {"cost": quadratic(1.001)}, "cost"),
    "cost's form": ({"cost": quadratic(1.0)}, {"cost": quartic}, "cost"),
    "cost far away": ({"cost": quadratic(1.0)}, {"cost": capped}, "cost"),
    "loss": ({"loss": margin(1.0)}, {"loss": margin(1.001)}, "loss"),
    "generator's weights": ({"adversary": Generator(network(0.1), 0.5)}, {"adversary": Generator(network(0.10001), 0.5)}, "adversary"),
    "generator's layers": ({"adversary": Generator(network(0.5), 0.5)}, {"adversary": Generator(network(0.5, nn.ReLU), 0.5)}, "adversary"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_known_by_what_they_compute(tmp_path, name):
    options, others, what = FUNCTIONS[name]
    run(tmp_path / "run", bal(**options), (X, Y), stop=3, samples=2)
    with pytest.raises(ValueError, match=f"run is of another run: its {what} computes other numbers"):
        resumed(tmp_path / "run", bal(**others), (X, Y))
    resumed(tmp_path / "run", bal(**options), (X, Y))


def test_functions_of_other_names_that_compute_the_same_are_the_same(tmp_path):
    def renamed(perturbed, clean):
        return (perturbed - clean).pow(2).sum(-1)

    def renamed_loss(model, clean, args, kwargs):
        return margin(1.0)(model, clean, args, kwargs)

    run(tmp_path / "run", bal(cost=quadratic(1.0), loss=margin(1.0)), (X, Y), stop=3, samples=2)
    resumed(tmp_path / "run", bal(cost=renamed, loss=renamed_loss), (X, Y))


def test_a_function_in_place_of_the_likelihood_is_another_run(tmp_path):
    run(tmp_path / "run", bal(), (X, Y), stop=3, samples=2)
    with pytest.raises(ValueError, match=r"run is of another run: its settings\['(loss|cost)'\]"):
        resumed(tmp_path / "run", bal(loss=margin(1.0)), (X, Y))
    with pytest.raises(ValueError, match=r"run is of another run: its settings\['(loss|cost)'\]"):
        resumed(tmp_path / "run", bal(cost=quadratic(1.0)), (X, Y))


def test_a_function_that_draws_random_numbers_changes_none_of_the_samples(tmp_path):
    def noisy(model, clean, args, kwargs):
        return torch.rand(len(clean)) * margin(1.0)(model, clean, args, kwargs)

    whole = run(None, bal(loss=noisy), (X, Y), samples=2)
    run(tmp_path / "run", bal(loss=noisy), (X, Y), stop=3, samples=2)
    assert torch.equal(resumed(tmp_path / "run", bal(loss=noisy), (X, Y)).get_samples()["w"], whole.get_samples()["w"])
