from __future__ import annotations

import math
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_advbayes import SGLD, SGMCMC, Potential, Predictive
from pyro_advbayes.infer.autoguide.factored import principal_components
from pyro_advbayes.infer.autoguide.implicit import AutoImplicit
from pyro_advbayes.infer.autoguide.rows import SampleRows, read_samples, sites_of
from pyro_advbayes.infer.distill import APD, PRESETS, FactoredGenerator, Fit, HyperGenerator, MLPGenerator
from pyro_advbayes.infer.distill.wgan import WGAN
from pyro_advbayes.infer.mcmc.noise import NormalNoise
from pyro_advbayes.nn import bayesianize
from pyro_advbayes.storage.draws import Field, FileDraws
from tests.small_models import data, logistic, regression

pytestmark = pytest.mark.filterwarnings("ignore:.*keep the draws, or take a smaller generator")


def vector(size: int):
    def model(x=None):
        return pyro.sample("w", dist.Normal(torch.zeros(size), 3.0).to_event(1))

    return model


def two_modes(count: int = 4000, size: int = 6, share: float = 0.3):
    """Unit-normal clouds of sd 0.5 at ±2 in every coordinate."""
    second = torch.rand(count) < share
    return torch.where(second, -2.0, 2.0)[:, None] + 0.5 * torch.randn(count, size), float(second.float().mean())


def correlated(count: int = 2000):
    """A Gaussian in five coordinates, and the factor of its covariance."""
    factor = torch.randn(5, 5)
    return 3.0 + torch.randn(count, 5) @ factor.mT, factor @ factor.mT


def test_the_default_fit_finds_both_modes_of_a_toy_and_their_weights_within_a_minute():
    w, share = two_modes(2000)
    guide = AutoImplicit(vector(6), MLPGenerator(noise=16, hidden=(64, 64)))
    start = time.process_time()
    fit = APD(guide).fit({"w": w})
    assert time.process_time() - start < 60.0
    assert fit.converged and fit.distance < 2 * fit.floor
    made = guide.sample(20_000)["w"]
    second = made.mean(-1) < 0
    assert abs(float(second.float().mean()) - share) < 0.05
    for which, centre in ((second, -2.0), (~second, 2.0)):
        assert float((made[which].mean(0) - centre).abs().max()) < 0.2
        assert bool((made[which].std(0) < 1.0).all()) and bool((made[which].std(0) > 0.3).all())


def test_a_wgan_recovers_weights_means_and_covariances_of_a_mixture():
    w, share = two_modes(size=2)
    guide = AutoImplicit(vector(2), MLPGenerator(noise=8, hidden=(32, 32)))
    settings = {"num_steps": 1200, "learning_rate": 5e-3, "batch_size": 64, "ema": 0.99}
    # With the published penalty, 10, the variances of the larger mode are 0.16 (five seeds) where they should be 0.25. The numbers below
    # are those of seven seeds.
    APD(guide, "paper", critic_hidden=(32, 32), penalty=0.1, **settings).fit({"w": w})
    made = guide.sample(20_000)["w"]
    assert abs(float((made.mean(-1) < 0).float().mean()) - share) < 0.03  # found: up to 0.009
    near = [(made - centre).norm(dim=-1) < 2.0 for centre in (2.0, -2.0)]  # four standard deviations
    # noise of one piece cannot become two pieces: some of what is made lies between them
    assert float((near[0] | near[1]).float().mean()) > 0.95  # 0.964 to 0.98
    for which, centre in zip(near, (2.0, -2.0), strict=True):
        assert float((made[which].mean(0) - centre).abs().max()) < 0.1  # up to 0.062
        # variances are 0.04 too small, give or take 0.022 from seed to seed, covariances 0 give or take 0.02
        torch.testing.assert_close(torch.cov(made[which].mT), 0.25 * torch.eye(2), atol=0.1, rtol=0.0)


