"""A backtest's figures against their definitions, its pictures against its extremes, its files against their bytes."""

import json
import math
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from kallos.core.backtest_plots import plot_costs, plot_equity, plot_exposure, plot_trades, thin
from kallos.core.errors import ConfigError, DataError
from kallos.core.runs import file_hash
from kallos.evaluation.backtest_files import backtest_figures, draw_png, write_backtest, write_page, write_table
from kallos.evaluation.performance import (
    COST_COLUMNS,
    cost_breakdown,
    drawdowns,
    equity_curve,
    figures_of_merit,
    monthly_returns,
    rolling_sharpe,
)

DELTA = {"1m": "1min", "1h": "1h", "1d": "1D"}
TRADE = {
    "asset_id": "BTC",
    "side": "long",
    "entry_ts": pd.Timestamp("2023-01-01", tz="UTC"),
    "exit_ts": pd.Timestamp("2023-01-02", tz="UTC"),
    "bars": 1,
    "net_pnl": 1.0,
    "return": 0.01,
    "exit_reason": "market",
    "is_open": False,
}


def account(
    values: list[float], *, timeframe: str = "1d", start: str = "2023-01-01", **columns: object
) -> pd.DataFrame:
    """An Equity table of those closes."""
    length = pd.Timedelta(DELTA[timeframe])
    ts = pd.date_range(pd.Timestamp(start, tz="UTC") + length, periods=len(values), freq=length)
    rows = pd.DataFrame({"ts": ts, "equity": np.array(values, float), "gross_exposure": 1.0, "net_exposure": 1.0})
    return rows.assign(**dict.fromkeys(COST_COLUMNS, 0.0)).assign(**columns)


def trades_of(*earned: float, is_open: list[bool] | None = None) -> pd.DataFrame:
    """A Trades table of those net results."""
    rows = pd.DataFrame([TRADE | {"net_pnl": value, "return": value / 100} for value in earned], columns=[*TRADE])
    return rows.assign(is_open=is_open if is_open is not None else False)


def walk(n: int = 700, seed: int = 0, spread: float = 0.02) -> list[float]:
    rng = np.random.default_rng(seed)
    return [*(100 * np.exp(np.cumsum(rng.normal(0.0003, spread, n))))]


def reference(values: list[float], per_year: float) -> dict[str, float]:
    """The ratios by plain Python, from the definitions."""
    path = [100.0, *values]
    returns = [after / before - 1 for before, after in pairwise(path)]
    mean, spread = math.fsum(returns) / len(returns), statistics.stdev(returns)
    losses = math.sqrt(math.fsum(min(r, 0) ** 2 for r in returns) / len(returns))
    peak, worst = path[0], 0.0
    for value in path:
        peak = max(peak, value)
        worst = min(worst, value / peak - 1)
    growth = (values[-1] / 100) ** (per_year / len(returns)) - 1
    ratios = {"sharpe": mean / spread * math.sqrt(per_year), "sortino": mean / losses * math.sqrt(per_year)}
    return ratios | {
        "total_return": values[-1] / 100 - 1,
        "cagr": growth,
        "volatility": spread * math.sqrt(per_year),
        "max_drawdown": worst,
        "calmar": growth / -worst,
    }


@pytest.mark.parametrize(("timeframe", "per_year"), [("1d", 365), ("1h", 8760)])
@pytest.mark.parametrize("seed", range(3))
def test_the_ratios_are_their_definitions(timeframe: str, per_year: int, seed: int):
    values = walk(seed=seed, spread=0.02 if timeframe == "1d" else 0.002)
    found = figures_of_merit(account(values, timeframe=timeframe), trades_of(), timeframe=timeframe, capital=100.0)
    for name, value in reference(values, per_year).items():
        assert found[name] == pytest.approx(value, rel=1e-9), name
        assert found[f"gross_{name}"] == pytest.approx(value, rel=1e-9), name  # nothing was paid
    assert found["years"] == pytest.approx(len(values) / per_year)


NASTY = {
    "nothing moves": [100.0] * 9,
    "one bar": [120.0],
    "one bar that loses all": [0.0],
    "one bar that loses more than all": [-50.0],
    "the same gain each bar": [*(100 * 1.01 ** np.arange(1, 40))],
    "a gain of one rounding error": [100.0, np.nextafter(100, 101), 100.0],
    "only gains": [101.0, 104.0, 108.0],
    "only losses": [99.0, 95.0, 90.0],
    "gone at the end": [120.0, 80.0, 0.0],
    "gone, and back": [120.0, -80.0, 300.0],
    "two returns that repeat": [150.0, 225.0, 225 * 1.5, 225 * 1.5 * 0.5] * 2,
    "an enormous gain": [1e3, 1e150, 1e300],
    "to a penny": [1e-3, 1e-150, 1e-300],
    "a spike": [100.0, 1e12, 100.0, 100.0],
}


