"""The variational objectives as modules in a Lightning trainer: its batches, optimisers, validation, gradient clipping, checkpoints."""

from __future__ import annotations

import lightning.pytorch as lightning
import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes.attacks import PGD
from tests.small_models import data


class Fit(lightning.LightningModule):
    """What a user of Lightning writes around any of Pyro's losses."""

    def __init__(self, loss, guide):
        super().__init__()
        self.model = mlp((3, 8, 2))
        self.guide = guide(self.model)
        self.elbo = loss(ab.minibatch(self.model, size=60), self.guide)
        self.seen = {"train": [], "validation": []}

    def training_step(self, batch, batch_index):
        loss = self.elbo(*batch)
        self.seen["train"].append(loss.item())
        return loss

    def validation_step(self, batch, batch_index):
        with torch.random.fork_rng():  # the trainer draws random numbers, too
            torch.manual_seed(1)
            self.seen["validation"].append(self.elbo(*batch).item())

    def configure_optimizers(self):
        return torch.optim.Adam(self.elbo.parameters(), lr=0.05)


OBJECTIVES = {
    "TraceAdversarial_ELBO": lambda: (
        ab.TraceAdversarial_ELBO(num_steps=2),
        lambda model: ab.AutoAdversarialNormal(model, init_scale=0.01),
    ),
    "TraceRobust_ELBO": lambda: (ab.TraceRobust_ELBO(PGD(eps=0.2, steps=2, clip=None)), AutoNormal),
}


def trainer(folder, **options):
    """On the CPU, quiet, and without files of its own."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return lightning.Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **options)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_lightning_trainer_fits_the_elbo_module(objective, tmp_path):
    x, y = data()
    rows = TensorDataset(x, y.long())
    with pyro.settings.context(module_local_params=True):
        fit = Fit(*OBJECTIVES[objective]())
        fit.elbo(x, y.long())  # makes the parameters
        fitting = trainer(tmp_path, max_epochs=12, gradient_clip_val=100.0)
        fitting.fit(fit, DataLoader(rows, batch_size=25, shuffle=True), DataLoader(rows, batch_size=60))
        fitting.save_checkpoint(tmp_path / "fit.ckpt")
        again = Fit(*OBJECTIVES[objective]())
        again.elbo(x, y.long())
        again.load_state_dict(torch.load(tmp_path / "fit.ckpt", weights_only=True)["state_dict"])
    train, validation = fit.seen["train"], fit.seen["validation"]
    assert len(train) == 12 * 3 and len(pyro.get_param_store()) == 0
    assert sum(train[-3:]) < 0.8 * sum(train[:3]) and validation[-1] < 0.8 * validation[0]
    state = fit.guide.state_dict()
    assert state and all(torch.equal(value, again.guide.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_validation_that_has_no_gradients_is_refused_and_one_that_has_them_is_the_same_loss(objective, tmp_path):
    """``Trainer.validate`` is in inference mode unless told otherwise, where no adversary can work."""
    x, y = data()
    rows = DataLoader(TensorDataset(x, y.long()), batch_size=60)
    with pyro.settings.context(module_local_params=True):
        fit = Fit(*OBJECTIVES[objective]())
        fit.elbo(x, y.long())
        with pytest.raises(RuntimeError, match=r"needs gradients.*inference_mode=False"):
            trainer(tmp_path).validate(fit, rows, verbose=False)
        trainer(tmp_path, inference_mode=False).validate(fit, rows, verbose=False)
        torch.manual_seed(1)
        wanted = fit.elbo(x, y.long()).item()
    assert fit.seen["validation"] == [pytest.approx(wanted, rel=1e-6)]