def test_the_factored_generator_has_the_draws_mean_and_variances_and_leading_covariance():
    w, covariance = correlated()
    guide = AutoImplicit(vector(5), FactoredGenerator(rank=2, noise=8, hidden=(32, 32)))
    APD(guide).fit({"w": w})
    made = guide.sample(20_000)["w"]
    torch.testing.assert_close(made.mean(0), w.mean(0), atol=0.15, rtol=0.0)
    torch.testing.assert_close(made.std(0), w.std(0), atol=0.0, rtol=0.1)
    direction = torch.linalg.eigh(covariance).eigenvectors[:, -1]
    torch.testing.assert_close((made @ direction).std(), (w @ direction).std(), atol=0.0, rtol=0.1)


@pytest.mark.parametrize("generator", [MLPGenerator(noise=8, hidden=(64, 64)), FactoredGenerator(rank=4, noise=8, hidden=(32, 32))])
def test_distilled_gaussian_draws_reproduce_the_predictive_of_linear_regression(generator):
    x = torch.randn(40, 4)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.5 * torch.randn(40)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        return x @ w

    precision = torch.eye(4) + x.mT @ x / 0.25
    exact = torch.distributions.MultivariateNormal(torch.linalg.solve(precision, x.mT @ y / 0.25), precision_matrix=precision)
    guide = AutoImplicit(model, generator)
    APD(guide).fit({"w": exact.sample((4000,))}, x, y)
    x_test = 2 * torch.randn(20, 4)
    predicted = Predictive(model, guide=guide, num_samples=2000, return_sites=["_RETURN"])(x_test)["_RETURN"]
    sd = (x_test @ exact.covariance_matrix @ x_test.mT).diagonal().sqrt()
    # the generator's own error is a tenth of a standard deviation, beside 1/√2000 of the draws
    assert float(((predicted.mean(0) - x_test @ exact.mean) / sd).abs().max()) < 0.2
    torch.testing.assert_close(predicted.std(0), sd, atol=0.0, rtol=0.2)


def test_noise_is_scaled_until_what_is_made_fits_the_data_as_well_as_the_draws_do():
    """Linear regression on inputs that are nearly one direction, so that weights hold each other: κ in closed form."""
    x = torch.randn(200, 1) + 0.1 * torch.randn(200, 5)
    y = x.sum(-1) + torch.randn(200)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    precision = torch.eye(5) + x.mT @ x
    exact = torch.distributions.MultivariateNormal(torch.linalg.solve(precision, x.mT @ y), precision_matrix=precision)
    w = exact.sample((3000,))
    fits, guides = [], []
    for args in ((), (x, y)):
        pyro.set_rng_seed(0)
        guides.append(AutoImplicit(model, FactoredGenerator(rank=2, noise=8, hidden=(32, 32))))
        fits.append(APD(guides[-1]).fit({"w": w}, *args))
    assert fits[0].noise_scale is None
    # what the components leave out adds tr(X' X R) / 2 to the misfit, with R the covariance left; independent noise Σ κ² σ² |x|² / 2
    values, vectors = torch.linalg.eigh(exact.covariance_matrix)
    left = vectors[:, :3] @ torch.diag(values[:3]) @ vectors[:, :3].mT
    gram = x.mT @ x
    kappa = math.sqrt(float((gram * left).sum() / (gram.diagonal() * left.diagonal()).sum()))
    assert fits[1].noise_scale == pytest.approx(kappa, abs=0.15) and kappa < 0.6
    torch.testing.assert_close(guides[1].network.sd, fits[1].noise_scale * guides[0].network.sd)


