"""What was given is named where it does not fit, and what is said to give instead works: every remedy here is run as it is written."""

from __future__ import annotations

import inspect
import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import pyro_advbayes as ab
from pyro_advbayes import attacks, diagnostics
from pyro_advbayes.given import check_int
from pyro_advbayes.infer import distill
from pyro_advbayes.nn import Classifier, bayesianize
from tests.small_models import data, logistic, regression

X, Y = data()
N = len(X)
CLASSES = Y.long()
ARRAY = X.double().numpy()


def sgld(model, batch_size=None, **options):
    return ab.SGLD(model, 1e-3, batch_size=batch_size, backend="handlers", **options)


def run(kernel, *args, **kwargs):
    mcmc = ab.SGMCMC(kernel, 2, 1, 2, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


def network(classes=2):
    return Classifier(bayesianize(nn.Linear(3, classes)))


def frame():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(ARRAY, columns=["age", "height", "weight"])


def series(values):
    return pytest.importorskip("pandas").Series(values)


def remedied(call, says, **given):
    """Calls, wants a refusal that says this, gives what it says to give, and calls again: with that there is no error and no warning."""
    with pytest.raises(ValueError) as caught:
        call(**given)
    message = str(caught.value)
    assert "\n" not in message and "Trace Shapes" not in message, message
    for part in [says] if isinstance(says, str) else says:
        assert part in message, message
    expressions = re.findall(
        r"torch\.as_tensor\((?:[^()]|\([^()]*\))*\)(?:\.\w+\([^()]*\))*|\b\w+(?:\.\w+\([^()]*\))+", message.split("give ")[-1]
    )
    assert expressions, message
    for expression in expressions:
        (name,) = [name for name in given if re.search(rf"\b{name}\b", expression)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            given = {**given, name: eval(expression, {"torch": torch}, given)}
    return call(**given)


# ---------------------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize(
    "x,y,says",
    [
        (
            lambda: ARRAY,
            lambda: Y.numpy(),
            ["argument x is a numpy array", "torch.as_tensor(x, dtype=torch.float32)", "torch.as_tensor(y)"],
        ),
        (lambda: X.numpy(), lambda: Y, ["argument x is a numpy array", "torch.as_tensor(x)"]),
        (lambda: ARRAY[::-1], lambda: Y, ["argument x is a numpy array", "torch.as_tensor(x.copy(), dtype=torch.float32)"]),
        (frame, lambda: Y, ["argument x is a pandas DataFrame", "torch.as_tensor(x.values", "dtype=torch.float32"]),
        (
            frame,
            lambda: series(CLASSES.numpy()),
            ["x is a pandas DataFrame", "y is a pandas Series", "torch.as_tensor(y.values", ".float()"],
        ),
        (lambda: frame().astype(object), lambda: Y, ["argument x is a pandas DataFrame", 'torch.as_tensor(x.values.astype("float32"))']),
        (X.tolist, lambda: Y, ["argument x is a list", "torch.as_tensor(x)"]),
        (lambda: X, lambda: CLASSES, ["argument y is of torch.int64", "give y.float()"]),
        (lambda: X, lambda: Y.bool(), ["argument y is of torch.bool", "give y.float()"]),
        (lambda: X.double(), lambda: Y, ["argument x is of torch.float64", "same dtype", "give x.float()"]),
        (lambda: X.double(), lambda: CLASSES, ["x is of torch.float64", "y is of torch.int64", "give x.float(), y.float()"]),
        (lambda: (9 * X).long(), lambda: Y, ["argument x is of torch.int64", "give x.float()"]),
    ],
    ids=["numpy", "numpy x", "backwards", "frame", "frame and series", "objects", "list", "int y", "bool y", "float64 x", "both", "int x"],
)
def test_a_sampler_names_what_was_given_and_what_to_give(x, y, says, batch_size):
    remedied(lambda x, y: run(sgld(logistic, batch_size), x, y), says, x=x(), y=y())


def test_names_are_those_of_the_call():
    remedied(lambda x, y: run(sgld(logistic), y=y, x=x), "argument y is of torch.int64", x=X, y=CLASSES)
    with pytest.raises(ValueError, match=r"argument features is a numpy array.*torch\.as_tensor\(features\)"):
        run(sgld(lambda features, y: logistic(features, y)), X.numpy(), Y)


def test_weights_in_float64_want_inputs_in_float64():
    def model(x, y):
        logits = x @ pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)

    remedied(lambda x: run(sgld(model), x, Y), ["argument x is of torch.float32", "give x.double()"], x=X)


