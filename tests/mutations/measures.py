"""Mutations of diagnostics: definitions, normalisations, signs."""

from __future__ import annotations

from tests.mutations.mutation import of

REGRESSION = "diagnostics/test_regression.py"

MUTATIONS = [
    *of(
        "diagnostics/uncertainty.py",
        "diagnostics/test_uncertainty.py",
        ("mutual information: without the expected entropy", "(_entropy(p.mean(0)) - _entropy(p).mean(0))", "_entropy(p.mean(0))"),
        ("model variance: unbiased", "correction=0", "correction=1"),
        (
            "expected entropy: that of the mean",
            "like(_entropy(check_probs(probs, ranks=(3,))).mean(0), probs)",
            "like(_entropy(check_probs(probs, ranks=(3,)).mean(0)), probs)",
        ),
        ("variation ratio: the confidence", "mean.argmax(-1, keepdim=True), 0.0)", "mean.argmin(-1, keepdim=True), 0.0)"),
        ("votes: for the second class", "votes = p.argmax(-1)", "votes = p.topk(2).indices[..., 1]"),
        ("entropy in bits", "torch.special.entr(p).sum(-1)", "torch.special.entr(p).sum(-1) / 0.6931471805599453"),
    ),
    *of(
        "diagnostics/calibration.py",
        "diagnostics/test_calibration.py",
        ("Brier's score halved", "(mean - truth).square().sum(-1).mean().item()", "(mean - truth).square().sum(-1).mean().item() / 2"),
        ("negative log-likelihood: the sign", "nll_loss(mean.log()", "nll_loss(-mean.log()"),
        ("calibration error: bins weigh alike", "((gap * self.count).sum() / self.count.sum())", "gap.mean()"),
        ("calibration error: signed gaps", "(self.accuracy - self.confidence).abs()", "(self.accuracy - self.confidence)"),
        ("calibration: bins are closed on the left", "edges[1:-1].float())", "edges[1:-1].float(), right=True)"),
        (
            "accuracy of the least probable class",
            "mean.argmax(-1) == check_labels(labels, mean)",
            "mean.argmin(-1) == check_labels(labels, mean)",
        ),
    ),
    *of(
        "diagnostics/robustness.py",
        "diagnostics/test_robustness.py",
        ("robustness: the change itself", "Estimate(1 - change.mean().item(), error)", "Estimate(change.mean().item(), error)"),
        (
            "robustness: changes of all classes",
            "(clean - moved.to(clean.device)).abs().amax(-1)",
            "(clean - moved.to(clean.device)).abs().sum(-1)",
        ),
        ("robustness: the error of one input", "change.std().item() / math.sqrt(len(change))", "change.std().item()"),
        ("Wilson's interval: the middle", "0.25 / count**2) / (1 + 1 / count)", "0.25 / count**2)"),
        ("Wilson's interval: its width at 0", "share * (1 - share) / count + 0.25 / count**2", "share * (1 - share) / count"),
        ("gradients by chance", "(squares / count**2).sqrt()", "(squares / count).sqrt()"),
        ("gradients: the sum over draws", "mean = total / count", "mean = total"),
    ),
    *of(
        "diagnostics/ood.py",
        "diagnostics/test_ood.py",
        (
            "ROC: the kinds change places",
            "roc_auc_score(*_labelled(in_scores, out_scores))",
            "roc_auc_score(*_labelled(out_scores, in_scores))",
        ),
        ("AUPR-: the score's sign", "average_precision_score(1 - labels, -scores)", "average_precision_score(1 - labels, scores)"),
        ("FPR: 90 % pass", "-(-95 * len(own) // 100)", "-(-90 * len(own) // 100)"),
        ("FPR: on the wrong side", "<= threshold)", "> threshold)"),
        ("missed attacks are those that hit", '"missed": ~hit', '"missed": hit'),
    ),
    *of(
        "diagnostics/draws.py",
        "diagnostics/test_draws.py",
        ("retained: the uncertain ones", "inside, at_edge = score < edge, score == edge", "inside, at_edge = score > edge, score == edge"),
        ("retained: all at the edge", "fits * right[at_edge].sum()", "right[at_edge].sum()"),
        ("the lowest draw is the highest", "return self.accuracy.min().item()", "return self.accuracy.max().item()"),
    ),
    *of(
        "diagnostics/two_sample.py",
        "diagnostics/test_two_sample.py",
        (
            "sliced Wasserstein: without the root of d",
            "directions /= directions.norm(dim=0) / dim**0.5",
            "directions /= directions.norm(dim=0)",
        ),
        ("sliced Wasserstein: squared", "return float((a - b).abs().mean())", "return float((a - b).square().mean())"),
        (
            "MMD: the kernel's width",
            ".clamp_min(torch.finfo(points.dtype).tiny) / 2).exp()",
            ".clamp_min(torch.finfo(points.dtype).tiny)).exp()",
        ),
        ("MMD: biased", "xx / (n * (n - 1))", "xx / (n * n)"),
        ("MMD: the cross term once", "- 2 * (total - xx) / (n * m)", "- (total - xx) / (n * m)"),
        ("p-value: of the other side", "values >= values[0] - 1e-9", "values <= values[0] + 1e-9"),
    ),
    *of(
        "diagnostics/acquisition.py",
        "diagnostics/test_acquisition.py",
        (
            "acquisition: the lowest scores",
            "round(decimals=DECIMALS).sort(descending=True, stable=True)",
            "round(decimals=DECIMALS).sort(descending=False, stable=True)",
        ),
        ("BatchBALD: without what draws are unsure of", "score = (entropy - conditional)", "score = (entropy - 0 * conditional)"),
        ("learning curve: the deviation of one repetition", ".div(len(scores)).sqrt()", ".sqrt()"),
    ),
    *of(
        "diagnostics/regression.py",
        (
            f"{REGRESSION}::test_rmse_and_r2_by_hand_and_by_scikit_learn",
            f"{REGRESSION}::test_the_nll_of_draws_is_that_of_their_mixture_or_of_the_normal_with_its_moments",
            f"{REGRESSION}::test_the_log_predictive_density_is_the_log_of_the_mean_density",
        ),
        ("RMSE: squared", "sub(y).square().mean().sqrt().item()", "sub(y).square().mean().item()"),
        ("R2: of the unbiased variance", "variance = y.var(correction=0)", "variance = y.var(correction=1)"),
        ("scores: of the first draw", "return mean.mean(0) if mean.dim() == 2 else mean", "return mean[0] if mean.dim() == 2 else mean"),
        (
            "moments: without the spread of the means",
            "(scale.square().mean(0) + mean.var(0, correction=0)).sqrt()",
            "scale.square().mean(0).sqrt()",
        ),
        ("moments: the mean scale", "scale.square().mean(0) + mean.var", "scale.mean(0).square() + mean.var"),
        ("density: the sum over draws", "log_probs.logsumexp(0) - math.log(len(log_probs))", "log_probs.logsumexp(0)"),
        ("Normal density: its constant", "- scale.log() - HALF_LOG_TWO_PI", "- scale.log()"),
    ),
    *of(
        "diagnostics/regression.py",
        (
            f"{REGRESSION}::test_crps_by_hand",
            f"{REGRESSION}::test_crps_by_sorting_is_its_double_sum_and_the_integral_of_its_definition",
            f"{REGRESSION}::test_the_crps_of_a_mixture_is_the_integral_of_its_definition",
            f"{REGRESSION}::test_the_crps_of_a_normal_is_the_known_value_and_the_integral",
        ),
        ("CRPS: fair and plain change places", "count - 1 if fair else count", "count if fair else count - 1"),
        ("CRPS: ranks begin at 1", "(2 * rank - (count - 1)) @ error", "(2 * rank - count) @ error"),
        ("mixture's CRPS: draws with themselves are left out", "scale.sum(0) / math.sqrt(math.pi)", "0.0 * scale.sum(0)"),
        ("mixture's CRPS: scales add up", "(scale[i + 1 :].square() + scale[i].square()).sqrt()", "(scale[i + 1 :] + scale[i])"),
        ("E|Normal|: without the tail", "* (-0.5 * z.square()).exp()\n\n\ndef _mixture", "\n\n\ndef _mixture"),
    ),
    *of(
        "diagnostics/regression.py",
        (
            f"{REGRESSION}::test_central_intervals_of_draws_by_hand",
            f"{REGRESSION}::test_the_intervals_of_a_normal_are_its_quantiles",
            f"{REGRESSION}::test_the_intervals_of_a_mixture_hold_their_level_exactly",
            f"{REGRESSION}::test_coverage_counts_the_ends_and_each_level_by_itself",
        ),
        ("intervals: torch's quantiles", "(p * (count + 1) - 1).clamp(0, count - 1)", "(p * (count - 1)).clamp(0, count - 1)"),
        ("intervals: one-sided", "torch.special.ndtri((1 + nominal) / 2)[:, None]", "torch.special.ndtri(nominal)[:, None]"),
        ("intervals: quantiles of a mixture are rough", "EXACT = 1e-10", "EXACT = 1e-3"),
        ("coverage: without the lower end", "(intervals.lower <= y)", "(intervals.lower < y)"),
        ("coverage: without the upper end", "(y <= intervals.upper)", "(y < intervals.upper)"),
        ("width: of levels", "return (intervals.upper - intervals.lower).mean(-1)", "return (intervals.upper - intervals.lower).mean(0)"),
    ),
    *of(
        "diagnostics/regression.py",
        f"{REGRESSION}::test_calibration_errors_by_hand",
        ("ECPE: the largest gap", "return self._gap().mean().item()", "return self._gap().max().item()"),
        ("MCPE: the mean gap", "return self._gap().max().item()", "return self._gap().mean().item()"),
        ("CWCE: levels weigh alike", "((self.levels * self._gap()).sum() / self.levels.sum())", "self._gap().mean()"),
        ("R-CWCE: what is explained", "return (1 - r2) * self.cwce", "return r2 * self.cwce"),
        (
            "calibration of intervals: signed gaps",
            "(self.coverage.double() - self.levels.double()).abs()",
            "(self.coverage.double() - self.levels.double())",
        ),
    ),
    *of(
        "diagnostics/regression.py",
        (
            f"{REGRESSION}::test_regression_scores_are_the_single_ones_with_their_errors",
            f"{REGRESSION}::test_bootstrap_errors_are_those_of_a_mean",
            f"{REGRESSION}::test_r2_of_large_targets_keeps_its_digits",
        ),
        ("bootstrap: half of the rows", "torch.randint(len(y), (len(y),)", "torch.randint(len(y), (len(y) // 2,)"),
        ("bootstrap: rows of the first half", "torch.randint(len(y), (len(y),)", "torch.randint(len(y) // 2, (len(y),)"),
        ("bootstrap: the error of the mean of resamples", ".all(-1)].std(0)", ".all(-1)].std(0) / math.sqrt(num_resamples)"),
        ("scores: targets are not centred", "center = y.mean()", "center = 0.0 * y.mean()"),
        ("scores: R-CWCE is CWCE", "unexplained * cwce)", "cwce)"),
    ),
]
