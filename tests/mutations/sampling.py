"""Mutations of what samplers are made of: noise scales, signs, schedules, batch scalings, costs; of the update rules few, at the end."""

from __future__ import annotations

from tests.mutations.mutation import of

ADVERSARY, RULES = "infer/mcmc/test_adversary.py", "infer/mcmc/test_rules.py::test_a_step_is_the_documented_equation"
CLIP = (
    f"{ADVERSARY}::test_inputs_that_would_leave_the_range_stop_at_its_edge",
    f"{ADVERSARY}::test_what_a_generator_makes_is_clipped_to_the_range_too",
)
CLIMB = "infer/mcmc/test_bal.py::test_the_adversary_climbs_the_loss_of_its_learners"

MUTATIONS = [
    *of(
        "infer/mcmc/bal.py",
        CLIP,
        ("BAL: no clip at the range", "return perturbed if self.clip is None else perturbed.clamp(*self.clip)", "return perturbed"),
        ("BAL: what is returned is not clipped", "return onto(adversary.inputs(z, clean))", "return adversary.inputs(z, clean)"),
        ("BAL: clipped to the unit interval", "perturbed.clamp(*self.clip)", "perturbed.clamp(0.0, 1.0)"),
    ),
    *of(
        "infer/mcmc/bal.py",
        f"{ADVERSARY}::test_the_clean_share_is_the_share_of_rows_that_stay",
        ("BAL: the clean share inverted", "device=flat.device) < self.clean_share", "device=flat.device) >= self.clean_share"),
        ("BAL: no row stays clean", "perturbed[unmoved] = flat[unmoved]", "perturbed[unmoved] = perturbed[unmoved]"),
    ),
    *of(
        "infer/mcmc/bal.py",
        f"{ADVERSARY}::test_the_steps_of_the_inputs_follow_their_schedule_from_0_on_every_minibatch",
        (
            "BAL: the inputs' first step for all",
            'check_value(step_size(i), "inputs\' step_size", i)',
            'check_value(step_size(0), "inputs\' step_size", i)',
        ),
        (
            "BAL: the inputs' schedule begins at 1",
            'check_value(step_size(i), "inputs\' step_size", i)',
            'check_value(step_size(i + 1), "inputs\' step_size", i)',
        ),
        ("BAL: the cost's sign", ".sub_(ascent)", ".add_(ascent)"),
    ),
    *of(
        "infer/mcmc/bal.py",
        f"{ADVERSARY}::test_the_temperature_of_the_inputs_is_that_of_their_noise",
        ("BAL: inputs without noise", "temperature = torch.tensor(self.input_temperature,", "temperature = torch.tensor(0.0,"),
    ),
    *of(
        "infer/mcmc/bal.py",
        CLIMB,
        ("BAL: the sum over learners is their mean", "gradient.mul_(self.num_chains)", "gradient.mul_(1)"),
    ),
    *of(
        "infer/mcmc/bal.py",
        f"{ADVERSARY}::test_a_generator_s_parameters_have_a_standard_normal_prior",
        ("BAL: a lasting adversary begins anew", "if adversary.lasting:", "if not adversary.lasting:"),
    ),
    *of(
        "infer/mcmc/adversary.py",
        f"{ADVERSARY}::test_a_generator_s_parameters_have_a_standard_normal_prior",
        ("Generator: its energy doubled", "return 0.5 * z.square().sum()", "return z.square().sum()"),
        ("Generator: no energy", "return 0.5 * z.square().sum()", "return 0.0 * z.sum()"),
        ("Generator: its energy is left out of the gradient", "if energy.requires_grad:", "if not energy.requires_grad:"),
    ),
    *of(
        "infer/mcmc/adversary.py",
        f"{ADVERSARY}::test_what_a_generator_makes_is_clipped_to_the_range_too",
        ("Generator: without its radius", "clean + self.radius * torch.tanh", "clean + torch.tanh"),
        (
            "Generator: not squashed",
            "torch.tanh(functional_call(self.network, values, (clean,)))",
            "functional_call(self.network, values, (clean,))",
        ),
    ),
    *of(
        "infer/mcmc/adversary.py",
        f"{ADVERSARY}::test_a_flow_s_energy_counts_every_pair_of_neighbours_once",
        ("Flow: smooth from left to right alone", "(down.square().sum() + right.square().sum())", "(2 * right.square().sum())"),
        ("Flow: smooth from top to bottom alone", "(down.square().sum() + right.square().sum())", "(2 * down.square().sum())"),
        (
            "Flow: smoothness in one direction",
            "down, right = z.diff(dim=-2), z.diff(dim=-1)",
            "down, right = z.diff(dim=-2), z.diff(dim=-2)",
        ),
        ("Flow: its weight halved", "self.weight * z.square().sum()", "0.5 * self.weight * z.square().sum()"),
    ),
    *of(
        "infer/mcmc/adversary.py",
        f"{ADVERSARY}::test_a_flow_is_in_pixels_on_images_of_any_sides",
        ("Flow: pixels of the other side", "[2.0 / width, 2.0 / height]", "[2.0 / height, 2.0 / width]"),
        ("Flow: pixels of one side", "[2.0 / width, 2.0 / height]", "[2.0 / width, 2.0 / width]"),
        ("Flow: half pixels", "[2.0 / width, 2.0 / height]", "[1.0 / width, 1.0 / height]"),
    ),
    *of(
        "infer/mcmc/adversary.py",
        f"{ADVERSARY}::test_a_cost_pulls_back_with_twice_its_weight_times_the_distance",
        ("L2: its slope halved", ".mul_(2.0 * self.weight)", ".mul_(self.weight)"),
        ("L2: away from the clean input", "return (perturbed - clean).mul_", "return (clean - perturbed).mul_"),
        ("a callable cost: its sign", "torch.autograd.grad(cost.sum(), perturbed)[0]", "torch.autograd.grad(-cost.sum(), perturbed)[0]"),
    ),
    *of(
        "infer/mcmc/adversary.py",
        f"{ADVERSARY}::test_a_box_ends_at_its_radius",
        (
            "Box: open at the top",
            "torch.minimum(torch.maximum(perturbed, clean - self.radius), clean + self.radius)",
            "torch.maximum(perturbed, clean - self.radius)",
        ),
        ("Box: twice its radius", "clean + self.radius)", "clean + 2 * self.radius)"),
    ),
    *of(
        "infer/mcmc/bal.py",
        f"{ADVERSARY}::test_what_is_not_given_is_in_the_units_of_the_range",
        ("BAL: default steps are lengths", "step_size=extent**2", "step_size=extent"),
        ("BAL: the default box is half the range", "Box(0.1 * extent)", "Box(0.5 * extent)"),
    ),
    *of(
        "infer/mcmc/bal.py",
        f"{ADVERSARY}::test_the_moves_of_inputs_are_reported_in_both_norms_as_the_mean_over_rows",
        ("BAL: the largest of all rows is told", "distance.amax(1).mean()", "distance.amax(1).max()"),
        ("BAL: the length in another norm", "torch.linalg.vector_norm(distance, dim=1)", "torch.linalg.vector_norm(distance, 1, dim=1)"),
    ),
    *of(
        "infer/mcmc/bal.py",
        "infer/mcmc/test_bal.py::test_the_temperature_that_is_reported_counts_all_updates_on_a_minibatch",
        ("BAL: every update has a minibatch of its own", "return self.weights.num_steps\n", "return 1\n"),
    ),
    *of(
        "infer/mcmc/schedules.py",
        "infer/mcmc/test_schedules.py",
        ("polynomial: it rises", "** -self.power", "** self.power"),
        ("polynomial: its scale", "step / self.scale", "step * self.scale"),
        ("cycle: twice its height", "0.5 * self.initial * (math.cos", "self.initial * (math.cos"),
        ("cycle: from cold to hot", "/ self.period) + 1.0)", "/ self.period + math.pi) + 1.0)"),
        ("cycle: samples are taken in its hot part", "step % self.period >= self.explore", "step % self.period < self.explore"),
        ("cycle: one schedule is enough to keep a sample", "return all(schedule.keeps", "return any(schedule.keeps"),
    ),
    *of(
        "infer/mcmc/control_variate.py",
        "infer/mcmc/test_control_variate.py",
        ("control variate: its sign", "return full - gradient(anchor, one, *tensors)", "return gradient(anchor, one, *tensors) - full"),
        ("control variate: batches weigh alike", "total += rows * potential", "total += potential"),
        ("control variate: evaluated with the other sign", "return self.full - self.potential.gradient", "return self.potential.gradient"),
    ),
    *of(
        "infer/mcmc/noise.py",
        "infer/mcmc/test_normal_noise.py",
        ("normal noise: half the variance", ".log_().mul_(-2.0).sqrt_()", ".log_().mul_(-1.0).sqrt_()"),
        ("normal noise: half the circle", "math.pi * 2.0**-31", "math.pi * 2.0**-32"),
        ("normal noise: the sine twice", "cosine = angle.cos()", "cosine = angle.sin()"),
        ("normal noise: 0 is drawn", ".add_(0.5).mul_(2.0**-31)", ".mul_(2.0**-31)"),
    ),
    *of(
        "storage/draws.py",
        (
            "storage/test_draws.py::test_draws_come_back_as_they_were_kept",
            "storage/test_draws.py::test_what_was_written_before_a_kill_can_be_read",
        ),
        ("draws: chains overwrite each other", "(chain * self._num_samples + self.count)", "(chain + self.count)"),
        ("draws: memory keeps the last alone", "kept[:, self.count] = values[name]", "kept[:, 0] = values[name]"),
        ("draws: what is not written is read, too", "{name: value[:, :count] for name", "{name: value for name"),
    ),
    *of(
        "infer/mcmc/update.py",
        "infer/mcmc/test_control_variate.py::test_at_the_anchor_an_update_follows_the_full_gradient_of_its_temperature",
        ("update: the correction's sign", "gradient = gradient + correction(*inputs)", "gradient = gradient - correction(*inputs)"),
    ),
    *of(
        "infer/mcmc/update.py",
        "infer/mcmc/test_runner.py::test_statistics_of_every_draw_are_those_of_its_last_update",
        (
            "update: the norm of the state",
            "report = (energy, torch.linalg.vector_norm(gradient, dim=-1))",
            "report = (energy, torch.linalg.vector_norm(theta, dim=-1))",
        ),
    ),
    *of(
        "model/energy.py",
        "model/test_potential.py::test_u_is_minus_the_log_joint_and_the_jacobian_is_weighted_by_the_temperature",
        (
            "potential: its sign",
            "-(trace.log_prob_sum() + temperature * log_jacobian)",
            "(trace.log_prob_sum() + temperature * log_jacobian)",
        ),
        ("potential: the Jacobian at temperature 1", "temperature * log_jacobian", "log_jacobian"),
        ("potential: the Jacobian's sign", "log_jacobian = log_jacobian + site", "log_jacobian = log_jacobian - site"),
    ),
    *of(
        "model/data.py",
        (
            "model/test_potential.py::test_a_plate_that_subsamples_itself_is_scaled_once",
            "model/test_potential.py::test_a_loaders_short_batch_is_scaled_by_its_own_length",
            "model/test_potential.py::test_minibatch_gradients_average_over_an_epoch_to_the_full_gradient",
        ),
        ("potential: minibatches are not scaled", 'elif self.structure.scaling == "minibatch" and scaled:', "elif False:"),
    ),
    *of(
        "model/potential.py",
        CLIMB,
        ("potential: the sum over chains for their mean", "pieces[0] / state.shape[0] if mean", "pieces[0] if mean"),
        ("potential: the first chunk's slope for all", "pieces[0] += piece.sum(0)", "pass"),
    ),
    *of(
        "model/energy.py",
        CLIMB,
        ("potential: the likelihood's sign", "return -log_likelihood(", "return log_likelihood("),
    ),
    *of(
        "model/energy.py",
        "model/test_potential.py::test_the_hessian_product_is_the_derivative_of_the_gradient",
        ("potential: the Hessian's direction", "torch.autograd.grad(gradient @ direction, row", "torch.autograd.grad(gradient.sum(), row"),
    ),
    *of(
        "handlers.py",
        "test_handlers.py",
        ("minibatch: the mean over rows", "(self.size / frame.size)", "(1 / frame.size)"),
        ("minibatch: a user's scale is lost", 'msg["scale"] = msg["scale"] * (self.size', 'msg["scale"] = (self.size'),
        ("minibatch: upside down", "(self.size / frame.size)", "(frame.size / self.size)"),
    ),
    *of(
        "model/initialization.py",
        "model/test_initialization.py::test_real_sites_start_at_their_priors_mean_with_the_scale_of_their_fan_in",
        ("start: the scale of the prior", "torch.minimum(variance.sqrt(), scale)", "variance.sqrt()"),
        ("start: the variance of the prior", "torch.minimum(variance.sqrt(), scale)", "torch.minimum(variance, scale)"),
        ("start: around 0", "return centre + scale * direction", "return scale * direction"),
        ("start: fan-in is not its root", "fan_in**-0.5", "fan_in**-1.0"),
        ("start: the fan-in of all elements", "shape[1:].numel() if len(shape) > 1", "shape.numel() if len(shape) > 1"),
    ),
    *of(
        "model/initialization.py",
        "model/test_initialization.py::test_sites_that_are_no_weights_start_up_to_two_from_their_priors_mean",
        ("start: every site is a weight", 'or "." in site["name"]', "or True"),
        ("start: no vector is a weight", "or shape.numel() > FEW", ""),
        ("start: one side of the mean", "2.0 * torch.rand_like(like) - 1.0", "torch.rand_like(like)"),
    ),
    *of(
        "model/batches.py",
        "model/test_batches.py",
        (
            "batches: what is left of an epoch is lost",
            "self._epoch(e)[:, max(0, first - e * self.num_data) : last - e * self.num_data]",
            "self._epoch(epochs[0])[:, max(0, first - e * self.num_data) : last - e * self.num_data]",
        ),
        ("batches: every epoch in the same order", 'f"{self.seed}/{epoch}"', 'f"{self.seed}/"'),
        ("batches: chains see the same rows", "for _ in range(self.num_chains)]", "for _ in range(1)] * self.num_chains"),
        ("batches: rows of two tensors come apart", "t.index_select(0, rows)", "t.index_select(0, rows.roll(t.dim()))"),
    ),
    *of(
        "infer/mcmc/noise_estimate.py",
        "infer/mcmc/test_noise.py::test_noise_estimate_takes_shuffled_epochs_into_account",
        ("noise estimate: both gradients' variance", "(0.5 * (1.0 - share)) ** 0.5", "(1.0 - share) ** 0.5"),
        ("noise estimate: as if epochs did not matter", "(0.5 * (1.0 - share)) ** 0.5", "0.5**0.5"),
    ),
    *of(
        "infer/mcmc/sgld.py",
        RULES,
        ("SGLD: half the noise's variance", "(2.0 * step_size * temperature).sqrt()", "(step_size * temperature).sqrt()"),
        ("SGLD: upwards", ".sub_(gradient.mul_(step_size))", ".add_(gradient.mul_(step_size))"),
    ),
    *of(
        "infer/mcmc/sgld.py",
        "infer/mcmc/test_rules.py::test_temperatures_add_what_minibatch_noise_brings",
        ("SGLD: all of the noise heats", "return 0.5 * step_size", "return step_size"),
    ),
    *of(
        "infer/mcmc/sgadald.py",
        RULES,
        ("SGAdaLD: half the noise's variance", "injected = 2.0 * temperature * rate", "injected = temperature * rate"),
        ("SGAdaLD: the correction's sign", 'injected - rate * rate * variables["moment"]', 'injected + rate * rate * variables["moment"]'),
    ),
    *of(
        "infer/mcmc/sghmc.py",
        RULES,
        ("SGHMC: half the noise's variance", "variance = 2.0 * self.friction * temperature\n", "variance = self.friction * temperature\n"),
        ("SGHMC: no friction", "mul_(1.0 - self.friction)", "mul_(1.0)"),
        ("SGHMC: momentum in units of the step", "torch.addcmul(theta, momentum, root", "torch.addcmul(theta, momentum, rate"),
    ),
]
