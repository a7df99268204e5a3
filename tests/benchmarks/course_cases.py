"""
The models of a first course in Bayesian statistics, each as a beginner writes it down: inputs and outcomes in their own units, collinear
inputs, vague priors, bounded and positive parameters. Data are simulated, with the sizes and units of the data sets that the models are
known by. Moments are exact by quadrature, with data drawn by the seed; those of five models come from NUTS, on fixed data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.benchmarks.trust_cases import Case, Problem
from tests.benchmarks.trust_references import Moments, Quadrature, Target, log_grid, nuts_moments, unknown_noise

# ---------------------------------------------------------------------------------------------------------------- one parameter, or two


def coin(seed: int) -> Problem:
    """Twenty flips of a coin."""
    torch.manual_seed(1000 + seed)
    y = torch.bernoulli(torch.full((20,), 0.3))

    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("flips", len(y)):
            pyro.sample("obs", dist.Bernoulli(p), obs=y)

    a, b = 2.0 + y.double().sum(), 22.0 - y.double().sum()
    total = a + b
    excess = 6.0 * ((a - b) ** 2 * (total + 1.0) - a * b * (total + 2.0)) / (a * b * (total + 2.0) * (total + 3.0))
    return Problem(model, (y,), {"p": Moments(a / total, (a * b / (total + 1.0)).sqrt() / total, 3.0 + excess)})


def heights(seed: int) -> Problem:
    """Mean and spread of 350 heights in cm, the spread with a flat prior between bounds."""
    torch.manual_seed(1000 + seed)
    y = 155.0 + 8.0 * torch.randn(350)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(178.0, 20.0))
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 50.0))
        with pyro.plate("people", len(y)):
            pyro.sample("obs", dist.Normal(mu, sigma), obs=y)

    sigma = log_grid(5.0, 15.0, 800)
    known = unknown_noise(torch.ones(350, 1), y - 178.0, 20.0, dist.Uniform(0.0, 50.0), sigma)
    mean, sd, kurtosis, _ = known.linear(torch.ones(1, 1, 1, dtype=torch.float64))
    return Problem(model, (y,), {"mu": Moments(178.0 + mean[0], sd[0], kurtosis[0]), "sigma": known.scale(sigma)})


def bioassay(seed: int) -> Problem:
    """Deaths among five animals at each of four doses (Racine et al., 1986), with vague priors: strongly correlated, and skewed."""
    dose, deaths = torch.tensor([-0.86, -0.30, -0.05, 0.73]), torch.tensor([0.0, 1.0, 3.0, 5.0])

    def model(dose: Tensor, deaths: Tensor | None = None) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
        with pyro.plate("groups", len(dose)):
            pyro.sample("obs", dist.Binomial(5, logits=alpha + beta * dose), obs=deaths)

    alpha, beta = (
        t.flatten() for t in torch.meshgrid(torch.linspace(-8, 10, 600).double(), torch.linspace(-20, 60, 800).double(), indexing="ij")
    )
    logits = alpha.unsqueeze(-1) + beta.unsqueeze(-1) * dose.double()
    log_weight = dist.Binomial(5, logits=logits).log_prob(deaths.double()).sum(-1)
    weight = (log_weight + dist.Normal(0.0, 2.0).log_prob(alpha) + dist.Normal(0.0, 10.0).log_prob(beta)).softmax(0)
    return Problem(model, (dose, deaths), {"alpha": _on_grid(weight, alpha), "beta": _on_grid(weight, beta)})


def _on_grid(weight: Tensor, values: Tensor) -> Moments:
    mean = weight @ values
    variance = weight @ (values - mean).square()
    return Moments(mean, variance.sqrt(), weight @ (values - mean).pow(4) / variance.square())


# ------------------------------------------------------------------------------------------------------------------------- regressions


def _regression(names: tuple[str, ...], x: Tensor, y: Tensor, prior_sd: float, noise: Any, grid: tuple[float, float]) -> Problem:
    """A scalar site a coefficient, the first of them the intercept; a noise scale."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        intercept, *slopes = (pyro.sample(name, dist.Normal(0.0, prior_sd)) for name in names)
        sigma = pyro.sample("sigma", noise)
        with pyro.plate("data", len(x)):
            mean = intercept + sum(slope * column for slope, column in zip(slopes, x.unbind(-1), strict=True))
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)

    sigma = log_grid(*grid, 500)
    known = unknown_noise(torch.cat([torch.ones(len(x), 1), x], -1), y, prior_sd, noise, sigma)
    both = known.linear(torch.eye(len(names), dtype=torch.float64).unsqueeze(0))
    moments = {name: Moments(*(part[i] for part in both[:3])) for i, name in enumerate(names)}
    return Problem(model, (x, y), {**moments, "sigma": known.scale(sigma)})


