from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_advbayes import Predictive
from pyro_advbayes.infer.autoguide.generators import NetworkGenerator
from pyro_advbayes.infer.autoguide.implicit import AutoImplicit
from pyro_advbayes.infer.autoguide.rows import sites_of
from pyro_advbayes.infer.distill import MLPGenerator, compare

X = torch.linspace(-3, 3, 25)[:, None]


def model(x, y=None):
    """A slope and an offset, logits of two classes."""
    slope, offset = pyro.sample("slope", dist.Normal(0.0, 1.0)), pyro.sample("offset", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    logits = torch.cat([torch.zeros_like(x), slope * x + offset], -1)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
    return logits


def draws(count: int = 2000) -> dict:
    return {"slope": 2.0 + torch.randn(count), "offset": -1.0 + 0.5 * torch.randn(count, 1)}


def guide(shift: float = 0.0, widen: float = 1.0) -> AutoImplicit:
    """The law of the draws itself, or one that is off."""
    network = torch.nn.Linear(2, 2)
    network.noise = 2
    with torch.no_grad():
        network.weight.copy_(torch.diag(torch.tensor([1.0, 0.5]) * widen))
        network.bias.copy_(torch.tensor([2.0 + shift, -1.0]))
    found = AutoImplicit(model, NetworkGenerator(network))
    found.set_sites(sites_of({name: value[None] for name, value in draws(2).items()}))
    found.num_draws = 2000
    return found


def test_the_same_law_is_as_near_as_the_halves_are():
    found = compare(draws(), guide(), X)
    assert found.num_samples == 1000
    assert found.sliced_wasserstein.value < 2 * found.sliced_wasserstein.floor
    assert found.mmd.p_value > 0.01 and found.mmd_floor.p_value > 0.01
    for moments in found.moments.values():  # 1000 draws of each: standard error of the difference .045, of the log-ratio .032
        assert moments.mean.value < 4 * 0.045 and moments.sd.value < 4 * 0.032
    functions = found.functions
    assert functions.kl.value < 0.01 and functions.total_variation.value < 0.05 and functions.mutual_information.value < 0.02
    assert functions.mutual_information_correlation.value > 0.98


def test_a_shifted_mean_is_found_in_its_site_and_in_function_space():
    found = compare(draws(), guide(shift=1.0), X)
    assert found.mmd.p_value < 0.01 and found.mmd_floor.p_value > 0.01
    assert found.sliced_wasserstein.value > 3 * found.sliced_wasserstein.floor
    assert found.moments["slope"].mean.value == pytest.approx(1.0, abs=4 * 0.045)
    assert found.moments["offset"].mean.value < 4 * 0.045
    assert found.functions.total_variation.value > 3 * found.functions.total_variation.floor


def test_a_wider_law_disagrees_more_with_itself():
    found = compare(draws(), guide(widen=2.0), X)
    for moments in found.moments.values():
        assert moments.sd.value == pytest.approx(0.693, abs=4 * 0.032)
    assert found.functions.mutual_information.value > 5 * found.functions.mutual_information.floor


def test_the_numbers_of_function_space_are_those_of_their_definitions():
    samples, other = draws(4), guide()
    torch.manual_seed(4)
    found = compare(samples, other, X, num_samples=2, num_permutations=1)
    torch.manual_seed(4)
    other.sample(1)
    made = other.constrain(other.network.sample(2))

    def probs(values):
        slope, offset = values["slope"][:, None], values["offset"]
        return torch.stack([torch.zeros(len(slope), 25), slope * X.T + offset], -1).double().softmax(-1)

    p, q = (probs({k: v[2 * i : 2 * i + 2] for k, v in samples.items()}).mean(0) for i in range(2))
    m = probs(made).mean(0)
    kl = [(a * (a / b).log()).sum(-1).mean() for a, b in ((p, m), (q, m), (p, q))]
    assert found.functions.kl == pytest.approx((float(kl[0] + kl[1]) / 2, float(kl[2])), rel=1e-4)
    tv = [(a - b).abs().sum(-1).mean() / 2 for a, b in ((p, m), (q, m), (p, q))]
    assert found.functions.total_variation == pytest.approx((float(tv[0] + tv[1]) / 2, float(tv[2])), rel=1e-4)


def test_mutual_information_is_compared_input_by_input():
    samples, other = draws(6), guide(widen=1.5)
    torch.manual_seed(4)
    found = compare(samples, other, X, num_samples=3, num_permutations=1)
    torch.manual_seed(4)
    other.sample(1)
    made = other.constrain(other.network.sample(3))

    def information(values):
        p = Predictive(model, values, return_sites=["_RETURN"])(X)["_RETURN"].double().softmax(-1)
        mean = p.mean(0)
        return (p * p.log()).sum(-1).mean(0) - (mean * mean.log()).sum(-1)

    p, q, m = (information(v) for v in (*({k: v[3 * i : 3 * i + 3] for k, v in samples.items()} for i in range(2)), made))
    pairs = ((p, m), (q, m), (p, q))
    off = [float((a - b).abs().mean()) for a, b in pairs]
    assert any(size > abs(float((a - b).mean())) + 1e-4 for size, (a, b) in zip(off, pairs, strict=True))
    assert found.functions.mutual_information == pytest.approx(((off[0] + off[1]) / 2, off[2]), rel=1e-4)
    turned = [float(((a - a.mean()) * (b - b.mean())).sum() / (a.std() * b.std() * 24)) for a, b in pairs]
    assert found.functions.mutual_information_correlation == pytest.approx(((turned[0] + turned[1]) / 2, turned[2]), rel=1e-4)


def test_without_inputs_only_the_weights_are_compared_and_the_table_has_every_number():
    found = compare(draws(), guide())
    assert found.functions is None
    text = str(compare(draws(), guide(), X))
    for word in ("sliced Wasserstein", "MMD²", "p-value", "slope: means", "offset: sds", "kl", "mutual information", "1000 draws"):
        assert word in text


def test_predictions_are_not_compared_with_a_site_drawn_from_its_prior():
    network = torch.nn.Linear(2, 1)
    network.noise = 2
    partial = AutoImplicit(model, network)
    partial.set_sites(sites_of({"slope": draws(2)["slope"][None]}))
    partial.num_draws = 2000
    samples = {"slope": draws()["slope"]}
    assert compare(samples, partial).functions is None
    with pytest.raises(ValueError, match="site 'offset' of the model, on which its site 'obs' depends, is not among the guide's"):
        compare(samples, partial, X)


def test_over_one_input_there_is_no_correlation_and_no_warning_of_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare(draws(), guide(), X[:1], num_permutations=10)
    assert all(math.isnan(value) for value in found.functions.mutual_information_correlation)
    assert found.functions.mutual_information.value < 0.05


def test_bad_input_is_refused_by_name():
    with pytest.raises(RuntimeError, match="has not been fitted"):
        compare(draws(), AutoImplicit(model, MLPGenerator()))
    with pytest.raises(ValueError, match="site 'offset' is missing"):
        compare({"slope": torch.randn(10)}, guide())
    broken = draws()
    broken["slope"][3] = float("nan")
    with pytest.raises(ValueError, match="draw 3 of site 'slope' is not finite"):
        compare(broken, guide())
    for wrong in (1, 1001, 2.5):
        with pytest.raises(ValueError, match=f"num_samples={wrong}: at most half of the 2000 draws, an int from 2 to 1000"):
            compare(draws(), guide(), num_samples=wrong)
    for name in ("num_projections", "num_permutations"):
        for wrong in (0, 2.5):
            with pytest.raises(ValueError, match=f"{name}={wrong}: an int >= 1"):
                compare(draws(), guide(), **{name: wrong})
    with pytest.raises(ValueError, match=r"return_site='slope' holds neither the logits nor the probabilities of .* site 'obs'"):
        compare(draws(), guide(), X, return_site="slope")
    with pytest.raises(ValueError, match=r"predictions at inputs need it: give model=\.\.\., or leave the inputs out"):
        compare(draws(), draws(), X)
    with pytest.raises(ValueError, match="an AutoImplicit has a model"):
        compare(draws(), guide(), X, model=model)
    with pytest.raises(ValueError, match="guide: site 'offset' is missing"):
        compare(draws(), {"slope": torch.randn(10)}, X, model=model)
    with pytest.raises(
        ValueError, match="num_samples=11: at most half of the 2000 draws, and the 10 of the second set, an int from 2 to 10"
    ):
        compare(draws(), draws(10), num_samples=11)


def test_two_sets_of_draws_are_compared_like_a_guide_and_its_draws():
    same, off = draws(), draws()
    off["slope"] = off["slope"] + 1.0
    near, far = (compare(draws(), other, X, model=model) for other in (same, off))
    assert near.mmd.p_value > 0.01 > far.mmd.p_value
    # 1000 draws of each: standard error of the difference of means .045
    assert near.moments["slope"].mean.value < 4 * 0.045 and far.moments["slope"].mean.value == pytest.approx(1.0, abs=4 * 0.045)
    assert far.moments["offset"].mean.value < 4 * 0.045
    assert far.functions.total_variation.value > 0.05 > near.functions.total_variation.value
    assert compare(draws(), off).functions is None
    # a set and itself: the second set is spaced over all of it, as the halves are over theirs, and the means of all are those of the halves
    one = draws(4) | {"slope": torch.tensor([0.0, 5.0, 1.0, 2.0])}
    exact = compare(one, one, num_samples=2, num_permutations=1)
    # means: 1.0 of the first and the last, 2.5 and 1.5 of the halves
    expected = (1.5 + 0.5) / 2 / float(one["slope"].std())
    assert exact.moments["slope"].mean.value == pytest.approx(expected, rel=1e-5)
