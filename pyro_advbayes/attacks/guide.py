"""A classifier that draws its weights at every call: :class:`GuideClassifier`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int, need_tensor
from pyro_advbayes.kinds import sample_sites
from pyro_advbayes.model.outcomes import Origins
from pyro_advbayes.model.program import run
from pyro_advbayes.model.readout import Readout
from pyro_advbayes.model.refusals import told


@checked
class GuideClassifier(nn.Module):
    r"""
    A random classifier: a model whose weights a guide draws at every call,

    .. math:: x \mapsto \log \frac{1}{S} \sum_{s=1}^{S} \mathrm{softmax}\, f(x, \theta_s), \qquad \theta_s \sim q.

    An attack on it must average over many draws, since it is judged on new ones: ``PGD(eps=0.1, eot=10)``.
    :class:`~pyro_advbayes.PosteriorClassifier` has fixed draws and is much faster; both read the probabilities from the model's likelihood.

    :param model: a Pyro model of ``x``.
    :param guide: its guide; called with ``x``.
    :param int num_samples: S, the draws of one call, >= 1.
    :param str return_site: as in :class:`~pyro_advbayes.PosteriorClassifier`.
    :raises ValueError: if ``num_samples`` is below 1; at the first call, if the model's likelihood is not that of a classifier.
    """

    def __init__(self, model: Callable, guide: Callable, num_samples: int = 1, return_site: str = "_RETURN") -> None:
        super().__init__()
        self.num_samples = check_int(num_samples, "num_samples", 1, "the draws of a call")
        self.model, self.guide, self.return_site = model, guide, return_site
        self._readouts: dict[int, Readout] = {}  # by the number of inputs

    def forward(self, x: Tensor) -> Tensor:
        """
        :param x: inputs ``[N, ...]``.
        :return: log mean probabilities ``[N, K]`` of new draws.
        """
        return torch.cat(list(self.log_probs(x))).logsumexp(0) - math.log(self.num_samples)

    def log_probs(self, x: Tensor) -> Iterator[Tensor]:
        """Log-probabilities ``[1, N, K]`` of new draws, one by one."""
        need_tensor(x, "x", inputs=True)
        for _ in range(self.num_samples):
            yield told(self._drawn, {"x": x}).log_softmax(-1).unsqueeze(0)

    def _drawn(self, given: Mapping[str, Tensor]) -> Tensor:
        x = given["x"]
        with poutine.block(), poutine.mask(mask=False), Origins() as origins:
            values = {name: node["value"] for name, node in sample_sites(run(self.guide, ((x,), {}), hidden=False)).items()}
            trace = run(self.model, ((x,), {}), values, hidden=False)
            if len(x) not in self._readouts:
                self._readouts = {len(x): Readout(self.model, trace, (x,), {}, values, self.return_site, type(self).__name__)}
            return self._readouts[len(x)].logits(trace, origins)