def kid_scores(seed: int) -> Problem:
    """Children's test scores on their mother's schooling, her IQ, and the product of both, in points."""
    torch.manual_seed(1000 + seed)
    school, iq = torch.bernoulli(torch.full((434,), 0.79)), 100.0 + 15.0 * torch.randn(434)
    x = torch.stack([school, iq, school * iq], -1)
    y = -11.0 + x @ torch.tensor([51.0, 1.1, -0.5]) + 18.0 * torch.randn(434)
    return _regression(("intercept", "school", "iq", "product"), x, y, 100.0, dist.HalfCauchy(2.5), (10.0, 30.0))


def mesquite(seed: int) -> Problem:
    """The logarithm of 46 bushes' weight on those of their diameters, heights and densities, which hang together."""
    torch.manual_seed(1000 + seed)
    size = 0.5 * torch.randn(46, 1)
    x = size + torch.tensor([0.15, 0.15, 0.2, 0.2, 0.4]) * torch.randn(46, 5) + torch.tensor([0.6, 0.4, 0.3, 0.1, 0.5])
    y = 4.8 + x @ torch.tensor([0.4, 1.1, 0.2, 0.4, 0.1]) + 0.33 * torch.randn(46)
    return _regression(("intercept", "d1", "d2", "height", "canopy", "density"), x, y, 10.0, dist.HalfNormal(5.0), (0.15, 0.8))


def autoregression(seed: int) -> Problem:
    """An AR(5) process of 200 points around a level."""
    torch.manual_seed(1000 + seed)
    series = torch.zeros(260)
    for t in range(5, 260):
        series[t] = 0.2 + torch.tensor([0.1, 0.0, -0.2, 0.2, 0.6]) @ series[t - 5 : t] + 0.15 * torch.randn(())
    lags = series[60:].unfold(0, 5, 1)[:-1].flip(-1)
    return _regression(("level", *(f"lag{i}" for i in range(1, 6))), lags, series[65:], 10.0, dist.HalfCauchy(2.5), (0.1, 0.25))


