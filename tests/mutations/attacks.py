"""Mutations of attacks: signs, step sizes, projections, norms, what is raised, what is best."""

from __future__ import annotations

from tests.mutations.mutation import of

STEPS, SEARCH = "attacks/test_steps.py", "attacks/test_carlini_wagner.py::test_the_search_is_the_published_one_by_adam_and_autograd"
ONE_STEP = "attacks/test_carlini_wagner.py::test_the_one_step_form_is_the_published_one_also_where_some_networks_give_no_gradient"
SQUARE = (
    "attacks/test_square.py::test_windows_are_squares_inside_every_image_at_different_places",
    "attacks/test_square.py::test_entries_are_as_many_in_every_row",
    "attacks/test_square.py::test_windows_shrink_as_they_do_in_the_authors_code",
)
APGD = f"{STEPS}::test_apgd_steps_with_momentum_and_begins_anew_at_the_best_point_after_a_checkpoint"
HALVING = f"{STEPS}::test_step_sizes_are_halved_one_by_one_where_little_rose_or_nothing_changed"
ADT = "attacks/test_distribution.py::test_the"
ADT_SURFACE = "attacks/test_distribution.py::test_densities_of_rounded_draws_are_finite_up_to_the_surface"

MUTATIONS = [
    *of(
        "attacks/carlini_wagner.py",
        SEARCH,
        ("Carlini-Wagner: the nearest in another norm", "flat(delta).square().sum(1)", "flat(delta).abs().sum(1)"),
        ("Carlini-Wagner: the distance is no part of the objective", "slope = 2 * delta - rows", "slope = 0 * delta - rows"),
        ("Carlini-Wagner: the slope of the distance halved", "slope = 2 * delta", "slope = delta"),
        ("Carlini-Wagner: no hinge", "rows(c * ~hit, gradient)", "rows(c, gradient)"),
        ("Carlini-Wagner: the margin is lowered", "rows(c * ~hit, gradient) * gradient", "rows(c * ~hit, gradient) * -gradient"),
        (
            "Carlini-Wagner: the confidence is ignored",
            "hit = success & (margin >= self.confidence) if self.confidence else success",
            "hit = success",
        ),
        ("Carlini-Wagner: c grows twofold", "c * 10)", "c * 2)"),
        ("Carlini-Wagner: bisection ends at the upper bound", "(low + high) / 2, c", "high, c"),
        ("Carlini-Wagner: Adam's mean is not corrected", "self.step_size * mean / (1 - DECAYS[0] ** t)", "self.step_size * mean"),
        ("Carlini-Wagner: Adam's square is not corrected", "(square / (1 - DECAYS[1] ** t)).sqrt()", "square.sqrt()"),
        ("Carlini-Wagner: Adam's decay", "DECAYS = 0.9, 0.999", "DECAYS = 0.9, 0.99"),
    ),
    *of(
        "attacks/carlini_wagner.py",
        ONE_STEP,
        (
            "one-step Carlini-Wagner: upwards",
            "region.center - check_gradient(total / count)",
            "region.center + check_gradient(total / count)",
        ),
        ("one-step Carlini-Wagner: a step of 1", "check_gradient(total / count) / math.sqrt(2)", "check_gradient(total / count)"),
        ("one-step Carlini-Wagner: no hinge", "signed.sum((-2, -1)).clamp_min(0)", "signed.sum((-2, -1))"),
        ("one-step Carlini-Wagner: the label's sign", "torch.where(label, logits, -logits)", "torch.where(label, -logits, logits)"),
    ),
    *of(
        "attacks/mim.py",
        f"{STEPS}::test_mim_forgets_earlier_gradients_at_its_decay",
        ("MIM: no decay", "self.decay * total + gradient", "total + gradient"),
        ("MIM: the decay weighs the new gradient", "self.decay * total + gradient", "total + self.decay * gradient"),
        ("MIM: gradients are not made of size 1", "gradient / rows(size, gradient)", "gradient"),
        ("MIM: size in the Euclidean norm", "flat(gradient).abs().sum(1)", "flat(gradient).norm(dim=1)"),
    ),
    *of(
        "attacks/mim.py",
        f"{STEPS}::test_mim_adds_up_gradients_of_size_1",
        ("MIM: default step", "self.step_size or self.eps / self.steps", "self.step_size or self.eps"),
    ),
    *of(
        "attacks/pgd.py",
        f"{STEPS}::test_iterated_steps_are_projected_on_the_ball",
        ("PGD: default step", "2.5 * self.eps / self.steps", "2.0 * self.eps / self.steps"),
    ),
    *of(
        "attacks/ifgsm.py",
        f"{STEPS}::test_iterated_steps_are_projected_on_the_ball",
        ("IFGSM: default step", "self.eps / self.steps)", "2.5 * self.eps / self.steps)"),
    ),
    *of(
        "attacks/fgsm.py",
        f"{STEPS}::test_fgsm_is_its_formula",
        ("FGSM: half a step", "step_size=self.eps)", "step_size=0.5 * self.eps)"),
    ),
    *of(
        "attacks/base.py",
        f"{STEPS}::test_iterated_steps_are_projected_on_the_ball",
        (
            "ascent without projection",
            "x = ball.restrict(x + step_size * ball.steepest(problem.gradient(x).gradient))",
            "x = x + step_size * ball.steepest(problem.gradient(x).gradient)",
        ),
        ("descent", "ball.restrict(x + step_size *", "ball.restrict(x - step_size *"),
    ),
    *of(
        "attacks/base.py",
        "attacks/test_attacks.py::test_a_success_is_better_than_a_higher_loss",
        (
            "the best by its loss alone",
            "(success & ~self._success) | ((success == self._success) & (loss > self._loss))",
            "loss > self._loss",
        ),
        ("the best forgets its success", "self._success | success", "self._success & success"),
    ),
    *of(
        "attacks/wrm.py",
        f"{STEPS}::test_wrm_climbs_the_loss_less_the_price_of_the_distance",
        ("WRM: the price of the distance doubled", "- (x - clean)", "- 2 * (x - clean)"),
        ("WRM: steps begin at 1", "math.sqrt(t + 2)", "math.sqrt(t + 1)"),
        ("WRM: the first step", "clean + self.strength * problem", "clean + problem"),
    ),
    *of(
        "attacks/distribution.py",
        f"{ADT}_fit_is_its_formula_by_autograd_with_the_same_noise",
        ("distribution: the slope of tanh", "a.square().neg_().add_(1).mul_(gradient)", "a.abs().neg_().add_(1).mul_(gradient)"),
        ("distribution: the entropy pushes outwards", "sub_(a, alpha=2 * weight)", "add_(a, alpha=2 * weight)"),
        ("distribution: the entropy's part of mu halved", "alpha=2 * weight", "alpha=weight"),
        ("distribution: the entropy of one draw for all", "self.num_samples * weight / scale", "weight / scale"),
        ("distribution: the entropy's weight is not per number", "self.entropy_weight / x[0].numel()", "self.entropy_weight"),
        ("distribution: rho without the noise", "of_scale.addcmul_(slope, noise)", "of_scale.add_(slope)"),
        ("distribution: clipped numbers count", " * (inside == wide)", ""),
        ("distribution: softplus has no slope", "of_rho.addcmul_(of_scale, rho.sigmoid())", "of_rho.add_(of_scale)"),
        ("distribution: gradients always add up", "if not self.accumulate:", "if False:"),
        ("distribution: gradients never add up", "if not self.accumulate:", "if True:"),
        (
            "distribution: the mean is returned",
            "F.softplus(rho), torch.randn_like(mu)).tanh()",
            "F.softplus(rho), torch.zeros_like(mu)).tanh()",
        ),
    ),
    *of(
        "attacks/distribution.py",
        (f"{ADT}_density_integrates_to_one_over_the_ball", ADT_SURFACE),
        ("distribution: the density without the radius", "math.log(self._eps) + 2 *", "2 *"),
        (
            "distribution: the density with tanh's slope once",
            "+ 2 * (math.log(2) - x - F.softplus(-2 * x))",
            "+ (math.log(2) - x - F.softplus(-2 * x))",
        ),
        ("distribution: no density on the surface", ".clamp(-most, most).atanh()", ".atanh()"),
    ),
    *of(
        "attacks/distribution.py",
        "attacks/test_distribution.py::test_a_law_whose_scale_shrinks_for_ever_stays_a_law",
        ("distribution: rho falls without end", ".clamp_min(LEAST_RHO)", ""),
        ("distribution: a start of any width", "max(first, LEAST_RHO)", "first"),
    ),
    *of(
        "attacks/apgd.py",
        APGD,
        ("APGD: the first step", "_Schedule(loss, 2 * self.eps", "_Schedule(loss, self.eps"),
        ("APGD: momentum", "MOMENTUM = 0.75", "MOMENTUM = 0.5"),
        ("APGD: momentum away from the last point", "(1 - MOMENTUM) * (x - previous)", "(1 - MOMENTUM) * (previous - x)"),
        ("APGD: no return to the best point", "torch.where(there, top.x, x), torch.where(there, top.x, previous)", "x, previous"),
    ),
    *of(
        "attacks/apgd.py",
        HALVING,
        ("APGD: steps are quartered", "self.step_size / 2, self", "self.step_size / 4, self"),
        ("APGD: progress", "PROGRESS = 0.75", "PROGRESS = 0.4"),
        ("APGD: halved at two checkpoints in a row", "~self._halved & (top <= self._top)", "top <= self._top"),
    ),
    *of(
        "attacks/apgd.py",
        f"{STEPS}::test_checkpoints_are_those_of_the_paper",
        ("APGD: the first checkpoint", "last, now = 0.0, 0.22", "last, now = 0.0, 0.2"),
        ("APGD: the last checkpoints", "now - last - 0.03, 0.06)", "now - last - 0.03, 0.03)"),
    ),
    *of(
        "attacks/geometry.py",
        "attacks/test_geometry.py",
        ("a box twice as wide", "(center - eps, center + eps)", "(center - eps, center + 2 * eps)"),
        ("a box that leaves the range", "super(LinfBall, self).restrict(bound)", "bound"),
        (
            "a ball's points on half its radius",
            "rows(self.eps / size.clamp_min(self.eps), delta)",
            "rows(0.5 * self.eps / size.clamp_min(self.eps), delta)",
        ),
        ("a ball's points on its surface", "** (1 / dimensions)", "** 0"),
        ("a ball's points crowd at its middle", "** (1 / dimensions)", "** 1"),
        (
            "steps in the Euclidean norm are by the largest entry",
            "return gradient / rows(l2_size(gradient).clamp_min(1.0), gradient)",
            "return gradient",
        ),
    ),
    *of(
        "attacks/losses.py",
        "attacks/test_losses.py::test_each_loss_is_its_formula",
        ("DLR: over the second logit", "largest[..., 0] - largest[..., 2]", "largest[..., 0] - largest[..., 1]"),
        ("margin: the sign", "_largest_other(logits, y) - _of_label(logits, y)", "_of_label(logits, y) - _largest_other(logits, y)"),
        (
            "margin: the label is among the others",
            "logits.masked_fill(classes == y.unsqueeze(-1), -torch.inf).amax(-1)",
            "logits.amax(-1) + 0 * classes.sum()",
        ),
        ("cross-entropy: the sign", "return -_of_label(log_probs, y)", "return _of_label(log_probs, y)"),
    ),
    *of(
        "attacks/problem.py",
        "attacks/test_problem.py::test_gradients_of_a_posterior_are_those_of_a_loop_over_its_draws",
        ("a posterior: the sum of losses", "total / self._count, gradients / self._count", "total, gradients"),
        (
            "a posterior: draws weigh alike in the loss of the mean",
            "gradients.mul_(rows(old, gradient)).addcmul_(gradient, rows(new, gradient))",
            "gradients.add_(gradient).div_(2.0)",
        ),
        ("a posterior: the mean's normalisation", "math.log(self._count) - total, -gradients", "-total, -gradients"),
        (
            "a posterior: the gradient's sign",
            "math.log(self._count) - total, -gradients",
            "math.log(self._count) - total, gradients",
        ),
        ("an examined loss: its sign", "return loss * self._sign, self.succeeds(log_probs)", "return loss, self.succeeds(log_probs)"),
        ("an examined loss: the sum over draws", "loss = total / count if self._mean_loss", "loss = total if self._mean_loss"),
    ),
    *of(
        "attacks/problem.py",
        "attacks/test_attacks.py::test_targeted_attacks_reach_their_targets",
        ("targets are left", "-1.0 if targeted else 1.0", "1.0"),
        ("a target that is reached is no success", "return right if self.targeted else ~right", "return ~right"),
    ),
    *of(
        "attacks/feature.py",
        "attacks/test_feature.py::test_one_step_follows_the_gradient_of_the_mean_distance_over_draws",
        ("features: towards where they are", "1.0 if self.towards is None else -1.0", "-1.0 if self.towards is None else 1.0"),
        ("features: the distance, not its square", ".square().sum(1)", ".abs().sum(1)"),
    ),
    *of(
        "attacks/square.py",
        SQUARE,
        ("Square: the side of a window", "round((share * height * width) ** 0.5)", "round(share * height * width)"),
        ("Square: windows shrink too late", "HALVINGS = (10, 50, 200", "HALVINGS = (100, 500, 2000"),
        ("Square: entries", "round(share * scores.shape[1])", "round(0.5 * share * scores.shape[1])"),
    ),
    *of(
        "attacks/uniform.py",
        "attacks/test_attacks.py::test_of_several_tries_the_best_is_kept_for_every_input",
        ("Uniform: one try", "for _ in range(self.tries):", "for _ in range(1):"),
    ),
    *of(
        "attacks/guide.py",
        "attacks/test_guide.py::test_every_call_draws_anew_and_many_draws_are_their_mean",
        ("a guide's draws: their sum", ".logsumexp(0) - math.log(self.num_samples)", ".logsumexp(0)"),
    ),
    *of(
        "attacks/evaluate.py",
        "attacks/test_evaluate.py",
        (
            "evaluate: success among all inputs",
            "float((clean & ~after).sum()) / max(1, int(clean.sum()))",
            "float((clean & ~after).sum()) / len(clean)",
        ),
        ("evaluate: the error of a share", "math.sqrt(share * (1 - share) / len(right))", "share * (1 - share) / len(right)"),
        (
            "evaluate: a worst case over any attack",
            "torch.stack([right[i] for i in members]).all(0)",
            "torch.stack([right[i] for i in members]).any(0)",
        ),
        ("evaluate: sizes change places", "for part in (linf, l2))", "for part in (l2, linf))"),
    ),
]
