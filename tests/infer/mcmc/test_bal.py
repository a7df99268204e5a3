"""BAL: the law of the perturbed inputs, of the weights given them, and of the alternation of the two."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC

import pyro_advbayes as ab
from models.mlp import mlp
from models.vae import VAE
from pyro_advbayes.infer.mcmc.adversary import Adversary
from pyro_advbayes.nn.classifier import Classifier
from tests.small_models import no_inputs


def logistic(x, y):
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=weight * x), obs=y)


def blobs(rows=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(rows) % 3
    x = 0.5 + 0.2 * torch.stack([(2 * math.pi * y / 3).cos(), (2 * math.pi * y / 3).sin()], -1)
    return (x + 0.05 * torch.randn(rows, 2, generator=generator)).to(dtype), y


def network(dtype=torch.float32):
    return mlp((2, 8, 3), activation=torch.nn.Tanh).to(dtype)


def sampled(kernel, *args, samples=1, warmup=0, chains=1, **options):
    mcmc = ab.SGMCMC(kernel, samples, warmup, chains, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


# ------------------------------------------------------------------------------------------------ the inputs' law


@pytest.mark.parametrize("rule, bias", [(ab.SGLD.rule, 1.0), (partial(ab.SGHMC.rule, friction=0.5), 1.0 / 1.5)], ids=["SGLD", "SGHMC"])
def test_without_a_loss_inputs_are_normal_around_the_clean_ones(rule, bias):
    """Variance T / 2α, times 1 / (1 - ηα) for a step η of SGLD, and 1 / (1 - ηα / (2 - a)) for SGHMC's; and the mean is the clean input."""
    x, y = torch.tensor([[0.2], [0.9]]), torch.zeros(2)
    alpha, T, eta = 40.0, 0.3, 0.005
    kernel = ab.BAL(
        no_inputs,
        "x",
        batch_size=2,
        inputs=rule(step_size=eta, num_steps=60),
        cost=ab.L2(alpha),
        input_temperature=T,
        copies=20_000,
        keep=(0, 1),
    )
    moved = sampled(kernel, x, y).get_extras()["x"].view(2, 20_000)
    variance = T / (2.0 * alpha) / (1.0 - bias * eta * alpha)
    error = (variance / 20_000) ** 0.5
    assert ((moved.mean(1) - x[:, 0]).abs() < 4.0 * error).all()
    assert ((moved.var(1) / variance - 1.0).abs() < 4.0 * (2.0 / 20_000) ** 0.5).all()


def test_the_cost_pulls_towards_the_clean_input():
    """Against a loss of slope v the inputs come to rest at x + v / 2α: with the paper's sign they would run away from x."""
    x, y = torch.rand(5, 3), torch.zeros(5)
    slope, alpha = torch.tensor([1.0, -2.0, 0.5]), 4.0
    kernel = ab.BAL(
        no_inputs,
        "x",
        batch_size=5,
        inputs=ab.SGLD.rule(step_size=0.05, num_steps=200),
        cost=ab.L2(alpha),
        input_temperature=0.0,
        loss=lambda model, clean, args, kwargs: args[0] @ slope,
        keep=range(5),
    )
    moved = sampled(kernel, x, y).get_extras()["x"][0]
    torch.testing.assert_close(moved, x + slope / (2.0 * alpha))


def test_a_callable_cost_acts_as_the_cost_it_computes():
    x, y = blobs()
    runs = []
    for cost in (ab.L2(3.0), lambda perturbed, clean: 3.0 * (perturbed - clean).square().sum(-1)):
        pyro.set_rng_seed(0)
        kernel = ab.BAL(network().double(), "x", batch_size=16, cost=cost, keep=(0, 1, 2), input_temperature=0.01, clip=(0.0, 1.0))
        runs.append(sampled(kernel, x.double(), y, samples=3).get_extras()["x"])
    torch.testing.assert_close(*runs)


