"""The fitted distribution has the density and entropy of its formula, and the fit takes the steps of its docstring."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from torch import nn

from pyro_advbayes.attacks import FGSM, PGD, AdversarialDistribution, Uniform
from pyro_advbayes.attacks.distribution import LEAST_RHO, Law, over_inputs, slope_of_mu
from tests.attacks.posteriors import digits_examples, digits_network, examples, posterior

EPS = 0.1
BEST_SCALE = 0.8744  # where the entropy at mu = 0 is largest; test_entropies_are_those_of_quadrature holds it
softplus = nn.functional.softplus


def law(mu, scale):
    """A law of one number for each pair, in double precision."""
    mu, scale = torch.as_tensor(mu, dtype=torch.double), torch.as_tensor(scale, dtype=torch.double)
    return Law(mu, scale + (-torch.expm1(-scale)).log())


def quantiles(count):
    """Standard normal noise as equally likely numbers: a sum over them is a quadrature."""
    return torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(count, dtype=torch.double) + 0.5) / count)


def entropy(mu, scale, eps=1.0):
    r""":math:`\log(\epsilon \sigma \sqrt{2 \pi e}) + E \log(1 - \tanh^2)`, by the trapezoidal rule, exact to 1e-12."""
    r = torch.linspace(-12, 12, 4001, dtype=torch.double)
    u = mu + scale * r
    weight = (-r.square() / 2).exp() * (r[1] - r[0]) / math.sqrt(2 * math.pi)
    return math.log(eps) + torch.as_tensor(scale).log() + 0.5 * math.log(2 * math.pi * math.e) - (2 * u.cosh().log() * weight).sum()


@pytest.fixture
def noise(monkeypatch):
    """Gives the fit noise of the test's choice, round and round."""

    def give(values):
        turn = iter(())

        def following(like):
            nonlocal turn
            value = next(turn, None)
            if value is None:
                turn = iter(values)
                value = next(turn)
            return torch.as_tensor(value, dtype=like.dtype).expand_as(like)

        monkeypatch.setattr(torch, "randn_like", following)

    return give


@pytest.mark.parametrize("eps", [0.03, 2.0])
@pytest.mark.parametrize(("mu", "scale"), [(0.0, 0.69), (0.0, 0.05), (0.0, 2.2), (1.3, 0.5), (-3.0, 0.8), (3.0, 0.8), (2.1, 1.5)])
def test_the_density_integrates_to_one_over_the_ball(mu, scale, eps):
    center = torch.tensor([0.4], dtype=torch.double)
    q = over_inputs(law([mu], [scale]), center, eps)
    u = torch.linspace(mu - 9 * scale, mu + 9 * scale, 4001, dtype=torch.double)
    u = u[u.abs() < 15]  # beyond lie the last two numbers before the surface
    x = center + eps * u.tanh()
    spacing = eps * (1 - u.tanh().square()) * (u[1] - u[0])
    assert q.log_prob(x.unsqueeze(1)).shape == (len(u), 1)
    torch.testing.assert_close((q.log_prob(x.unsqueeze(1)).exp().squeeze(1) * spacing).sum().item(), 1.0, rtol=0, atol=1e-6)


def test_entropies_are_those_of_quadrature():
    """Draws' mean of -log q, within four standard errors; the figures are nats of one number in a ball of radius 1."""
    torch.testing.assert_close(float(entropy(0.0, math.log(2))), 0.6477, rtol=0, atol=5e-5)
    scales = torch.arange(0.5, 1.5, 2e-3, dtype=torch.double)
    values = torch.stack([entropy(0.0, scale) for scale in scales])
    assert abs(float(scales[values.argmax()]) - BEST_SCALE) <= 1e-3
    torch.testing.assert_close(float(values.max()), 0.6836, rtol=0, atol=5e-5)
    for mu, scale, eps in ((0.0, math.log(2), 1.0), (0.0, BEST_SCALE, 0.1), (-2.1, 0.3, 0.1), (1.0, 2.0, 4.0)):
        q = over_inputs(law([mu], [scale]), torch.zeros(1, dtype=torch.double), eps)
        surprise = -q.log_prob(q.sample((20_000,)))
        error = float(surprise.std()) / math.sqrt(len(surprise))
        assert abs(float(surprise.mean() - entropy(mu, scale, eps))) < 4 * error < 0.06


