"""Private interfaces of Python, PyTorch and Pyro, which have no public equivalent: each is used in one file, and keeps its meaning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.poutine.runtime import _PYRO_STACK
from torch import nn
from torch.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_advbayes as ab
from pyro_advbayes.handlers import own_mask, unvalidated
from pyro_advbayes.kinds import is_deterministic
from pyro_advbayes.nn.bayesian import declared_sites, map_tensors, own_names, rename
from pyro_advbayes.tracing.guard import version_of
from pyro_advbayes.tracing.record import traits_of

PACKAGE = Path(ab.__file__).parent

# What is used, by the one file that uses it; tests of nn.bayesianize see what torch.compile leaves. Hooks of Pyro's classes (a guide's
# _setup_prototype, an ELBO's _get_trace) are overridden in subclasses.
USED = {
    r"\._mask\b": "handlers.py",
    r"\._validate_args\b": "handlers.py",
    r'"_deterministic"': "kinds.py",
    r"\._schema\b": "tracing/record.py",
    r"_python_dispatch\b": "tracing/record.py",
    r"_should_skip_dynamo\b": "tracing/record.py",
    r'"_op"': "tracing/calls.py",
    r"torch\._inductor\b": "tracing/compiled.py",
    r"\b_PYRO_STACK\b": "infer/elbo/objective.py",
    r"\._version\b": "tracing/guard.py",
    r"\._buffers\b": "tracing/guard.py",
    r"\._parameters\b": "tracing/guard.py",
    r"\._modules\b": "nn/dropout.py",
    r"\b(?!self)\w+\._pyro_name\b": "nn/bayesian.py",
    r"\._pyro_samples\b": "nn/bayesian.py",
    r'"_inv"': "nn/bayesian.py",
    r"\b_create_plates\b": "infer/autoguide/adversarial.py",
    r"\b_get_loc_and_scale\b": "infer/autoguide/adversarial.py",
    r"\b_event_dims\b": "infer/autoguide/adversarial.py",
    r'"_orig_mod"': "nn/bayesian.py",
    r'"_compiled_call_impl"': "nn/bayesian.py",
    r'"_is_protocol"': "checked.py",
    r"\b(?!self)\w+\._(?:args|kwargs|diagnostics)\b": "infer/arviz.py",
}


@pytest.mark.parametrize("name", USED)
def test_a_private_interface_is_used_in_one_file(name):
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if re.search(name, path.read_text())}
    assert found == {USED[name]}


def test_no_other_private_module_or_name_of_pytorch_or_pyro_is_imported():
    imported = re.compile(r"^(?:from ((?:torch|pyro)[\w.]*) import (.*)|import ((?:torch|pyro)\.[\w.]*))$", re.M)
    for path in PACKAGE.rglob("*.py"):
        names = [part for match in imported.findall(path.read_text()) for part in re.split(r"[.,\s]+", " ".join(match))]
        private = {part for part in names if part.startswith("_")}
        assert private <= {"_python_dispatch", "_PYRO_STACK"}, path


def test_a_write_into_a_tensor_raises_its_version():
    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) == before + 1
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) == 0


def test_a_masked_distribution_tells_its_mask():
    mask = torch.tensor([True, False])
    assert torch.equal(own_mask(dist.Normal(torch.zeros(2), 1.0).mask(mask)), mask)


def test_validation_can_be_switched_off_on_a_distribution_that_exists():
    fn = dist.Normal(0.0, 1.0, validate_args=True)
    with pytest.raises(ValueError):
        fn.log_prob(torch.tensor(float("nan")))
    assert unvalidated(fn).log_prob(torch.tensor(float("nan"))).isnan()


def test_a_deterministic_site_is_known():
    trace = poutine.trace(lambda: (pyro.deterministic("a", torch.zeros(1)), pyro.sample("b", dist.Normal(0.0, 1.0)))).get_trace()
    assert is_deterministic(trace.nodes["a"]) and not is_deterministic(trace.nodes["b"])


def test_the_stack_of_handlers_holds_those_that_are_entered():
    with poutine.mask(mask=False) as handler:
        assert any(each is handler for each in _PYRO_STACK)
    assert not any(each is handler for each in _PYRO_STACK)


def test_the_schema_of_an_operation_tells_what_it_writes():
    assert traits_of(torch.ops.aten.add_.Tensor)[:4] == ("add_", False, False, True)
    assert traits_of(torch.ops.aten.rand_like.default)[:4] == ("rand_like", True, False, False)
    written = [argument.name for argument in torch.ops.aten.add_.Tensor._schema.arguments if argument.alias_info is not None]
    assert written == ["self"]


def test_an_overload_can_be_called_without_the_python_around_it():
    function = torch.ops.aten.rsqrt.default
    assert function._op(torch.tensor(4.0)) == function(torch.tensor(4.0)) == 0.5


def test_a_mode_sees_operations_and_does_not_import_the_compiler():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.zeros(2) + 1
    assert torch.ops.aten.add.Tensor in seen and hasattr(TorchDispatchMode, "_should_skip_dynamo")


def test_modules_keep_their_tensors_under_the_names_that_guards_read():
    norm = nn.BatchNorm1d(3)
    assert norm._parameters.keys() == dict(norm.named_parameters()).keys() and norm._buffers.keys() == dict(norm.named_buffers()).keys()


def test_pyros_mcmc_keeps_its_arguments_and_diagnostics_under_the_names_that_arviz_reads():
    def model(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    mcmc, x = MCMC(NUTS(model), num_samples=4, warmup_steps=1, disable_progbar=True), torch.zeros(1)
    mcmc.run(x)
    assert torch.equal(mcmc._args[0], x) and mcmc._kwargs == {} and "divergences" in mcmc._diagnostics[0]


def test_pyros_elbo_asks_its_hook_for_the_traces_of_every_particle():
    asked = []

    class Counting(Trace_ELBO):
        def _get_trace(self, model, guide, args, kwargs):
            asked.append((args, kwargs))
            return super()._get_trace(model, guide, args, kwargs)

    def model(x, scale):
        pyro.sample("obs", dist.Normal(pyro.sample("w", dist.Normal(0.0, 1.0)), scale), obs=x)

    def guide(x, scale):
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    elbo, x = Counting(num_particles=3), torch.tensor(1.0)
    for each in (elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads):
        asked.clear()
        each(model, guide, x, scale=2.0)
        assert asked == [((x,), {"scale": 2.0})] * 3
    assert ELBO.__abstractmethods__ == {"_get_trace"}


def test_a_guide_of_pyro_makes_plates_for_each_call():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = ab.AutoAdversarialNormal(model)
    guide(torch.zeros(3))
    assert [(name, plate.size) for name, plate in guide.plates_of(torch.zeros(3)).items()] == [("data", 3)]
    assert isinstance(guide, AutoNormal) and AutoNormal._create_plates is AutoGuide._create_plates


def test_a_guide_of_pyro_tells_the_parameters_and_the_dimensions_of_a_site():
    guide = ab.AutoAdversarialNormal(lambda: pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
    guide()
    loc, scale = guide._get_loc_and_scale("w")
    assert torch.equal(loc, guide.locs.w) and torch.equal(scale, guide.scales.w) and guide._event_dims == {"w": 1}


def test_a_protocol_is_known():
    class Model(Protocol):
        pass

    assert Model._is_protocol is True and not getattr(dict, "_is_protocol", False)


@pytest.mark.parametrize("transform", [ExpTransform(), ExpTransform().inv, ComposeTransform([ExpTransform(), AffineTransform(0.0, 2.0)])])
def test_a_transform_remembers_its_inverse_under_the_name_that_copies_leave_out(transform):
    inverse = transform.inv
    assert "_inv" in vars(transform)
    copied = map_tensors(transform, torch.Tensor.double)
    assert type(copied) is type(transform) and copied.inv is not inverse
    x = torch.tensor([0.5, 2.0])
    assert torch.equal(copied(x), transform(x)) and torch.equal(copied.inv(transform(x)), inverse(transform(x)))


def test_a_module_of_pyro_keeps_its_name_and_its_samples_under_the_names_that_are_read():
    net = PyroModule[nn.Sequential](PyroModule[nn.Linear](3, 2))
    net[0].weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    assert list(declared_sites(net)) == ["0.weight"] and own_names(net[0]) == ["bias", "weight"]
    rename(net, "renamed")
    assert set(declared_sites(net)) == {"0.weight"} and net._pyro_name == "renamed"
