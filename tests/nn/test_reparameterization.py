"""Handlers that give every row of a minibatch weights of its own: the law, what it gains, and what they refuse."""

from __future__ import annotations

import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.optim import Adam
from torch import nn
from torch.nn import functional as F

import pyro_advbayes as ab
from pyro_advbayes.nn import ExemplarReparameterization, Flipout, LocalReparameterization
from pyro_advbayes.nn.classifier import Classifier

HANDLERS = [ExemplarReparameterization, Flipout, LocalReparameterization]
ROWS = 16


def dense():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def images():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", groups=2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, stride=2),
        nn.Flatten(),
        nn.Linear(12, 2),
    )
    return net


def others():
    layers = (
        nn.Conv1d(2, 3, 2, padding=1, bias=False),
        nn.BatchNorm1d(3),
        nn.PReLU(3),
        nn.ConvTranspose1d(3, 2, 2, stride=2),
        nn.LayerNorm(10),
        nn.RMSNorm(10),
        nn.Linear(10, 4, bias=False),
        nn.InstanceNorm1d(2, affine=True),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    return nn.Sequential(*layers)


INPUTS = {dense: (3,), images: (2, 4, 4), others: (2, 4)}


def problem(make, rows=ROWS):
    torch.manual_seed(0)
    pyro.clear_param_store()
    model = Classifier(ab.nn.bayesianize(make(), prior=dist.Normal(0.0, 1.0)))
    x, y = torch.randn(rows, *INPUTS[make]), torch.randint(0, 2, (rows,))
    guide = AutoNormal(model, init_scale=0.3)
    guide(x, y)
    return model, guide, x, y


def outputs(model, guide, x, handler=None):
    """The logits at a draw of the guide's."""
    with pyro.poutine.block():
        if handler is None:
            return pyro.poutine.replay(model, pyro.poutine.trace(guide).get_trace(x, None))(x)
        with handler:
            return pyro.poutine.replay(model, pyro.poutine.trace(guide).get_trace(x, None))(x)


def gradients(elbo, model, guide, x, y, count, handler=None):
    """``[count, parameters]``."""
    parameters, rows = list(guide.parameters()), []
    for _ in range(count):
        if handler is None:
            loss = elbo.differentiable_loss(model, guide, x, y)
        else:
            with handler:
                loss = elbo.differentiable_loss(model, guide, x, y)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


# -------------------------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("make", [dense, images, others])
def test_every_row_has_a_separate_network(make):
    """The weights of linear layers are drawn after the products that they must give."""
    model, guide, x, _ = problem(make)
    met = {}

    class Watched(ExemplarReparameterization):
        def once(self, site, rows, draw):
            met[site.name] = site
            return super().once(site, rows, draw)

    handler = Watched()
    out = outputs(model, guide, x, handler)
    plain = make().eval()
    own = {name.removeprefix("net."): handler.rows(None, site, ROWS) for name, site in met.items()}
    assert own.keys() == dict(plain.named_parameters()).keys()
    for row in range(ROWS):
        weights = {name: value[row] for name, value in own.items()}
        expected = torch.func.functional_call(plain, weights, x[row : row + 1])
        torch.testing.assert_close(out[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_weights_given_their_products_have_the_law_of_the_guide():
    """Mean, deviations, and no correlation, within a row or between rows; a row of zeros says nothing about its weights."""
    torch.manual_seed(2)
    x, loc, scale = torch.randn(2, 3), torch.randn(2, 3), torch.rand(2, 3) + 0.5
    x[1] = 0.0
    draws = []
    for _ in range(2000):
        with ExemplarReparameterization() as handler:
            w = pyro.sample("w", dist.Normal(loc, scale).to_event(2))
            out = F.linear(x, w)
            draws.append(handler.rows(w, handler._sites[id(w)], 2))
        torch.testing.assert_close(out, torch.einsum("boi,bi->bo", draws[-1], x), rtol=1e-3, atol=1e-5)
    standardised = ((torch.stack(draws) - loc) / scale).flatten(1)
    assert float(standardised.mean(0).abs().max()) < 4.0 / 2000**0.5
    assert float((standardised.var(0) - 1).abs().max()) < 4.5 * (2 / 2000) ** 0.5
    assert float((torch.corrcoef(standardised.T) - torch.eye(12)).abs().max()) < 4.5 / 2000**0.5


@pytest.mark.parametrize("times", [1, 2])
def test_products_have_the_gradient_of_drawn_weights(times):
    """Met once, it is the expectation of that gradient given the products, and varies less."""

    class Weights(ExemplarReparameterization):
        def layer(self, func, x, weight, site, options):
            self.rows(weight, site, len(x))  # drawn before the products are
            return super().layer(func, x, weight, site, options)

    torch.manual_seed(3)
    x, loc, scale = torch.randn(32, 4), torch.randn(4, 4, requires_grad=True), torch.full((4, 4), 0.5, requires_grad=True)

    def gradients_of(handler):
        found = []
        for _ in range(300):
            with handler():
                w, out = pyro.sample("w", dist.Normal(loc, scale).to_event(2)), x
                for _ in range(times):
                    out = F.linear(out, w)
            found.append(torch.stack(torch.autograd.grad(out.tanh().square().mean(), (loc, scale))))
        return torch.stack(found)

    drawn, ours = gradients_of(Weights), gradients_of(ExemplarReparameterization)
    error = ((drawn.var(0) + ours.var(0)) / 300).sqrt()
    assert float(((drawn.mean(0) - ours.mean(0)) / error).abs().max()) < 4.0
    if times == 1:
        assert float(ours.var(0)[1].sum()) < 0.5 * float(drawn.var(0)[1].sum())


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_row_of_a_linear_layer_has_the_law_of_the_guide(handler):
    """Of all rows together, over many draws: mean μx + b, covariance diagonal with σ²x² + σ_b²; and rows are uncorrelated."""
    torch.manual_seed(1)
    model, guide, x, _ = problem(single, rows=3)
    draws = torch.stack([outputs(model, guide, x, handler()).detach() for _ in range(300)])
    loc, scale = guide.median()["net.weight"], 0.3
    mean = x @ loc.T + guide.median()["net.bias"]
    variance = (scale**2 * (x.square().sum(1) + 1)).unsqueeze(1).expand_as(mean)
    assert float(((draws.mean(0) - mean) / (variance / 300).sqrt()).abs().max()) < 4.0
    assert float((draws.var(0) / variance - 1).abs().max()) < 5.0 * (2 / 300) ** 0.5
    correlation = torch.corrcoef(draws.flatten(1).T) - torch.eye(mean.numel())
    assert float(correlation.abs().max()) < 5.0 / 300**0.5


def single():
    return nn.Linear(3, 2)


INPUTS[single] = (3,)


@pytest.mark.parametrize(
    ("make", "handler", "elbo"),
    [
        *((dense, handler, TraceMeanField_ELBO) for handler in HANDLERS),
        (dense, Flipout, Trace_ELBO),
        (images, ExemplarReparameterization, TraceMeanField_ELBO),
        (images, Flipout, TraceMeanField_ELBO),
    ],
)
def test_gradients_are_unbiased_and_vary_less(make, handler, elbo):
    model, guide, x, y = problem(make)
    x, y = x + 1.0, torch.zeros_like(y)  # rows that are alike: sharing a draw, they err together
    count = 100
    plain = gradients(elbo(), model, guide, x, y, count)
    own = gradients(elbo(), model, guide, x, y, count, handler())
    error = ((plain.var(0) + own.var(0)) / count).sqrt()
    assert float(((plain.mean(0) - own.mean(0)) / error).abs().max()) < 4.5
    if elbo is TraceMeanField_ELBO:  # else the divergence, estimated at one draw, is most of it
        assert float(own.var(0).sum()) < 0.5 * float(plain.var(0).sum())


def test_weights_of_any_distribution_and_tied_ones_are_drawn_for_every_row():
    class Tied(pyro.nn.PyroModule):
        def forward(self, x, y=None):
            w = pyro.sample("w", dist.LogNormal(torch.zeros(4, 4), 0.3).to_event(2))
            out = F.linear(F.linear(x, w), w).sum(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(out, 1.0), obs=y)

    def guide(x, y=None):
        pyro.sample("w", dist.LogNormal(pyro.param("loc", torch.zeros(4, 4)), 0.1).to_event(2))

    x, y = torch.randn(6, 4), torch.randn(6)
    handler = ExemplarReparameterization()
    with handler:
        SVI(Tied(), guide, Adam({"lr": 0.01}), TraceMeanField_ELBO()).step(x, y)
    assert handler.covered == {"w": {"linear"}}
    with pytest.raises(ValueError, match=r"'w' is drawn from (TransformedDistribution|LogNormal)"), Flipout():
        SVI(Tied(), guide, Adam({"lr": 0.01}), TraceMeanField_ELBO()).step(x, y)


@pytest.mark.parametrize("convolution", [False, True])
def test_flipout_gives_every_row_signs_of_its_own_for_inputs_and_for_outputs(convolution):
    """Rows that are alike become m x + r ∘ (W - m) (s ∘ x) for signs r and s: all of the eight that there are, and no other."""
    loc, x = torch.tensor([[0.5, -1.0], [2.0, 0.25]]), torch.tensor([1.0, 3.0])
    layer, shape = (F.conv1d, (2, 2, 1)) if convolution else (F.linear, (2, 2))
    with Flipout():
        w = pyro.sample("w", dist.Normal(loc.view(shape), 0.7).to_event(len(shape)))
        out = layer(x.expand(300, 2).reshape(300, 2, *shape[2:]), w).flatten(1)
    signs = [torch.tensor(s) for s in ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0))]
    expected = torch.stack([loc @ x + r * ((w.view(2, 2) - loc) @ (s * x)) for r in signs for s in signs[:2]])
    apart = torch.cdist(out, expected, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(apart.min(1).values.max()) < 1e-5
    assert (apart.min(0).values < 1e-5).all()


def test_flipout_gives_every_row_signs_of_its_own_for_a_bias():
    loc, x = torch.tensor([0.5, -1.0]), torch.zeros(100, 3)
    with Flipout():
        b = pyro.sample("b", dist.Normal(loc, 0.7).to_event(1))
        out = F.linear(x, torch.zeros(2, 3), b)
    assert {tuple(row) for row in ((out - loc) / (b - loc)).round(decimals=3).tolist()} == {(a, c) for a in (1, -1) for c in (1, -1)}


def test_sequences_share_a_row_s_weights_among_their_positions():
    _, guide, x, _ = problem(single)
    x = x.unsqueeze(1).expand(ROWS, 5, 3)
    for handler in (ExemplarReparameterization(), Flipout()):
        with handler:
            values = guide(x[:, 0], torch.zeros(ROWS))
            out = F.linear(x, values["net.weight"], values["net.bias"])
        torch.testing.assert_close(out, out[:, :1].expand_as(out))
        assert float(out[:, 0].detach().std()) > 0.0


def test_running_statistics_of_an_evaluated_network_are_used():
    model, guide, x, _ = problem(others)
    before = model.net.get_submodule("1").running_mean.clone()
    outputs(model, guide, x, ExemplarReparameterization())
    assert torch.equal(model.net.get_submodule("1").running_mean, before)


# ---------------------------------------------------------------------------------------------------------- as a handler


def test_covered_sites_are_reported():
    model, guide, x, y = problem(images)
    handler = Flipout(shared="net.5.*")
    with handler:
        TraceMeanField_ELBO().loss(model, guide, x, y)
    assert handler.covered == {
        **{f"net.{i}.{name}": {"conv2d"} for i in (0, 3) for name in ("weight", "bias")},
        **{f"net.1.{name}": {"group_norm"} for name in ("weight", "bias")},
    }


def test_shared_sites_are_one_draw_for_all_rows():
    model, guide, x, _ = problem(single)
    x = x[:1].expand(ROWS, 3)
    out = outputs(model, guide, x, ExemplarReparameterization(shared=("*.weight", "*.bias")))
    torch.testing.assert_close(out, out[:1].expand_as(out))


def test_handlers_nest_and_the_inner_one_goes_first():
    model, guide, x, y = problem(images)
    outer, inner = ExemplarReparameterization(shared="net.5.*"), LocalReparameterization(shared=("net.0.*", "net.1.*", "net.3.*"))
    with outer, inner:
        TraceMeanField_ELBO().loss(model, guide, x, y)
    assert {name.split(".")[1] for name in outer.covered} == {"0", "1", "3"}
    assert inner.covered == {"net.5.weight": {"linear"}, "net.5.bias": {"linear"}}


def test_nothing_is_left_behind_and_other_threads_and_compiled_functions_are_as_they_were():
    model, guide, x, y = problem(dense)
    functions = F.linear, F.conv2d, F.batch_norm
    weight, seen = torch.randn(2, 3), []
    compiled = torch.compile(lambda x: F.linear(x, weight), backend="eager")
    expected = F.linear(x, weight)

    def elsewhere():
        seen.append((F.linear(x, weight), torch.overrides.is_tensor_like(x)))

    with ExemplarReparameterization():
        TraceMeanField_ELBO().loss(model, guide, x, y)
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        assert torch.equal(F.linear(x, weight), expected)
        assert torch.equal(compiled(x), expected)
    assert torch.equal(seen[0][0], expected)
    assert (F.linear, F.conv2d, F.batch_norm) == functions
    pyro.set_rng_seed(0)
    first = outputs(model, guide, x)
    pyro.set_rng_seed(0)
    assert torch.equal(outputs(model, guide, x), first)


def test_the_adversarial_elbo_gives_rows_their_own_draws_too():
    model, _, x, y = problem(images)
    guide, elbo = ab.AutoAdversarialNormal(model), ab.TraceAdversarial_ELBO(num_steps=1)
    for _ in range(4):
        elbo.loss_and_grads(model, guide, x, y)  # by now from graphs
    handler = ExemplarReparameterization()
    with handler:
        elbo.loss_and_grads(model, guide, x, y)
    assert len(handler.covered) == 8


def test_it_trains_under_pyros_svi():
    torch.manual_seed(0)
    model, guide, _, _ = problem(single)
    x = torch.randn(200, 3)
    y = (x[:, 0] > 0).long()
    svi = SVI(ab.minibatch(model, size=200), guide, Adam({"lr": 0.05}), TraceMeanField_ELBO())
    with LocalReparameterization():
        for batch in torch.randperm(200).repeat(15).split(50):
            svi.step(x[batch], y[batch])
    logits = x @ guide.median()["net.weight"].T + guide.median()["net.bias"]
    assert float((logits.argmax(-1) == y).float().mean()) > 0.95


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_weight_that_no_layer_meets_is_named(handler):
    class ByHand(pyro.nn.PyroModule):
        def forward(self, x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    model, x = ByHand(), torch.randn(4, 3)
    guide = AutoNormal(model)
    guide(x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"covers no function in which 'w' is used.*shared="), handler():
        TraceMeanField_ELBO().loss(model, guide, x, torch.zeros(4))
    with handler(shared="w"):
        TraceMeanField_ELBO().loss(model, guide, x, torch.zeros(4))
    with pytest.raises(ValueError, match="'w' is used"), handler():  # at once, not at the end of training
        for _ in range(2):
            TraceMeanField_ELBO().loss(model, guide, x, torch.zeros(4))
        pytest.fail("the second draw came after a first that met no layer")


def test_the_local_trick_refuses_what_it_would_draw_from_another_law():
    model, guide, x, y = problem(images)
    with pytest.raises(ValueError, match=r"site 'net.0.weight': in conv2d .* share the weights"), LocalReparameterization():
        TraceMeanField_ELBO().loss(model, guide, x, y)
    model, guide, x, _ = problem(single)
    with pytest.raises(ValueError, match="share the weights"), LocalReparameterization():
        F.linear(x.unsqueeze(1).expand(ROWS, 5, 3), guide(x, torch.zeros(ROWS))["net.weight"])

    def twice(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 3), 1.0).to_event(2))
        return F.linear(F.linear(x, w), w)

    with pytest.raises(ValueError, match="'w' is used twice"), LocalReparameterization():
        twice(x)


def test_rows_must_come_first_everywhere():
    def turned(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 3), 1.0).to_event(2))
        return F.linear(F.linear(x, w).T[:3, :3], w)

    with pytest.raises(ValueError, match=r"'w' meets inputs of 16 rows and of 3"), ExemplarReparameterization():
        turned(torch.randn(ROWS, 3))
    with pytest.raises(ValueError, match="no dimension for rows"), Flipout():
        F.linear(torch.randn(3), pyro.sample("w", dist.Normal(torch.zeros(3, 3), 1.0).to_event(2)))