def test_the_slope_of_the_entropy_is_that_of_quadrature():
    r = quantiles(20_000)
    for mu, scale in ((0.0, 0.3), (0.7, 0.9), (-2.0, 1.5)):
        a = (mu + scale * r).tanh()
        of_mu = slope_of_mu(a, torch.zeros_like(a), EPS, 1.0)
        of_scale = (of_mu * r).mean() + 1 / scale
        at = torch.tensor([mu, scale], dtype=torch.double, requires_grad=True)
        expected = torch.autograd.grad(entropy(at[0], at[1]), at)[0]
        torch.testing.assert_close(torch.stack([of_mu.mean(), of_scale]), expected, rtol=1e-3, atol=1e-3)


def by_autograd(attack, loss, x):
    """The fit as the docstring writes it, differentiated by autograd, and the draw after it: mu, rho, attacked inputs."""
    first = math.log(math.expm1(attack.init_scale))
    mu, rho = torch.zeros_like(x), torch.full_like(x, first)
    total = [torch.zeros_like(x), torch.zeros_like(x)]
    for _ in range(attack.steps):
        mu.requires_grad_(), rho.requires_grad_()
        objective = 0.0
        for _ in range(attack.num_samples):
            u = mu + softplus(rho) * torch.randn_like(x)
            moved = (x + attack.eps * u.tanh()).clamp(*attack.clip)
            nats = softplus(rho).log() + (1 - u.tanh().square()).log()
            objective = objective + loss(moved).sum() + attack.entropy_weight * nats.flatten(1).mean(1).sum()
        gradients = torch.autograd.grad(objective, (mu, rho))
        total = [g + t * attack.accumulate for g, t in zip(gradients, total, strict=True)]
        mu, rho = ((v + attack.step_size * t.sign()).detach() for v, t in zip((mu, rho), total, strict=True))
    drawn = (mu + softplus(rho) * torch.randn_like(x)).tanh()
    return mu, rho, (x + attack.eps * drawn).clamp(*attack.clip)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": False},
        {"num_samples": 1, "init_scale": 0.7},
        {"entropy_weight": 0.0},
        {"entropy_weight": 3.0, "init_scale": 2.0, "step_size": 0.11, "steps": 12},
        {"eps": 0.5, "clip": (0.0, 0.9)},
    ],
    ids=str,
)
def test_the_fit_is_its_formula_by_autograd_with_the_same_noise(settings, shape):
    _, (network,) = posterior(1)
    x, y = examples()
    x = (0.9 * x * (x > 0.3)).view(-1, *shape)  # some of them black

    def classifier(inputs):
        return network(inputs.flatten(1))

    def loss(inputs):
        return nn.functional.cross_entropy(classifier(inputs), y, reduction="none")

    attack = AdversarialDistribution(**{"eps": EPS} | settings)
    torch.manual_seed(3)
    mu, rho, attacked = by_autograd(attack, loss, x)
    torch.manual_seed(3)
    torch.testing.assert_close(attack(classifier, x, y), attacked, rtol=1e-12, atol=1e-12)
    torch.manual_seed(3)
    fitted = attack.fit(classifier, x, y).base_dist.base_dist
    torch.testing.assert_close((fitted.loc, fitted.scale), (mu, softplus(rho)), rtol=1e-12, atol=1e-12)
    assert bool(((x == 0) & (attacked == 0)).any())  # a draw was clipped