def radon(seed: int) -> Problem:
    """Thirty counties of 1 to 20 houses, a level each around a common one, the effect of the floor, both scales unknown; non-centred."""
    torch.manual_seed(1000 + seed)
    county = torch.arange(30).repeat_interleave(torch.randint(1, 21, (30,)))
    floor = torch.bernoulli(torch.full((len(county),), 0.2))
    y = (1.4 + 0.35 * torch.randn(30))[county] - 0.7 * floor + 0.75 * torch.randn(len(county))

    def model(county: Tensor, floor: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        score = pyro.sample("score", dist.Normal(torch.zeros(30), 1.0).to_event(1))
        with pyro.plate("houses", len(floor)):
            pyro.sample("obs", dist.Normal(mu + tau * score[county] + slope * floor, sigma), obs=y)

    tau, sigma = (t.flatten() for t in torch.meshgrid(log_grid(1e-3, 3.0, 100), log_grid(0.55, 1.0, 40), indexing="ij"))
    common = torch.stack([torch.ones(len(county)), floor], -1).double().expand(len(tau), -1, -1)
    scores = tau.reshape(-1, 1, 1) * torch.nn.functional.one_hot(county, 30).double()
    design = torch.cat([common, scores], -1) / sigma.reshape(-1, 1, 1)
    log_weight = sum(dist.HalfNormal(1.0).log_prob(scale) + scale.log() for scale in (tau, sigma)) - len(y) * sigma.log()
    precision = torch.tensor([0.01, 0.01, *[1.0] * 30], dtype=torch.float64)
    known = Quadrature(design, y.double() / sigma.unsqueeze(-1), precision, log_weight)
    every = known.linear(torch.eye(32, dtype=torch.float64).unsqueeze(0))
    moments = {name: Moments(*(part[i] for part in every[:3])) for i, name in enumerate(("mu", "slope"))}
    moments |= {"score": Moments(*(part[2:] for part in every[:3])), "tau": known.scale(tau), "sigma": known.scale(sigma)}
    return Problem(model, (county, floor, y), moments)


def gaussian_process(seed: int) -> Problem:
    """The length scale, the amplitude and the noise of a Gaussian process that was seen at eleven points."""
    torch.manual_seed(1000 + seed)
    x = torch.linspace(-10.0, 10.0, 11)
    y = 1.5 * torch.sin(x / 3.0) + 0.3 * torch.randn(11)

    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.Gamma(25.0, 4.0))
        amplitude = pyro.sample("amplitude", dist.HalfNormal(2.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        kernel = amplitude**2 * torch.exp(-0.5 * ((x.unsqueeze(-1) - x) / length) ** 2)
        covariance = kernel + (noise**2 + 1e-5) * torch.eye(len(x))
        pyro.sample("obs", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)

    axes = (torch.linspace(1.5, 14.0, 50).double(), log_grid(0.1, 9.0, 60), log_grid(0.02, 4.0, 60))
    length, amplitude, noise = (t.flatten() for t in torch.meshgrid(*axes, indexing="ij"))
    distance, eye = (x.unsqueeze(-1) - x).double() ** 2, torch.eye(11, dtype=torch.float64)
    covariance = amplitude.reshape(-1, 1, 1) ** 2 * torch.exp(-0.5 * distance / length.reshape(-1, 1, 1) ** 2)
    covariance = covariance + (noise.reshape(-1, 1, 1) ** 2 + 1e-5) * eye
    log_weight = dist.MultivariateNormal(torch.zeros(11, dtype=torch.float64), covariance).log_prob(y.double())
    log_weight = log_weight + dist.Gamma(25.0, 4.0).log_prob(length)
    log_weight = (
        log_weight + dist.HalfNormal(2.0).log_prob(amplitude) + amplitude.log() + dist.HalfNormal(1.0).log_prob(noise) + noise.log()
    )
    weight = log_weight.softmax(0)
    values = {"length": length, "amplitude": amplitude, "noise": noise}
    return Problem(model, (x, y), {name: _on_grid(weight, value) for name, value in values.items()})


# ------------------------------------------------------------------------------------------------------------------------ against NUTS


def wells_data() -> tuple[Tensor, Tensor]:
    """Distance to the next safe well in metres, arsenic, years of schooling ``[3000, 3]``; who switched."""
    torch.manual_seed(1000)
    x = torch.stack(
        [48.0 * torch.rand(3000).log().neg(), 0.5 + 1.1 * torch.rand(3000).log().neg(), torch.randint(0, 13, (3000,)).float()], -1
    )
    return x, torch.bernoulli(torch.sigmoid(-0.2 + x @ torch.tensor([-0.009, 0.47, 0.04])))


def wells_model(x: Tensor, y: Tensor | None = None) -> None:
    """Logistic regression in the inputs' own units."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    with pyro.plate("wells", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=intercept + x @ weight), obs=y)


def wells_target() -> Target:
    """Of (intercept, weight)."""
    import jax
    import jax.numpy as jnp

    x, y = (jnp.asarray(t.numpy()) for t in wells_data())

    def log_density(theta: Any) -> Any:
        f = theta[0] + x @ theta[1:]
        return (y * f - jax.nn.softplus(f)).sum() - (theta**2).sum() / 50.0

    return Target(log_density, [0.0] * 4, lambda draws: {"intercept": draws[..., 0], "weight": draws[..., 1:]})


def roaches_data() -> tuple[Tensor, Tensor, Tensor]:
    """Roaches before in hundreds, treatment, senior ``[262, 3]``; days of exposure; roaches caught, very unequal."""
    torch.manual_seed(1000)
    x = torch.stack(
        [0.42 * torch.rand(262).log().neg(), torch.bernoulli(torch.full((262,), 0.6)), torch.bernoulli(torch.full((262,), 0.3))], -1
    )
    exposure = 0.2 + 1.6 * torch.rand(262)
    mean = exposure * (2.8 + x @ torch.tensor([1.3, -0.8, -0.3])).exp()
    return x, exposure, torch.poisson(mean * dist.Gamma(0.4, 0.4).sample((262,)))


def roaches_model(x: Tensor, exposure: Tensor, y: Tensor | None = None) -> None:
    """Negative binomial regression with an offset."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 2.5).to_event(1))
    shape = pyro.sample("shape", dist.Exponential(1.0))
    log_mean = intercept + x @ weight + exposure.log()
    with pyro.plate("flats", len(x)):
        pyro.sample("obs", dist.NegativeBinomial(shape, logits=log_mean - shape.log()), obs=y)


def roaches_target() -> Target:
    """Of (intercept, weight, log shape)."""
    import jax.numpy as jnp
    from jax.scipy.special import gammaln

    x, exposure, y = (jnp.asarray(t.numpy()) for t in roaches_data())

    def log_density(theta: Any) -> Any:
        log_mean, shape = theta[0] + x @ theta[1:4] + jnp.log(exposure), jnp.exp(theta[4])
        rows = gammaln(y + shape) - gammaln(shape) + shape * theta[4] + y * log_mean - (y + shape) * jnp.logaddexp(log_mean, theta[4])
        return rows.sum() - theta[0] ** 2 / 50.0 - (theta[1:4] ** 2).sum() / 12.5 - shape + theta[4]

    return Target(
        log_density, [1.0, 0.0, 0.0, 0.0, 0.0], lambda t: {"intercept": t[..., 0], "weight": t[..., 1:4], "shape": t[..., 4].exp()}
    )


def dugongs_data() -> tuple[Tensor, Tensor]:
    """Age in years and length in metres of 27 sea cows."""
    torch.manual_seed(1000)
    age = torch.linspace(1.0, 5.6, 27) ** 2
    return age, 2.65 - 0.97 * 0.87**age + 0.05 * torch.randn(27)


def dugongs_model(age: Tensor, length: Tensor | None = None) -> None:
    """A growth curve."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    decay = pyro.sample("decay", dist.Uniform(0.5, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("animals", len(age)):
        pyro.sample("obs", dist.Normal(alpha - beta * decay**age, sigma), obs=length)


def dugongs_target() -> Target:
    """Of (alpha, beta, logit of the decay between its bounds, log sigma)."""
    import jax
    import jax.numpy as jnp

    age, length = (jnp.asarray(t.numpy()) for t in dugongs_data())

    def log_density(theta: Any) -> Any:
        decay, sigma = 0.5 + 0.5 * jax.nn.sigmoid(theta[2]), jnp.exp(theta[3])
        z = (length - theta[0] + theta[1] * decay**age) / sigma
        jacobian = -jax.nn.softplus(theta[2]) - jax.nn.softplus(-theta[2]) + theta[3]
        return -0.5 * (z**2).sum() - 27 * theta[3] - (theta[0] ** 2 + theta[1] ** 2) / 200.0 - 0.5 * sigma**2 + jacobian

    def sites(t: Tensor) -> dict[str, Tensor]:
        return {"alpha": t[..., 0], "beta": t[..., 1], "decay": 0.5 + 0.5 * t[..., 2].sigmoid(), "sigma": t[..., 3].exp()}

    return Target(log_density, [2.6, 1.0, 1.0, -2.3], sites)


def mixture_data() -> tuple[Tensor]:
    """500 numbers from two overlapping groups."""
    torch.manual_seed(1000)
    first = torch.rand(500) < 0.6
    return (torch.where(first, -1.5 + 0.8 * torch.randn(500), 1.5 + 1.2 * torch.randn(500)),)


def mixture_model(y: Tensor) -> None:
    """Two groups, told apart by the order of their means."""
    low = pyro.sample("low", dist.Normal(0.0, 2.0))
    gap = pyro.sample("gap", dist.HalfNormal(4.0))
    scale = pyro.sample("scale", dist.HalfNormal(torch.full((2,), 2.0)).to_event(1))
    share = pyro.sample("share", dist.Beta(5.0, 5.0))
    groups = dist.Normal(torch.stack([low, low + gap], -1), scale)
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.MixtureSameFamily(dist.Categorical(torch.stack([share, 1.0 - share], -1)), groups), obs=y)


def mixture_target() -> Target:
    """Of (low, log gap, log scales, logit of the share)."""
    import jax
    import jax.numpy as jnp

    y = jnp.asarray(mixture_data()[0].numpy())

    def log_density(theta: Any) -> Any:
        gap, scale = jnp.exp(theta[1]), jnp.exp(theta[2:4])
        z = (y[:, None] - jnp.stack([theta[0], theta[0] + gap])) / scale
        log_share = -jnp.stack([jax.nn.softplus(-theta[4]), jax.nn.softplus(theta[4])])
        rows = jax.nn.logsumexp(log_share - theta[2:4] - 0.5 * z**2, axis=1)
        prior = -(theta[0] ** 2) / 8.0 - gap**2 / 32.0 - (scale**2).sum() / 8.0 + 4.0 * log_share.sum()
        return rows.sum() + prior + theta[1] + theta[2:4].sum() + log_share.sum()

    def sites(t: Tensor) -> dict[str, Tensor]:
        return {"low": t[..., 0], "gap": t[..., 1].exp(), "scale": t[..., 2:4].exp(), "share": t[..., 4].sigmoid()}

    return Target(log_density, [-1.0, 1.0, 0.0, 0.0, 0.0], sites)


def outliers_data() -> tuple[Tensor, Tensor]:
    """A line of 100 points, with wild ones among them."""
    torch.manual_seed(1000)
    x = torch.randn(100)
    return x, 1.0 + 2.0 * x + 0.5 * dist.StudentT(2.5).sample((100,))


def outliers_model(x: Tensor, y: Tensor | None = None) -> None:
    """Robust regression: Student-t noise of unknown scale and tails."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.StudentT(nu, intercept + slope * x, sigma), obs=y)


def outliers_target() -> Target:
    """Of (intercept, slope, log sigma, log nu)."""
    import jax.numpy as jnp
    from jax.scipy.special import gammaln

    x, y = (jnp.asarray(t.numpy()) for t in outliers_data())

    def log_density(theta: Any) -> Any:
        sigma, nu = jnp.exp(theta[2]), jnp.exp(theta[3])
        z = (y - theta[0] - theta[1] * x) / sigma
        constant = gammaln(0.5 * (nu + 1.0)) - gammaln(0.5 * nu) - 0.5 * theta[3] - theta[2]
        rows = constant - 0.5 * (nu + 1.0) * jnp.log1p(z**2 / nu)
        return rows.sum() - (theta[0] ** 2 + theta[1] ** 2) / 200.0 - sigma**2 / 50.0 + theta[2] + 2.0 * theta[3] - 0.1 * nu

    def sites(t: Tensor) -> dict[str, Tensor]:
        return {"intercept": t[..., 0], "slope": t[..., 1], "sigma": t[..., 2].exp(), "nu": t[..., 3].exp()}

    return Target(log_density, [1.0, 2.0, -0.7, 1.0], sites)


# ------------------------------------------------------------------------------------------------------------------------------- table

TARGETS: dict[str, Callable[[], Target]] = {
    "course wells": wells_target,
    "course roaches": roaches_target,
    "course dugongs": dugongs_target,
    "course mixture": mixture_target,
    "course outliers": outliers_target,
}


def _against_nuts(name: str, model: Callable[..., None], data: Callable[[], tuple[Tensor, ...]], seed: int) -> Problem:
    return Problem(model, data(), nuts_moments(f"course {name}"))


_EXACT = (coin, heights, bioassay, kid_scores, mesquite, autoregression, radon, gaussian_process)
_FIXED: tuple[tuple[str, Callable[..., None], Callable[[], tuple[Tensor, ...]]], ...] = (
    ("wells", wells_model, wells_data),
    ("roaches", roaches_model, roaches_data),
    ("dugongs", dugongs_model, dugongs_data),
    ("mixture", mixture_model, mixture_data),
    ("outliers", outliers_model, outliers_data),
)
CASES = {f"course {make.__name__}": Case(make) for make in _EXACT}
CASES |= {f"course {name}": Case(partial(_against_nuts, name, model, data)) for name, model, data in _FIXED}