def test_a_box_and_the_range_of_the_inputs_are_never_left():
    x, y = blobs()
    x[0, 0] = 0.99
    kernel = ab.BAL(
        network(),
        "x",
        batch_size=16,
        inputs=ab.SGLD.rule(step_size=10.0, num_steps=15),
        cost=ab.Box(0.1),
        input_temperature=0.01,
        clip=(0.0, 1.0),
        keep=range(64),
    )
    moved = sampled(kernel, x.clamp(0, 1), y, samples=2).get_extras()["x"]
    assert float((moved - x.clamp(0, 1)).abs().max()) <= 0.1 + 1e-6
    assert float((moved - x.clamp(0, 1)).abs().max()) > 0.09
    assert float(moved.min()) >= 0.0 and float(moved.max()) <= 1.0


@pytest.mark.parametrize("backend", ["handlers", "graph"])
@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("learners", ["mean", "sum", "independent"])
def test_the_adversary_climbs_the_loss_of_its_learners(learners, chunk_size, backend):
    """One noiseless step of size η moves x by η times the gradient of the mean, the sum, or each learner's own loss."""
    x, y = blobs(dtype=torch.float64)
    eta = 0.01
    kernel = ab.BAL(
        network(torch.float64),
        "x",
        batch_size=16,
        inputs=ab.SGLD.rule(step_size=eta, num_steps=1),
        cost=ab.L2(0.0),
        input_temperature=0.0,
        learners=learners,
        keep=range(10),
        backend=backend,
        chunk_size=chunk_size,
    )
    kernel.setup_chains(3, 0, (x, y), {})
    moved = kernel.extras()["x"]
    inputs = x[:10].clone().requires_grad_()
    slopes = []
    for theta in kernel.initial_params["net.1.weight"].new_tensor(range(3)).long():
        values = {name: value[theta] for name, value in kernel.initial_params.items()}
        logits = pyro.poutine.condition(kernel.model, data=values)(inputs, y[:10])
        loss = torch.nn.functional.cross_entropy(logits, y[:10], reduction="sum")
        slopes.append(torch.autograd.grad(loss, inputs)[0])
    slopes = torch.stack(slopes)
    expected = {"mean": slopes.mean(0).expand(3, -1, -1), "sum": slopes.sum(0).expand(3, -1, -1), "independent": slopes}[learners]
    torch.testing.assert_close(moved, x[:10] + eta * expected)


# ------------------------------------------------------------------------------------------------ the whole alternation


@pytest.mark.parametrize(
    "sampler, settings",
    [
        (ab.SGAdaLD, {"step_size": 0.05, "clamp": True}),
        (ab.SGLD, {"step_size": 1e-3}),
        (ab.SGHMC, {"step_size": 1e-3, "friction": 0.2}),
        (ab.SGHMC, {"step_size": 0.02, "adaptive": True}),
    ],
)
def test_an_adversary_at_rest_leaves_the_plain_sampler(sampler, settings):
    """α → ∞ holds the inputs where they are: under one seed BAL then is the sampler of its weights, bit for bit."""
    x, y = blobs()
    pyro.set_rng_seed(3)
    plain = sampled(sampler(network(), temperature=0.1, batch_size=16, **settings), x, y, samples=10, warmup=5).get_samples()
    pyro.set_rng_seed(3)
    weights, alpha = sampler.rule(**settings, num_steps=1), 1e14
    kernel = ab.BAL(
        network(),
        "x",
        batch_size=16,
        inputs=ab.SGLD.rule(step_size=0.4 / alpha, num_steps=15),
        cost=ab.L2(alpha),
        weights=weights,
        temperature=0.1,
        clip=(0.0, 1.0),
    )
    bal = sampled(kernel, x, y, samples=10, warmup=5).get_samples()
    assert all(torch.equal(bal[site], plain[site]) for site in plain)


