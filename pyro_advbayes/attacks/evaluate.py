"""The accuracy of a classifier under attacks, and whether the attacks are reliable: :func:`evaluate`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_advbayes.attacks.base import Attack, BallAttack
from pyro_advbayes.attacks.geometry import flat, l2_size, linf_size
from pyro_advbayes.attacks.problem import ClassifierProblem, check_labels, check_outputs
from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int, warn

ZERO_SHARE = 0.01  # a larger share of inputs without a gradient makes gradient attacks unreliable


@dataclass(frozen=True)
class AttackResult:
    """
    The result of one attack.

    :ivar attack: its settings, in words.
    :ivar norm: norm of its ball; None without a ball, as is ``eps``.
    :ivar accuracy: share of inputs that are right after the attack.
    :ivar std_error: binomial standard error of the accuracy.
    :ivar success: share of the inputs right before the attack that are wrong after it.
    :ivar linf: mean size of the perturbations in the maximum norm.
    :ivar l2: mean size of the perturbations in the Euclidean norm.
    :ivar seconds: duration.
    """

    attack: str
    norm: str | None
    eps: float | None
    accuracy: float
    std_error: float
    success: float
    linf: float
    l2: float
    seconds: float


@dataclass(frozen=True)
class WorstCase:
    """The worst case of the attacks in one ball: an input counts as right if it is right when clean and after all ``attacks`` of them."""

    norm: str | None
    eps: float | None
    attacks: int
    accuracy: float
    std_error: float


@dataclass(frozen=True)
class Report:
    """
    The result of :func:`evaluate`. ``print(report)`` shows it as a table, :meth:`to_dict` gives plain values.

    :ivar num_inputs: N.
    :ivar already_wrong: number of inputs that were wrong before any attack. The accuracy of an attack counts them as they are after it; the
        worst case counts them as wrong.
    :ivar accuracy: accuracy on clean inputs.
    :ivar std_error: its standard error.
    :ivar results: one for each attack, in order.
    :ivar worst: one for each ball (norm and eps), and one for each attack without a ball.
    :ivar warnings: reasons why the accuracies may be too high.
    :ivar clean_right: ``[N]``, which inputs are right when clean.
    :ivar right: ``[attacks, N]``, which inputs are right after each attack.
    """

    num_inputs: int
    already_wrong: int
    accuracy: float
    std_error: float
    results: list[AttackResult]
    worst: list[WorstCase]
    warnings: list[str]
    clean_right: Tensor = field(repr=False)
    right: Tensor = field(repr=False)

    @property
    def worst_right(self) -> Tensor:
        """``[N]``, which inputs are right when clean and after every attack."""
        return self.clean_right & self.right.all(0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the tensors that have an entry for each input."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        return plain | {"results": [asdict(r) for r in self.results], "worst": [asdict(w) for w in self.worst]}

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("attack", "norm", "eps", "accuracy, %", "success, %", "mean linf", "mean l2")]
        lines.append(("(clean)", "", "", _percent(self.accuracy, self.std_error), "", "", ""))
        for r in self.results:
            sizes = f"{r.linf:.4g}", f"{r.l2:.4g}"
            accuracy = _percent(r.accuracy, r.std_error)
            lines.append((r.attack, r.norm or "", "" if r.eps is None else f"{r.eps:g}", accuracy, f"{100 * r.success:.1f}", *sizes))
        for w in self.worst:
            if w.attacks > 1:
                lines.append((f"(worst of {w.attacks})", w.norm or "", f"{w.eps:g}", _percent(w.accuracy, w.std_error), "", "", ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        table = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))) for line in lines
        ]
        wrong = f"{self.num_inputs} inputs, {self.already_wrong} of them wrong before any attack"
        return "\n".join([*table, wrong, *(f"warning: {text}" for text in self.warnings)])


@checked
def evaluate(
    classifier: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, attacks: Sequence[Attack], batch_size: int | None = None
) -> Report:
    """
    Runs several attacks on a classifier, and checks whether they are reliable.

    It warns (``UserWarning``, and in the report) of a classifier that is random, of one that gives probabilities in place of logits, of an
    attacked loss whose gradient is exactly 0 at more than 1 % of the inputs that are right, and of a gradient-free attack that is stronger
    than all gradient attacks in the same ball. A progress bar runs on a terminal.

    :param classifier: inputs ``[N, ...]`` -> logits ``[N, K]``, as for :class:`Attack`.
    :param x: clean inputs ``[N, ...]``.
    :param y: true labels ``[N]``.
    :param attacks: untargeted attacks.
    :param int batch_size: number of inputs that are attacked together; by default all.
    :raises ValueError: if there are no attacks, or targeted ones, or the classifier gives NaN for an input, clean or attacked.
    """
    attacks = list(attacks)
    if not attacks:
        raise ValueError("attacks must be one or more attacks, such as [PGD(eps=0.1)]")
    if any(attack.targeted for attack in attacks):
        raise ValueError("evaluate counts what stays right: call a targeted attack by itself, with its targets")
    if batch_size is not None:
        check_int(batch_size, "batch_size", 1)
    for attack in attacks:
        x, y = attack.check(classifier, x, y)
    size = batch_size or len(x)
    batches = list(zip(x.split(size), y.split(size), strict=True))
    with tqdm(total=len(batches) * (len(attacks) + 1), desc="attacks", disable=None) as bar:
        clean = _right(classifier, batches)
        found = _doubts(classifier, batches, attacks)
        bar.update(len(batches))
        results, right = [], []
        for attack in attacks:
            bar.set_description(type(attack).__name__)
            result, after = _attack(attack, classifier, batches, clean, bar)
            results.append(result)
            right.append(after)
    found += _masked(attacks, results)
    for text in found:
        warn(text)
    wrong = int((~clean).sum())
    return Report(len(x), wrong, *_share(clean), results, _worst(attacks, right, clean), found, clean, torch.stack(right))


Batches = list[tuple[Tensor, Tensor]]


def _right(classifier: Callable, batches: Batches) -> Tensor:
    right = []
    for x, y in batches:
        with torch.no_grad():
            outputs = classifier(x)
        check_outputs(outputs, len(x))
        check_labels(y, outputs.shape[-1])
        right.append(outputs.argmax(-1) == y)
    return torch.cat(right)


def _attack(attack: Attack, classifier: Callable, batches: Batches, clean: Tensor, bar: tqdm) -> tuple[AttackResult, Tensor]:
    start = time.perf_counter()
    right, linf, l2 = [], [], []
    for x, y in batches:
        attacked = attack(classifier, x, y)
        right.append(_right(classifier, [(attacked, y)]))
        linf.append(linf_size(attacked - x))
        l2.append(l2_size(attacked - x))
        bar.update()
    after = torch.cat(right)
    success = float((clean & ~after).sum()) / max(1, int(clean.sum()))
    mean_linf, mean_l2 = (float(torch.cat(part).double().mean()) for part in (linf, l2))
    return AttackResult(repr(attack), *_ball(attack), *_share(after), success, mean_linf, mean_l2, time.perf_counter() - start), after


def _doubts(classifier: Callable, batches: Batches, attacks: Sequence[Attack]) -> list[str]:
    """Reasons why attacks may be too weak, found on clean inputs."""
    found = []
    with torch.no_grad():
        once, again = (torch.cat([classifier(x) for x, _ in batches]) for _ in range(2))
    rounding = torch.finfo(once.dtype).eps ** 0.5
    if not torch.allclose(once, again, rtol=rounding, atol=rounding, equal_nan=True):
        found.append(
            "the classifier is random: the same inputs gave different outputs. The gradient of one call is noise, and accuracies change "
            "from call to call: give attacks eot=10 or more, or attack a posterior of fixed draws"
        )
    total = once.sum(-1)
    if bool((once >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-3):
        found.append(
            "the classifier's outputs look like probabilities, but are used as logits: losses are then flat, and attacks weak. Give "
            "logits, or the logarithm of the probabilities"
        )
    losses = {(a.loss, a.objective) for a in attacks if a.uses_gradient and "loss" in {f.name for f in fields(a)}}
    for loss, objective in sorted(losses):
        zeros, count = 0, 0
        for x, y in batches:
            _, gradient, wrong = ClassifierProblem(classifier, y, loss, objective, targeted=False, eot=1).climb(x)
            right = ~wrong  # at inputs that are wrong the loss may be at its maximum
            zeros += int(((flat(gradient) == 0).all(1) & right).sum())
            count += int(right.sum())
        if zeros > ZERO_SHARE * count:
            found.append(
                f"the gradient of the loss {loss!r} ({objective}) is exactly zero at {zeros} of {count} inputs that are right, so that no "
                "gradient attack can start there: predictions are too confident for the arithmetic. Try loss='margin'"
                f"{' or ' + repr('dlr') if once.shape[-1] > 2 else ''}, and a gradient-free attack"
            )
    return found


def _masked(attacks: Sequence[Attack], results: Sequence[AttackResult]) -> list[str]:
    """Warnings of balls in which a gradient-free attack is the strongest."""
    found = []
    for ball in dict.fromkeys(_ball(attack) for attack in attacks if isinstance(attack, BallAttack)):
        inside = [(a, r) for a, r in zip(attacks, results, strict=True) if isinstance(a, BallAttack) and _ball(a) == ball]
        following = [r.accuracy for a, r in inside if a.uses_gradient]
        for attack, result in inside:
            if not attack.uses_gradient and following and result.accuracy < min(following):
                found.append(
                    f"{result.attack}, which uses no gradient, leaves {100 * result.accuracy:.1f} % right, and the best gradient attack in "
                    f"its ball {100 * min(following):.1f} %: gradients are masked, or the gradient attacks have too few steps or restarts"
                )
    return found


def _worst(attacks: Sequence[Attack], right: Sequence[Tensor], clean: Tensor) -> list[WorstCase]:
    balls: dict[Any, list[int]] = {}
    for i, attack in enumerate(attacks):
        balls.setdefault(_ball(attack) if isinstance(attack, BallAttack) else i, []).append(i)
    cases = []
    for members in balls.values():
        stays = clean & torch.stack([right[i] for i in members]).all(0)
        cases.append(WorstCase(*_ball(attacks[members[0]]), len(members), *_share(stays)))
    return cases


def _ball(attack: Attack) -> tuple[str | None, float | None]:
    return (attack.norm, attack.eps) if isinstance(attack, BallAttack) else (None, None)


def _share(right: Tensor) -> tuple[float, float]:
    share = float(right.double().mean())
    return share, math.sqrt(share * (1 - share) / len(right))


def _percent(share: float, std_error: float) -> str:
    return f"{100 * share:.1f} ± {100 * std_error:.1f}"
