"""Why a model fails on minibatches, found in what its runs did before they failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from pyro.poutine.messenger import Messenger

from pyro_advbayes.handlers import in_a_line, local_latent
from pyro_advbayes.kinds import Node, plate_of
from pyro_advbayes.model.batches import in_words
from pyro_advbayes.model.program import Call, run
from pyro_advbayes.model.refusals import Mismatch, not_given, original


class Drawn(ValueError):
    """A refusal of a latent site that the user may have meant to observe."""


@contextlib.contextmanager
def naming_what_is_absent(model: Callable, call: Call) -> Iterator[None]:
    """Within it, a refusal of a latent site names an argument that the call leaves out, in which the site may be observed."""
    try:
        yield
    except Drawn as error:
        absent = not_given(model, *call)
        hint = f". Argument {absent[0]} is not given: if the site is what it observes, give it" if absent else ""
        raise ValueError(f"{error}{hint}") from error.__cause__


class Witness(Messenger):
    """Notes plates and latent sites in the order of the run, also of a run that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.plates: dict[str, int] = {}
        self.own: list[tuple[str, int, int]] = []
        self.latents: dict[str, dict[str, int]] = {}

    def _pyro_sample(self, msg: Node) -> None:
        sizes = {frame.name: frame.size for frame in msg["cond_indep_stack"]}
        plate = plate_of(msg)
        if plate is not None:
            batch = plate.size if plate.subsample_size is None else plate.subsample_size
            sizes[msg["name"]] = batch
            if batch != plate.size:
                self.own.append((msg["name"], batch, plate.size))
        elif not msg["is_observed"]:
            self.latents[msg["name"]] = sizes
        self.plates.update(sizes)


def witnessed(model: Callable, call: Call) -> Witness:
    """What a run of a model does, as far as it comes."""
    witness = Witness()
    with contextlib.suppress(Exception), torch.no_grad():
        run(model, call, None, witness)
    return witness


def explain(error: Exception, seen: list[Witness], rows: tuple[int, int], lengths: Mapping[str, int]) -> None:
    """
    Finds in two runs why a model fails on minibatches; returns if they do not tell.

    :param seen: the runs, on ``rows`` of the data.
    :raises ValueError: naming the plate, site or arguments.
    """
    first, second = seen
    for plate, batch, size in first.own + second.own:
        raise scaled_twice(plate, batch, size) from original(error)
    for name, sizes in first.latents.items():
        for plate, size in sizes.items():
            if (size, second.latents.get(name, {}).get(plate)) == rows:
                raise Drawn(local_latent(name, plate)) from original(error)
    what = f"the model fails on minibatches of {rows[0]} and {rows[1]} rows: {in_a_line(error)}"
    for plate, size in first.plates.items():
        if size == second.plates.get(plate) and rows[0] != rows[1]:
            raise Mismatch(
                f"{what}. Plate {plate!r} has {size} rows in both",
                f"if it holds the data it must take its size from them, pyro.plate({plate!r}, len(x)), or subsample itself (and "
                "batch_size=None)",
            ) from original(error)
    if len(set(lengths.values())) > 1:
        raise Mismatch(
            f"{what}. {in_words(lengths)}", "the arguments that hold data must be equally long (batch_args= names them)"
        ) from original(error)


def explain_plate(error: Exception) -> None:
    """:raises ValueError: if a distribution does not have a plate's size along the plate's dimension."""
    if "inside plate" in str(error):
        raise Mismatch(
            in_a_line(error),
            "the last dimension of a distribution's batch is the rows of the plate; .to_event(1) makes the outputs of a row one event, "
            ".squeeze(-1) drops a dimension of 1",
        ) from original(error)


def scaled_twice(plate: str, batch: int, size: int) -> ValueError:
    """The error for minibatches of a model that subsamples itself."""
    return ValueError(
        f"plate {plate!r} subsamples itself ({batch} of {size} rows): cut into minibatches as well it would be scaled twice. "
        "Drop batch_size, or the plate's subsample"
    )