def test_the_alternation_has_the_stationary_law_of_its_two_conditionals():
    """
    One input and one weight: small enough to integrate both conditionals on a grid. The chain that samples them in turn exactly has
    the grid's stationary law, found by power iteration; so has BAL, whose inner chains are long.
    """
    x, y, alpha = torch.tensor([0.7]), torch.tensor([1.0]), 1.5
    weights, inputs = torch.linspace(-6, 6, 401, dtype=torch.float64), torch.linspace(-5, 6, 401, dtype=torch.float64)
    log_likelihood = torch.nn.functional.logsigmoid(weights[:, None] * inputs)  # [weights, inputs], of y = 1
    inputs_given = (-log_likelihood - alpha * (inputs - x.double()) ** 2).softmax(1)
    weights_given = (log_likelihood - 0.5 * weights[:, None] ** 2).softmax(0)
    law = torch.full((401,), 1.0 / 401, dtype=torch.float64)
    for _ in range(200):
        law = weights_given @ (law @ inputs_given)
    of_inputs = law @ inputs_given

    chains = 4000
    kernel = ab.BAL(
        logistic,
        "x",
        batch_size=1,
        inputs=ab.SGLD.rule(step_size=0.02, num_steps=100),
        cost=ab.L2(alpha),
        weights=ab.SGLD.rule(step_size=0.03, num_steps=150),
        temperature=1.0,
        input_temperature=1.0,
        learners="independent",
        keep=(0,),
    )
    mcmc = sampled(kernel, x, y, samples=4, warmup=3, chains=chains)
    for drawn, grid, expected in (
        (mcmc.get_samples(group_by_chain=True)["weight"], weights, law),
        (mcmc.get_extras(group_by_chain=True)["x"][..., 0], inputs, of_inputs),
    ):
        drawn = drawn.double().reshape(chains, -1)
        for power in (1, 2):
            moments = (drawn**power).mean(1)
            # the four samples of a chain are nearly independent; the step's own bias is of order step / 2 in the second moment
            bias = 0.0 if power == 1 else 0.02
            assert abs(float(moments.mean()) - float((grid**power) @ expected)) < 4.0 * float(moments.std()) / chains**0.5 + bias
        # Kolmogorov and Smirnov's distance, of the last samples, which are independent; one in a thousand is larger than this
        below = (drawn[:, -1, None] <= grid).double().mean(0)
        assert float((below - expected.cumsum(0)).abs().max()) < 1.95 / chains**0.5


@pytest.mark.parametrize(
    "rule",
    [ab.SGLD.rule(step_size=1e-5, num_steps=10), ab.SGHMC.rule(step_size=2e-6, num_steps=10, friction=0.2)],
    ids=lambda updates: type(updates.rule).__name__,
)
def test_the_temperature_that_is_reported_counts_all_updates_on_a_minibatch(rule):
    """Ten updates on one minibatch heat ten times as much as on ten: the variance of a Gaussian is that of T_eff."""
    y = torch.randn(1000)
    quiet = ab.SGLD.rule(step_size=1e-12, num_steps=1)
    kernel = ab.BAL(no_inputs, "x", 20, inputs=quiet, cost=ab.L2(0.0), weights=rule, temperature=1.0, learners="independent")
    mcmc = sampled(kernel, torch.zeros(1000), y, samples=4, warmup=100, chains=1000)
    drawn = mcmc.get_samples(group_by_chain=True)["weight"].double()
    expected = mcmc.diagnostics()["T_eff"]["weight"] / 1001
    assert expected > 1.5 / 1001
    variances = (drawn - drawn.mean()).square().mean(1)  # of chains, which are independent
    assert abs(float(variances.mean()) / expected - 1.0) < 4.0 * float(variances.std()) / expected / 1000**0.5 + 0.05


def test_the_weights_see_the_perturbed_inputs():
    """A large adversary lowers what the weights can explain: the energy that they are updated with is higher."""
    x, y = blobs()
    means, variances = [], []
    for radius in (1e-6, 0.3):
        pyro.set_rng_seed(0)
        kernel = ab.BAL(network(), "x", 16, cost=ab.Box(radius), inputs=ab.SGLD.rule(step_size=1.0, num_steps=10))
        energies = sampled(kernel, x, y, samples=30, warmup=60).sample_stats()["energy"]
        means.append(float(energies.mean()))
        variances.append(float(energies.var()) / 30)
    assert means[1] - means[0] > 4.0 * sum(variances) ** 0.5


