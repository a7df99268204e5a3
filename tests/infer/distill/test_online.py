from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_advbayes import SGLD
from pyro_advbayes.infer.autoguide.implicit import AutoImplicit
from pyro_advbayes.infer.autoguide.rows import sites_of
from pyro_advbayes.infer.distill import APD, FactoredGenerator, MLPGenerator, OnlineAPD
from pyro_advbayes.infer.distill.reservoir import Reservoir
from tests.small_models import data, logistic, regression

pytestmark = pytest.mark.filterwarnings("ignore:.*keep the draws, or take a smaller generator")


def gaussian():
    """w in two dimensions around (5, -1), sds 2 and 0.5."""
    pyro.sample("w", dist.Normal(torch.tensor([5.0, -1.0]), torch.tensor([2.0, 0.5])).to_event(1))


def reservoir(capacity: int, size: int = 1) -> Reservoir:
    return Reservoir(sites_of({"w": torch.zeros(1, 1, size)}), torch.float32, torch.device("cpu"), capacity)


def test_a_reservoir_keeps_each_of_all_rows_with_the_same_probability():
    kept = torch.zeros(40)
    repeats = 2000
    for _ in range(repeats):
        sample = reservoir(10)
        for part in torch.arange(40.0).view(-1, 1).split(4):
            sample.add(part)
        kept[sample.take(torch.arange(10)).long().flatten()] += 1
    # each is in with probability 1/4: standard error .0097, 40 of them
    assert float((kept / repeats - 0.25).abs().max()) < 4 * 0.0097
    assert sample.seen == 40 and len(sample) == 10


@pytest.mark.parametrize("generator", [MLPGenerator(noise=8, hidden=(32, 32)), FactoredGenerator(rank=2, noise=8, hidden=(32, 32))])
def test_distilled_while_the_chains_run_a_gaussian_is_recovered(generator):
    guide = AutoImplicit(gaussian, generator)
    fit = OnlineAPD(guide, SGLD(gaussian, step_size=0.05, num_steps_per_sample=20), buffer=1000, num_samples=200, num_chains=20).run()
    assert fit.converged and guide.num_draws == 4000
    made = guide.sample(4000)["w"]
    # 4000 draws, of which about one in eight is independent in the wide direction: standard error 0.09
    torch.testing.assert_close(made.mean(0), torch.tensor([5.0, -1.0]), atol=0.4, rtol=0.0)
    torch.testing.assert_close(made.std(0), torch.tensor([2.0, 0.5]), atol=0.0, rtol=0.2)


def test_constrained_sites_are_distilled_in_unconstrained_space():
    x, y = data()
    guide = AutoImplicit(regression, MLPGenerator(noise=4, hidden=(16,)))
    kernel = SGLD(regression, step_size=1e-4, batch_size=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        OnlineAPD(guide, kernel, buffer=100, num_samples=60, num_chains=4, batch_size=50, num_steps=10).run(x, y)
    assert bool((guide.sample(1000)["scale"] > 0).all())
    assert guide(x)["w"].shape == (3,)  # and the model agrees


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_memory_stays_flat_over_a_hundred_thousand_updates():
    seen = {}

    class Watched(SGLD):
        def sample(self, params):
            if self._samples in (200, 1000):
                seen[self._samples] = resident()
            return super().sample(params)

    guide = AutoImplicit(gaussian, MLPGenerator(noise=4, hidden=(16,)))
    kernel = Watched(gaussian, step_size=0.05, num_steps_per_sample=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        OnlineAPD(guide, kernel, buffer=300, num_samples=950, warmup_steps=51, num_chains=1, num_steps=1).run()
    assert kernel.num_steps_per_sample * 1001 > 100_000
    assert seen[1000] - seen[200] < 4 * 2**20


def test_the_papers_preset_ends_with_the_chains():
    guide = AutoImplicit(gaussian, MLPGenerator(noise=4, hidden=(16,)))
    fit = OnlineAPD(guide, SGLD(gaussian, step_size=0.05), 100, 50, 0, num_chains=4, preset="paper", batch_size=50).run()
    assert fit.converged is None and 0 < fit.steps < 60


def test_bad_arguments_are_refused_by_name():
    guide, kernel = AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,))), SGLD(logistic)
    with pytest.raises(ValueError, match="kernel=function"):
        OnlineAPD(guide, logistic)
    for wrong in ({"buffer": 0}, {"num_samples": 0}, {"warmup_steps": -1}, {"num_chains": 1.5}, {"steps_per_sample": 0}, {"ema": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OnlineAPD(guide, kernel, **wrong)
    with pytest.raises(ValueError, match="FactoredGenerator has nothing to train: sample first"):
        OnlineAPD(AutoImplicit(logistic, FactoredGenerator(rank=2, hidden=None)), kernel).run(*data())
    with pytest.raises(ValueError, match="buffer=100: fewer draws than batch_size=256"):
        OnlineAPD(guide, kernel, buffer=100)
    with pytest.raises(ValueError, match="buffer=1000: 4 chains of num_samples=100 do not fill it"):
        OnlineAPD(guide, kernel, num_samples=100)
    with pytest.raises(ValueError, match="element 0 of site 'w' is the same in all"):
        OnlineAPD(guide, SGLD(logistic, step_size=1e-30), buffer=300, num_samples=300, warmup_steps=0, num_chains=1).run(*data())


def test_a_guide_fitted_online_may_be_fitted_again():
    guide = AutoImplicit(gaussian, MLPGenerator(noise=8, hidden=(32, 32)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        OnlineAPD(guide, SGLD(gaussian, step_size=0.05), 300, 100, 10, num_chains=4, num_steps=10).run()
    assert APD(guide).fit({"w": torch.randn(2000, 2)}).converged
