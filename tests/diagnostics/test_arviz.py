from __future__ import annotations

import types

import arviz as az
import matplotlib
import numpy as np
import pytest
import torch
import xarray

from pyro_advbayes.diagnostics import save_netcdf, to_inference_data

matplotlib.use("Agg")

CHAINS, DRAWS, N = 3, 50, 8
V0 = int(az.__version__.split(".")[0]) == 0


def groups() -> dict[str, dict[str, torch.Tensor | np.ndarray]]:
    return {
        "posterior": {"mu": torch.randn(CHAINS, DRAWS), "w": torch.randn(CHAINS, DRAWS, 2, 3)},
        "sample_stats": {"energy": torch.randn(CHAINS, DRAWS), "diverging": torch.zeros(CHAINS, DRAWS, dtype=torch.bool)},
        "posterior_predictive": {"obs": torch.randint(4, (CHAINS, DRAWS, N))},
        "log_likelihood": {"obs": -1 - torch.rand(CHAINS, DRAWS, N)},
        "observed_data": {"obs": torch.randint(4, (N,))},
    }


def test_every_group_holds_the_values_it_was_given():
    given = groups()
    data = to_inference_data(given)
    for group, variables in given.items():
        assert set(data[group].data_vars) == set(variables)
        for name, values in variables.items():
            assert np.array_equal(data[group][name].values, values.numpy())
            sampled = group != "observed_data"
            assert data[group][name].dims[:2] == ("chain", "draw") if sampled else "draw" not in data[group][name].dims


def test_dims_and_coords_name_what_follows_chains_and_draws():
    data = to_inference_data(groups(), dims={"w": ("out", "in"), "obs": ["row"]}, coords={"out": ["a", "b"]})
    assert data["posterior"]["w"].dims == ("chain", "draw", "out", "in")
    assert data["posterior"]["w"].coords["out"].values.tolist() == ["a", "b"]
    for group in ("posterior_predictive", "log_likelihood"):
        assert data[group]["obs"].dims == ("chain", "draw", "row")
    assert data["observed_data"]["obs"].dims == ("row",)


def test_a_log_likelihood_may_lack_the_dimensions_of_an_event():
    given = groups()
    given["observed_data"]["obs"] = torch.randn(N, 2)
    given["posterior_predictive"]["obs"] = torch.randn(CHAINS, DRAWS, N, 2)
    data = to_inference_data(given, dims={"obs": ["row", "axis"]})
    assert data["posterior_predictive"]["obs"].dims == ("chain", "draw", "row", "axis")
    assert data["log_likelihood"]["obs"].dims == ("chain", "draw", "row")


@pytest.mark.parametrize("values", [torch.ones(2, 4).bfloat16(), torch.ones(2, 4).half(), np.ones((2, 4), np.float16)])
def test_short_floating_types_become_float32(values):
    assert to_inference_data({"posterior": {"w": values}})["posterior"]["w"].dtype == np.float32


def test_other_types_are_kept_and_gradients_dropped():
    values = {"a": torch.ones(2, 4, dtype=torch.float64, requires_grad=True), "b": torch.ones(2, 4, dtype=torch.int16)}
    data = to_inference_data({"posterior": values})
    assert data["posterior"]["a"].dtype == np.float64 and data["posterior"]["b"].dtype == np.int16


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_arviz_summarises_plots_and_compares_it():
    given = groups()
    data = to_inference_data(given)
    summary = az.summary(data)
    assert len(summary) == 1 + 2 * 3
    assert summary.loc["mu", "mean"] == pytest.approx(given["posterior"]["mu"].mean().item(), abs=1e-3)
    loo = az.loo(data)
    assert loo.n_data_points == N and loo.n_samples == CHAINS * DRAWS
    # Leaving one out costs something: the estimate lies below the log of the mean likelihood.
    log_mean = torch.logsumexp(given["log_likelihood"]["obs"].flatten(0, 1), 0) - np.log(CHAINS * DRAWS)
    assert (loo.elpd_loo if V0 else loo.elpd) < log_mean.sum().item()
    figure = az.plot_trace(data)
    assert figure.shape == (2, 2) if V0 else {"mu", "w"} <= set(figure.viz["plot"])
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"posteriors": {"w": torch.ones(2, 4)}}, "unknown group 'posteriors'"),
        ({"posterior": {"mu": torch.ones(CHAINS)}}, r"'mu' in 'posterior' must be \[chains, draws, ...\], not \[3\]"),
        ({"posterior": {"mu": torch.ones(CHAINS, DRAWS), "w": torch.ones(CHAINS, 7)}}, "'w' in 'posterior' is .3, 7."),
        ({"log_likelihood": {"obs": torch.ones(2, DRAWS, N)}}, "'obs' in 'log_likelihood' is .2, 50.*'mu' in 'posterior'"),
        (
            {"prior": {"w": torch.ones(1, 7)}, "prior_predictive": {"obs": torch.ones(1, 9, N)}},
            "'obs' in 'prior_predictive' is .1, 9..*'w' in 'prior' is .1, 7.",
        ),
    ],
)
def test_groups_that_do_not_fit_are_named(change, reason):
    with pytest.raises(ValueError, match=reason):
        to_inference_data(groups() | change)


