"""
Separate draws of weights for each row of a minibatch, which reduce the variance of an ELBO's gradients:
:class:`LocalReparameterization`, :class:`Flipout` and :class:`ExemplarReparameterization`.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyro_advbayes.checked import checked
from pyro_advbayes.kinds import is_subsample, without_independent
from pyro_advbayes.model.refusals import Refused
from pyro_advbayes.tracing.replay import quiet_batching

CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
LAYERS = (F.linear, *CONVOLUTIONS)
NORMALISATIONS = (F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm)
OTHERS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.embedding, F.prelu, F.rms_norm)

# Other operations on weights, which occur in networks and not in log-densities. By name, since each has several forms.
PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "einsum", "tensordot", "bilinear"}
BY_HAND = {*PRODUCTS, "t", "transpose", "permute"}
TURNED = tuple(inspect.getattr_static(Tensor, name).__get__ for name in ("T", "mT"))

_entered = threading.local()


def rows_differ() -> bool:
    """Whether one of the handlers of this module is active in this thread."""
    return getattr(_entered, "count", 0) > 0


class DrawnSite:
    """
    A tensor that a guide drew, and its replacement in the rows of a minibatch.

    :ivar own: the separate values of the rows, or what determines them; None before the first use.
    :ivar uses: the number of layers that used it.
    """

    def __init__(self, name: str, fn: Any) -> None:
        self.name, self.fn = name, fn
        self.own: Any = None
        self.uses = 0


class RowwiseMessenger(Messenger):
    """
    Base of the three handlers. A handler encloses a guide and its model. It notes the tensors that are drawn, and replaces the functions of
    PyTorch that use such a tensor as a layer's weight, by a ``TorchFunctionMode``, which affects one thread and the ``with`` block only.
    Divergences from the prior do not change: they are those of the guide's distributions, or of its single draw. Each row's likelihood is
    that of a separate draw of the network from the guide.

    :param shared: one pattern or several (as in :mod:`fnmatch`) for the names of sites with one draw for all rows.
    :raises ValueError: naming the site, at the first run of the model, at the end of the block or at the next draw, if a site that is not
        ``shared`` is used outside the layers that the handler covers; and if the rows of a layer's input are not those of the plate around
        the observations.

    :ivar dict covered: site -> the names of the functions in which each row had a separate draw.
    """

    def __init__(self, shared: str | Sequence[str] = ()) -> None:
        super().__init__()
        self.shared = (shared,) if isinstance(shared, str) else tuple(shared)
        self.covered: dict[str, set[str]] = {}
        self._sites: dict[int, DrawnSite] = {}
        self._unmet: dict[str, DrawnSite] = {}
        self._rows: dict[str, int] = {}  # rows of a site's input, until an observation shows the number of rows
        self._drawing: dict[str, Any] | None = None

    def __enter__(self) -> RowwiseMessenger:
        super().__enter__()
        self._mode = _Mode(self)
        self._mode.__enter__()
        _entered.count = getattr(_entered, "count", 0) + 1
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        _entered.count -= 1
        self._mode.__exit__(exc_type, exc_value, traceback)
        super().__exit__(exc_type, exc_value, traceback)
        unmet, self._unmet, self._sites, self._rows = self._unmet, {}, {}, {}
        if exc_type is None:
            self._check_met(unmet)

    # -------------------------------------------------------------------------------------------------------- what is drawn

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        # a value that is there already was drawn elsewhere: by the guide, when its model is replayed
        self._drawing = None if msg["done"] or msg["value"] is not None else msg

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        name, value, fn = msg["name"], msg["value"], without_independent(msg["fn"])
        if msg["is_observed"]:
            self._check_rows(msg)
        if msg is not self._drawing or msg["is_observed"] or is_subsample(msg) or not isinstance(value, Tensor):
            return
        shared = any(fnmatchcase(name, pattern) for pattern in self.shared)
        if isinstance(fn, Delta):  # AutoNormal draws an auxiliary site, and a point mass there
            site = self._sites.pop(id(fn.v), None)
            if site is not None:
                self._unmet.pop(site.name)
                site.name = name
        else:
            site = DrawnSite(name, msg["fn"]) if value.is_floating_point() else None
        if site is not None and not shared:
            self._check_met([name] if name in self._unmet else [])  # the previous draw must have been used by its layer
            self._note(value, site)

    def _note(self, value: Tensor, site: DrawnSite) -> None:
        key = id(value)
        self._rows.pop(site.name, None)
        self._sites[key] = self._unmet[site.name] = site
        weakref.finalize(value, self._sites.pop, key, None).atexit = False  # the id may be reused by another tensor

    def _check_rows(self, observed: dict[str, Any]) -> None:
        plates = {frame.size for frame in observed["cond_indep_stack"] if frame.vectorized}
        met, self._rows = self._rows, {}
        other = {name: rows for name, rows in met.items() if rows not in plates} if plates else {}
        if other:
            name, rows = min(other.items())
            raise Refused(
                f"site {name!r} meets an input of {rows} rows, and {observed['name']!r} is observed in a plate of "
                f"{' x '.join(map(str, sorted(plates)))}: {type(self).__name__} needs the rows of the minibatch in the first dimension, "
                f"else parts of one row would have separate weights. Share one draw of such sites among all rows, shared={sorted(other)!r}"
            )

    def _check_met(self, unmet: Collection[str]) -> None:
        if unmet:
            raise Refused(
                f"{type(self).__name__} covers no function in which {', '.join(map(repr, sorted(unmet)))} is used, or a draw is used "
                f"in another form. Share one draw among all rows: shared={sorted(unmet)!r}"
            )

    # ----------------------------------------------------------------------------------------------------- PyTorch's functions

    def call(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs a function of PyTorch, with separate draws for the rows where a layer uses a drawn tensor."""
        met = [self._sites[id(v)] for v in (*args, *kwargs.values()) if id(v) in self._sites] if self._sites else []
        if not met:
            return func(*args, **kwargs)
        if func in LAYERS:
            result = self._layer(func, args, kwargs)
        elif func in NORMALISATIONS:
            result = self._normalise(func, inspect.signature(func).bind(*args, **kwargs).arguments)
        elif func in OTHERS:
            result = self.other(func, args, kwargs)
        else:
            result = NotImplemented
            if func in TURNED or getattr(func, "__name__", "") in BY_HAND:
                self._check_met([site.name for site in met])
        if result is NotImplemented:
            return func(*args, **kwargs)
        rows = len(args[0] if args else kwargs["input"])
        for site in met:
            site.uses += 1
            self._rows[site.name] = rows
            self._unmet.pop(site.name, None)
            self.covered.setdefault(site.name, set()).add(func.__name__)
        return result

    def _layer(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        options = dict(zip(names, args, strict=False)) | kwargs
        x, weight, bias = options.pop("input"), options.pop("weight"), options.pop("bias", None)
        if x.dim() < (CONVOLUTIONS[func] + 2 if func in CONVOLUTIONS else 2):
            raise Refused(f"{type(self).__name__}: {func.__name__} is given {tuple(x.shape)}, which has no dimension for rows")
        site = self._sites.get(id(weight))
        out = func(x, weight, None, **options) if site is None else self.layer(func, x, weight, site, options)
        return self._with(torch.add, out, bias, 1 if func in CONVOLUTIONS else out.dim() - 1)

    def _normalise(self, func: Callable, arguments: dict[str, Any]) -> Tensor:
        """Normalises, and then applies gain and shift."""
        gain, shift = arguments.pop("weight", None), arguments.pop("bias", None)
        out = func(**arguments)
        channels = out.dim() - len(arguments["normalized_shape"]) if func is F.layer_norm else 1
        return self._with(torch.add, self._with(torch.mul, out, gain, channels), shift, channels)

    def _with(self, apply: Callable, out: Tensor, value: Tensor | None, channels: int) -> Tensor:
        """Applies a bias or a gain, whose dimensions are those of ``out`` from ``channels`` on, with separate draws for the rows."""
        if value is None:
            return out
        site = self._sites.get(id(value))
        values = value.unsqueeze(0) if site is None else self.rows(value, site, len(out))
        shape = (*[1] * (channels - 1), *value.shape, *[1] * (out.dim() - channels - value.dim()))
        return apply(out, values.reshape(len(values), *shape))

    def once(self, site: DrawnSite, rows: int, make: Callable[[], Any]) -> Any:
        """
        The separate values of the rows at a site: made at its first use, and used again later.

        :raises ValueError: if it was made for another number of rows.
        """
        if site.own is None:
            site.own = rows, make()
        made, own = site.own
        if made != rows:
            raise Refused(
                f"site {site.name!r} meets inputs of {made} rows and of {rows}: {type(self).__name__} needs the rows of the minibatch in "
                f"the first dimension everywhere; share one draw of the site among all rows, shared={site.name!r}"
            )
        return own

    def normal(self, site: DrawnSite) -> Normal:
        """
        The Normal that a site was drawn from.

        :raises ValueError: if it was drawn from another distribution.
        """
        fn = without_independent(site.fn)
        if not isinstance(fn, Normal):
            raise Refused(
                f"site {site.name!r} is drawn from {type(fn).__name__}, and {type(self).__name__} is for Normal ones: use "
                f"ExemplarReparameterization, or leave the site one draw for all rows, shared={site.name!r}"
            )
        return fn

    @abstractmethod
    def rows(self, value: Tensor, site: DrawnSite, rows: int) -> Tensor:
        """Values ``[rows, *shape]`` for a bias or a gain."""

    @abstractmethod
    def layer(self, func: Callable, x: Tensor, weight: Tensor, site: DrawnSite, options: dict[str, Any]) -> Tensor:
        """A linear or convolutional layer without its bias."""

    def other(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Another function with rows, or NotImplemented."""
        return NotImplemented


@checked
class ExemplarReparameterization(RowwiseMessenger):
    r"""
    Draws all weights anew for every row, :math:`\theta_i \sim q` for rows :math:`i = 1, \ldots, B`. ::

        with ab.nn.ExemplarReparameterization():
            svi.step(x, y)

    The estimate of the expected log-likelihood is unbiased, and the variance that draws add to its gradient falls with B, since rows do not
    share draws. A convolution becomes one grouped convolution, a linear layer on sequences one batched product; gains and shifts of
    normalisation layers are applied separately; transposed convolutions, embeddings, PReLU and RMSNorm use ``torch.vmap``. Any distribution
    with reparameterised draws is supported.

    For a linear layer with one input vector for each row and Normal weights, the outputs are drawn in place of the weights, as in
    :class:`LocalReparameterization`: they have the same law, the gradient has no larger variance, and there are no B copies of the weights.
    If such weights are used again, they are drawn given these outputs. Memory: B times that of all other weights.

    Source: Z. Deng, H. Zhang, X. Yang, Y. Dong and J. Zhu, BayesAdapter: being Bayesian, inexpensively and reliably, via Bayesian
    fine-tuning, 2020.

    Arguments, and what is raised: :class:`RowwiseMessenger`.
    """

    def rows(self, value: Tensor, site: DrawnSite, rows: int) -> Tensor:
        own = self.once(site, rows, lambda: site.fn.rsample((rows,)))
        if isinstance(own, _Products):
            own = own.weights(site.fn.rsample((rows,)))
            site.own = rows, own
        return own

    def layer(self, func: Callable, x: Tensor, weight: Tensor, site: DrawnSite, options: dict[str, Any]) -> Tensor:
        if func is F.linear and x.dim() == 2 and site.own is None and isinstance(without_independent(site.fn), Normal):
            return self.once(site, len(x), lambda: _Products(x, self.normal(site))).values
        own = self.rows(weight, site, len(x))
        if func is F.linear:
            # In this order the gradient has the layout of the weights, and one pass sums it over rows.
            out = torch.bmm(own, x.reshape(len(x), -1, x.shape[-1]).mT).mT
            return out.reshape(*x.shape[:-1], own.shape[1])
        options = {**options, "groups": options.get("groups", 1) * len(x)}
        out = func(x.reshape(1, -1, *x.shape[2:]), own.flatten(0, 1), None, **options)
        return out.reshape(len(x), own.shape[1], *out.shape[2:])

    def other(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        x, *others = args  # the rows come first in all of them
        values: dict[int | str, Any] = dict(enumerate(others))
        values.update(kwargs)
        drawn = {key: self.rows(v, self._sites[id(v)], len(x)) for key, v in values.items() if id(v) in self._sites}

        def of_row(row: Tensor, own: dict[Any, Tensor]) -> Tensor:
            given = {**values, **own}
            return func(row, *(given[i] for i in range(len(others))), **{name: given[name] for name in kwargs})

        with quiet_batching():
            return torch.vmap(of_row)(x.unsqueeze(1), drawn).squeeze(1)  # a row is a minibatch of one


@checked
class Flipout(RowwiseMessenger):
    r"""
    Gives every row i the single draw of a layer with separate random signs,

    .. math:: W_i = \mu + (W - \mu) \circ r_i s_i^\top, \qquad r_i, s_i \in \{-1, 1\} \text{ at random},

    over the layer's outputs and inputs (channels of a convolution, shared by its positions). Each :math:`W_i` has the guide's law, so that
    estimates are unbiased, and those of different rows are uncorrelated. It costs a second pass through the layer. ::

        with ab.nn.Flipout():
            svi.step(x, y)

    Linear and convolutional layers, biases, and the gains and shifts of normalisation layers, drawn from a Normal.

    Source: Y. Wen, P. Vicol, J. Ba, D. Tran and R. Grosse, Flipout: efficient pseudo-independent weight perturbations on mini-batches,
    ICLR 2018, Eq. 3 and 4.

    Arguments, and what is raised: :class:`RowwiseMessenger`.
    """

    def rows(self, value: Tensor, site: DrawnSite, rows: int) -> Tensor:
        loc = self.normal(site).loc
        signs = self.once(site, rows, lambda: _signs(value, rows, *value.shape))
        return loc + (value - loc) * signs

    def layer(self, func: Callable, x: Tensor, weight: Tensor, site: DrawnSite, options: dict[str, Any]) -> Tensor:
        loc = self.normal(site).loc
        channels = x.dim() - 1 if func is F.linear else 1
        inputs, outputs = x.shape[channels], len(weight)
        s, r = self.once(site, len(x), lambda: (_signs(x, len(x), inputs), _signs(x, len(x), outputs)))

        def along(signs: Tensor) -> Tensor:
            return signs.reshape(len(x), *[1] * (channels - 1), -1, *[1] * (x.dim() - channels - 1))

        return func(x, loc, None, **options) + func(x * along(s), weight - loc, None, **options) * along(r)


@checked
class LocalReparameterization(RowwiseMessenger):
    r"""
    Draws the outputs of a linear layer for each row, in place of its weights: with :math:`W_{jk} \sim \mathcal{N}(\mu_{jk}, \sigma_{jk}^2)`
    and a row :math:`x`,

    .. math:: a_j \sim \mathcal{N}\Big(\sum_k \mu_{jk} x_k,\; \sum_k \sigma_{jk}^2 x_k^2\Big),

    independently from row to row. ::

        with ab.nn.LocalReparameterization():
            svi.step(x, y)

    The law is that of a separate draw of the weights for every row, so that estimates are unbiased. The input must be ``[rows, features]``,
    and each layer be used once. Convolutions and sequences are refused, since their positions share weights: independent draws for
    positions, as is often done, have another expectation. Gains and shifts of normalisation layers are drawn for every row.

    Source: D. Kingma, T. Salimans and M. Welling, Variational dropout and the local reparameterization trick, NeurIPS 2015, Eq. 6.

    Arguments, and what is raised: :class:`RowwiseMessenger`.
    """

    def rows(self, value: Tensor, site: DrawnSite, rows: int) -> Tensor:
        return self.once(site, rows, lambda: self.normal(site).rsample((rows,)))

    def layer(self, func: Callable, x: Tensor, weight: Tensor, site: DrawnSite, options: dict[str, Any]) -> Tensor:
        if func is not F.linear or x.dim() != 2:
            raise Refused(
                f"site {site.name!r}: in {func.__name__} on {tuple(x.shape)}, several positions of a row share the weights, and "
                "LocalReparameterization would draw them apart: use Flipout or ExemplarReparameterization, or leave the site one draw for "
                f"all rows, shared={site.name!r}"
            )
        if site.uses:
            raise Refused(
                f"site {site.name!r} is used twice, and LocalReparameterization would draw the two outputs apart: use Flipout or "
                f"ExemplarReparameterization, or leave the site one draw for all rows, shared={site.name!r}"
            )
        return _Products(x, self.normal(site)).values


class _Products:
    """
    Products of rows ``x`` with separate Normal weights ``[outputs, inputs]`` for each row, drawn without the weights.

    :ivar values: ``[rows, outputs]``.
    """

    def __init__(self, x: Tensor, fn: Normal) -> None:
        self.x, self.fn = x, fn
        variance = F.linear(x.square(), fn.scale.square())
        self.variance = variance.clamp_min(torch.finfo(variance.dtype).tiny)  # for a row of zeros it is 0, where the root has no derivative
        self.values = F.linear(x, fn.loc) + self.variance.sqrt() * torch.randn_like(variance)

    def weights(self, free: Tensor) -> Tensor:
        """
        Draws of the weights given the products, by Matheron's rule: ``free`` draws ``[rows, outputs, inputs]``, moved along each row's
        ``x`` until they give its products.
        """
        missing = (self.values - torch.einsum("boi,bi->bo", free, self.x)) / self.variance
        return free + missing.unsqueeze(2) * self.fn.scale.square() * self.x.unsqueeze(1)


class _Mode(TorchFunctionMode):
    def __init__(self, messenger: RowwiseMessenger) -> None:
        super().__init__()
        self.messenger = messenger

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self.messenger.call(func, args, kwargs or {})


def _signs(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(0.5).mul_(2.0).sub_(1.0)