def test_clean_rows_stay_clean():
    x, y = blobs()
    kernel = ab.BAL(network(), "x", 16, cost=ab.Box(0.2), inputs=ab.SGLD.rule(step_size=1.0, num_steps=3), clean_share=0.5)
    kernel.setup_chains(1, 0, (x, y), {})
    shares = []
    for _ in range(40):
        inputs = kernel._next_batch()[0]
        shares.append(float((inputs[:, None] == x).all(-1).any(1).float().mean()))
    assert abs(sum(shares) / 40 - 0.5) < 4 * (0.25 / 640) ** 0.5


@pytest.mark.parametrize("learners", ["mean", "independent"])
def test_copies_are_further_chains_of_the_same_rows(learners):
    """The batch holds every row S times, its likelihood counts once: at rest, energies are those of one copy."""
    x, y = blobs()
    energies = []
    for copies in (1, 5):
        pyro.set_rng_seed(0)
        quiet = ab.SGLD.rule(step_size=1e-12, num_steps=1)
        kernel = ab.BAL(network(), "x", 64, inputs=quiet, cost=ab.L2(0.0), input_temperature=0.0, copies=copies, learners=learners)
        kernel.setup_chains(2, 0, (x, y), {})
        batch = kernel._next_batch()
        assert batch[0].shape[-2] == 64 * copies
        energies.append(kernel.potential.energy(kernel.theta, batch))
    torch.testing.assert_close(*energies, rtol=1e-5, atol=1e-3)


# ------------------------------------------------------------------------------------------------ drivers and files


def test_it_runs_in_pyros_own_driver():
    x, y = blobs()
    kernel = ab.BAL(network(), "x", batch_size=16, clip=(0.0, 1.0))
    mcmc = MCMC(kernel, num_samples=4, warmup_steps=2, disable_progbar=True)
    mcmc.run(x, y)
    assert mcmc.get_samples()["net.1.weight"].shape == (4, 8, 2)


@pytest.mark.parametrize("how", ["tensors", "generator", "loader"])
def test_an_interrupted_run_goes_on_bit_for_bit(how, tmp_path):
    x, y = blobs()
    data = (x, y)
    if how == "loader":
        data = (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True),)

    def kernel():
        options = {"clip": (0.0, 1.0), "input_temperature": 0.01, "num_steps_per_sample": 2}
        if how == "generator":
            pyro.set_rng_seed(5)
            options["adversary"] = ab.Generator(torch.nn.Linear(2, 2), radius=0.1)
        elif how == "tensors":
            options["keep"] = (1, 2)
        return ab.BAL(network(), "x", None if how == "loader" else 16, **options)

    class Killed(Exception):
        pass

    def kill(kernel, params, stage, i):
        if stage == "Sample" and i == 5:
            raise Killed

    whole_kernel, killed_kernel, again = kernel(), kernel(), kernel()
    pyro.set_rng_seed(1)
    whole = sampled(whole_kernel, *data, samples=9, warmup=3, chains=2)
    pyro.set_rng_seed(1)
    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        sampled(killed_kernel, *data, samples=9, warmup=3, chains=2, checkpoint=path, checkpoint_every=4, hook_fn=kill)
    pyro.set_rng_seed(77)
    resumed = ab.SGMCMC.resume(path, again, *data, disable_progbar=True)
    for site, value in whole.get_samples().items():
        assert torch.equal(resumed.get_samples()[site], value)
    for name, value in whole.get_extras().items():
        assert torch.equal(resumed.get_extras()[name], value)