def ring(x, y=None):
    """Two weights on a circle, and one of which the data know nothing."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(w[:2].square().sum() * x, 0.1), obs=y)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_generator_that_misfits_without_any_noise_says_so(rank):
    x, angle, radius = torch.randn(50), 2 * math.pi * torch.rand(400), 1.0 + 0.01 * torch.randn(400)
    w = torch.stack([radius * angle.cos(), radius * angle.sin(), torch.randn(400)], 1)
    scales, told = [], []
    for seed in range(6):
        pyro.set_rng_seed(seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            guide = AutoImplicit(ring, FactoredGenerator(rank=rank, hidden=None))
            scales.append(APD(guide).fit({"w": w}, x, x + 0.1 * torch.randn(50)).noise_scale)
        told += [str(warning.message) for warning in caught if "misfits the data" in str(warning.message)]
    if rank == 3:  # what it makes are draws, and differs from others of them by chance
        assert 0.0 in scales and not told
    else:
        assert scales == [0.0] * 6
        assert len(told) == 6 and "take a larger rank" in told[0] and "hidden=None" in told[0]


def test_the_papers_preset_is_what_the_paper_trained():
    paper = PRESETS["paper"]
    assert (paper.objective, paper.batch_size, paper.critic_steps, paper.penalty) == ("wgan-gp", 100, 5, 10.0)
    assert (WGAN.betas, WGAN.half_life) == ((0.5, 0.9), None)
    assert (paper.learning_rate, paper.num_steps, paper.check_every) == (1e-4, 100_000, None)
    assert paper.critic_hidden == MLPGenerator().hidden == (100, 100, 100) and MLPGenerator().noise == 32 and paper.ema == 0.0


def test_principal_components_are_those_of_the_singular_value_decomposition():
    w = torch.randn(60, 30, dtype=torch.float64) * torch.logspace(0, -2, 30, dtype=torch.float64) + 5.0
    rows = SampleRows({"w": w[None]}, sites_of({"w": w[None]}), torch.float64, torch.device("cpu"))
    mean, sd = rows.moments()
    torch.testing.assert_close(mean, w.mean(0))
    torch.testing.assert_close(sd, w.std(0))
    directions, spread = principal_components(rows, mean, 4)
    _, values, vectors = torch.linalg.svd(w - w.mean(0), full_matrices=False)
    torch.testing.assert_close(spread, values[:4] / math.sqrt(59))
    torch.testing.assert_close((directions * vectors[:4].mT).sum(0).abs(), torch.ones(4).double(), atol=1e-6, rtol=0.0)


def test_codes_of_the_draws_have_unit_variance_and_decode_to_them():
    w, _ = correlated()
    generator = FactoredGenerator(rank=5, noise=4, hidden=(8,))
    rows = SampleRows({"w": w[None]}, sites_of({"w": w[None]}), torch.float32, torch.device("cpu"))
    generator.build([torch.Size([5])], torch.float32, torch.device("cpu"))
    generator.prepare(rows, *rows.moments())
    codes = generator.encode(w)
    torch.testing.assert_close(torch.cov(codes.mT), torch.eye(5), atol=1e-3, rtol=0.0)
    torch.testing.assert_close(codes @ generator.factors[:-1] + generator.factors[-1], w, atol=1e-3, rtol=1e-3)
    assert float(generator.sd.max()) < 0.01  # nothing is left for the noise


def test_codes_that_are_kept_lose_nothing_in_their_directions():
    w, _ = correlated(500)
    guide = AutoImplicit(vector(5), FactoredGenerator(rank=5, hidden=None))
    assert APD(guide).fit({"w": w}).steps == 0
    made = guide.sample(200)["w"]
    assert float(torch.cdist(made, w).amin(1).max()) < 0.05  # every one is one of the draws, but for the noise of rounding
    assert len(made.round(decimals=1).unique(dim=0)) > 100
    network = guide.network
    assert sum(value.numel() for value in network.state_dict().values()) == network.numbers([(5,)]) == 7 * 5 + 5 * 500


@pytest.mark.parametrize("hidden", [None, (8,)])
def test_a_packed_generator_is_the_same_within_half_a_step_at_a_byte_a_number(hidden):
    w = torch.randn(300) + 0.1 * torch.randn(300, 12) @ torch.randn(12, 300) + 0.01 * torch.randn(300, 300)
    networks, sizes, made = [], [], []
    for packed in (False, True):
        pyro.set_rng_seed(0)
        guide = AutoImplicit(vector(300), FactoredGenerator(rank=10, hidden=hidden, packed=packed))
        with pytest.warns(UserWarning) if hidden else warnings.catch_warnings():
            for _ in range(1 + (packed and hidden is None)):  # fitted again, it starts from the draws and not from what is packed
                pyro.set_rng_seed(0)
                APD(guide, num_steps=5).fit({"w": w})
        guide.network.scale_noise(0.5)
        pyro.set_rng_seed(1)
        made.append(guide.sample(50)["w"])
        networks.append(guide.network)
        sizes.append(guide.storage().bytes)
    whole, packed = networks
    assert packed.levels.dtype == torch.int8 and bool((packed.levels.abs().amax(1) == 127).all())
    errors = torch.cat([packed.basis - whole.basis, packed.deviation[None] - whole.deviation]).abs().amax(1)
    assert bool((errors <= 0.51 * packed.steps).all()) and bool((packed.steps > 0).all())
    torch.testing.assert_close(packed.factors[-1], whole.factors[-1])
    assert sizes[0] - sizes[1] == 3 * 11 * 300 - 4 * 11  # bytes in place of float32, and the steps
    if hidden is None:  # the same codes are drawn
        assert float((made[0] - made[1]).square().mean().sqrt()) < 0.02 * float(made[0].std(0).mean())


def test_drawing_from_a_packed_generator_makes_numbers_of_its_bytes_a_piece_at_a_time(monkeypatch):
    generator = FactoredGenerator(rank=10, noise=4, hidden=(8,), packed=True)
    generator.build([torch.Size([300])], torch.float32, torch.device("cpu"))
    w = torch.randn(50, 300)
    rows = SampleRows({"w": w[None]}, sites_of({"w": w[None]}), torch.float32, torch.device("cpu"))
    generator.prepare(rows, *rows.moments())
    generator.finish()
    monkeypatch.setattr("pyro_advbayes.infer.autoguide.factored.PIECE", 64)  # four whole pieces, and what is left
    made = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point())
            return result

    torch.manual_seed(0)
    with Watched():
        found = generator.sample(6)
    assert max(made) == 6 * 300  # the draws: all of the basis would be 10 · 300
    torch.manual_seed(0)
    code = generator.code(generator.latent(6))
    source, noise = NormalNoise(found), torch.empty(6, 300)
    for row in noise.split(1):
        source.fill(row)
    torch.testing.assert_close(found, code @ generator.basis + generator.factors[-1] + generator.deviation * noise)


def test_a_finished_mlp_makes_the_rows_that_it_made_before_its_standardisation_was_folded():
    w, _ = correlated()
    generator = MLPGenerator(noise=4, hidden=(8,))
    rows = SampleRows({"w": w[None]}, sites_of({"w": w[None]}), torch.float32, torch.device("cpu"))
    generator.build([torch.Size([5])], torch.float32, torch.device("cpu"))
    generator.prepare(rows, *rows.moments())
    torch.nn.init.normal_(generator.layers[-1].bias)
    z = torch.randn(10, 4)
    before = generator(z)
    generator.finish()
    torch.testing.assert_close(generator(z), before, atol=1e-4, rtol=1e-4)
    generator.prepare(rows, *rows.moments())
    torch.testing.assert_close(generator(z), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_a_trained_factored_generator_makes_the_rows_that_it_made_before_its_basis_was_another(packed):
    generator = FactoredGenerator(rank=5, noise=4, hidden=(8,), packed=packed)
    generator.build([torch.Size([5])], torch.float32, torch.device("cpu"))

    def prepare(w):
        rows = SampleRows({"w": w[None]}, sites_of({"w": w[None]}), torch.float32, torch.device("cpu"))
        generator.prepare(rows, *rows.moments())

    w, _ = correlated()
    prepare(w)
    torch.nn.init.normal_(generator.layers[-1].bias)
    generator.finish()
    z, basis = torch.randn(10, 4), generator.basis
    before, _ = generator.parts(z)
    prepare(w.flip(-1) + 1.0)  # five directions hold all rows
    assert float((generator.basis - basis).abs().max()) > 0.1
    torch.testing.assert_close(generator.parts(z)[0], before, atol=1e-3, rtol=1e-3)


def test_a_file_of_draws_is_as_good_as_the_samples(tmp_path):
    x, y = data()
    path = tmp_path / "draws.safetensors"
    mcmc = SGMCMC(SGLD(logistic, step_size=1e-3), 50, 0, num_chains=4, draws=path)
    mcmc.run(x, y)
    fitted = []
    for samples in (path, str(path), mcmc.get_samples()):
        pyro.set_rng_seed(7)
        guide = AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            APD(guide, batch_size=50, num_steps=30).fit(samples)
        fitted.append(guide.sample(5)["w"])
    assert torch.equal(fitted[0], fitted[1]) and torch.equal(fitted[0], fitted[2])


def test_rows_of_a_file_that_is_not_full_yet_and_in_half_precision_are_read(tmp_path):
    path = tmp_path / "draws.safetensors"
    file = FileDraws(path, {"w": Field(torch.Size([3]), torch.float16), "sample_stats/energy": Field(torch.Size(), torch.float64)}, 2, 10)
    for i in range(4):
        file.append({"w": torch.tensor([0.0, 10.0])[:, None] + i + torch.zeros(2, 3), "sample_stats/energy": torch.zeros(2)})
    values, _ = read_samples(path)
    rows = SampleRows(values, sites_of(values), torch.float32, torch.device("cpu"))
    assert rows.take(torch.arange(8))[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert rows.take(torch.tensor([5, 0])).dtype == torch.float32


def test_rows_that_are_not_kept_ready_are_the_same(monkeypatch):
    w, _ = correlated(100)
    values = {"w": w[None]}
    ready = SampleRows(values, sites_of(values), torch.float32, torch.device("cpu"))
    monkeypatch.setattr("pyro_advbayes.infer.autoguide.rows.READY", 0)
    monkeypatch.setattr("pyro_advbayes.infer.autoguide.rows.CHUNK", 35)
    made = SampleRows(values, sites_of(values), torch.float32, torch.device("cpu"))
    index = torch.randint(100, (30,))
    assert made._ready is None and torch.equal(made.take(index), ready.take(index))
    mean, sd = made.moments()
    torch.testing.assert_close(mean, w.mean(0))
    torch.testing.assert_close(sd, w.std(0))


@pytest.mark.parametrize("preset", ["fast", "paper"])
@pytest.mark.parametrize("kind", [MLPGenerator, FactoredGenerator])
def test_a_resumed_fit_is_the_same_bit_for_bit(tmp_path, preset, kind):
    w, _ = two_modes(300)
    settings = {"batch_size": 40, "num_steps": 60, "check_every": 10}

    def fresh():
        return AutoImplicit(vector(6), kind(noise=4, hidden=(16, 16), **({"rank": 3} if kind is FactoredGenerator else {})))

    results = []
    path = tmp_path / "apd.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyro.set_rng_seed(3)
        guide = fresh()
        APD(guide, preset, checkpoint=path, checkpoint_every=25, **settings).fit({"w": w})  # the last checkpoint is at 50
        results.append(guide.sample(10)["w"])
        pyro.set_rng_seed(999)
        again = fresh()
        fit = APD.resume(path, again, {"w": w})
        results.append(again.sample(10)["w"])
    assert fit.steps == 60 and torch.equal(*results)
    with pytest.raises(ValueError, match="is of another fit: its number of draws is 300, here it is 299"):
        APD.resume(path, fresh(), {"w": w[1:]})
    with pytest.raises(ValueError, match="is of another fit: its draws is"):
        APD.resume(path, fresh(), {"w": w + 1})
    with pytest.raises(ValueError, match="is of another fit: its generator is"):
        APD.resume(path, AutoImplicit(vector(6), MLPGenerator(noise=5, hidden=(16, 16))), {"w": w})
    with pytest.raises(FileExistsError):
        APD(fresh(), preset, checkpoint=path, **settings).fit({"w": w})


def test_no_draw_and_no_row_of_the_data_may_be_another_in_a_resumed_fit(tmp_path):
    x, y = data()
    samples = {"w": torch.randn(300, 3), "b": torch.randn(300)}
    path = tmp_path / "apd.safetensors"

    def fresh():
        return AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        APD(fresh(), checkpoint=path, checkpoint_every=10, num_steps=20).fit(samples, x, y)
        assert APD.resume(path, fresh(), samples, x, y).steps == 20
    others = {name: value.clone() for name, value in samples.items()}
    others["w"][17, 1] += 1e-3
    with pytest.raises(ValueError, match="is of another fit: its draws is"):
        APD.resume(path, fresh(), others, x, y)
    with pytest.raises(ValueError, match="is of another fit: its draws is"):  # the same rows in another order
        APD.resume(path, fresh(), {name: torch.cat([value[:1], value[1:-1].flip(0), value[-1:]]) for name, value in samples.items()}, x, y)
    other = y.clone()
    other[5] = 1 - other[5]
    for args, kwargs in (((x, other), {}), ((x + 1.0, y), {}), ((), {}), ((), {"x": x, "y": other})):
        with pytest.raises(ValueError, match=r"is of another fit: its data is \[\["):
            APD.resume(path, fresh(), samples, *args, **kwargs)


def test_draws_are_read_once_more_for_all_checkpoints_together(tmp_path, monkeypatch):
    w, _ = two_modes(300)
    passes, chunks = [], SampleRows.chunks

    def counted(rows):
        passes[-1] += 1
        return chunks(rows)

    monkeypatch.setattr(SampleRows, "chunks", counted)
    for settings in (
        {},
        {"checkpoint": tmp_path / "two", "checkpoint_every": 10},
        {"checkpoint": tmp_path / "many", "checkpoint_every": 1},
    ):
        passes.append(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            APD(AutoImplicit(vector(6), MLPGenerator(noise=4, hidden=(8,))), num_steps=20, **settings).fit({"w": w})
    assert passes == [passes[0], passes[0] + 1, passes[0] + 1]


def test_a_fit_that_does_not_converge_warns_and_keeps_the_best():
    w, _ = two_modes()
    guide = AutoImplicit(vector(6), MLPGenerator(noise=4, hidden=(8,)))
    with pytest.warns(UserWarning, match="APD has not converged by step 40: its two-sample distance is .* Judge it"):
        fit = APD(guide, num_steps=40, check_every=10).fit({"w": w})
    assert fit.converged is False and fit.distance > fit.floor > 0


def test_the_distance_of_a_fit_is_that_of_the_generator_that_is_kept(monkeypatch):
    w, _ = two_modes(300)
    fits, made = [], []
    for num_steps, looks in ((40, [5.0, 4.0, 3.0, 2.0]), (70, [5.0, 4.0, 3.0, 2.0, 9.0, 9.0, 9.0])):
        found = iter([0.1] * 20 + looks)  # of 20 splits of the draws, then of the generator every 10 steps
        monkeypatch.setattr("pyro_advbayes.infer.distill.stopping.sliced_wasserstein", lambda x, y, found=found: next(found))
        pyro.set_rng_seed(3)
        guide = AutoImplicit(vector(6), MLPGenerator(noise=4, hidden=(8,)))
        with pytest.warns(UserWarning, match=f"by step {num_steps}: its two-sample distance is 3, and that of two halves of the draws 0.1"):
            fits.append(APD(guide, num_steps=num_steps, check_every=10, batch_size=40).fit({"w": w}))
        pyro.set_rng_seed(4)
        made.append(guide.sample(5)["w"])
    assert [fit.distance for fit in fits] == [3.0, 3.0]  # means of the last three
    assert torch.equal(*made)


def test_a_fit_too_short_for_a_look_claims_nothing_about_its_distance():
    w, _ = two_modes(300)
    guide = AutoImplicit(vector(6), MLPGenerator(noise=4, hidden=(8,)))
    with pytest.warns(
        UserWarning, match="APD has not measured its distance from the draws by step 60: .*, or take more num_steps or a check_every below"
    ):
        fit = APD(guide, num_steps=60).fit({"w": w})
    assert fit == Fit(60, None, None, None)


def test_fitting_again_goes_on_from_where_the_generator_was():
    w, _ = two_modes()
    guide = AutoImplicit(vector(6), MLPGenerator(noise=16, hidden=(64, 64)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = APD(guide, num_steps=600).fit({"w": w})
        second = APD(guide, num_steps=300).fit({"w": w})
    assert second.distance < first.distance


def test_sites_that_turn_out_to_be_constrained_are_fitted_anew():
    x, y = data()
    samples = {"w": torch.randn(300, 3), "b": torch.randn(300), "scale": torch.randn(300).add(3.0).exp()}
    guide = AutoImplicit(regression, MLPGenerator(noise=3, hidden=(8,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        APD(guide, num_steps=20).fit(samples)
        assert bool((guide.sample(1000)["scale"] < 0).any())  # nothing had told that it is positive
        APD(guide, num_steps=20).fit(samples, x, y)
    assert bool((guide.sample(1000)["scale"] > 0).all())


def test_a_batch_that_nobody_asked_for_is_no_larger_than_the_draws(tmp_path):
    draws = {"w": torch.randn(40, 3), "b": torch.randn(40)}
    path = tmp_path / "fit.safetensors"
    guide = AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,)))
    fitted = APD(guide, num_steps=40, checkpoint=path, checkpoint_every=20)
    assert fitted.settings.batch_size == 256
    fitted.fit(draws)
    assert fitted.settings.batch_size == 40 and fitted.settings.num_steps == 40
    again = AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,)))
    APD.resume(path, again, draws)  # with the batch that it had
    made = []
    for one in (guide, again):
        torch.manual_seed(0)
        made.append(one.network.sample(3))
    assert torch.equal(*made)
    kept = FactoredGenerator(rank=2, hidden=None, packed=True)
    APD(AutoImplicit(logistic, kept)).fit(draws, *data())


def test_bad_draws_are_refused_by_name():
    x, y = data()
    good = {"w": torch.randn(300, 3), "b": torch.randn(300)}

    def fit(samples, *args, **settings):
        APD(AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,))), num_steps=1, **settings).fit(samples, *args)

    with pytest.raises(ValueError, match="20 draws are fewer than batch_size=21: take a smaller batch"):
        fit({k: v[:20] for k, v in good.items()}, batch_size=21)
    for count in (2, 3):
        with pytest.raises(ValueError, match=f"{count} draws cannot be split into two sets .*: at least 4 are needed, or check_every=None"):
            fit({k: v[:count] for k, v in good.items()}, batch_size=2)
    for bad in (math.nan, math.inf):
        broken = good["w"].clone()
        broken[17, 2] = bad
        with pytest.raises(ValueError, match="draw 17 of site 'w' is not finite in unconstrained space"):
            fit({**good, "w": broken})
    with pytest.raises(ValueError, match="site 'b' is missing; draws are needed of"):
        fit({"w": good["w"]}, x, y)
    with pytest.raises(ValueError, match="site 'c' is not among the guide's"):
        fit({**good, "c": good["b"]}, x, y)
    with pytest.raises(ValueError, match=r"a draw of site 'w' has shape \(2,\), the site has \(3,\)"):
        fit({**good, "w": good["w"][:, :2]}, x, y)
    constant = good["w"].clone()
    constant[:, 1] = 0.1
    with pytest.raises(ValueError, match=r"element 1 of site 'w' is the same in all 300 draws .*Did the chain move"):
        fit({**good, "w": constant})
    with pytest.raises(ValueError, match="equally many draws of every site"):
        fit({**good, "b": good["b"][1:]})
    with pytest.raises(ValueError, match="site 'w' must be a tensor"):
        fit({**good, "w": good["w"].long()})
    with pytest.raises(ValueError, match="a dict of draws"):
        fit({})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit("nowhere.safetensors")


class Members(PyroModule):
    """As many sets of weights as there are draws of few chains."""

    def __init__(self):
        super().__init__()
        self.w = PyroSample(dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def forward(self, x):
        with pyro.plate("members", 100):
            return x @ self.w.mT


def test_draws_grouped_by_chain_are_refused_where_the_model_declares_its_shapes():
    net = bayesianize(torch.nn.Linear(3, 2))
    grouped = {"weight": torch.randn(8, 100, 2, 3), "bias": torch.randn(8, 100, 2)}

    def fit(samples, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return APD(AutoImplicit(net, MLPGenerator(noise=3, hidden=(8,))), num_steps=1, **settings).fit(samples)

    found = (
        r"samples: 8 draws of site 'weight', each of shape \(100, 2, 3\), where the model declares \(2, 3\), .*without group_by_chain=True"
    )
    for settings in ({}, {"batch_size": 8}):
        with pytest.raises(ValueError, match=found):
            fit(grouped, **settings)
    plate = {name: value.transpose(0, 1) for name, value in grouped.items()}  # 100 draws of 8 networks
    assert fit(plate, batch_size=50).steps == 1
    members = AutoImplicit(Members(), MLPGenerator(noise=3, hidden=(8,)))
    few = {"w": torch.randn(8, 100, 3)}
    with pytest.raises(ValueError, match=r"8 draws of site 'w', .*look grouped by chain: .*fit\(samples, x, y\)"):
        APD(members, batch_size=4, num_steps=1).fit(few)
    with pytest.warns(UserWarning, match="APD has not measured its distance from the draws by step 1:"):
        assert APD(members, batch_size=4, num_steps=1).fit(few, torch.randn(5, 3)).steps == 1
    with pytest.raises(ValueError, match=r"8 draws are fewer than batch_size=20: .*without group_by_chain=True"):
        APD(AutoImplicit(vector(3), MLPGenerator(noise=3, hidden=(8,)))).fit({"w": torch.randn(8, 100, 3)})


def test_bad_settings_are_refused_by_name():
    guide = AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,)))
    for wrong in (
        {"preset": "best"},
        {"objective": "gan"},
        {"batch_size": 1},
        {"critic_steps": 0},
        {"num_steps": 1.5},
        {"check_every": 0},
        {"penalty": -1.0},
        {"learning_rate": 0.0},
        {"ema": 1.0},
        {"checkpoint_every": 0},
        {"epochs": 3},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            APD(guide, **wrong)
    with pytest.raises(ValueError, match="guide=function"):
        APD(logistic)
    w = torch.randn(300, 3)
    with pytest.raises(ValueError, match="rank=4: the sites hold 3 numbers"):
        APD(AutoImplicit(vector(3), FactoredGenerator(rank=4))).fit({"w": w})
    with pytest.raises(ValueError, match="rank=3: 3 draws determine at most 2 directions"):
        APD(AutoImplicit(vector(3), FactoredGenerator(rank=3)), batch_size=2).fit({"w": w[:3]})
    with pytest.raises(ValueError, match="critic_hidden"):
        APD(AutoImplicit(vector(3), MLPGenerator(noise=3, hidden=(8,))), "paper", critic_hidden=()).fit({"w": w})


def test_a_guide_for_a_potential_refuses_draws_without_one_of_its_sites():
    guide = AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,)), Potential(logistic, data()))
    with pytest.raises(ValueError, match="site 'b' is missing"):
        APD(guide).fit({"w": torch.randn(300, 3)})


def test_a_hypernetwork_learns_what_the_rows_of_a_matrix_have_in_common():
    common = torch.randn(2000, 1, 1)
    w = 5.0 + common * torch.randn(6, 1) * torch.randn(1, 4) + 0.3 * torch.randn(2000, 6, 1) * torch.randn(1, 4)

    def model():
        pyro.sample("w", dist.Normal(torch.zeros(6, 4), 1.0).to_event(2))

    guide = AutoImplicit(model, HyperGenerator(noise=16, hidden=(32,), width=16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = APD(guide, num_steps=1500).fit({"w": w})
    made = guide.sample(4000)["w"].flatten(1)
    torch.testing.assert_close(made.mean(0), w.flatten(1).mean(0), atol=0.25, rtol=0.0)
    assert float((made.std(0) / w.flatten(1).std(0)).log().abs().mean()) < 0.2
    near = torch.corrcoef(made.mT) - torch.corrcoef(w.flatten(1).mT)
    assert float(near.abs().mean()) < 0.15 and fit.distance < 3 * fit.floor


@pytest.mark.parametrize("ends", ["as near as the draws", "no nearer for long"])
def test_a_fit_that_stopped_at_a_checkpoint_is_not_trained_on(tmp_path, monkeypatch, ends):
    if ends == "no nearer for long":
        monkeypatch.setattr("pyro_advbayes.infer.distill.stopping.PATIENCE", 1)
    w, path = torch.randn(300, 6) if ends == "as near as the draws" else two_modes(300)[0], tmp_path / "apd.safetensors"

    def fresh():
        return AutoImplicit(vector(6), MLPGenerator(noise=4, hidden=(16,)))

    guides = [fresh(), fresh()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = APD(guides[0], checkpoint=path, checkpoint_every=10, batch_size=40, num_steps=2000, check_every=10).fit({"w": w})
        again = APD.resume(path, guides[1], {"w": w})
    assert 30 <= fit.steps < 2000 and fit.converged is (ends == "as near as the draws")
    assert again == fit
    for name, value in guides[0].network.state_dict().items():
        assert torch.equal(value, guides[1].network.state_dict()[name])
