"""What predictions are worth, as functions of tensors.

Probabilities of ``K`` classes for ``N`` inputs are ``[N, K]`` for one prediction, ``[draws, N, K]`` for one per posterior
draw; where only their mean matters, either will do. Entropies are in nats. A score of uncertainty is ``[N]``, higher for
inputs that look less like the data; :func:`auroc`, :func:`aupr_out`, :func:`aupr_in` and :func:`fpr95` say how well it tells them apart.
"""

from pyro_advbayes.diagnostics.acquisition import LearningCurve, acquire, batch_bald
from pyro_advbayes.diagnostics.arviz import save_netcdf, to_inference_data
from pyro_advbayes.diagnostics.calibration import Reliability, accuracy, brier, ece, nll, reliability
from pyro_advbayes.diagnostics.draws import DrawQuality, RetainedAccuracy, draw_quality, retained_accuracy
from pyro_advbayes.diagnostics.ood import (
    AdversarialDetection,
    Detection,
    adversarial_detection,
    aupr_in,
    aupr_out,
    auroc,
    detection,
    fpr95,
    ood_detection,
)
from pyro_advbayes.diagnostics.plots import (
    plot_accuracy_curves,
    plot_accuracy_robustness,
    plot_draw_curves,
    plot_draw_quality,
    plot_gradient_norms,
    plot_learning_curves,
    plot_reliability,
    plot_retained_accuracy,
    plot_scores,
    plot_uncertainty_map,
)
from pyro_advbayes.diagnostics.robustness import (
    AccuracyCurve,
    Estimate,
    GradientNorms,
    accuracy_curve,
    accuracy_under_attack,
    gradient_norms,
    softmax_robustness,
)
from pyro_advbayes.diagnostics.two_sample import MMDTest, mmd_test, sliced_wasserstein
from pyro_advbayes.diagnostics.uncertainty import (
    expected_entropy,
    model_variance,
    mutual_information,
    predictive_entropy,
    variation_ratio,
    vote_variation_ratio,
)

__all__ = [
    "AccuracyCurve",
    "AdversarialDetection",
    "Detection",
    "DrawQuality",
    "Estimate",
    "GradientNorms",
    "LearningCurve",
    "MMDTest",
    "Reliability",
    "RetainedAccuracy",
    "accuracy",
    "accuracy_curve",
    "accuracy_under_attack",
    "acquire",
    "adversarial_detection",
    "aupr_in",
    "aupr_out",
    "auroc",
    "batch_bald",
    "brier",
    "detection",
    "draw_quality",
    "ece",
    "expected_entropy",
    "fpr95",
    "gradient_norms",
    "mmd_test",
    "model_variance",
    "mutual_information",
    "nll",
    "ood_detection",
    "plot_accuracy_curves",
    "plot_accuracy_robustness",
    "plot_draw_curves",
    "plot_draw_quality",
    "plot_gradient_norms",
    "plot_learning_curves",
    "plot_reliability",
    "plot_retained_accuracy",
    "plot_scores",
    "plot_uncertainty_map",
    "predictive_entropy",
    "reliability",
    "retained_accuracy",
    "save_netcdf",
    "sliced_wasserstein",
    "softmax_robustness",
    "to_inference_data",
    "variation_ratio",
    "vote_variation_ratio",
]
