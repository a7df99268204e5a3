"""The rival of an iteration of Bayesian Adversarial Learning does the same arithmetic."""

from __future__ import annotations

import torch

from tests.benchmarks import rows_bal
from tests.benchmarks.workloads import CONVNET


def test_the_iteration_written_by_hand_moves_weights_where_ours_does(monkeypatch):
    """Without noise, on a minibatch of all rows; with steps that are seen beside rounding."""
    for name, value in {"ROWS": 12, "BATCH": 12, "COLD": 0.0, "STEP_SIZE": 0.1, "ETA": 0.4}.items():
        monkeypatch.setattr(rows_bal, name, value)
    device = torch.device("cpu")
    torch.manual_seed(0)
    nets = [CONVNET.plain() for _ in range(rows_bal.CHAINS)]
    start = {f"net.{name}": torch.stack([net.get_parameter(name).detach() for net in nets]) for name, _ in nets[0].named_parameters()}
    ours = rows_bal._ours(2, device, start).call()  # its second iteration
    torch.manual_seed(0)
    hand = rows_bal._hand_written(2, device)
    for _ in range(2):
        nets = hand.call()
    for site, values in ours.items():
        moved = torch.stack([net.get_parameter(site.removeprefix("net.")).detach() for net in nets]) - start[site]
        torch.testing.assert_close(values - start[site], moved, rtol=1e-3, atol=1e-5)
        assert float(moved.abs().max()) > 1e-3
