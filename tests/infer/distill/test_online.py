from __future__ import annotations

import ctypes
import functools
import gc
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

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
    """Bytes in memory, without those that were freed and that the allocator keeps for what comes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_memory_stays_flat_over_ten_thousand_updates():
    seen, size = {}, 5000

    def wide():
        pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    class Watched(SGLD):
        def sample(self, params):
            if self.chains.counts.samples in (200, 1000):
                seen[self.chains.counts.samples] = resident()
            return super().sample(params)

    guide = AutoImplicit(wide, MLPGenerator(noise=4, hidden=(4,)))
    kernel = Watched(wide, step_size=0.05, num_steps_per_sample=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        OnlineAPD(guide, kernel, buffer=100, num_samples=950, warmup_steps=51, num_chains=1, batch_size=64, num_steps=1).run()
    assert kernel.num_steps_per_sample * 1001 > 10_000
    # of the 800 draws between, which take 16 MB, none stays; a sixteenth is for what Python keeps, 125 bytes an update
    assert seen[1000] - seen[200] < 800 * 4 * size / 16


def test_the_papers_preset_ends_with_the_chains():
    guide = AutoImplicit(gaussian, MLPGenerator(noise=4, hidden=(16,)))
    fit = OnlineAPD(guide, SGLD(gaussian, step_size=0.05), 100, 50, 0, num_chains=4, preset="paper", batch_size=50).run()
    assert fit.converged is None and fit.steps == 26  # from the 25th sample on, at which the buffer is full


def test_a_basis_found_at_the_last_sample_does_not_change_what_is_made():
    made = []

    class Watched(FactoredGenerator):
        def prepare(self, *args):
            z = torch.linspace(-1.0, 1.0, 4 * self.noise).view(4, self.noise)
            made.append([self.parts(z)[0]])
            super().prepare(*args)
            made[-1].append(self.parts(z)[0])

    guide = AutoImplicit(gaussian, Watched(rank=2, noise=4, hidden=(16,)))
    kernel = SGLD(gaussian, step_size=0.05, num_steps_per_sample=20)
    OnlineAPD(guide, kernel, 100, 200, 0, num_chains=4, preset="paper", batch_size=50, learning_rate=1e-2).run()
    assert len(made) == 4  # at 100, 200, 400 and 800 draws, of 800
    for before, after in made[1:]:
        torch.testing.assert_close(before, after, atol=1e-3, rtol=1e-3)


def test_steps_after_the_chains_are_taken_where_they_are_asked_for(tmp_path):
    path = tmp_path / "online.safetensors"

    def run(**options):
        guide = AutoImplicit(gaussian, MLPGenerator(noise=4, hidden=(16,)))
        return OnlineAPD(guide, SGLD(gaussian, step_size=0.05), 100, 50, 0, num_chains=4, preset="paper", batch_size=50, **options).run()

    assert run(num_steps=9).steps == 26 + 9
    for options, steps in (({}, 26), ({"num_steps": 9}, 26 + 9)):
        assert run(checkpoint=path, checkpoint_every=40, overwrite=True, **options).steps == steps  # the last at the 40th sample
        guide = AutoImplicit(gaussian, MLPGenerator(noise=4, hidden=(16,)))
        assert OnlineAPD.resume(path, guide, SGLD(gaussian, step_size=0.05)).steps == steps


def test_bad_arguments_are_refused_by_name():
    guide, kernel = AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,))), SGLD(logistic)
    with pytest.raises(ValueError, match="kernel=function"):
        OnlineAPD(guide, logistic)
    with pytest.raises(ValueError, match="guide: its model is 'logistic', and the kernel samples 'regression': give both the same model"):
        OnlineAPD(guide, SGLD(regression))
    for wrong in (
        {"buffer": 0},
        {"num_samples": 0},
        {"warmup_steps": -1},
        {"num_chains": 1.5},
        {"checkpoint_every": 0},
        {"ema": 2.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OnlineAPD(guide, kernel, **wrong)
    with pytest.raises(ValueError, match="FactoredGenerator has nothing to train: sample first"):
        OnlineAPD(AutoImplicit(logistic, FactoredGenerator(rank=2, hidden=None)), kernel).run(*data())
    with pytest.raises(ValueError, match="buffer=100: fewer draws than batch_size=256"):
        OnlineAPD(guide, kernel, buffer=100)
    with pytest.raises(ValueError, match="3 draws cannot be split into two sets"):
        OnlineAPD(guide, kernel, buffer=3, batch_size=2)
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


SMALL = {"buffer": 60, "num_samples": 60, "warmup_steps": 20, "num_chains": 2, "batch_size": 40, "num_steps": 60, "check_every": 10}


class Stopped(Exception):
    pass


class Mortal(SGLD):
    """Dies before it has given as many samples."""

    last: int | None = None

    def sample(self, params):
        if self.chains.counts.samples == self.last:
            raise Stopped
        return super().sample(params)


def mortal(batch_size: int | None = 20) -> Mortal:
    return Mortal(logistic, step_size=1e-2, batch_size=batch_size, backend="handlers")  # which needs no time to be traced


def loader():
    return (DataLoader(TensorDataset(*data()), 20, shuffle=True),)


def small(kind) -> AutoImplicit:
    return AutoImplicit(logistic, kind(noise=4, hidden=(16,), **({"rank": 2} if kind is FactoredGenerator else {})))


IN_WARMUP, BEFORE_IT_LEARNS, AS_IT_LEARNS, AFTER_THE_CHAINS = 15, 45, 75, None


@pytest.mark.parametrize(
    "preset,kind,arguments,dies",
    [
        ("fast", MLPGenerator, data, IN_WARMUP),
        ("fast", MLPGenerator, data, BEFORE_IT_LEARNS),
        ("fast", MLPGenerator, data, AS_IT_LEARNS),
        ("fast", FactoredGenerator, data, AFTER_THE_CHAINS),
        ("paper", MLPGenerator, loader, AS_IT_LEARNS),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, preset, kind, arguments, dies):
    path, results, batch_size = tmp_path / "online.safetensors", [], None if arguments is loader else 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyro.set_rng_seed(3)
        whole = small(kind)
        fit = OnlineAPD(whole, mortal(batch_size), preset=preset, **SMALL).run(*arguments())
        results.append(whole.sample(10)["w"])
        pyro.set_rng_seed(3)
        run = OnlineAPD(small(kind), mortal(batch_size), preset=preset, checkpoint=path, checkpoint_every=7, **SMALL)
        run.kernel.last = dies
        if dies is None:  # the last checkpoint is short of the end
            run.run(*arguments())
        else:
            with pytest.raises(Stopped):
                run.run(*arguments())
        pyro.set_rng_seed(999)
        again = small(kind)
        resumed = OnlineAPD.resume(path, again, mortal(batch_size), *arguments())
        results.append(again.sample(10)["w"])
    assert resumed == fit and again.num_draws == whole.num_draws == 120
    assert torch.equal(*results)


@pytest.mark.parametrize("model", [functools.partial(logistic), poutine.scale(scale=0.5)(logistic)])
def test_a_model_that_is_no_plain_function_is_distilled_and_resumed(tmp_path, model):
    path, results = tmp_path / "online.safetensors", []
    kernel = SGLD(model, step_size=1e-2, batch_size=20, backend="handlers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for start in (
            lambda guide: OnlineAPD(guide, kernel, checkpoint=path, checkpoint_every=7, **SMALL).run(*data()),
            lambda guide: OnlineAPD.resume(path, guide, kernel, *data()),
        ):
            guide = AutoImplicit(model, MLPGenerator(noise=4, hidden=(16,)))
            start(guide)
            pyro.set_rng_seed(1)
            results.append(guide.sample(10)["w"])
    assert torch.equal(*results)


def test_a_checkpoint_is_of_one_run_and_is_never_overwritten_or_half_written(tmp_path, monkeypatch):
    path, (x, y) = tmp_path / "online.safetensors", data()

    def start(**changes):
        return OnlineAPD(small(MLPGenerator), mortal(), checkpoint=path, checkpoint_every=7, **{**SMALL, **changes})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start().run(x, y)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        start().run(x, y)
    with pytest.raises(FileNotFoundError, match="no such file"):
        OnlineAPD.resume(tmp_path / "none.safetensors", small(MLPGenerator), mortal(), x, y)
    others = {
        "its data is": (small(MLPGenerator), mortal(), x, 1 - y),
        "settings.*batch_size": (small(MLPGenerator), Mortal(logistic, step_size=1e-2, batch_size=30, backend="handlers"), x, y),
        "its kernel is Mortal, here it is SGLD": (small(MLPGenerator), SGLD(logistic, step_size=1e-2, batch_size=20), x, y),
        r"its generator\['name'\] is MLPGenerator, here it is FactoredGenerator": (small(FactoredGenerator), mortal(), x, y),
        r"its generator\['noise'\] is 4, here it is 5": (AutoImplicit(logistic, MLPGenerator(5, (16,))), mortal(), x, y),
    }
    for message, (guide, kernel, *arguments) in others.items():
        with pytest.raises(ValueError, match=message):
            OnlineAPD.resume(path, guide, kernel, *arguments)
    assert path.read_bytes() == before
    # what dies while it writes leaves the last whole file
    monkeypatch.setattr("pyro_advbayes.storage.files.save_file", lambda tensors, name, **_: (open(name, "wb").write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        start(overwrite=True).run(x, y)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [path.name]
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match="is truncated"):
        OnlineAPD.resume(path, small(MLPGenerator), mortal(), x, y)


def test_files_of_another_kind_are_refused(tmp_path):
    offline, online, guide = (tmp_path / f"{name}.safetensors" for name in ("offline", "online", "guide"))
    w = torch.randn(100, 3)
    samples = {"w": w, "b": w[:, 0] + w[:, 1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = small(MLPGenerator)
        APD(fitted, batch_size=40, num_steps=20, checkpoint=offline, checkpoint_every=10).fit(samples)
        fitted.save(guide)
        OnlineAPD(small(MLPGenerator), mortal(), checkpoint=online, checkpoint_every=10, **SMALL).run(*data())
    for path in (offline, guide):
        with pytest.raises(ValueError, match=f"{path.name} is no checkpoint of OnlineAPD"):
            OnlineAPD.resume(path, small(MLPGenerator), mortal(), *data())
    for path in (online, guide):
        with pytest.raises(ValueError, match=f"{path.name} is no checkpoint of APD"):
            APD.resume(path, small(MLPGenerator), samples)
    for path in (online, offline):
        with pytest.raises(ValueError, match=f"{path.name} is no file of AutoImplicit"):
            AutoImplicit.load(path, logistic)
    for path in (online, offline, guide):
        with pytest.raises(ValueError, match=f"{path.name} is no file of draws"):
            APD(small(MLPGenerator)).fit(path)


def test_what_the_chains_give_is_checked_as_draws_of_others_are():
    sample = reservoir(10, size=3)
    rows = torch.randn(10, 3)
    rows[4, 1] = torch.nan
    sample.add(rows)
    with pytest.raises(ValueError, match="the chains: draw 4 of site 'w' is not finite"):
        sample.moments()
    own = torch.nn.Linear(2, 5)
    own.noise = 2
    with pytest.raises(ValueError, match=r"Linear makes \(2, 5\) of noise \(2, 2\): \(2, 4\) is needed"):
        OnlineAPD(AutoImplicit(logistic, own), mortal(), **SMALL).run(*data())
    with pytest.raises(ValueError, match="rank=5: the sites hold 4 numbers"):
        OnlineAPD(AutoImplicit(logistic, FactoredGenerator(rank=5)), mortal(), **SMALL).run(*data())


def test_a_run_that_stopped_at_a_checkpoint_is_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_advbayes.infer.distill.stopping.PATIENCE", 1)
    path, guides = tmp_path / "online.safetensors", [small(MLPGenerator), small(MLPGenerator)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {**SMALL, "num_steps": 500, "learning_rate": 1e-9}
        fit = OnlineAPD(guides[0], mortal(), checkpoint=path, checkpoint_every=10, **options).run(*data())
        again = OnlineAPD.resume(path, guides[1], mortal(), *data())
    assert not fit.converged and again == fit
    for name, value in guides[0].network.state_dict().items():
        assert torch.equal(value, guides[1].network.state_dict()[name])
