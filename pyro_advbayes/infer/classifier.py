"""A posterior of classifiers as one network: :class:`PosteriorClassifier`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_advbayes.checked import checked
from pyro_advbayes.given import need_tensor
from pyro_advbayes.infer.autoguide.implicit import AutoImplicit
from pyro_advbayes.infer.conditioned import ConditionedModel
from pyro_advbayes.infer.predictive import Predictive, predict, record_draws, refuse_nan
from pyro_advbayes.kinds import sample_sites
from pyro_advbayes.model.outcomes import Origins
from pyro_advbayes.model.program import run
from pyro_advbayes.model.readout import Readout
from pyro_advbayes.tracing.guard import Guard, Kept, RandomState, agree, autocast_state, roots_of, version_of
from pyro_advbayes.tracing.record import record
from pyro_advbayes.tracing.replay import Interpreter, Replays, draws_together

# The number of input shapes (batches, and the last, shorter one) whose recordings are kept.
SHAPES = 8

# Log-probabilities [chunk, N, K] and labels [N] -> [N].
Reduction = Callable[[Tensor, Tensor], Tensor]


@checked
class PosteriorClassifier(nn.Module):
    r"""
    A Bayesian classifier as a network from inputs to the logarithm of the mean predicted probability,

    .. math:: \log \bar p(k \mid x) = \log \frac{1}{S} \sum_{s=1}^{S} \mathrm{softmax}_k f(x, \theta_s),

    over a fixed set of draws :math:`\theta_s`, so that its gradient is exact for these draws. Logarithms of probabilities are
    logits of these probabilities: attacks, metrics and explanations of a network take it. ::

        network = PosteriorClassifier(model, mcmc.get_samples())
        loss = torch.nn.functional.cross_entropy(network(x), y)

    The probabilities are those of the model's likelihood, not of its return value: a Categorical, OneHotCategorical, Bernoulli or
    Binomial of one trial at the observed site, which a run without observations finds. A Bernoulli has the classes 0 and 1, K = 2.
    If no site in a plate of N rows (or with N rows outside plates) is observed, the return value must be the logits ``[N, K]``.

    Only the inputs are kept for the backward pass, which computes the draws again, chunk by chunk: the memory is that of one chunk for any
    number of draws. Gradients reach the inputs and the parameters of ``model``, if it is a module. A second derivative
    (``create_graph=True``) is right, too, but holds all draws in memory.

    The model is recorded once for each shape of inputs; its attributes that are not tensors must not change afterwards. Call ``.eval()`` on
    models with BatchNorm or Dropout; ``.train()`` does not change the model. The draws are buffers: ``.to()`` and ``.double()`` move them,
    and the ``state_dict`` holds them.

    :param model: a Pyro model of ``x``.
    :param dict posterior_samples: site -> ``[draws, *site]``.
    :param guide: a guide, in place of ``posterior_samples``: called without arguments, at once, for ``num_samples`` draws. An
        :class:`AutoImplicit` of the same model is compared with it at the first inputs.
    :param int num_samples: number of draws from the guide.
    :param int chunk_size: number of draws that are computed together; by default half as many as in :class:`Predictive`.
    :param str return_site: the observed site, if there are several; or, for a model without one, a site that holds the logits ``[N, K]``
        in place of the return value.
    :raises ValueError: if draws hold NaN or do not fit the model, if its likelihood is not that of a classifier, or if logits are random
        given the draws or not ``[N, K]`` with K >= 2.
    """

    def __init__(
        self,
        model: Callable,
        posterior_samples: Mapping[str, Tensor] | None = None,
        guide: Callable | None = None,
        num_samples: int | None = None,
        chunk_size: int | None = None,
        return_site: str = "_RETURN",
    ) -> None:
        if not posterior_samples and guide is None:
            raise ValueError("PosteriorClassifier needs posterior_samples, or a guide and num_samples")
        arguments = Predictive(model, posterior_samples, guide, num_samples, (return_site,), chunk_size=chunk_size)
        super().__init__()
        samples = posterior_samples or {} if guide is None else _draw(guide, arguments.num_samples)
        refuse_nan(samples)
        # the guide was called without arguments, so that its sites are still to be compared; a bound method, so that it is no submodule
        self._check = guide.check if isinstance(guide, AutoImplicit) and guide.model is model else None
        self.model, self.num_samples, self.chunk_size, self.return_site = model, arguments.num_samples, chunk_size, return_site
        self.sites = tuple(samples)
        for i, sample in enumerate(samples.values()):
            self.register_buffer(f"draws{i}", sample.detach().contiguous())
        self._recorded = Kept(SHAPES)
        self.register_load_state_dict_pre_hook(_make_room)

    @property
    def posterior_samples(self) -> dict[str, Tensor]:
        """The draws: site -> ``[draws, *site]``."""
        return {site: getattr(self, f"draws{i}") for i, site in enumerate(self.sites)}

    @checked
    def forward(self, x: Tensor) -> Tensor:
        """
        :param x: inputs ``[N, ...]``.
        :return: log mean probabilities ``[N, K]``.
        """
        x, leaves, attached = self._prepared(x)
        logits = self._logits(x, attached, leaves)
        return _LogMeanProbability.apply(logits, x, *leaves) if attached else logits.log_mean_probability(x)

    @checked
    def log_probs(self, x: Tensor) -> Iterator[Tensor]:
        """
        The predictions of the draws, whose mean is the classifier's.

        :param x: inputs ``[N, ...]``.
        :return: log-probabilities ``[chunk, N, K]``, of all :attr:`num_samples` draws in order, chunk by chunk. Each chunk is attached to
            ``x`` separately (if gradients are enabled), so that only those that the caller keeps are in memory.
        """
        return (_log_softmax(logits) for logits in self.logits(x))

    def logits(self, x: Tensor) -> Iterator[Tensor]:
        """
        The draws' logits as the model passes them to its likelihood, ``[chunk, N, K]``: logarithms of probabilities if it passes
        probabilities, and [0, logit] for a single logit. Otherwise like :meth:`log_probs`.
        """
        x, leaves, attached = self._prepared(x)
        yield from self._logits(x, attached, leaves).chunks(x)

    def gradients(self, x: Tensor, y: Tensor, reduce: Reduction) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """
        Values of a function of the draws, and their gradients with respect to the inputs, chunk by chunk, for attacks.

        The computation of a chunk, its backward pass included, is recorded and replayed without autograd. Recordings are kept by
        ``reduce``: pass the same function each time, whose Python code does not depend on values.

        :param x: inputs ``[N, ...]``.
        :param y: a tensor for ``reduce``, such as labels ``[N]``.
        :param reduce: differentiable function of log-probabilities ``[chunk, N, K]`` and ``y`` to ``[N]``; each value depends on its row
            only.
        :return: log-probabilities ``[chunk, N, K]``, values ``[N]`` and gradients ``[N, ...]``, detached.
        """
        _, leaves, _ = self._prepared(x)
        x = x.detach().contiguous().requires_grad_()
        yield from self._logits(x, True, leaves).gradients(x, y, reduce)

    def train(self, mode: bool = True) -> PosteriorClassifier:
        """``eval()`` reaches the model; ``train()`` does not, since predictions of a posterior must not be random."""
        if not mode:
            return super().train(False)
        self.training = True
        return self

    def _prepared(self, x: Tensor) -> tuple[Tensor, list[Tensor], bool]:
        """The inputs in the layout of a recording; the model's parameters; whether either has gradients."""
        need_tensor(x, "x", inputs=True)
        leaves: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad] if isinstance(self.model, nn.Module) else []
        return x.contiguous(), leaves, torch.is_grad_enabled() and bool(x.requires_grad or leaves)

    def _logits(self, x: Tensor, attached: bool, leaves: list[Tensor]) -> _Logits:
        guard = Guard(roots_of(self.model), attributes=True)
        others = [*self.posterior_samples.values(), *(value for _, value in pyro.get_param_store().named_parameters())]
        slopes = attached and (x.requires_grad, *map(id, leaves))  # a recording of a model that differentiates depends on these
        key = (x.shape, x.dtype, x.device, tuple(autocast_state()), slopes, guard.state, tuple(map(id, others)))
        found: _Logits | None = self._recorded.get(key)
        if found is None:
            model = ConditionedModel(self.model, self.posterior_samples, self.num_samples)
            with torch.set_grad_enabled(attached), RandomState().again():  # no prediction takes random numbers from its caller
                found = _Logits(model, self.return_site, self.chunk_size, x, leaves, [*guard.held, *others])
            if self._check is not None:
                self._check(x)
                self._check = None
            self._recorded[key] = found
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PosteriorClassifier:
        self._recorded.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recorded": Kept(SHAPES)}


