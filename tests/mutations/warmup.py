"""Mutations of warm-up: when a preconditioner is frozen, what bounds "auto", when chains start again, what a run warns of."""

from __future__ import annotations

from tests.mutations.mutation import of

WARMUP, ASSESSMENT = "infer/mcmc/test_warmup.py", "infer/mcmc/test_assessment.py"
ENERGY, UPDATE = "infer/mcmc/test_energy_error.py", "infer/mcmc/test_update.py"
BOUND = f"{WARMUP}::test_each_kernels_bound_is_its_equation"
COUNTS = f"{WARMUP}::test_noise_counts_from_the_first_update_and_is_held_to_its_share_from_60_percent_on"
RESTARTS = (
    f"{WARMUP}::test_a_chain_that_is_lost_in_warm_up_starts_again_with_half_the_step",
    f"{WARMUP}::test_restarts_are_bounded_and_a_step_that_was_given_has_none",
)
DRIFT = (
    f"{ASSESSMENT}::test_drift_has_its_formula",
    f"{ASSESSMENT}::test_a_run_that_starts_far_out_without_a_warm_up_says_so_and_one_from_exact_draws_does_not",
)
FIRST_TENTH = f"{WARMUP}::test_the_first_kept_tenth_is_as_stationary_as_the_last"
R_HAT = ("infer/mcmc/test_summary.py::test_r_hat_sees_chains_of_different_spread_and_of_heavy_tails",)
GOOD = f"{WARMUP}::test_a_chain_starts_again_from_its_last_good_state"

