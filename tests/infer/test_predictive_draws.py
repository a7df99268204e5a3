"""How ``Predictive`` computes draws: side by side or one by one, attached to inputs, and what it refuses."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.mlp import mlp
from pyro_advbayes.infer import predictive as module
from pyro_advbayes.infer.predictive import Predictive
from pyro_advbayes.nn import bayesianize
from pyro_advbayes.nn.classifier import Classifier
from pyro_advbayes.tracing.replay import NUMBERS_TOGETHER

DRAWS = 23


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True))

    def forward(self, x):
        y = self.body(x)
        y += x
        return y


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)), (5, 4)),
    "one layer": (lambda: nn.Linear(4, 3), (5, 4)),
    "layers of sequences": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Flatten(), nn.Linear(30, 3)), (2, 5, 4)),
    "convolutions": (
        lambda: nn.Sequential(Residual(), nn.MaxPool2d(2), nn.GroupNorm(1, 2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)),
        (3, 2, 8, 8),
    ),
    "attention": (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(20, 3)), (3, 5, 4)),
    "lstm": (Recurrent, (3, 5, 4)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3)), (3, 5)),
    "dropout in eval mode": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)), (5, 4)),
}


def draws_of(net, count=DRAWS):
    return {f"net.{name}": torch.randn(count, *p.shape) for name, p in net.named_parameters()}


def inputs_of(name, shape):
    return torch.randint(0, 7, shape) if name == "embedding" else torch.randn(*shape)


@pytest.mark.filterwarnings("error:chunk_size")
@pytest.mark.parametrize("chunk_size", [None, 1, 10])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_what_a_loop_over_their_weights_gives(name, chunk_size):
    make, shape = NETWORKS[name]
    net = make().eval()
    samples, x = draws_of(net), inputs_of(name, shape)
    ours = Predictive(Classifier(bayesianize(net)), samples, return_sites=["_RETURN"], chunk_size=chunk_size)(x)["_RETURN"]
    for i in range(DRAWS):
        weights = {site.removeprefix("net."): value[i] for site, value in samples.items()}
        assert torch.allclose(ours[i], torch.func.functional_call(net, weights, x), rtol=1e-4, atol=1e-5)


def test_draws_are_replayed_and_not_run_through_the_model():
    calls = []

    class Counted(Classifier):
        def forward(self, x, y=None):
            calls.append(1)
            return super().forward(x, y)

    net = nn.Linear(4, 3)
    for chunk_size in (None, 1, 10):
        calls.clear()
        Predictive(Counted(bayesianize(net)), draws_of(net, 200), chunk_size=chunk_size)(torch.randn(5, 4))
        assert len(calls) == 2


def test_a_deterministic_part_is_computed_a_few_times_only():
    seen = []

    class Watch(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls):
            return False  # spares the import of the compiler

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def model(x):
        features = x.sin()
        return features * pyro.sample("w", dist.Normal(0.0, 1.0))

    samples, x = {"w": torch.randn(100)}, torch.randn(5)
    for chunk_size in (1, 10):
        seen.clear()
        with Watch():
            ours = Predictive(model, samples, return_sites=["_RETURN"], chunk_size=chunk_size)(x)["_RETURN"]
        assert torch.allclose(ours, x.sin() * samples["w"].unsqueeze(1))
        assert seen.count(torch.ops.aten.sin.default) <= 5


# ------------------------------------------------------------------------------------------------------------- gradients


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def plain(x, w):
    return (x @ w).tanh()


def through_a_function_of_its_own(x, w):
    return StraightThrough.apply(x @ w)


def partly_without_gradient(x, w):
    with torch.no_grad():
        scale = (x @ w).abs().mean()
    return (x @ w) / scale


def with_a_branch(x, w):
    return (x @ w).tanh() if w.sum() > 0 else x @ w


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.filterwarnings("ignore:chunk_size")
@pytest.mark.parametrize("function", [plain, through_a_function_of_its_own, partly_without_gradient, with_a_branch])
def test_gradients_of_inputs_are_those_of_a_loop(function, chunk_size):
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        return function(x, w)

    w = torch.randn(DRAWS, 3, 2, dtype=torch.double)
    x = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    ours = Predictive(model, {"w": w}, return_sites=["_RETURN"], chunk_size=chunk_size)(x)["_RETURN"]
    theirs = torch.stack([function(x, value) for value in w])
    weights = torch.randn_like(theirs)
    assert torch.allclose(ours, theirs)
    (a,), (b,) = (torch.autograd.grad((value * weights).sum(), x) for value in (ours, theirs))
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_gradients_pass_through_drawn_sites_and_guides():
    def guide(x):
        pyro.sample("z", dist.Normal(x.mean(), 0.1))

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z * x, 1.0).to_event(1))

    x = torch.ones(3, requires_grad=True)
    drawn = Predictive(model, guide=guide, num_samples=50)(x)
    (gradient,) = torch.autograd.grad(drawn["z"].sum(), x, retain_graph=True)
    assert torch.allclose(gradient, torch.full((3,), 50 / 3))
    (gradient,) = torch.autograd.grad(drawn["obs"].sum(), x)
    assert torch.allclose(gradient, drawn["z"].sum() + 3 * torch.full((3,), 50 / 3), rtol=1e-4)


def test_nothing_is_attached_unless_an_input_asks_for_it():
    predictive = Predictive(mlp((3, 4, 2)), num_samples=9, return_sites=["_RETURN"])
    x = torch.randn(5, 3)
    assert not predictive(x)["_RETURN"].requires_grad
    assert predictive(x.requires_grad_())["_RETURN"].requires_grad
    with torch.no_grad():
        assert not predictive(x)["_RETURN"].requires_grad


# ------------------------------------------------------------------------------------- what cannot be recorded or batched


def silent_numpy(z):
    return torch.as_tensor(np.exp(z.numpy()))


def silent_list(z):
    return torch.tensor(2.0 * z.tolist())


def item(z):
    return torch.tensor(z.item()) * 3.0


@pytest.mark.parametrize("function", [silent_numpy, silent_list, item])
def test_a_model_whose_python_reads_drawn_values_runs_draw_by_draw(function):
    def model():
        return function(pyro.sample("z", dist.Normal(0.0, 1.0)))

    z = torch.randn(DRAWS)
    with pytest.warns(UserWarning, match="prediction falls back to 'handlers'") as caught:
        ours = Predictive(model, {"z": z}, return_sites=["_RETURN"])()["_RETURN"]
    assert len(caught) == 1 and torch.allclose(ours, torch.stack([function(value) for value in z]))
    with pytest.warns(UserWarning, match="chunk_size=7 is not possible"):
        Predictive(model, {"z": z}, chunk_size=7, return_sites=["_RETURN"])()


def test_python_may_read_the_data_that_stay_the_same():
    calls = []

    def model(y):
        calls.append(1)
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y.unique())]).to_event(1))
        return z[y] * y.max().item()

    y = torch.tensor([0, 2, 1, 2])
    z = torch.randn(DRAWS, 3)
    predictive = Predictive(model, {"z": z}, return_sites=["_RETURN"])
    assert torch.equal(predictive(y)["_RETURN"], z[:, y] * 2)
    assert len(calls) == 2
    assert torch.equal(predictive(y.flip(0))["_RETURN"], z[:, y.flip(0)] * 2)


def test_an_operation_that_cannot_be_batched_is_replayed_one_by_one():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        return torch._foreach_mul([z], 2.0)[0]

    z = torch.randn(DRAWS, 2)
    with pytest.warns(UserWarning, match="chunk_size=5 is not possible"):
        ours = Predictive(model, {"z": z}, return_sites=["_RETURN"], chunk_size=5)()["_RETURN"]
    assert torch.equal(ours, 2 * z)


def test_an_error_of_the_model_is_raised_as_it_is():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 100:
            raise ArithmeticError("too large")
        return z

    with pytest.raises(ArithmeticError, match="too large"):
        Predictive(model, {"z": torch.arange(200.0)}, return_sites=["_RETURN"])()


def test_draws_of_different_shapes_are_refused():
    def model():
        count = pyro.sample("count", dist.Poisson(2.0))
        return torch.zeros(int(count) + 1)

    with pytest.raises(RuntimeError, match=r"'_RETURN' has shape \(2,\) in one draw and \(1,\)"):
        Predictive(model, {"count": torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])}, return_sites=["_RETURN"])()


# -------------------------------------------------------------------------------------------------------- the fixed rule


def test_the_number_of_draws_side_by_side_depends_on_their_size(monkeypatch):
    chunks = []
    original = module.Replays
    monkeypatch.setattr(module, "Replays", lambda tape, chunk: chunks.append(chunk) or original(tape, chunk))
    for net, shape in (
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (10, 4)),
        (nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 3)), (4000, 4)),
    ):
        Predictive(Classifier(bayesianize(net)), draws_of(net, 6), return_sites=["_RETURN"])(torch.randn(shape))
    assert chunks == [NUMBERS_TOGETHER // 10 // (8 + 8 + 3), 1]


# --------------------------------------------------------------------------------------------------------------- bad input


def test_samples_of_another_shape_are_refused_by_name_before_anything_runs():
    net = nn.Linear(4, 3)
    samples = draws_of(net)
    samples["net.weight"] = torch.randn(DRAWS, 4, 3)
    with pytest.raises(ValueError, match=r"'net.weight'.*\(4, 3\).*\(3, 4\)"):
        Predictive(Classifier(bayesianize(net)), samples)(torch.randn(2, 4))


@pytest.mark.parametrize("wrong", [{"weight", "bias"}, {"net.weight", "bias"}, {"net.weight", "net.bias", "net.scale"}])
def test_samples_of_unknown_sites_are_refused_by_name(wrong):
    net = nn.Linear(4, 3)
    shapes = {"weight": (3, 4), "bias": (3,)}
    samples = {name: torch.randn(DRAWS, *shapes.get(name.split(".")[-1], ())) for name in wrong}
    with pytest.raises(ValueError, match=r"sites that the model does not have: .*(bias|weight|scale).*'obs'"):
        Predictive(Classifier(bayesianize(net)), samples)(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"z": torch.tensor(1.0)}, r"'z'.*\[draws, \*site\]"),
        ({"z": torch.zeros(0)}, r"'z'.*one draw or more"),
        ({"z": [1.0, 2.0]}, r"'z'.*tensor"),
        ({"z": torch.zeros(3), "w": torch.zeros(4)}, r"equally many draws.*'z': 3, 'w': 4"),
    ],
)
def test_malformed_samples_are_refused_at_construction(samples, message):
    with pytest.raises(ValueError, match=message):
        Predictive(lambda: None, samples)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, True])
def test_a_chunk_size_that_is_no_count_is_refused(chunk_size):
    with pytest.raises(ValueError, match="chunk_size"):
        Predictive(lambda: None, num_samples=3, chunk_size=chunk_size)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5)], ids=["BatchNorm", "Dropout"])
def test_a_layer_in_training_mode_is_refused_by_name_and_left_as_it_was(layer):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.features = layer
            self.head = bayesianize(nn.Linear(4, 3))

        def forward(self, x):
            return self.head(self.features(x))

    model = Model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'features'.*training mode.*eval"):
        Predictive(model, num_samples=5)(torch.randn(6, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    Predictive(model.eval(), num_samples=5)(torch.randn(6, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_draws_that_give_no_probabilities_are_refused():
    net = nn.Linear(4, 3)
    samples = draws_of(net)
    samples["net.bias"][DRAWS - 2] = float("nan")
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"'obs'.*Categorical"):
        Predictive(Classifier(bayesianize(net)), samples)(torch.randn(2, 4))