def test_a_finished_run_that_is_resumed_still_says_how_far_inputs_were_moved(tmp_path):
    x, y = blobs()
    path = tmp_path / "run.safetensors"
    finished = sampled(ab.BAL(network(), "x", 16, clip=(0.0, 1.0)), x, y, samples=2, chains=2, checkpoint=path)
    again = ab.SGMCMC.resume(path, ab.BAL(network(), "x", 16, clip=(0.0, 1.0)), x, y, disable_progbar=True)
    moved = finished.kernel.diagnostics()["perturbation"]
    assert moved["linf"] > 0.0 and again.kernel.diagnostics()["perturbation"] == moved


def test_another_adversary_is_not_resumed(tmp_path):
    x, y = blobs()
    path = tmp_path / "run.safetensors"
    sampled(ab.BAL(network(), "x", 16, cost=ab.L2(1.0), clip=(0.0, 1.0)), x, y, samples=2, checkpoint=path)
    for other, what in (({"cost": ab.L2(2.0)}, "cost"), ({"inputs": ab.SGLD.rule(step_size=2.0, num_steps=15)}, "inputs_step_sizes")):
        with pytest.raises(ValueError, match=what):
            ab.SGMCMC.resume(path, ab.BAL(network(), "x", 16, **{"cost": ab.L2(1.0), "clip": (0.0, 1.0), **other}), x, y)


def test_a_custom_cost_and_a_custom_adversary_are_the_same_in_another_process(tmp_path):
    class Ridge(ab.L2):
        __repr__ = object.__repr__

    x, y = blobs()
    path = tmp_path / "run.safetensors"
    sampled(ab.BAL(network(), "x", 16, cost=Ridge(1.0), clip=(0.0, 1.0)), x, y, samples=2, checkpoint=path)
    again = ab.SGMCMC.resume(path, ab.BAL(network(), "x", 16, cost=Ridge(1.0), clip=(0.0, 1.0)), x, y, disable_progbar=True)
    assert again.kernel.settings()["cost"] == "a function", "what it computes is compared, and no address"


def test_it_starts_from_trained_weights():
    x, y = blobs()
    trained = {name: torch.full(shape, 0.1) for name, shape in {"net.1.weight": (8, 2), "net.1.bias": (8,)}.items()}
    trained |= {"net.3.weight": torch.zeros(3, 8), "net.3.bias": torch.zeros(3)}
    start = pyro.infer.autoguide.init_to_value(values=trained)
    kernel = ab.BAL(network(), "x", 16, init_strategy=start, clip=(0.0, 1.0))
    kernel.setup_chains(3, 0, (x, y), {})
    assert all(torch.equal(value, trained[name].expand_as(value)) for name, value in kernel.initial_params.items())


def test_what_is_reported_is_how_far_inputs_were_moved():
    x, y = blobs()
    kernel = ab.BAL(network(), "x", 16, cost=ab.Box(0.05), inputs=ab.SGLD.rule(step_size=100.0, num_steps=5))
    found = sampled(kernel, x, y, samples=2).diagnostics()["perturbation"]
    assert 0.03 < found["linf"] <= 0.05 + 1e-6 and found["linf"] <= found["l2"] <= 2**0.5 * 0.05 + 1e-6


# ------------------------------------------------------------------------------------------------ other adversaries


def images(rows=12):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, 1, 8, 8, generator=generator), torch.arange(rows) % 3


def image_network():
    return mlp((64, 8, 3))


def test_a_flow_moves_pixels_and_not_their_values():
    x, y = images()
    flow = ab.Flow(weight=0.01, smoothness=0.01)
    assert torch.allclose(flow.inputs(flow.start(x), x), x, atol=1e-5)
    right = flow.start(x)
    right[:, 0] = 1.0  # one pixel to the right is read
    assert torch.allclose(flow.inputs(right, x)[..., :-1], x[..., 1:], atol=1e-5)
    kernel = ab.BAL(image_network(), "x", 12, adversary=flow, inputs=ab.SGLD.rule(step_size=1.0, num_steps=10), keep=range(12))
    kernel.setup_chains(2, 0, (x, y), {})
    moved = kernel.extras()["x"][0]
    losses = [kernel.potential.data_loss(kernel.theta[0], None, inputs, y) for inputs in (x, moved)]
    assert float(losses[1]) > float(losses[0])
    assert float(moved.max()) <= float(x.max()) + 1e-5 and float(moved.min()) >= float(x.min()) - 1e-5


