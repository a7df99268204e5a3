"""Mutations of diagnostics: definitions, normalisations, signs."""

from __future__ import annotations

from tests.mutations.mutation import of

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
]
