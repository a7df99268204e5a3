"""Mutations of what is read off a model before it is sampled or predicted with: additivity, notices, likelihoods, terms of rows."""

from __future__ import annotations

from tests.mutations.mutation import of

SCALE, NOTICES = "model/test_scale.py", "model/test_notices.py"
LIKELIHOOD, ROWS = "infer/test_likelihood.py", "infer/test_arviz_rows.py"
LABELS_HIDDEN = (
    f"{SCALE}::test_rows_sorted_by_class_hide_nothing",
    f"{SCALE}::test_halves_by_label_show_what_halves_at_random_hide",
    f"{SCALE}::test_one_row_in_a_thousand_of_the_last_class_is_enough",
)
PRECISION = (
    f"{SCALE}::test_a_difference_is_held_against_the_root_of_the_rounding",
    f"{SCALE}::test_rounding_is_that_of_the_coarsest_numbers",
)
OWN_PLATE = (
    f"{SCALE}::test_a_plate_that_subsamples_itself_is_accepted",
    f"{SCALE}::test_a_plate_that_subsamples_itself_is_looked_at_as_well",
)
KIND = f"{LIKELIHOOD}::test_the_kind_of_an_outcome_is_read_off_its_distribution_with_and_without_observations"
LOGITS = f"{LIKELIHOOD}::test_logits_of_the_classes_are_the_logarithms_of_what_the_distribution_gives_them"
SINGLE = f"{ROWS}::test_a_factor_that_fits_no_single_site_is_a_variable_of_its_own"
PARTS = f"{ROWS}::test_parts_of_rows_that_are_masked_leave_a_list_of_entries"