@pytest.mark.parametrize("learners, chains, colder", [("mean", 3, 1.0), ("sum", 3, 3.0)])
def test_a_flow_without_a_loss_has_the_law_of_its_energy(learners, chains, colder):
    """The sum over learners is the law of their mean at T / S."""
    x, y = torch.rand(2000, 1, 3, 3), torch.zeros(2000)
    T, weight, eta = 0.5, 2.0, 0.01
    flow = ab.Flow(weight=weight, smoothness=0.0)
    drawn = {}

    class Noted(type(flow)):
        def inputs(self, z, clean):
            drawn["z"] = z
            return super().inputs(z, clean)

    inputs = ab.SGLD.rule(step_size=eta, num_steps=200)
    kernel = ab.BAL(no_inputs, "x", 2000, adversary=Noted(weight, 0.0), inputs=inputs, input_temperature=T, learners=learners)
    kernel.setup_chains(chains, 0, (x, y), {})
    kernel._next_batch()
    expected = T / (2.0 * colder * weight) / (1.0 - eta * colder * weight)
    assert abs(float(drawn["z"].var()) / expected - 1.0) < 4.0 * (2.0 / drawn["z"].numel()) ** 0.5


def test_a_generator_lasts_from_batch_to_batch_and_learns_to_raise_the_loss():
    x, y = blobs()
    torch.manual_seed(0)
    generator = ab.Generator(torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)), radius=0.2)
    before = [p.clone() for p in generator.network.parameters()]
    inputs = ab.SGLD.rule(step_size=0.01, num_steps=5)
    kernel = ab.BAL(network(), "x", 64, adversary=generator, inputs=inputs, input_temperature=1e-4)
    kernel.setup_chains(2, 0, (x, y), {})

    def loss(*batch):
        return float(torch.stack([kernel.potential.data_loss(theta, None, *batch) for theta in kernel.theta]).mean())

    losses = []
    for _ in range(20):
        batch = kernel._next_batch()
        assert float((torch.cdist(batch[0], x).min(1).values).max()) <= 0.2 * 2**0.5 + 1e-6
        losses.append(loss(*batch))
    assert losses[-1] > losses[0] + 1.0 > loss(x, y) + 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, generator.network.parameters(), strict=True))


def test_looking_at_kept_rows_leaves_a_lasting_adversary_where_it_is():
    x, y = blobs()
    generator = ab.Generator(torch.nn.Linear(2, 2), radius=0.2)
    kernel = ab.BAL(network(), "x", 64, adversary=generator, inputs=ab.SGLD.rule(step_size=0.01, num_steps=5), keep=(0, 1))
    kernel.setup_chains(2, 0, (x, y), {})
    kernel._next_batch()
    before = kernel.chains.inputs.lasting.clone()
    kernel.extras()
    assert torch.equal(kernel.chains.inputs.lasting, before)


def test_an_adversary_may_have_no_energy_of_its_own():
    class Shift(Adversary):
        def start(self, clean):
            return torch.zeros_like(clean)

        def inputs(self, z, clean):
            return clean + z

    x, y = blobs()
    options = {"inputs": ab.SGLD.rule(step_size=0.01, num_steps=3), "cost": ab.L2(1.0), "keep": (0, 1)}
    moved = []
    for adversary in (Shift(), None):
        pyro.set_rng_seed(0)
        moved.append(sampled(ab.BAL(network(), "x", 16, adversary=adversary, **options), x, y, samples=2).get_extras()["x"])
    torch.testing.assert_close(*moved)