MUTATIONS = [
    *of(
        "infer/mcmc/update.py",
        FIRST_TENTH,
        ("V adapts through all of warm-up", "if 2 * run.chains.counts.samples < run.warmup_samples:", "if run.adapting:"),
    ),
    *of(
        "infer/mcmc/step_size.py",
        f"{ENERGY}::test_a_lost_chain_does_not_shorten_the_others_steps_at_the_end_of_warm_up",
        ("steps at the end of warm-up: of lost chains, too", "log[run.chains.alive.to(log.device)].mean()", "log.mean()"),
        ("steps at the end of warm-up: changed by rounding", "elif before is not None and bool((steps <= most).all()):", "elif False:"),
    ),
    *of(
        "infer/mcmc/update.py",
        f"{UPDATE}::test_updates_in_one_call_are_those_of_as_many_calls_in_warm_up_and_after",
        ("updates in one call: nothing is measured between them", "            return updates - first", "            return most"),
        ("updates in one call: a rule learns what the first one learns", "or learning(run, updates) != now:", "or False:"),
    ),
    *of(
        "infer/mcmc/update.py",
        f"{UPDATE}::test_a_chain_that_is_lost_in_the_middle_of_a_call_is_lost_at_the_same_update",
        ("updates made again: with other noise", "chains.normal.rewind(mark)", "pass"),
        ("updates made again: from other variables", "chains.variables[name].copy_(value)", "pass"),
    ),
    *of(
        "infer/mcmc/kernel.py",
        f"{ASSESSMENT}::test_the_temperature_that_is_reported_is_the_worst_chains",
        (
            "T_eff is a mean over chains",
            "by_site(self.run, effective, worst=torch.amax)",
            "by_site(self.run, effective, worst=torch.mean)",
        ),
    ),
    *of(
        "infer/mcmc/sghmc.py",
        ("infer/mcmc/test_rules.py::test_momentum_is_not_in_units_of_the_step", BOUND),
        (
            "SGHMC: momentum without the root of the step",
            "torch.addcmul(theta, momentum, root, out=noise)",
            "torch.add(theta, momentum, out=noise)",
        ),
        ("SGHMC: half the curvature bound", "return 2.0 * (2.0 - self.friction) * share", "return (2.0 - self.friction) * share"),
        ("SGHMC: the rate for its root", "return rate**0.5 if self.adaptive else rate", "return rate"),
        (
            "SGHMC: twice the noise bound",
            "float(2.0 * self.friction * share * temperature",
            "float(4.0 * self.friction * share * temperature",
        ),
    ),
    *of(
        "infer/mcmc/sgadald.py",
        BOUND,
        ("SGAdaLD: the temperature is not in its bound", "float(temperature / taken)", "float(1.0 / taken)"),
        ("SGAdaLD: the square of the step", "return squared**0.5", "return squared"),
    ),
    *of(
        "infer/mcmc/step_size.py",
        (COUNTS, BOUND),
        ("auto: noise is held to its share at once", "elif not rest:", "elif False:"),
        ("auto: noise never counts", "if T == 0.0:", "if True:"),
        ("auto: the excess is twice as large", "noise.slope / (2.0 * curvature)", "noise.slope / curvature"),
        ("auto: the rest begins with warm-up", "rest=place >= REST_FROM", "rest=True"),
        ("auto: the rest never begins", "rest=place >= REST_FROM", "rest=False"),
    ),
    *of(
        "infer/mcmc/step_size.py",
        f"{WARMUP}::test_the_rate_grows_by_four_at_most_from_one_measurement_to_the_next",
        ("auto: growth without a bound", "value = min(value, most)", "pass"),
        ("auto: growth by eight", "GROWTH = 4.0", "GROWTH = 6.0"),
    ),
    *of(
        "infer/mcmc/step_size.py",
        f"{WARMUP}::test_energy_error_shortens_the_step_where_curvature_grows_along_the_way",
        ("auto: energy errors do not count", "if not energy_rises(run, value):", "if True:"),
        ("auto: energy may rise without bound", "return bool((rise > allowed)", "return bool((rise != rise)"),
    ),
    *of(
        "infer/mcmc/trajectory.py",
        f"{ASSESSMENT}::test_the_step_is_tried_where_a_chain_met_its_largest_gradient",
        ("steepest: the latest state", "steeper = norm > steepest.norm", "steeper = norm == norm"),
        ("steepest: the flattest state", "steeper = norm > steepest.norm", "steeper = norm < steepest.norm"),
        (
            "steepest: steps of the rule, not of Hamiltonian dynamics",
            "leapfrog_step(step_size, temperature",
            "leapfrog_step(0.5 * step_size, temperature",
        ),
        ("steepest: any gain is too large", "temperature * (50.0 +", "temperature * (0.0 *"),
        ("steepest: no gain is too large", "(rises > allowed)", "(rises > torch.inf)"),
    ),
    *of(
        "infer/mcmc/trajectory.py",
        f"{ASSESSMENT}::test_the_rise_of_energy_is_the_largest_along_the_way",
        ("trajectory: the energy at its end", "torch.maximum(largest, rise.nan_to_num(torch.inf))", "rise.nan_to_num(torch.inf)"),
        (
            "trajectory: half a kick too much",
            "momentum = momentum - 0.5 * step * gradient\n        theta",
            "momentum = momentum - step * gradient\n        theta",
        ),
    ),
    *of(
        "infer/mcmc/assessment.py",
        f"{ASSESSMENT}::test_few_effective_draws_are_warned_of_with_their_number",
        ("mixing: few draws are not told", "LEAST_EFFECTIVE = 50.0", "LEAST_EFFECTIVE = 5.0"),
        ("mixing: few draws are told of good runs", "LEAST_EFFECTIVE = 50.0", "LEAST_EFFECTIVE = 500.0"),
    ),
    *of(
        "infer/mcmc/assessment.py",
        f"{ASSESSMENT}::test_a_step_that_is_unstable_in_the_steepest_places_is_warned_of",
        ("assessment: unstable steps are not told", "share <= LARGEST_UNSTABLE", "share <= 1.0"),
    ),
    *of(
        "infer/mcmc/assessment.py",
        f"{ASSESSMENT}::test_data_in_their_own_units_are_named_where_a_run_is_not_right",
        ("assessment: units of good data are named", "if float(size[column]) > largest:", "if True:"),
        ("assessment: units are not named", "if float(size[column]) > largest:", "if False:"),
    ),
    *of(
        "infer/mcmc/step_size.py",
        RESTARTS,
        ("auto: the smaller step is forgotten", "value = min(value, auto.ceiling)", "pass"),
    ),
    *of(
        "infer/mcmc/state.py",
        RESTARTS,
        ("auto: a restart keeps the step", "self.value = self.ceiling = 0.5 * self(0)", "self.ceiling = self.value"),
    ),
    *of(
        "infer/mcmc/restart.py",
        RESTARTS,
        ("restarts: without end", "MOST_RESTARTS = 10", "MOST_RESTARTS = 10**9"),
        ("restarts: a runaway is good", "good = (energy <= last.energy + allowed)", "good = energy.isfinite()"),
    ),
    *of(
        "infer/mcmc/temperatures.py",
        (
            f"{ASSESSMENT}::test_heat_along_the_noisiest_direction_is_its_variance",
            f"{ASSESSMENT}::test_noise_without_a_direction_is_not_made_hotter_by_looking_for_one",
        ),
        (
            "hottest: found and measured on the same half",
            "for one, other in (halves, halves[::-1]):",
            "for one, other in (halves[:1] * 2, halves[1:] * 2):",
        ),
        ("hottest: the smallest direction", "vectors[:, -1]", "vectors[:, 0]"),
    ),
    *of(
        "infer/mcmc/assessment.py",
        DRIFT,
        ("drift: the spread of all draws", "sd = float(last.var(1)", "sd = float(energy.var(1)"),
        ("drift: against all draws", "float(first.mean() - last.mean()) / sd", "float(first.mean() - energy.mean()) / sd"),
        ("drift: without autocorrelation", "z = shift / (tau / first.numel()", "z = shift / (1.0 / first.numel()"),
    ),
    *of(
        "infer/mcmc/summary.py",
        R_HAT,
        ("R-hat: of the draws themselves", "split_gelman_rubin(normal_scores(each)", "split_gelman_rubin((each)"),
        ("R-hat: without the folded draws", "for each in (values, folded)]", "for each in (values, values)]"),
    ),
    *of(
        "infer/mcmc/runner.py",
        "infer/mcmc/test_drivers.py::test_arviz_sees_which_of_twelve_chains_were_lost",
        ("lost chains stay in the results", "if lost_chains or not self._left_out:", "if True:"),
    ),
    *of(
        "infer/mcmc/restart.py",
        GOOD,
        ("restarts: from where warm-up began", "last.theta[good], last.energy[good] = chains.theta[good], energy[good]", "pass"),
        ("restarts: momentum stays", "chains.variables[name][rows] = value[rows]", "pass"),
        ("restarts: momentum of the start", "value[good] = chains.variables[name][good]", "pass"),
        ("restarts: of all chains", "rows = again.to(into.device)", "rows = torch.ones_like(again)"),
        ("restarts: a tenth of what U may rise", "T * (1000.0 + 10.0 * potential.size)", "T * (100.0 + 10.0 * potential.size)"),
        ("restarts: U may rise alike in every dimension", "T * (1000.0 + 10.0 * potential.size)", "T * 1000.0"),
        ("restarts: U may rise alike at every temperature", "allowed = T * (1000.0", "allowed = (1000.0"),
        ("restarts: five looks", "LOOKS = 50", "LOOKS = 5"),
    ),
    *of(
        "infer/mcmc/assessment.py",
        f"{ASSESSMENT}::test_drift_is_seen_and_is_not_seen_where_there_is_none",
        ("drift: the first third alone", "FIRST_PARTS = (0.1, 0.2, 0.33)", "FIRST_PARTS = (0.33,)"),
    ),
    *of(
        "infer/mcmc/assessment.py",
        f"{ASSESSMENT}::test_drift_and_heat_are_warned_of_beyond_their_bounds_only",
        (
            "drift: a large z is enough",
            'abs(found["z"]) <= LARGEST_Z or abs(found["shift"]) <= LARGEST_SHIFT',
            'abs(found["z"]) <= LARGEST_Z',
        ),
        (
            "drift: a large shift is enough",
            'abs(found["z"]) <= LARGEST_Z or abs(found["shift"]) <= LARGEST_SHIFT',
            'abs(found["shift"]) <= LARGEST_SHIFT',
        ),
        ("drift: upwards alone", 'abs(found["z"]) <= LARGEST_Z or', 'found["z"] <= LARGEST_Z or'),
        ("heat: at temperature 1", "if hottest > LARGEST_HEAT * temperature:", "if hottest > LARGEST_HEAT:"),
        ("heat: of the coldest site", 'max(about["T_eff"].items()', 'min(about["T_eff"].items()'),
        ("heat: no direction", "if along is not None and along >", "if along is None and 0.0 >"),
        (
            "heat: the direction at temperature 1",
            "hottest_allowed(DIRECTION_SHARE, kernel.potential.size)) * temperature:",
            "hottest_allowed(DIRECTION_SHARE, kernel.potential.size)):",
        ),
        (
            "heat: the remedy that is in force",
            '"a larger batch_size" if kernel.automatic else',
            '"a larger batch_size" if not kernel.automatic else',
        ),
    ),
    *of(
        "infer/mcmc/assessment.py",
        (
            f"{ASSESSMENT}::test_chains_that_have_not_mixed_are_warned_of_by_their_predictions",
            f"{ASSESSMENT}::test_weights_of_a_network_that_differ_between_modes_are_no_warning",
            f"{ASSESSMENT}::test_a_coefficient_that_few_rows_know_of_is_looked_at_too",
        ),
        ("mixing: R-hat of 11", "LARGEST_R_HAT = 1.1", "LARGEST_R_HAT = 11.0"),
        (
            "mixing: weights of networks are compared",
            'looked = {f"site {name!r}": value for name, value in compared.items()}',
            'looked = {f"site {name!r}": value for name, value in samples.items()}',
        ),
        ("mixing: sites are not compared", 'looked = {f"site {name!r}": value for name, value in compared.items()}', "looked = {}"),
        ("mixing: predictions are not compared", "if predictions is not None:", "if False:"),
        (
            "mixing: predictions of the first draws",
            "kept = torch.linspace(0, run.num_samples - 1, draws).round().long()",
            "kept = torch.arange(draws)",
        ),
        (
            "mixing: classes in place of their probabilities",
            "law.mean.flatten() if probs is None else probs.flatten()",
            "law.mean.flatten()",
        ),
    ),
    *of(
        "infer/mcmc/assessment.py",
        f"{ASSESSMENT}::test_a_site_that_stands_still_is_warned_of",
        ("mixing: what stands still", "if bool(still.any()):", "if bool(still.all()) and len(samples) == 1:"),
    ),
    *of(
        "infer/ensemble_start.py",
        "infer/test_ensemble_start.py::test_every_member_finds_the_mode_of_the_posterior_of_the_training_rows",
        ("members: Adam climbs", "self._theta.grad = self._potential", "self._theta.grad = -self._potential"),
    ),
    *of(
        "infer/ensemble_start.py",
        "infer/test_ensemble_start.py::test_rows_that_are_held_out_are_never_trained_on_and_alone_are_scored",
        ("members: trained on the rows that are held out", "*_take(arguments, rows),", "*_take(arguments, torch.cat([rows, held_out])),"),
    ),
    *of(
        "infer/ensemble_start.py",
        "infer/test_ensemble_start.py::test_a_member_is_kept_as_it_was_when_it_predicted_best",
        ("members: the last state", "better = scores > self.best", "better = scores < math.inf"),
        ("the ensemble's score: the sum of densities", "rows.logsumexp(0) - math.log(len(rows))", "rows.logsumexp(0)"),
    ),
    *of(
        "infer/ensemble_start.py",
        "infer/test_ensemble_start.py::test_training_ends_when_no_member_has_improved_for_a_while",
        ("members: patience is not heeded", "if all(epoch - best >= patience for best", "if all(epoch - best >= num_epochs for best"),
    ),
    *of(
        "infer/mcmc/mclmc.py",
        "infer/mcmc/test_mclmc.py::test_an_update_is_the_equation_of_the_docstring",
        (
            "MCLMC: a step of all weights",
            "norm * step_size / (2.0 * (gradient.shape[-1] - 1)",
            "norm * step_size / (2.0 * gradient.shape[-1]",
        ),
        ("MCLMC: memory in halves", "math.expm1(2.0 / self.memory)", "math.expm1(1.0 / self.memory)"),
        ("MCLMC: one kick", 'variables["direction"].copy_(turned(direction, downhill, delta))', 'variables["direction"].copy_(direction)'),
    ),
    *of(
        "infer/mcmc/mclmc.py",
        "infer/mcmc/test_mclmc.py::test_half_a_force_is_the_flow_of_its_differential_equation",
        ("MCLMC: kinetic energy of d weights", "(gradient.shape[-1] - 1) * change", "gradient.shape[-1] * change"),
        ("MCLMC: kinetic energy without its logarithm of 2", "change = delta - math.log(2.0) +", "change = delta +"),
    ),
    *of(
        "infer/mcmc/mclmc.py",
        "infer/mcmc/test_mclmc.py::test_the_predicted_temperature_under_noise_that_is_larger_where_curvature_is",
        ("MCLMC: kappa without its half", "self.memory / (2.0 * temperature**2 * size)", "self.memory / (temperature**2 * size)"),
        (
            "MCLMC: noise without the mean",
            "temperature, variables) * noise_variance.mean())",
            "temperature, variables) * noise_variance.max())",
        ),
    ),
    *of(
        "infer/mcmc/energy_error.py",
        "infer/mcmc/test_mclmc.py::test_the_error_is_that_of_the_energy_over_one_update",
        ("energy error: without the last kick", "+ first.double() + last.double()", "+ first.double()"),
    ),
    *of(
        "infer/mcmc/energy_error.py",
        "infer/mcmc/test_mclmc.py::test_the_energy_error_is_near_its_target_in_every_chain",
        ("energy error: upside down", "(target / error) **", "(error / target) **"),
    ),
    *of(
        "infer/mcmc/step_size.py",
        "infer/mcmc/test_mclmc.py::test_chains_in_modes_of_different_width_get_steps_of_their_own",
        ("energy error: one step for all", "relative.copy_((log - mean).exp())", "relative.fill_(1.0)"),
    ),
    *of(
        "infer/mcmc/energy_error.py",
        f"{ENERGY}::test_no_update_counts_with_more_than_the_given_error",
        ("energy error: rare errors rule", "nan_to_num(most, most).clamp_max(most)", "nan_to_num(most, most)"),
    ),
    *of(
        "infer/mcmc/energy_error.py",
        f"{ENERGY}::test_rounding_of_a_large_energy_does_not_shorten_the_step",
        ("energy error: rounding counts", "change - resolved * energy", "change - 0.0 * energy"),
    ),
    *of(
        "infer/mcmc/restart.py",
        f"{ENERGY}::test_a_chain_that_starts_again_keeps_the_step_that_it_has_now",
        ("restart: with an older step", ' if name != "relative_step"}', "}"),
    ),
    *of(
        "infer/mcmc/sghmc.py",
        f"{ENERGY}::test_the_energy_error_of_updates_is_that_of_leapfrog_steps",
        ("SGHMC: a kick instead of half of one", "before - 0.5 * self._root", "before - self._root"),
        ("SGHMC: kinetic energy twice", "sum(-1) / (2.0 * temperature)", "sum(-1) / temperature"),
        ("SGHMC: momenta of temperature 1", '"momentum": temperature**0.5 * fresh', '"momentum": fresh'),
        ("SGHMC: the metric's square in a trial", 'step_size * variables["V"].pow(-0.25)', 'step_size * variables["V"].pow(-0.5)'),
    ),
    *of(
        "infer/mcmc/sghmc.py",
        f"{ENERGY}::test_the_target_is_the_error_of_equal_precisions_at_the_step_of_their_curvature",
        ("SGHMC: four times the target", "self._rate_at(share) ** 3 / 16.0", "self._rate_at(share) ** 3 / 4.0"),
    ),
    *of(
        "infer/mcmc/step_size.py",
        f"{ENERGY}::test_one_stiff_direction_among_many_does_not_bound_the_step",
        ("auto: curvature bounds networks, too", "max(1.0, potential.size / 20.0)", "1.0"),
    ),
    *of(
        "infer/mcmc/schedules.py",
        f"{ENERGY}::test_every_chain_moves_by_the_step_that_is_given_for_it",
        (
            "steps of chains: ratios to the first",
            "[value / self(0) for value in self.values]",
            "[value / self.values[0] for value in self.values]",
        ),
    ),
]