def test_a_frame_that_holds_text_is_named_as_that():
    table = frame()
    table["town"] = "Ulm"
    with pytest.raises(ValueError, match="argument x is a pandas DataFrame with entries that are no numbers: encode them first"):
        run(sgld(logistic), table, Y)


def test_a_frame_is_no_loader():
    with pytest.raises(ValueError, match="argument x is a pandas DataFrame"):
        run(sgld(logistic), frame())


def test_a_model_that_takes_arrays_itself_goes_on_doing_so():
    def model(x, y):
        logistic(torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y))

    assert run(sgld(model), ARRAY, Y.numpy()).get_samples()["w"].isfinite().all()


@pytest.mark.parametrize("wrong", [lambda x, y: logistic(x, y) / (1 // 0), lambda x, y: logistic(x[:, :2], y)])
def test_an_error_that_no_other_form_of_an_argument_mends_is_the_models_own(wrong):
    with pytest.raises((ZeroDivisionError, RuntimeError)) as caught:
        run(sgld(wrong), X, Y)
    assert "argument" not in str(caught.value).splitlines()[0]


def test_an_array_is_named_even_where_more_is_wrong():
    with pytest.raises(ValueError, match=r"argument x is a numpy array, not a tensor: give torch\.as_tensor\(x\)"):
        run(sgld(lambda x, y: logistic(x.unsqueeze(0)[0], y) / (1 // 0)), X.numpy(), Y)


@pytest.mark.parametrize(
    "kernel", [lambda m: ab.SGHMC(m, 1e-3), lambda m: ab.SGAdaLD(m, 1e-2), lambda m: ab.BAL(m, "x", 10, clip=(-9.0, 9.0))]
)
def test_every_kernel_says_so(kernel):
    with pytest.raises(ValueError, match=r"argument x is a numpy array.*torch\.as_tensor\(x, dtype=torch\.float32\)"):
        run(kernel(network()), ARRAY, CLASSES)


def test_pyros_driver_says_so():
    def call(x):
        MCMC(sgld(logistic), 2, 1, disable_progbar=True).run(x, Y)

    remedied(call, "argument x is a numpy array", x=ARRAY)


def test_start_values_and_anchors_are_named():
    start = {"w": np.zeros((2, 3)), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"initial_params\['w'\] is a numpy array: give a tensor, torch\.as_tensor"):
        ab.SGMCMC(sgld(logistic), 2, 1, 2, initial_params=start, disable_progbar=True).run(X, Y)
    anchor = {"w": np.zeros(3), "b": torch.tensor(0.0)}
    with pytest.raises(ValueError, match=r"control_variate\['w'\] is a numpy array: give a tensor, torch\.as_tensor"):
        run(sgld(logistic, 10, control_variate=anchor), X, Y)


# --------------------------------------------------------------------------------------------------------------------- loaders


def test_a_loader_of_three_items_for_two_arguments_says_so_and_how_to_leave_one_out():
    rows, classes = TensorDataset(X, Y, torch.arange(N)), TensorDataset(X, CLASSES, torch.arange(N))
    says = r"items hold 3 tensors and the model takes 2 \(x, y\): leave the others out, collate_fn=(lambda rows: .*\[:2\])$"
    for call in (
        lambda: run(sgld(logistic), DataLoader(rows, 10)),
        lambda: ab.bayes_adapter(nn.Linear(3, 2), nn.Linear(3, 2), DataLoader(classes, 10), weight_decay=0.1),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            call()
    collate = eval(re.search(says, str(caught.value)).group(1), {"default_collate": default_collate})
    run(sgld(logistic), DataLoader(rows, 10, collate_fn=collate))


def test_a_loader_of_one_item_for_two_arguments_says_so():
    with pytest.raises(ValueError, match=r"items hold 1 tensor and the model takes 2 \(x, y\)"):
        run(sgld(lambda x, y: logistic(x, y)), DataLoader(TensorDataset(X), 10))


@pytest.mark.parametrize(
    "call",
    [
        lambda: run(sgld(logistic), X),
        lambda: run(sgld(logistic, 10), X),
        lambda: run(sgld(logistic, num_data=N), [X]),
        lambda: run(sgld(lambda x, target=None: logistic(x, target)), X),
    ],
)
def test_observations_that_were_left_out_are_asked_for(call):
    with pytest.raises(ValueError, match=r"'obs'.*Argument (y|target) is not given: if the site is what it observes, give it$"):
        call()


def test_a_tuple_of_arguments_is_told_from_a_loader():
    with pytest.raises(ValueError, match=r"A tuple of tensors is taken for a loader.*run\(x, y\)"):
        run(sgld(logistic), (X, Y))


@pytest.mark.parametrize("item", [(ARRAY, Y), (X, Y.numpy())])
def test_a_loader_of_arrays_is_refused_with_how_to_make_tensors_of_them(item):
    with pytest.raises(ValueError, match=r"the loader gave \[.*Of a numpy array make a tensor, torch\.as_tensor\(array"):
        run(sgld(logistic, num_data=N), [item])


@pytest.mark.parametrize("x,y,says", [(X.double(), Y, "argument x is of torch.float64"), (X, CLASSES, "argument y is of torch.int64")])
def test_a_loaders_dtypes_are_named(x, y, says):
    remedied(lambda x, y: run(sgld(logistic), DataLoader(TensorDataset(x, y), 10)), says, x=x, y=y)


# ------------------------------------------------------------------------------------------------ prediction, guides, training

DRAWS = {"net.weight": torch.randn(4, 2, 3), "net.bias": torch.randn(4, 2)}


def normal(x, y=None):
    mean = x @ pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)
    return mean


def drawn_guide():
    guide = ab.AutoAdversarialNormal(network())
    guide(X, CLASSES)
    return guide


def summary(x):
    mcmc = run(sgld(network()), X, CLASSES)
    mcmc.summary(x)


CALLS = {
    "Predictive": lambda x: ab.Predictive(network(), DRAWS, return_sites=["obs"])(x),
    "PosteriorClassifier": lambda x: ab.PosteriorClassifier(network(), DRAWS)(x),
    "PosteriorRegressor": lambda x: ab.PosteriorRegressor(normal, {"w": torch.randn(4, 3)})(x),
    "log_probs": lambda x: list(ab.PosteriorClassifier(network(), DRAWS).log_probs(x)),
    "attack": lambda x: attacks.PGD(0.1, clip=None)(ab.PosteriorClassifier(network(), DRAWS), x, CLASSES),
    "attack on a network": lambda x: attacks.PGD(0.1, clip=None)(nn.Linear(3, 2), x, CLASSES),
    "Square": lambda x: attacks.Square(0.1, clip=None, queries=2)(nn.Linear(3, 2), x, CLASSES),
    "evaluate": lambda x: attacks.evaluate(nn.Linear(3, 2), x, CLASSES, [attacks.FGSM(0.1, clip=None)]),
    "GuideClassifier": lambda x: attacks.GuideClassifier(network(), drawn_guide())(x),
    "deep_ensemble": lambda x: ab.deep_ensemble(network(), (x, CLASSES), num_members=1, num_steps=1, optim=Adam({"lr": 0.1})),
    "deep_ensemble in minibatches": lambda x: ab.deep_ensemble(
        network(), (x, CLASSES), num_members=1, num_steps=1, optim=Adam({"lr": 0.1}), batch_size=10
    ),
    "to_arviz": lambda x: ab.to_arviz(run(sgld(network()), X, CLASSES), args=(x, CLASSES), log_likelihood=True),
    "guide": lambda x: ab.AutoAdversarialNormal(network())(x, CLASSES),
    "adversarial training": lambda x: SVI(
        network(), AutoNormal(network()), Adam({"lr": 0.1}), ab.TraceRobust_ELBO(attacks.FGSM(0.1, clip=None))
    ).step(x, CLASSES),
    "active_learning": lambda x: ab.active_learning(
        lambda *_: ab.PosteriorClassifier(network(), DRAWS), (x, CLASSES), (X, CLASSES), num_rounds=1, per_round=1, disable_progbar=True
    ),
    "summary": summary,
}


@pytest.mark.parametrize("name", CALLS)
def test_every_entry_point_names_a_numpy_array_and_its_remedy_works(name):
    if name in ("active_learning",):
        with pytest.raises(
            ValueError, match=r"pool\[0\] is a numpy array: give a tensor, torch\.as_tensor\(pool\[0\], dtype=torch\.float32\)"
        ):
            CALLS[name](ARRAY)
        return
    remedied(CALLS[name], ["x is a numpy array", "torch.as_tensor(x, dtype=torch.float32)"], x=ARRAY)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("evaluate", "adversarial training", "active_learning", "summary")])
def test_every_entry_point_names_float64_inputs_to_float32_weights(name):
    remedied(CALLS[name], ["x is of torch.float64", "give x.float()"], x=X.double())


@pytest.mark.parametrize("name", ["Predictive", "PosteriorClassifier", "attack", "deep_ensemble", "guide"])
def test_every_entry_point_names_a_pandas_frame(name):
    remedied(CALLS[name], ["x is a pandas DataFrame", "torch.as_tensor(x.values"], x=frame())


def test_bayes_adapter_names_arrays_and_dtypes_in_its_loader():
    def adapt(x):
        return ab.bayes_adapter(nn.Linear(3, 2), nn.Linear(3, 2), [(x, CLASSES)], weight_decay=0.1, num_data=N, num_epochs=0)

    with pytest.raises(ValueError, match=r"Of a numpy array make a tensor, torch\.as_tensor\(array, dtype=torch\.float32\)"):
        adapt(ARRAY)
    remedied(adapt, "argument x is of torch.float64", x=X.double())


def test_an_integer_target_of_a_coin_is_named_by_what_trains_on_it():
    def ensemble(y):
        ab.deep_ensemble(logistic, (X, y), num_members=1, num_steps=1, optim=Adam({"lr": 0.1}))

    def adapt(y):
        class Coin(pyro.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.net = bayesianize(nn.Linear(3, 1))

            def forward(self, x, y=None):
                logits = self.net(x).squeeze(-1)
                with pyro.plate("data", len(x)):
                    pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)

        ab.bayes_adapter(Coin(), nn.Linear(3, 1), [(X, y)], num_data=N, num_epochs=1)

    for call in (ensemble, adapt):
        remedied(call, ["argument y is of torch.int64", "give y.float()"], y=CLASSES)


@pytest.mark.parametrize("make", [lambda s: ab.Predictive(network(), s), lambda s: ab.PosteriorClassifier(network(), s)])
def test_draws_that_are_arrays_are_named(make):
    draws = {name: value.numpy() for name, value in DRAWS.items()}
    with pytest.raises(
        ValueError, match=r"posterior_samples\['net.weight'\] is a numpy array: give a tensor, torch\.as_tensor\(posterior_s"
    ):
        make(draws)


def test_draws_for_distillation_that_are_arrays_are_named():
    guide = ab.AutoImplicit(logistic, generator=distill.MLPGenerator(noise=5, hidden=(5,)))
    with pytest.raises(ValueError, match=r"samples\['w'\] is a numpy array: give a tensor, torch\.as_tensor\(samples\['w'\]\)"):
        distill.APD(guide).fit({"w": np.zeros((200, 3)), "b": np.zeros(200)})


@pytest.mark.parametrize(
    "y,says",
    [
        (CLASSES.numpy(), ["y is a numpy array", "torch.as_tensor(y)"]),
        (Y, ["labels must be a tensor of integers, not torch.float32", "give y.long()"]),
        (nn.functional.one_hot(CLASSES, 2), ["labels must be [60]", "give y.argmax(-1)"]),
        (CLASSES.unsqueeze(-1), ["labels must be [60]", "give y.squeeze(-1)"]),
    ],
)
def test_an_attack_names_labels_in_another_form(y, says):
    remedied(lambda y: attacks.PGD(0.1, clip=None)(nn.Linear(3, 2), X, y), says, y=y)


# ------------------------------------------------------------------------------------------------------ functions of arrays

PROBS = torch.softmax(torch.randn(4, N, 2, generator=torch.Generator().manual_seed(0)), -1)
SCORES = PROBS[0, :, 0]

INTERVALS = diagnostics.gaussian_intervals(Y, 1.0)

FUNCTIONS = {
    "accuracy": (lambda probs, labels: diagnostics.accuracy(probs, labels), {"probs": PROBS, "labels": CLASSES}),
    "nll": (lambda probs, labels: diagnostics.nll(probs, labels), {"probs": PROBS, "labels": CLASSES}),
    "brier": (lambda probs, labels: diagnostics.brier(probs, labels), {"probs": PROBS, "labels": CLASSES}),
    "ece": (lambda probs, labels: diagnostics.ece(probs, labels), {"probs": PROBS, "labels": CLASSES}),
    "reliability": (lambda probs, labels: diagnostics.reliability(probs, labels), {"probs": PROBS, "labels": CLASSES}),
    "retained_accuracy": (
        lambda probs, labels, uncertainty: diagnostics.retained_accuracy(probs, labels, uncertainty=uncertainty),
        {"probs": PROBS, "labels": CLASSES, "uncertainty": SCORES},
    ),
    "predictive_entropy": (lambda probs: diagnostics.predictive_entropy(probs), {"probs": PROBS}),
    "mutual_information": (lambda probs: diagnostics.mutual_information(probs), {"probs": PROBS}),
    "model_variance": (lambda probs: diagnostics.model_variance(probs), {"probs": PROBS}),
    "variation_ratio": (lambda probs: diagnostics.variation_ratio(probs), {"probs": PROBS}),
    "vote_variation_ratio": (lambda probs: diagnostics.vote_variation_ratio(probs), {"probs": PROBS}),
    "expected_entropy": (lambda probs: diagnostics.expected_entropy(probs), {"probs": PROBS}),
    "acquire": (lambda probs: diagnostics.acquire(probs, 3), {"probs": PROBS}),
    "acquire_regression": (
        lambda mean, scale: diagnostics.acquire_regression(mean, scale, 3),
        {"mean": SCORES.expand(2, -1), "scale": 1.0 + SCORES.expand(2, -1).abs()},
    ),
    "batch_bald": (lambda probs: diagnostics.batch_bald(probs, 3), {"probs": PROBS}),
    "accuracy_under_attack": (diagnostics.accuracy_under_attack, {"attacked": PROBS, "labels": CLASSES}),
    "accuracy_curve": (
        lambda attacked, labels: diagnostics.accuracy_curve([0.1], [attacked], labels),
        {"attacked": PROBS, "labels": CLASSES},
    ),
    "softmax_robustness": (lambda probs: diagnostics.softmax_robustness(probs, probs), {"probs": PROBS}),
    "gradient_norms": (lambda gradients: diagnostics.gradient_norms(gradients), {"gradients": torch.ones(4, N, 3)}),
    "draw_quality": (lambda log_probs, labels: diagnostics.draw_quality(log_probs, labels), {"log_probs": PROBS.log(), "labels": CLASSES}),
    "auroc": (lambda in_scores, out_scores: diagnostics.auroc(in_scores, out_scores), {"in_scores": SCORES, "out_scores": SCORES}),
    "aupr_in": (lambda in_scores, out_scores: diagnostics.aupr_in(in_scores, out_scores), {"in_scores": SCORES, "out_scores": SCORES}),
    "aupr_out": (lambda in_scores, out_scores: diagnostics.aupr_out(in_scores, out_scores), {"in_scores": SCORES, "out_scores": SCORES}),
    "fpr95": (lambda in_scores, out_scores: diagnostics.fpr95(in_scores, out_scores), {"in_scores": SCORES, "out_scores": SCORES}),
    "detection": (lambda in_scores, out_scores: diagnostics.detection(in_scores, out_scores), {"in_scores": SCORES, "out_scores": SCORES}),
    "ood_detection": (lambda in_probs: diagnostics.ood_detection(in_probs, {"same": torch.as_tensor(in_probs)}), {"in_probs": PROBS}),
    "adversarial_detection": (
        lambda attacked_probs, hit: diagnostics.adversarial_detection(PROBS, attacked_probs, hit),
        {"attacked_probs": PROBS, "hit": CLASSES > 0},
    ),
    "rmse": (lambda mean, y: diagnostics.rmse(mean, y), {"mean": Y, "y": Y}),
    "r2": (lambda mean, y: diagnostics.r2(mean, y), {"mean": Y, "y": Y}),
    "gaussian_nll": (lambda mean, scale, y: diagnostics.gaussian_nll(mean, scale, y), {"mean": Y, "scale": Y + 1, "y": Y}),
    "gaussian_crps": (lambda mean, scale, y: diagnostics.gaussian_crps(mean, scale, y), {"mean": Y, "scale": Y + 1, "y": Y}),
    "gaussian_intervals": (lambda mean, scale: diagnostics.gaussian_intervals(mean, scale), {"mean": Y, "scale": Y + 1}),
    "regression_scores": (lambda mean, y: diagnostics.regression_scores(mean, 1.0, y, num_resamples=2), {"mean": Y, "y": Y}),
    "crps": (lambda draws, y: diagnostics.crps(draws, y), {"draws": PROBS[..., 0], "y": Y}),
    "central_intervals": (lambda draws: diagnostics.central_intervals(draws, [0.5]), {"draws": PROBS[..., 0]}),
    "log_predictive_density": (lambda log_probs: diagnostics.log_predictive_density(log_probs), {"log_probs": PROBS[..., 0]}),
    "coverage": (lambda y: diagnostics.coverage(INTERVALS, y), {"y": Y}),
    "interval_calibration": (lambda y: diagnostics.interval_calibration(INTERVALS, y), {"y": Y}),
    "mmd_test": (lambda x, y: diagnostics.mmd_test(x, y, 3), {"x": X, "y": X + 1}),
    "sliced_wasserstein": (lambda x, y: diagnostics.sliced_wasserstein(x, y, 3), {"x": X, "y": X + 1}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_tensors_says_that_it_was_given_a_numpy_array_and_how_to_make_a_tensor_of_it(name):
    function, tensors = FUNCTIONS[name]
    function(**tensors)
    for argument, tensor in tensors.items():
        remedied(function, [f"{argument} is a numpy array", f"torch.as_tensor({argument})"], **{**tensors, argument: tensor.numpy()})


def test_a_function_of_arrays_is_covered_here_or_takes_them():
    drawn = {name for name in diagnostics.__all__ if name.startswith("plot_")}
    others = {"to_inference_data", "save_netcdf", "interval_width"}  # which take arrays, or what another function returned
    functions = {name for name in diagnostics.__all__ if not isinstance(getattr(diagnostics, name), type)} - drawn - others
    assert functions - set(FUNCTIONS) == set(), "a function without a case"


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda a: diagnostics.plot_scores({"own": a}), r"scores\['own'\] is a numpy array"),
        (lambda a: diagnostics.plot_accuracy_robustness({"own": (a, a)}), r"points\['own'\]\[0\] is a numpy array"),
        (lambda a: diagnostics.plot_uncertainty_map(a, torch.arange(6.0), torch.arange(10.0)), "scores is a numpy array"),
        (lambda a: diagnostics.plot_uncertainty_map(torch.as_tensor(a), np.arange(6.0), torch.arange(10.0)), "x1 is a numpy array"),
    ],
)
def test_a_plot_says_that_it_was_given_a_numpy_array(call, says):
    with pytest.raises(ValueError, match=says + r": give a tensor, torch\.as_tensor"):
        call(SCORES.numpy())


def test_regression_takes_integers_as_it_did():
    assert run(sgld(regression), X, CLASSES).get_samples()["w"].isfinite().all()


@pytest.mark.parametrize(
    "value, most, says",
    [
        (2, None, "count=2: rows, an int >= 3"),
        (True, None, "count=True: rows, an int >= 3"),
        (4.0, None, "count=4.0: rows, an int >= 3"),
        (None, None, "count=None: rows, an int >= 3"),
        (6, 5, "count=6: rows, an int from 3 to 5"),
    ],
)
def test_a_count_is_an_int_in_its_range(value, most, says):
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        check_int(value, "count", 3, "rows", most)
    assert check_int(3, "count", 3) == 3 and check_int(5, "count", 3, most=5) == 5
    with pytest.raises(ValueError, match=r"^count=True: an int >= 1$"):
        check_int(True, "count", 1)


@pytest.mark.parametrize("kernel", [ab.SGLD, ab.SGAdaLD, ab.SGHMC, ab.MCLMC, ab.BAL], ids=lambda kernel: kernel.__name__)
def test_a_kernel_shows_all_its_arguments_in_help_and_completion(kernel):
    parameters = inspect.signature(kernel).parameters
    assert {"model", "batch_size", "num_steps_per_sample", "backend", "chunk_size", "batch_dependent"} <= set(parameters)
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    with pytest.raises(TypeError, match=f"there are {re.escape(', '.join(parameters))}$"):
        kernel(logistic, lr=0.1)
    given = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    needed = {"perturb": "x", "clip": (0.0, 1.0)} if kernel is ab.BAL else {}
    kernel(logistic, **given | needed)  # each is an argument, and takes its default


def test_an_option_that_is_handed_on_is_given_by_name():
    class Named(ab.SGHMC):
        def __init__(self, model, *, name, **options):
            self.name = name
            super().__init__(model, **options)

    parameters = inspect.signature(Named).parameters
    assert list(parameters)[:2] == ["model", "name"] and parameters["adaptive"].kind is inspect.Parameter.KEYWORD_ONLY
    inspect.signature(Named).bind(logistic, name="a", adaptive=True, backend="handlers")
    with pytest.raises(TypeError, match="too many positional"):
        inspect.signature(Named).bind(logistic, 0.1, name="a")


def test_dir_shows_what_is_public():
    assert set(dir(ab)) == {*ab.__all__, "__version__"}
    assert all(hasattr(ab, name) for name in dir(ab))