@pytest.mark.parametrize(
    "use", [lambda h, w: h @ w, lambda h, w: F.linear(h, w.t()), lambda h, w: F.linear(h, w.T), torch.mm, torch.matmul]
)
@pytest.mark.parametrize("handler", HANDLERS)
def test_a_weight_that_is_also_used_by_hand_is_named(handler, use):
    def tied(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 3), 1.0).to_event(2))
        return use(F.linear(x, w), w)

    with pytest.raises(ValueError, match="covers no function in which 'w' is used"), handler():
        tied(torch.randn(ROWS, 3))
    with handler(shared="w"):
        assert tied(torch.randn(ROWS, 3)).shape == (ROWS, 3)


@pytest.mark.parametrize("handler", [Flipout, ExemplarReparameterization])
@pytest.mark.parametrize("turn", [lambda x: x.flatten(0, 1), lambda x: x.transpose(0, 1)])
def test_positions_of_a_row_are_no_rows(handler, turn):
    """Sequences [rows, positions, features], folded or turned around: positions would have weights of their own."""

    class Sequences(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.net = ab.nn.bayesianize(nn.Linear(3, 1))

        def forward(self, x, y=None):
            heights = self.net(turn(x)).reshape(5, ROWS) if turn(x).dim() == 3 else self.net(turn(x)).reshape(ROWS, 5).T
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(heights.sum(0), 1.0), obs=y)

    model, x, y = Sequences(), torch.randn(ROWS, 5, 3), torch.zeros(ROWS)
    guide = AutoNormal(model)
    guide(x, y)
    with pytest.raises(ValueError, match=rf"'net.(weight|bias)' meets an input of \d+ rows, and 'obs' .* plate of {ROWS}"), handler():
        TraceMeanField_ELBO().loss(model, guide, x, y)
    with handler(shared="net.*"):
        TraceMeanField_ELBO().loss(model, guide, x, y)


def test_batches_of_another_length_are_accepted():
    model, guide, x, y = problem(dense)
    with ExemplarReparameterization():
        kept = poutine.trace(guide).get_trace(x, y)
        poutine.trace(poutine.replay(model, trace=kept)).get_trace(x, y)
        TraceMeanField_ELBO().loss(model, guide, x[:5], y[:5])


def test_a_guide_that_draws_all_weights_at_once_is_refused():
    model, _, x, y = problem(dense)
    guide = AutoLowRankMultivariateNormal(model, rank=1)
    guide(x, y)
    with pytest.raises(ValueError, match=r"_AutoLowRankMultivariateNormal_latent.*another form"), ExemplarReparameterization():
        TraceMeanField_ELBO().loss(model, guide, x, y)
