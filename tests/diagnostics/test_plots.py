from __future__ import annotations

import matplotlib
import pytest
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from pyro_advbayes.diagnostics import (
    LearningCurve,
    RegressionCurve,
    accuracy_curve,
    draw_quality,
    gaussian_intervals,
    gradient_norms,
    interval_calibration,
    plot_accuracy_curves,
    plot_accuracy_robustness,
    plot_draw_curves,
    plot_draw_quality,
    plot_gradient_norms,
    plot_interval_calibration,
    plot_learning_curves,
    plot_reliability,
    plot_retained_accuracy,
    plot_scores,
    plot_uncertainty_map,
    predictive_entropy,
    reliability,
    retained_accuracy,
)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def predictions(sharpness: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(300, 4).mul(sharpness).softmax(-1), torch.randint(4, (300,))


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_reliability_diagram_shows_the_bins_it_is_given():
    probs, labels = predictions(2.0)
    bins = reliability(probs.requires_grad_(), labels)
    ax = plot_reliability(bins, "SGLD")
    diagonal, line = ax.lines
    assert np.allclose(diagonal.get_xdata(), diagonal.get_ydata())
    full = bins.count > 0
    assert np.allclose(line.get_xdata(), bins.confidence[full]) and np.allclose(line.get_ydata(), bins.accuracy[full])
    assert 0 < full.sum() < 15
    assert legend(ax) == [f"SGLD (ECE {bins.ece:.3f})"]
    sizes = torch.as_tensor(ax.collections[0].get_sizes())
    assert sizes.argmax() == bins.count[full].argmax() and sizes.argmin() == bins.count[full].argmin()


def test_diagrams_can_be_compared_on_given_axes():
    _, ax = plt.subplots()
    assert plot_reliability(reliability(*predictions(1.0)), "a", ax=ax) is ax
    plot_reliability(reliability(*predictions(3.0)), "b", ax=ax)
    assert len(ax.lines) == 3  # one diagonal
    assert [text[0] for text in legend(ax)] == ["a", "b"]
    assert len(plt.get_fignums()) == 1


def test_histograms_are_densities_over_the_same_bins():
    scores = {name: predictive_entropy(predictions(s)[0]) for name, s in [("digits", 5.0), ("letters", 1.0)]}
    ax = plot_scores(scores, num_bins=20)
    outlines = [patch.get_xy() for patch in ax.patches]
    assert len(outlines) == 2
    edges = np.linspace(min(map(float, map(min, scores.values()))), max(map(float, map(max, scores.values()))), 21)
    for outline, score in zip(outlines, scores.values(), strict=True):
        wanted, _ = np.histogram(score, bins=edges, density=True)
        assert np.allclose(sorted(set(outline[:, 0])), edges)
        assert np.isclose(outline[:, 1].max(), wanted.max(), rtol=0.05)
        heights = outline[1:41:2, 1]
        assert np.isclose((heights * np.diff(edges)).sum(), 1)
    assert legend(ax) == [f"{name} (mean {score.mean():.3g})" for name, score in scores.items()]
    assert "nats" in ax.get_xlabel()


def test_scores_that_are_all_alike_are_still_drawn():
    for value in (0.0, 0.3, 2.0):
        ax = plot_scores({"sure": torch.full((10,), value)}, num_bins=7)
        width = 1e-6
        assert ax.patches[0].get_xy()[:, 1].max() == pytest.approx(7 / width, rel=1e-3)


@pytest.mark.parametrize(
    ("scores", "culprit"),
    [
        ({}, "at least one"),
        ({"digits": torch.ones(3), "letters": torch.ones(2, 2)}, "'letters'"),
        ({"digits": torch.tensor([float("nan")])}, "'digits'"),
        ({"digits": torch.ones(0)}, "'digits'"),
    ],
)
def test_scores_that_cannot_be_drawn_are_named(scores, culprit):
    with pytest.raises(ValueError, match=culprit):
        plot_scores(scores)
    assert not plt.get_fignums()


def test_accuracy_curves_are_drawn_as_they_are_with_their_ends_in_the_legend():
    curve = accuracy_curve([0.0, 0.1], (predictions(s)[0] for s in (3.0, 1.0)), torch.randint(4, (300,)))
    ax = plot_accuracy_curves({"BNN": curve, "MAP": curve}, xlabel="eps, linf")
    assert np.allclose(ax.lines[0].get_xydata(), torch.stack([curve.eps, curve.accuracy], -1))
    band = ax.collections[0].get_paths()[0].vertices
    assert np.isclose(band[:, 1].max(), (curve.accuracy + curve.error).max())
    assert legend(ax) == [f"{name} ({curve.accuracy[0]:.3f} to {curve.accuracy[1]:.3f})" for name in ("BNN", "MAP")]
    assert ax.get_xlabel() == "eps, linf"


def test_gradient_norms_are_drawn_with_what_chance_would_leave():
    norms = gradient_norms(torch.randn(100, 5, 3))
    ax = plot_gradient_norms({"HMC": norms})
    line, chance = ax.lines
    assert np.allclose(line.get_xydata(), torch.stack([norms.draws.double(), norms.l2.mean(-1)], -1))
    assert np.allclose(chance.get_ydata(), norms.l2_by_chance.mean(-1)) and ax.get_xscale() == ax.get_yscale() == "log"
    assert legend(ax) == [f"HMC ({norms.l2[0].mean():.2g} to {norms.l2[-1].mean():.2g})"]


def test_accuracy_and_robustness_are_points_with_their_correlation():
    accuracy = torch.tensor([0.8, 0.9, 1.0])
    ax = plot_accuracy_robustness({"HMC": (accuracy, accuracy / 2), "SGD": (accuracy, 1 - accuracy), "VI": (accuracy[:1], accuracy[:1])})
    assert [len(points.get_offsets()) for points in ax.collections] == [3, 3, 1]
    assert np.allclose(ax.collections[1].get_offsets(), torch.stack([accuracy, 1 - accuracy], -1))
    assert legend(ax) == ["HMC (r = 1.00, 3 points)", "SGD (r = -1.00, 3 points)", "VI"]


@pytest.mark.parametrize("plot", [plot_accuracy_curves, plot_gradient_norms, plot_accuracy_robustness])
def test_plots_of_nothing_are_refused(plot):
    with pytest.raises(ValueError, match="must name at least one"):
        plot({})


def test_points_without_a_partner_are_refused():
    with pytest.raises(ValueError, match=r"points\['HMC'\] must be two vectors of one length, not \[3\] and \[2\]"):
        plot_accuracy_robustness({"HMC": (torch.ones(3), torch.ones(2))})


def qualities(count: int) -> list:
    labels = torch.randint(4, (100,))
    hints = torch.nn.functional.one_hot(labels, 4)
    return [draw_quality((torch.randn(7, 100, 4) + epoch * hints).log_softmax(-1), labels) for epoch in range(1, count + 1)]


def test_the_accuracies_of_draws_are_drawn_as_they_are_with_the_ensemble_across():
    one, two = qualities(2)
    ax = plot_draw_quality({"plain": one, "adversarial": two})
    dots = [c for c in ax.collections if len(c.get_offsets()) == 7]
    assert np.allclose(dots[1].get_offsets()[:, 1], two.accuracy)
    lines = [c for c in ax.collections if c not in dots]
    assert lines[0].get_segments()[0][0, 1] == pytest.approx(one.ensembled.value)
    assert legend(ax)[0] == f"plain ({one.lowest:.3f} to {one.highest:.3f}, together {one.ensembled.value:.3f})"
    with pytest.raises(ValueError, match="at least one posterior"):
        plot_draw_quality({})


def test_the_spread_of_draws_in_training_is_a_band_around_the_ensemble():
    run = qualities(3)
    ax = plot_draw_curves({"plain": run})
    (line,), (band,) = ax.lines, ax.collections
    assert np.allclose(line.get_xdata(), [1, 2, 3]) and np.allclose(line.get_ydata(), [q.ensembled.value for q in run])
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(min(q.lowest for q in run)) and heights.max() == pytest.approx(max(q.highest for q in run))
    for wrong in ({}, {"plain": []}):
        with pytest.raises(ValueError, match="at least one run"):
            plot_draw_curves(wrong)


def test_retained_accuracy_is_drawn_as_it_is():
    probs, labels = predictions(2.0)
    curve = retained_accuracy(probs, labels)
    ax = plot_retained_accuracy({"plain": curve})
    assert np.allclose(ax.lines[0].get_xdata(), curve.share) and np.allclose(ax.lines[0].get_ydata(), curve.accuracy)
    assert legend(ax) == [f"plain ({curve.accuracy[0]:.3f} to {curve.accuracy[-1]:.3f})"]
    with pytest.raises(ValueError, match="at least one posterior"):
        plot_retained_accuracy({})


def test_a_map_shows_the_score_of_an_input_at_its_place():
    x1, x2 = torch.linspace(-1, 1, 3), torch.linspace(0, 3, 4)
    inputs = torch.cartesian_prod(x1, x2)
    scores = (10 * inputs[:, 0] + inputs[:, 1]).requires_grad_()
    ax = plot_uncertainty_map(scores, x1, x2, examples=(inputs[:2], torch.tensor([0, 1])), limits=(-20.0, 20.0))
    mesh, points = ax.collections
    assert np.allclose(mesh.get_array().reshape(4, 3), [[10 * a + b for a in x1] for b in x2])  # rows upwards, columns to the right
    corners = mesh.get_coordinates()  # of the cells around the inputs
    assert np.allclose(corners[0, 0], [-1.5, -0.5]) and np.allclose(corners[-1, -1], [1.5, 3.5])
    assert mesh.get_clim() == (-20.0, 20.0) and np.allclose(points.get_offsets(), inputs[:2])
    assert ax.get_title() == "mean 1.500"
    _, second = plt.subplots()
    assert plot_uncertainty_map(scores, x1, x2, ax=second) is second and second.collections[0].get_clim() == (-10.0, 13.0)


def test_scores_that_do_not_fill_a_map_are_refused():
    axis = torch.linspace(0, 1, 3)
    for scores in (torch.zeros(8), torch.zeros(3, 3), torch.full((9,), torch.nan)):
        with pytest.raises(ValueError, match=r"scores must be 9 finite numbers"):
            plot_uncertainty_map(scores, axis, axis)


def test_an_interval_calibration_plot_shows_levels_coverages_and_their_errors():
    y = torch.randn(400)
    laws = {name: interval_calibration(gaussian_intervals(torch.zeros(400), scale), y) for name, scale in (("right", 1.0), ("sure", 0.5))}
    ax = plot_interval_calibration(laws)
    diagonal, *lines = ax.lines
    assert np.allclose(diagonal.get_xdata(), diagonal.get_ydata()) and len(lines) == 2
    for line, band, found in zip(lines, ax.collections, laws.values(), strict=True):
        assert np.allclose(line.get_xdata(), found.levels) and np.allclose(line.get_ydata(), found.coverage)
        error = (found.coverage * (1 - found.coverage) / 400).sqrt()
        top = band.get_paths()[0].vertices[:, 1].max()
        assert top == pytest.approx((found.coverage + error).max().item())
    assert legend(ax) == [f"{n} (ECPE {c.ecpe:.3f}, CWCE {c.cwce:.2f} %, EPIW {c.epiw:.3g})" for n, c in laws.items()]
    assert laws["sure"].ecpe > 0.1 > laws["right"].ecpe
    with pytest.raises(ValueError, match="calibrations must name at least one predictive law"):
        plot_interval_calibration({})


def test_learning_curves_show_the_score_that_is_asked_for():
    labels, values = torch.tensor([10, 20, 30]), torch.tensor([[0.5, 0.4, 0.2], [0.7, 0.6, 0.2]])
    curve = RegressionCurve(labels, values, -values)
    for score, name, sign in (("rmse", "RMSE", 1), ("log_density", "log predictive density [nats]", -1)):
        ax = plot_learning_curves({"variance": curve}, score=score)
        (line,) = ax.lines
        assert np.allclose(line.get_xdata(), labels) and np.allclose(line.get_ydata(), [sign * 0.6, sign * 0.5, sign * 0.2])
        assert ax.get_ylabel() == name and legend(ax) == [f"variance (to {sign * 0.2:.3f})"]
        top = ax.collections[0].get_paths()[0].vertices[:, 1].max()
        assert top == pytest.approx(sign * 0.6 + 0.1 if sign > 0 else -0.2)  # 0.6 +- 0.1: two repetitions that are 0.2 apart
    assert plot_learning_curves({"bald": LearningCurve(labels, values)}).get_ylabel() == "accuracy"
    with pytest.raises(ValueError, match=r"score='accuracy': curves\['variance'\] has rmse and log_density"):
        plot_learning_curves({"variance": curve})
