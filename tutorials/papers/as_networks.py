"""The images of the script on Adversarial Sampling, and the networks that it makes Bayesian."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyro
import torch
from pyro.distributions import Normal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad
from tqdm.auto import tqdm

import pyro_advbayes as ab
from models.bal_convnet import bal_convnet, bal_convnet_network
from models.resnet import resnet, resnet_network
from tutorials.papers.experiments import Task

DATA = ("fashion_mnist", "cifar10")
BATCH_SIZE = 100
DROPS = (0.4, 0.7, 0.9)  # of the epochs, where the learning rate falls to a tenth
PRIOR = Normal(0.0, 0.15)


def load(data: str, folder: Path | None, counts: tuple[int, int], device: str, digits: bool = False) -> Task:
    """
    As many images of a data set's splits, always the same.

    :param data: a name in :data:`DATA`.
    :param folder: where its files are; None: ``PYRO_ADVBAYES_DATA``.
    :param counts: of training and test images.
    :param digits: scikit-learn's digits in the shape of its images, which need no files.
    """
    if digits:
        sets = [ab.datasets.digits(split) for split in ("train", "test")]
        width, channels = (28, 1) if data == "fashion_mnist" else (16, 3)
        sets = [(interpolate(x, (width, width), mode="bilinear").expand(-1, channels, -1, -1).contiguous(), y) for x, y in sets]
    else:
        sets = [getattr(ab.datasets, data)(folder, split) for split in ("train", "test")]
    chosen = []
    for (x, y), count in zip(sets, counts, strict=True):
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
        chosen += [x[rows], y[rows]]
    task = Task(*(t.to(device) for t in chosen))
    if data == "cifar10":
        mean, deviation = (f(task.x, dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        task = task._replace(x=(task.x - mean) / deviation, x_test=(task.x_test - mean) / deviation)
    return task


def new_network(data: str, depth: int) -> nn.Module:
    """The plain network, for a data set; the depth is that of the residual one."""
    return bal_convnet_network() if data == "fashion_mnist" else resnet_network(depth)


def new_model(data: str, depth: int, device: str) -> nn.Module:
    """The Bayesian one."""
    model = bal_convnet(PRIOR) if data == "fashion_mnist" else resnet(depth, prior=PRIOR, eval_only=False)
    return model.to(device)


class Batches:
    """Shuffled minibatches; images of CIFAR-10 are flipped, and moved by up to 4 pixels."""

    def __init__(self, task: Task, data: str) -> None:
        self.x, self.y, self.augmented = task.x, task.y, data == "cifar10"

    def __len__(self) -> int:
        return -(-len(self.x) // BATCH_SIZE)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.x)).to(self.x.device).split(BATCH_SIZE):
            yield augmented(self.x[rows]) if self.augmented else self.x[rows], self.y[rows]


def augmented(images: Tensor) -> Tensor:
    """Each image flipped at random, and a random window of it after padding by 4 pixels."""
    count, _, height, width = images.shape
    images = torch.where(torch.rand(count, 1, 1, 1, device=images.device) < 0.5, images.flip(-1), images)
    down, right = torch.randint(9, (2, count, 1, 1), device=images.device)
    rows = down + torch.arange(height, device=images.device)[:, None]
    columns = right + torch.arange(width, device=images.device)
    return pad(images, (4, 4, 4, 4)).movedim(1, -1)[torch.arange(count, device=images.device)[:, None, None], rows, columns].movedim(-1, 1)


def stepped(optimiser: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate falls three times."""
    return torch.optim.lr_scheduler.MultiStepLR(optimiser, [max(1, round(share * epochs)) for share in DROPS], gamma=0.1)


def trained(data: str, task: Task, depth: int, epochs: int, seed: int, path: Path) -> dict[str, Tensor]:
    """A network's weights, a MAP estimate under the prior; trained once."""
    if not path.exists():
        pyro.set_rng_seed(seed)
        net = new_network(data, depth).to(task.x.device)
        decay = 0.5 / (len(task.x) * float(PRIOR.variance))
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
        schedule, batches = stepped(optimiser, epochs), Batches(task, data)
        for _ in tqdm(range(epochs), desc=f"{data}, a network", disable=None):
            for x, y in batches:
                optimiser.zero_grad()
                (cross_entropy(net(x), y) + decay * sum(p.square().sum() for p in net.parameters())).backward()
                optimiser.step()
            schedule.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), path)
    return {name: value.to(task.x.device) for name, value in load_file(path).items()}