def test_a_prior_may_have_another_number_of_draws():
    data = to_inference_data(groups() | {"prior": {"w": torch.ones(1, 7, 2, 3)}, "constant_data": {"scale": torch.ones(2)}})
    assert data["prior"]["w"].shape == (1, 7, 2, 3) and data["constant_data"]["scale"].shape == (2,)


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ({"v": ["out"]}, "'v', which is in no group"),
        ({"w": ["out"]}, "1 dimensions of 'w', which has 2 in 'posterior'"),
        ({"w": ["out", "in", "more"]}, "3 dimensions of 'w', which has 2 in 'posterior'"),
        ({"obs": []}, "0 dimensions of 'obs', which has 1"),
        ({"obs": ["row", "axis"]}, "2 dimensions of 'obs', which has 1 in 'posterior_predictive'"),
    ],
)
def test_dims_that_do_not_fit_are_named(dims, reason):
    with pytest.raises(ValueError, match=reason):
        to_inference_data(groups(), dims=dims)


def test_nothing_to_convert_is_refused():
    with pytest.raises(ValueError, match="no variables"):
        to_inference_data({"posterior": {}})


def test_a_saved_file_gives_back_every_group(tmp_path):
    given = groups()
    given["posterior"]["w"] = given["posterior"]["w"].bfloat16()
    data = to_inference_data(given, dims={"obs": ["row"]})
    path = save_netcdf(data, tmp_path / "posterior.nc")
    assert path == tmp_path / "posterior.nc"
    back = az.from_netcdf(path)
    for group in given:
        assert back[group].equals(data[group])
    assert [file.name for file in tmp_path.iterdir()] == ["posterior.nc"]


def test_a_file_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "posterior.nc"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_netcdf(to_inference_data(groups()), path)
    assert path.read_text() == "precious"
    save_netcdf(to_inference_data(groups()), path, overwrite=True)
    assert len(az.from_netcdf(path).posterior.draw) == DRAWS


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        save_netcdf(to_inference_data(groups()), tmp_path / "nowhere" / "posterior.nc")


def test_a_write_that_fails_leaves_the_old_file_and_no_new_one(tmp_path):
    def to_netcdf(path: str, engine: str) -> None:
        with open(path, "w") as file:
            file.write("half of")
        raise OSError("no space left")

    path = tmp_path / "posterior.nc"
    path.write_text("precious")
    with pytest.raises(OSError, match="no space"):
        save_netcdf(types.SimpleNamespace(to_netcdf=to_netcdf), path, overwrite=True)
    assert path.read_text() == "precious"
    assert [file.name for file in tmp_path.iterdir()] == ["posterior.nc"]


def arviz_1(data, *, name=None, sample_dims=None, save_warmup=None, index_origin=None, coords=None, dims=None, **rest):
    """A stand-in with the signature of ArviZ 1.3's ``from_dict`` (the rest: pred_dims, pred_coords, check_conventions and
    attrs), whose own packages need Python 3.12: one level of groups, a ``DataTree``."""
    tree = {}
    for group, variables in data.items():
        lead = [] if "data" in group else ["chain", "draw"]
        tree[group] = xarray.Dataset(
            {
                name: ([*lead, *((dims or {}).get(name) or [f"{name}_dim_{i}" for i in range(v.ndim - len(lead))])], v)
                for name, v in variables.items()
            },
            coords=None if coords is None else {k: v for k, v in coords.items() if k in {"out"} and group == "posterior"},
        )
    return xarray.DataTree.from_dict(tree, name=name)


def test_arviz_1_is_given_its_nested_dictionary_and_its_tree_can_be_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(az, "__version__", "1.3.1")
    monkeypatch.setattr(az, "from_dict", arviz_1)
    given = groups()
    given["posterior"]["mu"] = given["posterior"]["mu"].bfloat16()
    tree = to_inference_data(given | {"prior": {}}, dims={"w": ["out", "in"]}, coords={"out": ["a", "b"]})
    assert isinstance(tree, xarray.DataTree)
    assert set(tree.children) == set(given)  # and no group without variables
    assert tree["posterior"]["w"].dims == ("chain", "draw", "out", "in")
    assert tree["posterior"]["mu"].dtype == np.float32
    assert tree["observed_data"]["obs"].shape == (N,)
    path = save_netcdf(tree, tmp_path / "posterior.nc")
    with xarray.open_datatree(path, engine="h5netcdf") as back:
        assert back.equals(tree)
