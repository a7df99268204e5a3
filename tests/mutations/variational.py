"""Mutations of guides, objectives, distillation, networks and predictions: scalings, signs, weights, definitions."""

from __future__ import annotations

from tests.mutations.mutation import of

FLIPOUT = "nn/test_reparameterization.py::test_flipout_gives_every_row_signs_of_its_own_for_inputs_and_for_outputs"
LAW = "nn/test_reparameterization.py::test_weights_given_their_products_have_the_law_of_the_guide"
OBJECTIVE = "infer/elbo/test_adversarial.py::test_the_objective_is_its_equation_with_noise_moved_by_sign_steps"
ASCENT = "infer/autoguide/test_adversarial.py"
TRAINING = "infer/distill/test_training.py"
APD = "infer/distill/test_apd.py"
READOUT = "model/test_readout.py::test_the_classes_are_the_likelihoods_in_every_form"

MUTATIONS = [
    *of(
        "attacks/guide.py",
        READOUT,
        ("a guide's classes: the return value", "self._readouts[len(x)].logits(trace, origins)", 'trace.nodes["_RETURN"]["value"]'),
    ),
    *of(
        "infer/distill/compare.py",
        READOUT,
        ("comparison: the return value", "self._readout.logits(trace, origins).double()", 'trace.nodes["_RETURN"]["value"].double()'),
    ),
    *of(
        "nn/reparameterization.py",
        FLIPOUT,
        ("flipout: input signs shared by all rows", "_signs(x, len(x), inputs)", "_signs(x, 1, inputs).expand(len(x), inputs)"),
        ("flipout: output signs shared by all rows", "_signs(x, len(x), outputs)", "_signs(x, 1, outputs).expand(len(x), outputs)"),
        ("flipout: one sign for all inputs", "_signs(x, len(x), inputs)", "_signs(x, len(x), 1).expand(len(x), inputs)"),
        ("flipout: the mean is flipped, too", "func(x * along(s), weight - loc, None", "func(x * along(s), weight, None"),
        ("flipout: signs that are 0 or 1", ".mul_(2.0).sub_(1.0)", ""),
    ),
    *of(
        "nn/reparameterization.py",
        "nn/test_reparameterization.py::test_flipout_gives_every_row_signs_of_its_own_for_a_bias",
        ("flipout: signs of a bias shared by all rows", "_signs(value, rows, *value.shape)", "_signs(value, 1, *value.shape)"),
        ("flipout: a bias twice as wide", "loc + (value - loc) * signs", "loc + 2 * (value - loc) * signs"),
    ),
    *of(
        "nn/reparameterization.py",
        (LAW, "nn/test_reparameterization.py::test_a_row_of_a_linear_layer_has_the_law_of_the_guide"),
        ("local: deviations add up", "F.linear(x.square(), fn.scale.square())", "F.linear(x.square(), fn.scale)"),
        ("local: the variance for its root", "self.variance.sqrt() * torch.randn_like", "self.variance * torch.randn_like"),
        ("exemplar: weights do not give their products", "return free + missing", "return free + 0.5 * missing"),
    ),
    *of(
        "nn/bayesian.py",
        "nn/test_bayesian.py::test_fan_in_scales_weights_by_the_inputs_of_their_layer_and_biases_not_at_all",
        ("fan-in: the variance for its root", "self.scale / math.sqrt(value[0].numel())", "self.scale / value[0].numel()"),
        ("fan-in: of all elements", "math.sqrt(value[0].numel())", "math.sqrt(value.numel())"),
        ("fan-in: of biases, too", "if value.dim() < 2:", "if value.dim() < 1:"),
    ),
    *of(
        "nn/bayesian.py",
        "test_private_interfaces.py::test_a_transform_remembers_its_inverse_under_the_name_that_copies_leave_out",
        ("copies of priors: with the old inverse", 'None if name == "_inv" else map_tensors(item, fn)', "item"),
    ),
    *of(
        "tracing/calls.py",
        "tracing/test_replay.py::test_large_layers_stay_as_they_are_side_by_side",
        ("draws together: vmap's rule for the bias of a large layer", "call._replace(function=_addmm_rows_first)", "call"),
        ("draws together: a large layer's bias counts twice", "rows.mm(weight).add_(bias)", "rows.mm(weight).add_(bias, alpha=2)"),
    ),
    *of(
        "tracing/guard.py",
        "test_private_interfaces.py::test_a_write_into_a_tensor_raises_its_version",
        ("guards: versions of inference tensors", "return 0 if tensor.is_inference() else tensor._version", "return tensor._version"),
    ),
    *of(
        "nn/dropout.py",
        (
            "nn/test_dropout.py::test_a_mask_leaves_units_out_and_scales_the_others",
            "nn/test_dropout.py::test_over_draws_units_are_left_out_as_often_as_the_layer_says_and_the_same_for_all_rows",
        ),
        ("dropout: units stay with p", "x.new_tensor(1.0 - self.p)", "x.new_tensor(self.p)"),
        ("dropout: what stays is not scaled", "(x.dim() - 1 - len(shape))) / (1.0 - self.p)", "(x.dim() - 1 - len(shape)))"),
    ),
    *of(
        "infer/elbo/adversarial.py",
        OBJECTIVE,
        ("adversarial ELBO: weights change places", "return 1 - moved, moved, self", "return moved, 1 - moved, self"),
        ("adversarial ELBO: the plain draw counts once", "return 1 - moved, moved, self", "return 1.0, moved, self"),
        (
            "adversarial ELBO: the divergence is not scaled",
            "self.kl_scale * (1 - self.mix) if self.kl_in_mix else self.kl_scale",
            "self.kl_scale * (1 - self.mix) if self.kl_in_mix else 1.0",
        ),
        ("adversarial ELBO: the adversary lowers the loss", "return -log_likelihood(", "return log_likelihood("),
    ),
    *of(
        "infer/elbo/adversarial.py",
        "infer/elbo/test_adversarial.py::test_the_authors_weights_are_an_option",
        ("adversarial ELBO: the authors' divergence", "self.kl_scale * (1 - self.mix)", "self.kl_scale * self.mix"),
    ),
    *of(
        "infer/elbo/adversarial.py",
        "infer/elbo/test_objective.py::test_without_an_adversary_they_are_those_of_pyros_mean_field_elbo",
        ("adversarial ELBO: graphs sum over particles", "weight / self.num_particles", "weight"),
    ),
    *of(
        "infer/elbo/objective.py",
        "infer/elbo/test_objective.py::test_the_divergence_of_normals_and_its_gradients_are_pytorchs",
        ("closed divergence: the variance", "scale.flatten().dot(scale.flatten())", "scale.sum()"),
        ("closed divergence: its constant", "scale.numel() * (math.log(prior.scale) - 0.5)", "scale.numel() * math.log(prior.scale)"),
        ("closed divergence: the slope of the entropy", "addcdiv_(weight, scale, value=-1)", "addcdiv_(weight, scale, value=1)"),
        ("closed divergence: precision for variance", "precision = prior.scale**-2", "precision = prior.scale**-1"),
    ),
    *of(
        "infer/autoguide/adversarial.py",
        ASCENT,
        ("ascent: against the sign", "noise.add_(g.sign(), alpha=step_size)", "noise.sub_(g.sign(), alpha=step_size)"),
        ("ascent: the gradient itself", "noise.add_(g.sign(), alpha=step_size)", "noise.add_(g, alpha=step_size)"),
        ("ascent: site by site", "along = torch.where(norm > 0, step_size / norm", "along = torch.where(norm > 0, 0.5 * step_size / norm"),
        ("ascent: the ball is not kept", "(radius / joint_norm(shifts)).clamp(max=1.0)", "(radius / joint_norm(shifts)).clamp(min=1.0)"),
        ("ascent: noise in the weights' units", "loc + noise * scale for loc", "loc + noise for loc"),
    ),
    *of(
        "infer/elbo/robust.py",
        (
            "infer/elbo/test_robust.py::test_what_the_attack_raises_is_the_unscaled_loss_of_every_row",
            "infer/elbo/test_robust.py::test_the_loss_is_pyros_on_inputs_moved_by_hand",
        ),
        (
            "robust ELBO: the attack lowers the loss",
            "losses.append(-_row_log_probs(name, site, rows))",
            "losses.append(_row_log_probs(name, site, rows))",
        ),
        ("robust ELBO: masks are ignored", 'mask=site["mask"])', "mask=None)"),
        (
            "robust ELBO: scaled rows",
            'scale_and_mask(site["fn"].log_prob(site["value"]), mask',
            'scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], mask',
        ),
        ("robust ELBO: the last site alone", "torch.stack(losses).sum(0)", "losses[-1]"),
    ),
    *of(
        "infer/distill/training.py",
        TRAINING,
        (
            "distillation: the learning rate does not fall",
            "self.settings.learning_rate / (1.0 + self.steps / self.half_life)",
            "self.settings.learning_rate",
        ),
        (
            "distillation: the learning rate halves at every half-life",
            "/ (1.0 + self.steps / self.half_life)",
            "/ 2.0 ** (self.steps / self.half_life)",
        ),
        (
            "distillation: the learning rate falls a step late",
            "self.steps / self.half_life",
            "max(0, self.steps - 1) / self.half_life",
        ),
        ("distillation: one optimiser keeps its rate", "for optimizer in self.optimizers:\n", "for optimizer in self.optimizers[1:]:\n"),
    ),
    *of(
        "infer/distill/training.py",
        "infer/distill/test_wgan.py::test_what_is_kept_is_the_moving_average_of_the_generators_parameters",
        ("distillation: the average's decay is its rate", "kept.lerp_(new, 1.0 - decay)", "kept.lerp_(new, decay)"),
        (
            "distillation: the average begins with the start",
            "min(self.settings.ema, self.steps / (self.steps + 10.0))",
            "self.settings.ema",
        ),
    ),
    *of(
        "infer/distill/energy.py",
        "infer/distill/test_energy.py::test_the_loss_is_the_unbiased_estimate_of_its_definition",
        ("energy distance: between counts once", "2.0 * between.mean()", "between.mean()"),
        ("energy distance: biased", "within / (n * (n - 1))", "within / (n * n)"),
    ),
    *of(
        "infer/distill/wgan.py",
        "infer/distill/test_wgan.py::test_three_steps_are_those_of_the_published_algorithm",
        ("GAN: the generator is driven away", "/ -len(codes))", "/ len(codes))"),
        ("GAN: the generator learns in the first step", "if self.steps:", "if self.steps >= 0:"),
    ),
    *of(
        "infer/distill/critic.py",
        "infer/distill/test_critic.py::test_gradients_of_the_critics_loss_equal_autograds",
        ("critic: the penalty's factor 2", ".mul_(2.0 * weight)", ".mul_(weight)"),
        ("critic: slopes are pulled to 0", "(norm - 1.0) / norm", "norm / norm"),
        ("critic: real and made change places", "signs[n:] = -1.0 / n", "signs[n:] = 1.0 / n"),
        ("critic: the points between", "torch.lerp(*first, share", "torch.lerp(*first, 1.0 - share"),
    ),
    *of(
        "infer/distill/noise.py",
        f"{APD}::test_noise_is_scaled_until_what_is_made_fits_the_data_as_well_as_the_draws_do",
        (
            "fitted noise: more than fits",
            "(middle, high) if fits(middle) else (low, middle)",
            "(low, middle) if fits(middle) else (middle, high)",
        ),
        ("fitted noise: not scaled at all", "generator.scale_noise(low)", "generator.scale_noise(1.0)"),
    ),
    *of(
        "infer/distill/reservoir.py",
        "infer/distill/test_online.py::test_a_reservoir_keeps_each_of_all_rows_with_the_same_probability",
        ("reservoir: late rows always come in", "int(torch.randint(self.seen, ()))", "int(torch.randint(len(self._rows), ()))"),
    ),
    *of(
        "infer/autoguide/factored.py",
        f"{APD}::test_the_factored_generator_has_the_draws_mean_and_variances_and_leading_covariance",
        (
            "factored: all of the variance is noise, too",
            "(sd.square() - self.factors[:-1].square().sum(0)).clamp_min(0.0).sqrt()",
            "sd.clone()",
        ),
        (
            "factored: the variance for its root",
            "self.factors[:-1].square().sum(0)).clamp_min(0.0).sqrt()",
            "self.factors[:-1].square().sum(0)).clamp_min(0.0)",
        ),
    ),
    *of(
        "infer/autoguide/factored.py",
        f"{APD}::test_codes_of_the_draws_have_unit_variance_and_decode_to_them",
        ("factored: codes are not standardised", "basis.square().sum(-1, keepdim=True)", "basis.norm(dim=-1, keepdim=True)"),
    ),
    *of(
        "infer/autoguide/generators.py",
        f"{APD}::test_a_finished_mlp_makes_the_rows_that_it_made_before_its_standardisation_was_folded",
        ("generator: the folded shift", "(self.loc + self.scale * last.bias - loc) / scale", "(self.scale * last.bias - loc) / scale"),
        ("generator: the folded scale", "(self.scale / scale).expand", "(scale / self.scale).expand"),
    ),
    *of(
        "infer/distill/compare.py",
        "infer/distill/test_compare.py::test_the_numbers_of_function_space_are_those_of_their_definitions",
        (
            "comparison: the divergence's arguments change places",
            "torch.special.xlogy(p, p) - torch.special.xlogy(p, q)",
            "torch.special.xlogy(q, q) - torch.special.xlogy(q, p)",
        ),
        ("comparison: total variation doubled", ".abs().sum(-1).mean() / 2", ".abs().sum(-1).mean()"),
        (
            "comparison: the sum of both halves",
            "float(distance(one, made) + distance(two, made)) / 2",
            "float(distance(one, made) + distance(two, made))",
        ),
    ),
    *of(
        "infer/distill/compare.py",
        "infer/distill/test_compare.py::test_two_sets_of_draws_are_compared_like_a_guide_and_its_draws",
        ("comparison: only the first of the second set", "_spaced(len(made), num_samples)", "torch.arange(num_samples)"),
    ),
    *of(
        "nn/bayesian.py",
        "nn/test_learned_scale.py::test_the_law_of_the_weights_is_that_of_the_formula",
        ("learned scale: gains around 0", "return self.mean + getattr", "return 0.0 + getattr"),
        (
            "learned scale: raw weights of unit width",
            "raw = Normal(0.0, 1.0) if without_fan_in else FanIn()(name, value)",
            "raw = Normal(0.0, 1.0)",
        ),
        ("learned scale: one width for all", "self.bias_scale if without_fan_in else self.scale", "self.scale"),
    ),
    *of(
        "infer/prior.py",
        "infer/test_prior.py",
        ("prior: logits with their mean over classes", "(values - values.mean(-1, keepdim=True)).std()", "values.std()"),
        ("prior: the mean probability", "values.softmax(-1).amax(-1).mean()", "values.softmax(-1).mean()"),
        ("prior: a unit is dead that is 0 once", "(output == 0).all(0)", "(output == 0).any(0)"),
        ("prior: the noise is the mean", "scale=float(scale.median())", "scale=float(mean.median())"),
        ("prior: hooks stay", "            hook.remove()", "            pass"),
        ("prior: statistics are written", "with torch.no_grad(), kept_statistics():", "with torch.no_grad():"),
    ),
    *of(
        "infer/distill/apd.py",
        "infer/distill/test_apd.py::test_a_batch_that_nobody_asked_for_is_no_larger_than_the_draws",
        ("distillation: a batch of more than the draws", "batch_size=min(self.settings.batch_size, len(rows))", "batch_size=256"),
    ),
    *of(
        "given.py",
        "test_given.py::test_an_option_that_is_handed_on_is_given_by_name",
        ("signature: an option by position", "inspect.Parameter.KEYWORD_ONLY if each", "parameter.kind if each"),
    ),
    *of(
        "infer/distill/compare.py",
        "infer/distill/test_compare.py::test_mutual_information_is_compared_input_by_input",
        (
            "comparison: signed differences of information",
            "(mutual_information(a) - mutual_information(b)).abs()",
            "(mutual_information(a) - mutual_information(b))",
        ),
        ("comparison: the correlation with itself", "torch.corrcoef(both)[0, 1]", "torch.corrcoef(both)[0, 0]"),
    ),
    *of(
        "infer/distill/compare.py",
        (
            "infer/distill/test_compare.py::test_a_shifted_mean_is_found_in_its_site_and_in_function_space",
            "infer/distill/test_compare.py::test_a_wider_law_disagrees_more_with_itself",
        ),
        ("comparison: squared differences of means", "(a.mean(0) - b.mean(0)).square().mean().sqrt()", "(a.mean(0) - b.mean(0)).mean()"),
        ("comparison: the ratio of variances", ".log().square().mean().sqrt()", ".log().square().mean().sqrt() * 2"),
    ),
    *of(
        "infer/distill/stopping.py",
        "infer/distill/test_stopping.py",
        ("stopping: a deviation below the splits", "splits.mean() + splits.std()", "splits.mean() - splits.std()"),
        ("stopping: far from the draws", "self.distance <= self.threshold", "self.distance >= self.threshold"),
        ("stopping: the last look alone", "sum(recent) / len(recent)", "recent[-1]"),
        ("stopping: the last is the best", "self.distance < self.best[0]", "self.distance > self.best[0]"),
        ("stopping: splits share rows", ".split(self._rows)[:2]", ".split(self._rows)[:1] * 2"),
        ("stopping: patience", "self.since_best >= PATIENCE", "self.since_best > PATIENCE"),
    ),
    *of(
        "infer/autoguide/hyper.py",
        "infer/autoguide/test_generators.py::test_a_hypernetwork_is_its_equation_row_by_row",
        ("hypernetwork: without its ReLU", "(t * gain + shift).relu()", "(t * gain + shift)"),
        ("hypernetwork: heads grow with the width", "/ math.sqrt(w)", "/ 1.0"),
        ("hypernetwork: a shift that is a gain", "t * gain + shift", "t * gain * shift"),
    ),
    *of(
        "infer/autoguide/generators.py",
        "infer/autoguide/test_generators.py::test_layers_start_by_he_without_biases",
        ("generator: another start", "nn.init.kaiming_normal_(layer.weight)", "nn.init.xavier_normal_(layer.weight)"),
        ("generator: biases that are not 0", "nn.init.zeros_(layer.bias)", "nn.init.ones_(layer.bias)"),
    ),
    *of(
        "infer/autoguide/factored.py",
        f"{APD}::test_principal_components_are_those_of_the_singular_value_decomposition",
        ("principal components: the biased deviation", "max(1, len(rows) - 1)", "max(1, len(rows))"),
        ("principal components: the smallest", "values.flip(0)[:rank], vectors.flip(1)[:, :rank]", "values[:rank], vectors[:, :rank]"),
    ),
    *of(
        "infer/autoguide/factored.py",
        f"{APD}::test_a_packed_generator_is_the_same_within_half_a_step_at_a_byte_a_number",
        ("packed: steps twice as wide", "whole.abs().amax(1) / 127", "whole.abs().amax(1) / 63"),
    ),
    *of(
        "infer/elbo/adversarial.py",
        "infer/elbo/test_adversarial.py::test_the_moves_of_draws_are_reported_in_noise_and_in_distance",
        ("adversarial ELBO: noise of a shift", "[shift / scale for shift", "[shift * scale for shift"),
        ("adversarial ELBO: distance of noise", "[noise * scale for noise, scale", "[noise / scale for noise, scale"),
    ),
    *of(
        "infer/autoguide/adversarial.py",
        f"{ASCENT}::test_steps_that_are_not_given",
        ("ascent: default steps in a ball", "2.5 * self.radius / max(1, self.num_steps)", "2.0 * self.radius / max(1, self.num_steps)"),
        ("ascent: default steps of noise", "return 0.02 if self.radius is None", "return 0.2 if self.radius is None"),
    ),
    *of(
        "infer/ensemble.py",
        "infer/test_ensemble.py::test_minibatches_are_scaled_to_all_rows_so_that_the_prior_counts_once",
        ("ensemble: minibatches are not scaled", "model = minibatch(model, size, prior", "model = minibatch(model, batch_size, prior"),
    ),
    *of(
        "infer/adapter.py",
        "infer/test_adapter.py::test_the_divergences_gradients_are_weight_decay_and_a_pull_towards_uncertainty",
        ("adapter: the prior's variance for its deviation", "(num_data * weight_decay) ** -0.5", "(num_data * weight_decay) ** -1"),
    ),
    *of(
        "infer/adapter.py",
        "infer/test_adapter.py::test_the_loss_of_an_epoch_is_that_of_all_rows_whatever_the_batches",
        (
            "adapter: the likelihood is not scaled to N",
            "minibatch(model, size=batches.num_data,",
            "minibatch(model, size=len(batches.example[0]),",
        ),
        ("adapter: a short last batch weighs like the others", "total + loss.item() * size, rows + size", "total + loss.item(), rows + 1"),
    ),
    *of(
        "infer/adapter.py",
        "infer/test_adapter.py::test_means_and_scales_have_learning_rates_of_their_own",
        ("adapter: one learning rate for all", '"lr": scale_lr}', '"lr": lr}'),
    ),
    *of(
        "infer/adapter.py",
        "infer/test_adapter.py::test_the_uncertainty_regulariser_is_its_equation",
        ("adapter: agreement is asked for", "(self.threshold - disagreement).relu()", "(self.threshold + disagreement).relu()"),
        ("adapter: the noise's width", "uniform_(-self.eps, self.eps)", "uniform_(0.0, self.eps)"),
    ),
    *of(
        "infer/classifier.py",
        "infer/test_classifier.py::test_outputs_and_gradients_are_those_of_the_mean",
        ("classifier: the sum over draws", "return total - math.log(self.model.num_samples)", "return total"),
        (
            "classifier: draws weigh alike",
            "share = (log_probs - result.clamp_min(torch.finfo(result.dtype).min)).exp_()",
            "share = torch.ones_like(log_probs)",
        ),
        ("classifier: gradients of the sum", ".mul_(gradient / logits.model.num_samples)", ".mul_(gradient)"),
    ),
]