def _make_room(classifier: PosteriorClassifier, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before a ``state_dict`` is loaded: makes new buffers, so that the caller's draws are not overwritten."""
    classifier._recorded.clear()  # they belong to the old draws
    for i in range(len(classifier.sites)):
        own, new = getattr(classifier, f"draws{i}"), state.get(f"{prefix}draws{i}")
        if isinstance(new, Tensor) and new.shape == own.shape:
            setattr(classifier, f"draws{i}", torch.empty_like(own))


def _draw(guide: Callable, num_samples: int) -> dict[str, Tensor]:
    """Draws of a guide's sites, without auxiliary ones."""
    try:
        with torch.no_grad():
            draws = predict(ConditionedModel(guide, {}, num_samples), None)
            sites = sample_sites(run(guide, ((), {}), hidden=False))
    except TypeError as error:
        raise ValueError(
            "the guide cannot be called without arguments: draw with Predictive(guide, num_samples=...)(...) and pass the result as "
            "posterior_samples"
        ) from error
    return {name: value for name, value in draws.items() if not (sites[name]["infer"] or {}).get("is_auxiliary")}


class _Logits:
    """A model's logits for every draw, at inputs of one shape."""

    def __init__(
        self, model: ConditionedModel, site: str, chunk_size: int | None, x: Tensor, leaves: list[Tensor], held: list[Tensor]
    ) -> None:
        self.model = model
        self._held = held  # so that their ids are not reused
        state, x = RandomState(), x.detach().requires_grad_(x.requires_grad)
        with _by_itself(), Origins() as origins:
            trace = model.look(x)
            self._readout = Readout(model.model, trace, (x,), {}, model.samples, site, "PosteriorClassifier")
            first = self._readout.logits(trace, origins)
        # Recorded at other inputs than it is checked at, since a number taken from the inputs would become a constant.
        leaves = [x, *leaves] if x.requires_grad else leaves
        recorded = record_draws(model, self._run, [[first]], state, leaves if torch.is_grad_enabled() else [], (x,), (x.flip(0),))
        if recorded.random[0] if recorded else not agree([first], self._run(*model.draw(0), x)):
            names = [name for name in trace.stochastic_nodes if name not in model.samples]
            raise ValueError(
                f"the logits are random although draws are given: they depend on a site without draws (one of {names}), or on random "
                "numbers outside of its sites"
            )
        chunk = 1 if recorded is None else draws_together(recorded, passes=2) if chunk_size is None else chunk_size
        self.replays = None if recorded is None else Replays(recorded, chunk, lasting=True)
        self._slopes: dict[Reduction, _Slopes] = {}

    def _run(self, *values: Tensor) -> list[Tensor]:
        with _by_itself(), Origins() as origins:
            return [self._readout.logits(self.model.trace(values[:-1], values[-1]), origins)]

    def _one(self, index: int, x: Tensor) -> Tensor:
        with RandomState().again():  # like a recording, which draws nothing beside the logits
            return self._run(*self.model.draw(index), x)[0].unsqueeze(0)

    def versions(self) -> list[int]:
        """How often the draws and the model's tensors were written to."""
        return [version_of(tensor) for tensor in self._held]

    def chunks(self, x: Tensor) -> Iterator[Tensor]:
        """Logits ``[chunk, N, K]`` of all draws; chunks are independent."""
        start, stop = 0, self.model.num_samples
        while start < stop:
            if self.replays is None:
                logits = self._one(start, x)
            else:
                (logits,) = next(self.replays.run(self.model.draws, start, min(start + self.replays.chunk, stop), (x,)))
            start += len(logits)
            yield logits

    def gradients(self, x: Tensor, y: Tensor, reduce: Reduction) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As :meth:`PosteriorClassifier.gradients`."""
        if self.replays is None:
            for index in range(self.model.num_samples):
                yield _slope(partial(self._one, index), x, y, reduce)
            return
        slopes = self._slopes.setdefault(reduce, _Slopes(self.replays.recorded, reduce))
        constants, start, stop, together = self.replays.recorded.prepare(), 0, self.model.num_samples, self.replays.chunk
        while start < stop:
            size = min(self.replays.chunk, stop - start)
            try:
                found = slopes(constants, self.model.draws(start, size), x, y)
            except _NotTogether:
                self.replays.chunk = 1
            except Exception:  # chunking is not the cause: the next call uses the same size
                self.replays.chunk = together
                raise
            else:
                yield found
                start += size

    def log_mean_probability(self, x: Tensor) -> Tensor:
        """``[N, K]``, attached to ``x`` where gradients are enabled."""
        total = None
        for logits in self.chunks(x):
            part = _log_softmax(logits).logsumexp(0)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None  # there is one draw at least
        return total - math.log(self.model.num_samples)


def _by_itself() -> Any:
    """Hides the sample sites of a call from the handlers around it, as in a recording; parameters remain visible."""
    return poutine.block(hide_types=["sample", "observe"])


class _NotTogether(RuntimeError):
    """Draws cannot be computed together: an operation cannot be batched, or memory does not suffice."""


class _Slopes:
    """
    Gradients of one function of the draws, chunk by chunk, recorded once for each chunk size.

    :param Interpreter logits: from a draw and the inputs to its logits.
    :param reduce: as in :meth:`PosteriorClassifier.gradients`.
    """

    def __init__(self, logits: Interpreter, reduce: Reduction) -> None:
        self._draws_logits, self._reduce = logits, reduce
        self._recorded: dict[int, Interpreter | None] = {}

    def __call__(self, constants: list[Any], draws: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:raises _NotTogether: where there are several draws."""
        size = len(draws[0])
        places = [i for i, value in enumerate(constants) if value is not None]
        changing, fixed = (*draws, x.detach(), y), [constants[i] for i in places]
        recorded = self._recorded.get(size)
        if recorded is not None:
            with torch.no_grad():
                log_probs, reduced, gradient = recorded.replay(recorded.prepare(), (*changing, *fixed))
            return log_probs, reduced, gradient

        def whole(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            values, (x, y, *others) = list(constants), tensors[len(draws) :]
            for i, value in zip(places, others, strict=True):
                values[i] = value
            return _slope(lambda x: self._logits(values, tensors[: len(draws)], size, x), x, y, self._reduce)

        try:
            found = whole(*changing, *fixed)
        except Exception as error:
            if size > 1:
                raise _NotTogether from error
            raise
        if size not in self._recorded:
            self._recorded[size] = self._record(whole, changing, fixed, found)
        return found

    @staticmethod
    def _record(whole: Callable, changing: Sequence[Tensor], fixed: Sequence[Tensor], expected: Sequence[Tensor]) -> Interpreter | None:
        """Recorded at other values than it is compared at; None if they disagree."""
        try:
            recorded = Interpreter(record(whole, (*(tensor.flip(0) for tensor in changing), *fixed))[0])
            with torch.no_grad():
                agrees = agree(recorded.replay(recorded.prepare(), (*changing, *fixed)), expected)
        except Exception:  # what cannot be recorded still runs
            return None
        return recorded if agrees else None

    def _logits(self, values: list[Any], draws: Sequence[Tensor], size: int, x: Tensor) -> Tensor:
        if size > 1:
            return self._draws_logits.replay_together(values, draws, size, (x,))[0]
        return self._draws_logits.replay(values, (*(draw[0] for draw in draws), x))[0].unsqueeze(0)


@torch.enable_grad()
def _slope(logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, reduce: Reduction) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().requires_grad_()
    log_probs = _log_softmax(logits(x))
    values = reduce(log_probs, y)
    ones = torch.ones(len(x), dtype=values.dtype, device=values.device)  # a constant, which a recording makes once
    (gradient,) = torch.autograd.grad(values, x, ones)
    return log_probs.detach(), values.detach(), gradient


def _log_softmax(logits: Tensor) -> Tensor:
    """Over the classes, in the layout of the memory: draws that are computed together have adjacent rows."""
    return logits.log_softmax(-1) if logits.stride(-1) == 1 else logits.mT.log_softmax(-2).mT


class _LogMeanProbability(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: _Logits, x: Tensor, *leaves: Tensor) -> Tensor:
        result = logits.log_mean_probability(x)
        ctx.logits, ctx.versions = logits, logits.versions()
        ctx.save_for_backward(result, x, *leaves)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        result, *inputs = ctx.saved_tensors
        if ctx.logits.versions() != ctx.versions:
            raise RuntimeError(
                "the draws or a tensor of the model have changed since the prediction, which its backward pass computes again: call "
                "backward() before the change, or predict again"
            )
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        if torch.is_grad_enabled():  # create_graph=True
            whole = ctx.logits.log_mean_probability(inputs[0])
            sums: Sequence[Tensor] = torch.autograd.grad(whole, [inputs[i] for i in wanted], gradient, create_graph=True, allow_unused=True)
        else:
            inputs[0] = inputs[0].detach().requires_grad_(0 in wanted)
            sums = _gradients(ctx.logits, inputs[0], [inputs[i] for i in wanted], result, gradient)
        found = dict(zip(wanted, sums, strict=True))
        return None, *(found.get(i) for i in range(len(inputs)))


@torch.enable_grad()
def _gradients(logits: _Logits, x: Tensor, wanted: list[Tensor], result: Tensor, gradient: Tensor) -> list[Tensor]:
    """Gradients with respect to ``wanted``, summed over chunks, of which one is in memory."""
    sums = [torch.zeros_like(tensor) for tensor in wanted]
    for chunk in logits.chunks(x):
        log_probs = _log_softmax(chunk)
        with torch.no_grad():
            # the share of a draw in the mean; 0 where a class is impossible under all draws
            share = (log_probs - result.clamp_min(torch.finfo(result.dtype).min)).exp_().mul_(gradient / logits.model.num_samples)
        for total, part in zip(sums, torch.autograd.grad(log_probs, wanted, share, allow_unused=True), strict=True):
            if part is not None:
                total += part
        del chunk, log_probs
    return sums