@pytest.mark.parametrize("timeframe", ["1m", "1d"])
@pytest.mark.parametrize("values", NASTY.values(), ids=NASTY)
def test_what_has_no_answer_is_nan_without_a_warning_and_never_infinite(values: list[float], timeframe: str):
    table = account(values, timeframe=timeframe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = figures_of_merit(
            table, trades_of(), timeframe=timeframe, capital=100.0, n_trials=9, trial_variance=0.1, fills=None
        )
        curve = equity_curve(table, timeframe=timeframe, capital=100.0)
        tables = [monthly_returns(curve), drawdowns(curve)[["depth", "days"]], rolling_sharpe(curve, window=2)]
        backtest_figures(table, trades_of(), timeframe=timeframe, capital=100.0)
    for name, value in figures.items():
        assert not (isinstance(value, float) and math.isinf(value)), name
    assert not any(np.isinf(table.to_numpy(float)).any() for table in tables)
    assert -1 <= figures["max_drawdown"] <= 0


def test_an_account_that_is_gone_stays_gone():
    found = figures_of_merit(account([300, 900, -5, 9000]), trades_of(), timeframe="1d", capital=100.0)
    assert [found[name] for name in ("total_return", "cagr", "max_drawdown", "calmar")] == [-1] * 4
    assert found["is_ruined"] and math.isnan(found["sharpe"]) and math.isnan(found["probabilistic_sharpe"])
    assert (found["max_drawdown_bars"], found["max_drawdown_is_over"]) == (2, False)
    assert found["end_equity"] == 9000


@pytest.mark.parametrize(
    ("table", "capital", "said"),
    [
        (account([]), 100.0, "without a bar"),
        (account([1.0, 2.0]).iloc[::-1], 100.0, "order of time"),
        (account([1.0, 2.0]).assign(ts=pd.Timestamp("2023", tz="UTC")), 100.0, "order of time"),
        (account([1.0, math.inf]), 100.0, "without a value"),
        (account([1.0]), -1.0, "begins with capital"),
        (account([1.0]), math.nan, "begins with capital"),
    ],
)
def test_what_is_no_account_is_refused(table: pd.DataFrame, capital: float, said: str):
    with pytest.raises((ConfigError, DataError), match=said):
        equity_curve(table, timeframe="1d", capital=capital)


@pytest.mark.parametrize("seed", range(8))
def test_drawdowns_are_those_of_a_search_bar_by_bar(seed: int):
    rng = np.random.default_rng(seed)
    path = [
        100.0,
        *(100 + np.cumsum(rng.integers(-2, 3, 300))).clip(10),
    ]  # whole steps, so that old peaks are met again
    expected, at = [], 0
    while at < len(path) - 1:
        if path[at + 1] >= path[at]:
            at += 1
            continue
        end = next((later for later in range(at + 1, len(path)) if path[later] >= path[at]), None)
        stop = len(path) - 1 if end is None else end
        low = min(range(at + 1, stop + 1), key=path.__getitem__)
        expected.append((at, low, stop, path[low] / path[at] - 1, end is not None))
        at = stop
    curve = equity_curve(account(path[1:]), timeframe="1d", capital=100.0)
    found = drawdowns(curve)
    position = {when: number for number, when in enumerate(curve.index)}
    assert [position[when] for when in found["start"]] == [row[0] for row in expected]
    assert [position[when] for when in found["trough"]] == [row[1] for row in expected]
    assert found["bars"].tolist() == [row[2] - row[0] for row in expected]
    assert found["depth"].tolist() == pytest.approx([row[3] for row in expected])
    assert found["is_over"].tolist() == found["end"].notna().tolist() == [row[4] for row in expected]


def test_the_last_bar_of_a_month_belongs_to_it():
    days = 366 + 31  # 2024 has a 29th of February
    table = account([*(100.0 + np.arange(1, days + 1))], start="2024-01-01")
    months = monthly_returns(equity_curve(table, timeframe="1d", capital=100.0))
    assert months.loc[2024, 1] == pytest.approx(31 / 100)
    assert months.loc[2024, 2] == pytest.approx(29 / 131)
    assert months.loc[2024, "year"] == pytest.approx(3.66)
    assert months.loc[2025].notna().tolist() == [True] + [False] * 11 + [True]
    assert (1 + months[[*range(1, 13)]].fillna(0)).prod(axis=1).tolist() == pytest.approx((1 + months["year"]).tolist())


def test_a_month_and_a_year_without_a_bar_are_empty():
    table = account([110.0, 121.0])
    table["ts"] = pd.to_datetime(["2021-03-05", "2023-03-05"], utc=True)
    months = monthly_returns(equity_curve(table, timeframe="1d", capital=100.0))
    assert months.index.tolist() == [2021, 2022, 2023]
    assert months.loc[2022].isna().all()
    assert months["year"].iloc[[0, 2]].tolist() == pytest.approx([0.1, 0.1])


def test_costs_and_gross_figures_are_the_account_without_what_it_paid():
    paid = {"fees": [1.0, 0.0, 2.0], "funding": [0.0, -0.5, 0.0], "liquidation": [0.0, 0.0, 4.0]}
    table = account([99.0, 109.5, 100.0], **paid)
    found = figures_of_merit(table, trades_of(3.0, -1.5), timeframe="1d", capital=100.0)
    assert (found["gross_pnl"], found["net_pnl"], found["costs"]) == (6.5, 0, 6.5)
    assert (found["cost_share"], found["costs_of_capital"]) == (1, 0.065)
    assert (found["costs_fees"], found["costs_funding"], found["costs_liquidation"]) == (3, -0.5, 4)
    free = [100, 110, 106.5]
    assert found["gross_max_drawdown"] == pytest.approx(106.5 / 110 - 1)
    assert found["gross_sharpe"] == pytest.approx(reference(free, 365)["sharpe"])
    assert cost_breakdown(table, capital=100.0)["amount"].tolist() == [6.5, -3, 0, 0, 0.5, 0, -4, 0]
    assert math.isnan(figures_of_merit(account([90.0]), trades_of(), timeframe="1d", capital=100.0)["cost_share"])


def test_trades_that_are_open_or_even_neither_win_nor_lose():
    trades = trades_of(4.0, -1.0, 0.0, 50.0, is_open=[False, False, False, True])
    found = figures_of_merit(account([100.0, 101.0]), trades, timeframe="1d", capital=100.0)
    assert (found["trades"], found["open_trades"]) == (3, 1)
    assert (found["hit_rate"], found["profit_factor"]) == (pytest.approx(1 / 3), 4)
    alone = figures_of_merit(account([100.0]), trades_of(5.0), timeframe="1d", capital=100.0)
    assert alone["hit_rate"] == 1 and math.isnan(alone["profit_factor"])


def test_turnover_and_exposure_by_hand():
    table = account([100.0, 300.0] * 365, gross_exposure=[0.0, 0.5] * 365)
    fills = pd.DataFrame({"notional": [100.0, 300.0, 400.0]})
    found = figures_of_merit(table, trades_of(), timeframe="1d", capital=100.0, fills=fills)
    assert found["turnover"] == pytest.approx(800 / 200 / 2)
    assert (found["exposure"], found["mean_gross_exposure"]) == (0.5, 0.25)
    assert math.isnan(figures_of_merit(table, trades_of(), timeframe="1d", capital=100.0)["turnover"])


@pytest.mark.parametrize("n", [2999, 3000, 3001, 3005, 9000, 100_003])
def test_thinning_loses_no_extreme(n: int):
    rng = np.random.default_rng(n)
    values = pd.Series(rng.normal(size=n), pd.date_range("2020", periods=n, freq="1min", tz="UTC"))
    values.iloc[rng.integers(0, n, 50)] = np.nan
    values.iloc[[n // 3, n // 2]] = [90.0, -90.0]
    drawn = thin(values)
    assert len(drawn) <= 3000 and drawn.index.is_unique and drawn.index.is_monotonic_increasing
    assert (drawn.max(), drawn.min()) == (90, -90)
    assert (drawn.index[0], drawn.index[-1]) == (values.index[0], values.index[-1])
    assert np.array_equal(values[drawn.index], drawn, equal_nan=True)


def test_a_drawdown_between_the_drawn_bars_is_drawn():
    n = 300_000
    values = np.linspace(100, 200, n)
    values[150_001] = 20.0
    curve = pd.Series(values, pd.date_range("2020", periods=n, freq="1min", tz="UTC"))
    figure = plot_equity(curve)
    assert min(figure.data[0].y) == 20 and min(figure.data[1].y) < -80
    assert "-86.7 % below the peak" in figure.layout.title.text
    assert min(line.get_ydata().min() for line in draw_png(curve, title="x").axes[0].lines) == 20


DRAWN = {
    "equity": lambda: plot_equity(
        pd.Series([1.0, 2, 3], pd.date_range("2023", periods=3, tz="UTC")), marked="in-sample"
    ),
    "exposure": lambda: plot_exposure(account([1.0, 2.0]), marked="in-sample"),
    "trades": lambda: plot_trades(trades_of(1.0), marked="in-sample"),
    "no trades": lambda: plot_trades(trades_of(), marked="in-sample"),
    "costs": lambda: plot_costs(cost_breakdown(account([90.0]), capital=100.0), marked="in-sample"),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_every_figure_is_stamped(draw: Callable[[], go.Figure]):
    figure = draw()
    assert "IN-SAMPLE" in figure.layout.title.text
    assert "IN-SAMPLE" in [note.text for note in figure.layout.annotations]


def write_some(folder: Path, *, in_sample: bool = True) -> dict[str, Path]:
    values = walk(900)
    table = account(values, fees=0.25, gross_exposure=[0.0, 0.7, 1.0] * 300)
    trades = trades_of(*np.diff(values)[:40], is_open=[False] * 39 + [True])
    trades["exit_ts"] = trades["exit_ts"].where(~trades["is_open"])
    metrics = figures_of_merit(table, trades, timeframe="1d", capital=100.0)
    curve = equity_curve(table, timeframe="1d", capital=100.0)
    words = {"heading": "gru on BTC </script><b>", "sentence": "1 < 2 & so on"}
    beside = {
        "others": {"<i>hold</i></script>": curve.rolling(9, min_periods=1).mean()},
        "shuffled": pd.DataFrame({1: curve}),
    }
    return write_backtest(folder, table, trades, metrics, in_sample=in_sample, **words, **beside)


def test_two_processes_write_the_same_bytes(root: Path, tmp_path: Path):
    code = "import sys; sys.path[:0] = ['tests']; import test_performance as t; t.write_some(t.Path(sys.argv[1]))"
    surroundings = os.environ | {"TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "MPLBACKEND": "svg"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, cwd=root, env=surroundings)
    written = write_some(tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([*written, "plotly.min.js"])
    for name in [*written, "plotly.min.js"]:
        assert len({file_hash(tmp_path / folder / name) for folder in ("a", "c")}) == 1, name


def test_in_sample_is_told_in_every_file(tmp_path: Path):
    seen, unseen = write_some(tmp_path / "seen"), write_some(tmp_path / "unseen", in_sample=False)
    for name in ("trades.csv", "equity.csv"):
        assert pd.read_csv(seen[name])["in_sample"].all() and not pd.read_csv(unseen[name])["in_sample"].any()
    told = [json.loads(paths["backtest_metrics.json"].read_text())["in_sample"] for paths in (seen, unseen)]
    assert told == [True, False]
    assert seen["backtest.html"].read_text().count("IN-SAMPLE") > 12
    assert "IN-SAMPLE" not in unseen["backtest.html"].read_text()
    assert file_hash(seen["equity_curve.png"]) != file_hash(unseen["equity_curve.png"])


def test_names_cannot_break_the_page(tmp_path: Path):
    text = write_some(tmp_path)["backtest.html"].read_text()
    assert "<h1>gru on BTC &lt;/script&gt;&lt;b&gt;</h1>" in text and "1 &lt; 2 &amp; so on" in text
    assert "<i>hold</i></script>" not in text
    assert text.count("</script>") == text.count("<script")


def test_tables_give_every_number_and_time_back(tmp_path: Path):
    rng = np.random.default_rng(0)
    floats = np.r_[
        0.1 + 0.2, 1e-300, -0.0, 1e22, 123456789.123456789, np.nextafter(1, 2), math.nan, rng.normal(size=500)
    ]
    ts = pd.date_range("2022-03-27 00:30", periods=len(floats), freq="37min", tz="Europe/Berlin")  # clocks change
    path = write_table(tmp_path / "t.csv", pd.DataFrame({"ts": ts, "value": floats}), in_sample=False)
    back = pd.read_csv(path, float_precision="round_trip")
    assert back["value"].to_numpy().tobytes() == floats.tobytes()
    assert back["ts"].str.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ").all()
    assert (pd.to_datetime(back["ts"]) == ts).all()


def test_a_page_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = {"heading": "a", "sentence": "b", "in_sample": False}
    page = write_page(tmp_path / "backtest.html", {"one": go.Figure()}, **words)
    before = file_hash(page)
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="No space"):
        write_page(page, {"two": go.Figure()}, **words)
    assert file_hash(page) == before and not [*tmp_path.glob(".*")]


def test_a_million_bars_are_drawn_small(tmp_path: Path):
    n = 1_000_000
    values = 100 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, 0.0005, n)))
    table = account(values, timeframe="1m")
    figures = backtest_figures(table, trades_of(*np.linspace(-1, 1, 20_000)), timeframe="1m", capital=100.0)
    page = write_page(tmp_path / "backtest.html", figures, heading="a", sentence="b", in_sample=False)
    assert page.stat().st_size < 1_500_000
    assert figures_of_merit(table, trades_of(), timeframe="1m", capital=100.0)["bars"] == n