def test_a_vae_is_perturbed_so_that_its_codes_move():
    """The adversary raises how far the code's mean is from that of the clean image, and the weights see what it made."""
    x = images(20)[0]
    model = VAE(num_pixels=64, hidden=(16,), num_latents=3)

    def moved_code(model, clean, args, kwargs):
        return (model.encode(args[0])[0] - model.encode(clean)[0].detach()).square().sum(-1)

    inputs = ab.SGLD.rule(step_size=20.0, num_steps=15)
    kernel = ab.BAL(
        model, "x", 20, loss=moved_code, inputs=inputs, cost=ab.Box(0.1), input_temperature=1e-4, clip=(0.0, 1.0), keep=range(20)
    )
    mcmc = sampled(kernel, x, torch.randn(20, 3), samples=3, chains=2)
    moved = mcmc.get_extras()["x"][-1]
    assert float((moved - x).abs().max()) <= 0.1 + 1e-6
    weights = {site: value[-1] for site, value in mcmc.get_samples().items()}
    encode = pyro.poutine.condition(model.encode, data=weights)
    noise = x + 0.1 * torch.randn_like(x).sign()
    distances = [(encode(images_)[0] - encode(x)[0]).norm(dim=-1).mean() for images_ in (moved, noise.clamp(0, 1))]
    assert float(distances[0]) > 2.0 * float(distances[1])


# ------------------------------------------------------------------------------------------------ bad input


def run_bal(x=None, y=None, **options):
    if x is None:
        x, y = blobs()
    options = {"perturb": "x", "batch_size": 16, "clip": (0.0, 1.0), **options}
    sampled(ab.BAL(options.pop("model", None) or network(), **options), x, y)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"perturb": "z"}, "perturb='z'.*x, y"),
        ({"perturb": "y"}, "perturb='y'.*int64"),
        ({"batch_size": None}, "perturb='x'.*batch_size"),
        ({"clip": (0.4, 0.6)}, "argument 'x' has values from .* outside clip"),
        ({"clip": (1.0, 0.0)}, "clip"),
        ({"clip": None, "cost": ab.Box(0.1)}, "cost and inputs are in the units of the inputs"),
        ({"learners": "many"}, "learners='many'.*'mean', 'sum', 'independent'"),
        ({"copies": 0}, "copies=0"),
        ({"clean_share": 1.5}, "clean_share=1.5"),
        ({"inputs": 0.1}, "inputs=0.1"),
        ({"cost": 3}, "cost=3"),
        ({"cost": lambda perturbed, clean: 1.0}, "cost must return one number for each"),
        ({"loss": lambda model, clean, args, kwargs: args[0].sum()}, "loss must return one number for each"),
        ({"keep": (64,)}, r"keep=\[64\]"),
        ({"input_temperature": -1.0}, "temperature"),
        ({"adversary": ab.Flow()}, "Flow moves the pixels of images"),
        ({"adversary": ab.Generator(torch.nn.Linear(2, 3), radius=0.1)}, "Generator: the network makes"),
        ({"adversary": ab.Generator(torch.nn.Linear(2, 2), radius=0.1), "learners": "independent"}, "shared by all rows"),
    ],
)
def test_bad_input_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        run_bal(**options)


@pytest.mark.parametrize("make", [lambda: ab.L2(-1.0), lambda: ab.Box(0.0), lambda: ab.Flow(weight=0.0)])
def test_costs_out_of_range_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_independent_learners_cannot_share_a_loader():
    x, y = blobs()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    kernel = ab.BAL(network(), "x", learners="independent", clip=(0.0, 1.0))
    with pytest.raises(ValueError, match="independent"):
        sampled(kernel, loader, chains=2)


def test_labels_outside_the_classes_are_refused():
    x, y = blobs()
    y[40] = 3
    with pytest.raises(ValueError, match="obs"):
        run_bal(x, y)


def test_a_classifier_of_images_is_a_model_like_any_other():
    x, y = images()
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(72, 3))
    kernel = ab.BAL(Classifier(ab.nn.bayesianize(net)), "x", batch_size=6, clip=(0.0, 1.0))
    mcmc = sampled(kernel, x, y, samples=2, chains=2)
    assert mcmc.get_samples()["net.0.weight"].shape == (4, 2, 1, 3, 3)