def test_the_gradient_of_one_draw_is_that_of_autograd():
    """Its size, too, which the signs of the steps hide."""
    x, weight = torch.rand(4, 5, dtype=torch.double), 0.3
    direction = torch.randn(4, 5, dtype=torch.double)
    mu, rho = torch.randn(2, 4, 5, dtype=torch.double).requires_grad_()
    r = torch.randn(4, 5, dtype=torch.double)
    u = mu + softplus(rho) * r
    moved = (x + EPS * u.tanh()).clamp(0, 1)
    nats = (softplus(rho).log() + (1 - u.tanh().square()).log()).sum()
    expected = torch.autograd.grad((moved.square() * direction).sum() + weight * nats, (mu, rho))
    wide = x + EPS * u.tanh()
    gradient = (2 * moved * direction * (wide == moved)).detach()
    of_mu = slope_of_mu(u.tanh().detach(), gradient, EPS, weight)
    of_rho = (of_mu * r + weight / softplus(rho)) * rho.sigmoid()
    torch.testing.assert_close((of_mu, of_rho.detach()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_on_a_linear_model_every_number_goes_the_way_of_its_weight(accumulate, targeted):
    """Seven steps of 0.3, which bound |mu|; the median perturbation is then 97 % of eps."""
    direction = torch.randn(6, dtype=torch.double)
    x, y = 0.4 + 0.2 * torch.rand(8, 6, dtype=torch.double), torch.arange(8) % 2

    def classifier(inputs):
        return torch.stack([torch.zeros(len(inputs), dtype=torch.double), inputs @ direction], 1)

    attack = AdversarialDistribution(EPS, num_samples=1, entropy_weight=0.0, accumulate=accumulate, targeted=targeted)
    mu = attack.fit(classifier, x, y).base_dist.base_dist.loc
    away = (1 - 2 * y.double()).unsqueeze(1) * direction.sign()  # of class 1 the loss rises against the direction
    torch.testing.assert_close(mu, 2.1 * (-away if targeted else away))
    assert round(math.tanh(2.1), 2) == 0.97


@pytest.mark.parametrize("start", [0.05, 0.7, 4.0, 800.0])
def test_with_a_large_entropy_weight_the_fit_ends_at_the_widest_law(start, noise):
    """The noise is a quadrature, so that no step is random."""
    noise(quantiles(40))
    step = 0.1 if start < 100 else 10.0
    attack = AdversarialDistribution(EPS, 70, 40, step, entropy_weight=1e9, init_scale=start, accumulate=False)
    x = torch.full((2, 3), 0.5, dtype=torch.double)
    q = attack.fit(lambda inputs: torch.stack([inputs[:, 0], inputs.sum(1)], 1), x, torch.tensor([0, 1])).base_dist.base_dist
    assert float(q.loc.abs().max()) <= step
    if start < 100:
        best = law(0.0, BEST_SCALE).rho
        assert float((law(0.0, q.scale).rho - best).abs().max()) <= step + 0.02  # 40 quantiles are that far from the quadrature


def test_a_narrow_law_takes_one_step_of_fgsm_through_tanh():
    _, (network,) = posterior(1)
    x, y = examples()
    x = 0.4 + 0.2 * x
    for step in (0.3, 3.0):
        attack = AdversarialDistribution(EPS, 1, 1, step, entropy_weight=0.0, init_scale=1e-7)
        expected = x + math.tanh(step) * (FGSM(EPS)(network, x, y) - x)
        torch.testing.assert_close(attack(network, x, y), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_a_row_of_a_batch_is_fitted_as_if_alone(batch_size, noise):
    _, (network,) = posterior(1)
    x, y = examples(5)
    attack = AdversarialDistribution(EPS, 4, 2, init_scale=0.6)
    r = torch.randn(9, 1, 6, dtype=torch.double)
    noise(r)
    together = AdversarialDistribution(EPS, 4, 2, init_scale=0.6, batch_size=batch_size)(network, x, y)
    for i in range(5):
        noise(r)
        torch.testing.assert_close(attack(network, x[i : i + 1], y[i : i + 1]), together[i : i + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 2, 3)])
def test_the_fitted_distribution_is_one_of_inputs_in_the_ball(shape):
    weight = torch.randn(4, max(1, math.prod(shape)))
    x, y = torch.rand(3, *shape), torch.randint(4, (3,))
    q = AdversarialDistribution(EPS, init_scale=0.7, batch_size=2).fit(lambda inputs: inputs.reshape(len(inputs), -1) @ weight.T, x, y)
    assert isinstance(q, pyro.distributions.Distribution)
    assert q.batch_shape == (3,) and q.event_shape == shape and q.event_dim == len(shape)
    draws = q.sample((1000,))
    assert draws.shape == (1000, 3, *shape) and q.log_prob(draws).shape == (1000, 3)
    assert float((draws - x).abs().max()) <= EPS * (1 + 1e-5)
    with pytest.raises(ValueError, match=r"support"):
        q.log_prob(x + 1.01 * EPS)
    with pyro.poutine.trace() as seen:
        pyro.sample("x", q.mask(torch.tensor([True, False, True])))
    assert seen.trace.log_prob_sum().isfinite()


def test_densities_of_rounded_draws_are_finite_up_to_the_surface():
    """PyTorch's own transforms give NaN there."""
    x = torch.full((1, 4), 0.5)
    q = over_inputs(Law(torch.tensor([[0.0, 2.1, -9.0, 30.0]]), torch.tensor([[0.5, 2.1, 0.1, 3.0]])), x, EPS)
    draws = q.sample((2000,))
    exact = q.log_prob(draws)  # from the numbers before tanh, which the transform remembers
    again = q.log_prob(draws.clone())
    assert exact.isfinite().all() and again.isfinite().all()
    assert q.log_prob(torch.cat([x - EPS, x + EPS]).unsqueeze(1)).isfinite().all()
    inner = over_inputs(Law(torch.tensor([[0.0, 2.1]]), torch.tensor([[0.5, -1.0]])), x[:, :2], EPS)
    draws = inner.sample((2000,))
    torch.testing.assert_close(inner.log_prob(draws), inner.log_prob(draws.clone()), rtol=0, atol=1e-2)


def test_the_attack_clips_its_draws_and_the_distribution_does_not():
    net = digits_network()
    x, y = digits_examples(30)
    attack = AdversarialDistribution(EPS)
    attacked, draws = attack(net, x, y), attack.fit(net, x, y).sample()
    assert float(attacked.min()) == 0.0 and float(attacked.max()) == 1.0
    assert float(draws.min()) < -0.5 * EPS and float(draws.max()) > 1 + 0.5 * EPS


def test_a_law_whose_scale_shrinks_for_ever_stays_a_law(noise):
    noise([-0.7, 0.7])  # around a peak of the loss, where mu stays
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)

    def peak(inputs):
        return torch.stack([1e3 * inputs.square().sum(1), torch.zeros(len(inputs))], 1)

    settings = {"entropy_weight": 0.0, "accumulate": False, "clip": None}
    q = AdversarialDistribution(EPS, 60, 2, step_size=2.0, **settings).fit(peak, x, y)
    assert float(q.base_dist.base_dist.scale.min()) == softplus(torch.tensor(LEAST_RHO)) and q.log_prob(q.sample()).isfinite().all()
    narrow = AdversarialDistribution(EPS, 3, init_scale=1e-200).fit(peak, x, y)
    widened = softplus(torch.tensor(LEAST_RHO + 3 * 0.3))  # by the entropy, three steps of 0.3
    torch.testing.assert_close(narrow.base_dist.base_dist.scale, widened.expand(2, 3), rtol=1e-5, atol=0)
    assert narrow.log_prob(narrow.sample()).isfinite().all()


def test_half_precision_is_fitted_in_single():
    net = digits_network()
    x, y = digits_examples(20)
    found = AdversarialDistribution(EPS)(lambda inputs: net(inputs.float()), x.half(), y)
    assert found.dtype == torch.half
    q = AdversarialDistribution(EPS).fit(lambda inputs: net(inputs.float()), x.half(), y)
    assert q.sample().dtype == torch.float32 and q.log_prob(q.sample()).isfinite().all()


def test_a_draw_is_stronger_than_noise_and_weaker_than_pgd_at_as_many_gradients():
    net = digits_network()
    x, y = digits_examples(200)
    attacks = (Uniform(EPS), AdversarialDistribution(EPS, 35, 1), PGD(EPS, 35)), (Uniform(EPS), AdversarialDistribution(EPS), PGD(EPS, 35))
    for trio in attacks:
        losses = [float(nn.functional.cross_entropy(net(attack(net, x, y)).detach(), y)) for attack in trio]
        assert losses[0] + 1 < losses[1] < losses[2] - 0.03


def test_more_draws_and_a_narrow_start_raise_the_expected_loss():
    """What the docstring says of the defaults: each is better than what it takes the place of, at seven steps."""
    net = digits_network()
    x, y = digits_examples(200)

    def loss(**settings):
        logits = net(AdversarialDistribution(EPS, **settings)(net, x, y)).detach()
        return float(nn.functional.cross_entropy(logits, y))

    default = loss()
    assert default > loss(init_scale=math.log(2)) + 0.1
    assert default > loss(num_samples=1) + 0.02
    assert loss(num_samples=1) > loss(num_samples=1, accumulate=False) + 0.1