MUTATIONS = [
    *of("model/scale.py", OWN_PLATE, ("additivity: each half once", "torch.cat([first, first, rest])", "torch.cat([first, second, rest])")),
    *of(
        "model/scale.py",
        f"{SCALE}::test_a_second_factor_is_refused_under_the_handler",
        ("minibatch: the factor upside down", "[values], self._handler.size / batch)", "[values], batch / self._handler.size)"),
    ),
    *of(
        "model/additivity.py",
        f"{SCALE}::test_a_mean_over_rows_of_the_full_data_warns_with_both_numbers_and_can_be_meant",
        ("a mean over rows: the sum", "abs(value - (one + two) / 2) <= near", "abs(value - (one + two)) <= near"),
    ),
    *of(
        "model/additivity.py",
        f"{SCALE}::test_on_the_full_data_nothing_has_to_add_up",
        ("a mean over rows: scales of the full data count", "each, scaled=False)", "each)"),
    ),
    *of(
        "model/additivity.py",
        f"{SCALE}::test_the_numbers_are_those_of_the_model",
        ("additivity: one half is left out", "return Parts(rows, (first, second))", "return Parts(rows, (first, first[:0]))"),
        ("additivity: the part of the first half twice", "return Parts(rows, (first, second))", "return Parts(rows, (first, first))"),
    ),
    *of(
        "model/additivity.py",
        LABELS_HIDDEN,
        ("additivity: any labels", "rows[0], rows[-1] = int(label.argmin()), int(label.argmax())", "pass"),
        (
            "additivity: labels are mixed in both halves",
            "rows = rows[label[rows.to(label.device)].cpu().argsort(stable=True)]",
            "pass",
        ),
    ),
    *of(
        "model/additivity.py",
        OWN_PLATE,
        ("additivity: doubled halves against the whole once", "abs(times * whole.sums.get(site, 0.0)", "abs(whole.sums.get(site, 0.0)"),
        ("additivity: the plate's own scale counts", "own *= frame.full_size / frame.size", "own *= 1.0"),
    ),
    *of(
        "model/additivity.py",
        PRECISION,
        ("additivity: rounding is not its root", "in likelihoods)) ** 0.5", "in likelihoods)) ** 1.0"),
        ("additivity: products on a GPU are exact", "return max(eps, 2.0**-10) if", "return max(eps, 2.0**-24) if"),
        ("additivity: autocast is ignored", "if torch.is_autocast_enabled(device.type):", "if False:"),
    ),
    *of(
        "model/additivity.py",
        f"{SCALE}::test_a_scale_that_is_a_number_is_refused_where_it_is_that_of_the_minibatches",
        ("additivity: no scale is one too many", "if factor > 1.0 and bool(", "if factor > 1e9 and bool("),
        ("additivity: every scale is one too many", "bool(torch.isclose(given, torch.full_like(given, factor), rtol=1e-5).all())", "True"),
    ),
    *of(
        "model/additivity.py",
        (
            f"{SCALE}::test_a_likelihood_that_is_no_sum_over_rows_is_refused_with_both_numbers_and_the_cause",
            f"{SCALE}::test_a_half_without_a_finite_likelihood_is_refused",
            f"{SCALE}::test_a_draw_without_a_finite_likelihood_is_followed_by_another",
            f"{SCALE}::test_a_start_where_all_is_well_fitted_is_accepted",
            f"{SCALE}::test_a_sum_over_rows_is_accepted",
        ),
        ("additivity: a sum that is not finite adds up", "if math.isfinite(found) else math.inf", "if math.isfinite(found) else 0.0"),
        ("additivity: the cause", "abs(part_sum - 2.0 * whole_sum)", "abs(part_sum - whole_sum)"),
        ("additivity: rounding beside sums of 0", "+ 0.1 * log_prob.numel()", ""),
        ("additivity: the first draw alone", "if whole.finite:", "if True:"),
    ),
    *of(
        "model/additivity.py",
        f"{SCALE}::test_the_look_leaves_the_random_numbers_of_a_run_as_they_are",
        ("additivity: random numbers move", "with RandomState().again(), torch.no_grad()", "with torch.no_grad()"),
    ),
    *of(
        "model/additivity.py",
        "test_bad_input.py::test_a_model_that_draws_beside_its_sites_is_refused",
        (
            "additivity: random numbers are told as a sum that fails",
            "if _difference(whole, [again], 1, worst, tolerance) <= 1.0:",
            "if True:",
        ),
    ),
    *of(
        "model/notices.py",
        (
            f"{NOTICES}::test_statistics_that_have_never_seen_data_are_warned_of_where_bayesianize_has_not",
            f"{NOTICES}::test_what_bayesianize_has_warned_of_is_not_warned_of_again",
        ),
        ("statistics: those that have seen data are told", "int(counted) == 0", "int(counted) >= 0"),
        ("statistics: told again", "and module not in told and never_seen_data(module)", "and never_seen_data(module)"),
    ),
    *of(
        "model/notices.py",
        (
            f"{NOTICES}::test_what_is_meant_to_be_fixed_or_moves_does_not_warn",
            f"{NOTICES}::test_a_parameter_that_is_held_fixed_is_warned_of_once_with_the_remedy",
        ),
        ("parameters: those that bayesianize leaves out are told", "and id(value) not in excluded}", "}"),
        ("parameters: unused ones are told", "if gradient is not None]", "]"),
        ("parameters: by Pyro's names", 'name.replace("$$$", ".")', "name"),
    ),
    *of(
        "model/notices.py",
        f"{NOTICES}::test_notices_take_no_random_numbers_and_change_no_parameters",
        ("parameters: random numbers move", "with RandomState().again(), torch.enable_grad()", "with torch.enable_grad()"),
    ),
    *of(
        "model/notices.py",
        f"{NOTICES}::test_of_many_parameters_a_few_are_named",
        ("parameters: how many are not named", "{len(names) - 5} others", "{len(names)} others"),
    ),
    *of(
        "model/outcomes.py",
        KIND,
        (
            "likelihood: a row's labels are one class",
            "CLASSES if self.shape.numel() == self.rows",
            "CLASSES if self.shape.numel() >= self.rows",
        ),
        ("likelihood: counts are classes", "bool((torch.as_tensor(self.fn.total_count) == 1).all())", "True"),
        ("likelihood: one trial of some is one of all", "== 1).all())", "== 1).any())"),
        ("likelihood: numbers are counts", "support is not None and support.is_discrete", "support is None or not support.is_discrete"),
    ),
    *of(
        "model/outcomes.py",
        LOGITS,
        ("likelihood: 0 and 1 change places", "torch.stack([1 - probs, probs], -1)", "torch.stack([probs, 1 - probs], -1)"),
        (
            "likelihood: 0 and 1 change places in logits",
            "torch.stack([torch.zeros_like(one), one], -1)",
            "torch.stack([one, torch.zeros_like(one)], -1)",
        ),
    ),
    *of(
        "model/outcomes.py",
        f"{LIKELIHOOD}::test_a_log_density_of_the_users_own_is_that_of_the_classes",
        ("likelihood: a custom log-density is ignored", "if type(self.fn).log_prob not in _OWN:", "if False:"),
    ),
    *of(
        "model/outcomes.py",
        f"{LIKELIHOOD}::test_a_probability_of_zero_has_a_finite_gradient",
        ("likelihood: the logarithm of 0", "torch.finfo(probs.dtype).tiny", "torch.finfo(probs.dtype).eps"),
    ),
    *of(
        "model/outcomes.py",
        (
            f"{LIKELIHOOD}::test_logits_that_were_written_to_since_are_not_taken",
            f"{LIKELIHOOD}::test_a_share_of_sigmoids_is_not_taken_for_a_softmax",
            f"{LIKELIHOOD}::test_a_softmax_over_rows_is_not_taken_for_one_over_classes",
        ),
        ("origins: logits that were written to", "and version_of(found[2]) == found[3] else None", "else None"),
        ("origins: a share of anything", 'elif whole is x and self._logits(x, "softmax") is not None:', "elif whole is x:"),
        ("origins: over any dimension", "return dim in (-1, x.dim() - 1, (-1,), [-1])", "return True"),
    ),
    *of(
        "model/outcomes.py",
        f"{LIKELIHOOD}::test_what_is_no_outcome_is_passed_by",
        ("outcomes: those without a plate first", "for found in (inside, bare):", "for found in (bare, inside):"),
        ("outcomes: factors, too", ' or isinstance(node["fn"], dist.Unit))', ")"),
    ),
    *of(
        "infer/row_terms.py",
        (SINGLE, f"{ROWS}::test_a_factor_outside_the_data_plate_is_named_and_left_out"),
        ("terms: a factor belongs to the first site", "if len(beside) == 1 else name", "if beside else name"),
        ("terms: a factor of wider plates", "plates[site] == plates[name]]", "plates[site] >= plates[name]]"),
        ("terms: factors outside the data are rows", "if not plates[name] & of_data:", "if False:"),
    ),
    *of(
        "infer/row_terms.py",
        (f"{ROWS}::test_a_factor_in_the_data_plate_is_a_part_of_its_row", f"{ROWS}::test_a_row_that_is_masked_in_some_draws_only_is_data"),
        ("terms: the last alone", "values[name] + value if name in values else value", "value"),
        ("terms: masks are ignored", 'mask=nodes[term]["mask"])', "mask=None)"),
        ("rows: data where all terms are", "there[name] | holds if name in there", "there[name] & holds if name in there"),
        ("rows: data in all draws", "name: holds.any(0) for", "name: holds.all(0) for"),
    ),
    *of(
        "infer/row_terms.py",
        (PARTS, f"{ROWS}::test_masked_rows_are_no_data_and_the_others_keep_their_numbers"),
        (
            "rows: an event is there as a whole",
            ".flatten(-fn.reinterpreted_batch_ndims).any(-1)",
            ".flatten(-fn.reinterpreted_batch_ndims).all(-1)",
        ),
        ("rows: a distribution's own mask is ignored", "& torch.as_tensor(own_mask(fn))", ""),
        (
            "rows: numbers of what is masked",
            "return self.there.flatten().nonzero().flatten()",
            "return (~self.there).flatten().nonzero().flatten()",
        ),
        ("rows: a row is whole if something is", "return bool((self.there == rows.reshape(", "return bool((self.there <= rows.reshape("),
    ),
    *of(
        "infer/row_terms.py",
        f"{ROWS}::test_no_scale_is_in_the_log_likelihood_of_a_row",
        (
            "terms: with the plate's scale",
            '["value"]), mask=nodes[term]["mask"])',
            '["value"]), nodes[term]["scale"], mask=nodes[term]["mask"])',
        ),
    ),
    *of(
        "infer/row_terms.py",
        f"{ROWS}::test_labels_of_the_rows_that_stay_are_theirs",
        ("rows: the first labels", "else [given[i] for i in numbers]", "else list(given[: len(numbers)])"),
    ),
]
