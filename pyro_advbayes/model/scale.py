"""Log-likelihoods that are not a sum over rows, which no factor N / B scales: refused for minibatches, warned of on the full data."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.handlers import CoveredMessenger, MinibatchMessenger, in_a_line
from pyro_advbayes.model.additivity import HALF, Failed, Parts, Subject, check, looking, means, pick_rows
from pyro_advbayes.model.batches import Arguments
from pyro_advbayes.model.data import Data
from pyro_advbayes.model.layers import kept_statistics, refuse_random_layers
from pyro_advbayes.model.notices import tell_of_mean, tell_of_scales
from pyro_advbayes.model.program import Call, Values, draw
from pyro_advbayes.model.refusals import refusing

DRAWS = 5  # of each kind, until the likelihood is finite
LOOKS = 4  # until a likelihood on the full data counts as a mean: once may be a coincidence


def check_additive(data: Data, strategy: Callable) -> None:
    """
    Compares, at one draw of the latent sites, the log-likelihood of eight rows with the sum over two halves of them.

    Fewer rows if minibatches have fewer. A plate that subsamples itself takes B rows only: there the log-likelihood of half the rows is
    that of the same rows twice. A dependence on B alone (a mean over the minibatch) cannot show then; a second factor N / B shows in the
    scale of the observed sites.

    A draw at which the likelihood of the whole is not finite tells nothing, and another draw is taken. If none is finite, the search for
    a start refuses the model. The random generators stay as they are.

    :param data: whose data plate was found.
    :param strategy: draws the latent sites; later draws are from the prior.
    :raises ValueError: with both numbers, the site, and the usual cause.
    """
    found, rows = data.structure, _choose(data)
    if rows is None or data.batches.num_data is None:
        return
    subject = Subject(data.model, partial(_cut, data), found.prior_factors, data.covering)
    with looking():
        draws = (draw(data.model, data.example_arguments(), each) for each in (strategy, init_to_sample) for _ in range(DRAWS))
        try:
            check(subject, rows, draws, data.batches.num_data / found.plate_batch)
        except Failed as failed:
            raise ValueError(
                f"the model runs on the first {found.plate_batch} rows and fails on {failed} others: {in_a_line(failed.cause)}. "
                "It must run on any minibatch; batch_dependent=True skips this test"
            ) from failed.cause


def tell_of_tempering(data: Data) -> None:
    """
    Warns of a likelihood that counts for more or less than the data: one that is scaled by a number, or, on the full data, one that is a
    mean over rows. Other models whose rows depend on each other (a Gaussian process, a time series) are right on the full data.

    :param data: whose model was looked at.
    """
    found = data.structure
    if found.scales:
        tell_of_scales(dict(found.scales))
    if found.plate is not None or not any(t.dim() for t in data.arguments.tensors):
        return
    places, size = data.arguments.rows(None)
    if size < 2:
        return
    subject = Subject(data.model, partial(_cut, data, places=places), (), data.covering)
    looks: list[Mapping[str, tuple[float, float, bool]]] = []
    with contextlib.suppress(Exception), warnings.catch_warnings(), pyro.get_param_store().scope(), kept_statistics(), looking():
        warnings.simplefilter("ignore")  # whatever a model's Python does with fewer rows than all
        while len(looks) < LOOKS and (not looks or looks[-1]):
            rows = pick_rows([data.arguments.tensors[i] for i in places], size, min(HALF, size // 2), seed=len(looks))
            call, _ = subject.cut(rows.whole)
            looks.append(means(subject, rows, draw(data.model, call, init_to_sample)))
    for name, (whole, total, _) in looks[-1].items() if len(looks) == LOOKS else ():
        differ = [each[name][2] for each in looks if name in each]
        if len(differ) == LOOKS and sum(differ) > 1 and name not in dict(found.scales):
            tell_of_mean(name, whole, total, size)


def _choose(data: Data) -> Parts | None:
    found = data.structure
    if not data.places and found.scaling != "indices":  # rows are not cut: a plate with indices that stay
        return None
    if found.scaling != "indices":
        tensors = [data.arguments.tensors[i] for i in data.places]
        return pick_rows(tensors, len(tensors[0]), min(HALF, found.plate_batch))
    half, odd = found.plate_batch // 2, found.plate_batch % 2
    if half == 0:  # one row for every plate: no rows that could depend on each other
        return None
    tensors = [t for t in data.arguments.tensors if t.dim() and len(t) == found.plate_size]
    rows = pick_rows(tensors, found.plate_size, half, odd)
    (first, second), rest = rows.parts, rows.whole[2 * half :]
    return Parts(rows.whole, (torch.cat([first, first, rest]), torch.cat([second, second, rest])), 2)


def _cut(data: Data, rows: Tensor, places: Sequence[int] | None = None) -> tuple[Call, Values]:
    if data.structure.scaling == "indices":
        return data.arguments.replace(data.arguments.tensors), {str(data.structure.plate): rows.to(data.device)}
    return _cut_arguments(data.arguments, data.places if places is None else places, rows), {}


def _cut_arguments(arguments: Arguments, places: Sequence[int], rows: Tensor) -> Call:
    tensors = arguments.tensors
    length = len(tensors[places[0]])
    cut = [i for i in places if len(tensors[i]) == length]
    return arguments.replace([t.index_select(0, rows.to(t.device)) if i in cut else t for i, t in enumerate(tensors)])


# ------------------------------------------------------------------------------------------------ minibatches of SVI


@checked
def minibatch(
    fn: Callable | None = None,
    size: int | None = None,
    plate: str | None = None,
    prior_factors: Sequence[str] = (),
    batch_dependent: bool = False,
) -> Any:
    r"""
    Scales a model's data plate to the whole set: with :math:`B` rows in the plate and ``size`` :math:`= N`,

    .. math:: \log p(\theta) + \frac{N}{B} \sum_{i=1}^{B} \log p(y_i \mid x_i, \theta),

    an unbiased estimate of the log-joint of all :math:`N` rows when the :math:`B` rows are drawn uniformly. :math:`B` is read
    off the plate at every call, so that a short last batch is scaled by its own length.

    Example::

        svi = SVI(minibatch(model, size=50_000), guide, optim, Trace_ELBO())

    The first call with fewer than N rows runs the model on eight of them and on two halves of these, once, to see whether its
    log-likelihood is a sum over rows. There is no such check for a context manager, which gets no arguments, for a model that runs on its
    own number of rows only, and for layers in training mode (BatchNorm), where rows depend on each other by intent.

    :param fn: a Pyro model; without it, the handler itself is returned, for use as a context manager or decorator.
    :param int size: number of rows in the whole data set, >= 1.
    :param str plate: name of the data plate; needed only if observed sites are in several nested plates.
    :param prior_factors: names of ``pyro.factor`` terms that belong to the prior, and are not scaled.
    :param bool batch_dependent: accepts a log-likelihood that is not a sum over rows, so that :math:`N / B` times it is no estimate of the
        whole data set's; refused by default.
    :raises ValueError: at the first call, if a site would be scaled wrongly: an observed site outside the plate, a latent
        site inside it, a sequential plate, a plate that subsamples itself, more rows than ``size``, rows that depend on each other.
    """
    messenger = _CheckedMinibatch(size, plate, prior_factors, batch_dependent)
    return messenger if fn is None else messenger(fn)


class _CheckedMinibatch(MinibatchMessenger):
    """Looks at the first minibatch of each model that it is put around."""

    def __init__(self, size: int | None, plate: str | None, prior_factors: Sequence[str], batch_dependent: bool) -> None:
        super().__init__(size, plate, prior_factors)
        self.batch_dependent = batch_dependent

    def __call__(self, fn: Callable) -> Callable:
        if self.batch_dependent or not callable(fn):
            return super().__call__(fn)
        return super().__call__(partial(_call, _FirstLook(self), fn))  # as poutine.unwrap knows handlers: the model is the second argument


def _call(first: _FirstLook, fn: Callable, *args: Any, **kwargs: Any) -> Any:
    result = fn(*args, **kwargs)  # first, for what the handler refuses by name
    first.look(fn, args, kwargs)
    return result


class _FirstLook:
    def __init__(self, handler: MinibatchMessenger) -> None:
        self._handler, self._over = handler, False

    def look(self, model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """:raises ValueError: as :func:`check_additive`, at the first minibatch."""
        if self._over or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        arguments = Arguments(model, args, kwargs)
        if not any(t.dim() for t in arguments.tensors):
            return
        places, batch = arguments.rows(None)
        if batch >= self._handler.size:
            return
        self._over = True
        found = False
        with contextlib.suppress(Exception), kept_statistics(), refuse_random_layers(model), looking():
            rows = pick_rows([arguments.tensors[i] for i in places], batch, max(1, min(HALF, batch // 2)))
            values = draw(model, (args, kwargs), init_to_sample)  # fails where layers are in training mode, say
            found = True
        if not found:
            return
        subject = Subject(model, lambda rows: (_cut_arguments(arguments, places, rows), {}), self._handler.prior_factors, CoveredMessenger)
        with refusing(), contextlib.suppress(Failed), kept_statistics(), looking():
            check(subject, rows, [values], self._handler.size / batch)
