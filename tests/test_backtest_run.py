"""The backtest as a user runs it: from a tuned model to a folder of results, and what is refused on the way."""

import json
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from kallos.core.errors import KallosError
from kallos.core.runs import file_hash, read_json, verify_manifest, write_json
from kallos.data.records import write_funding
from kallos.data.store import read_bars, write_bars
from kallos.data.tables import connect
from kallos.evaluation.backtest_runs import run_backtest
from kallos.evaluation.backtest_settings import BacktestSettings
from tests.study_runs import END, run_command, start_command, write_market

DAY = pd.Timedelta(days=1)
FILES = ["trades.csv", "equity.csv", "backtest_metrics.json", "equity_curve.png", "backtest.html"]
LINEAR = {"model_name": "linear", "hyperparameters": {"input_chunk_length": 5, "alpha": 10.0}}


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder}/data/kallos.db"


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A working folder with a sample market in its database."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "data").mkdir()
    write_market(url_of(folder))
    return folder


def bars_of(folder: Path) -> pd.DataFrame:
    engine = connect(url_of(folder))
    bars = read_bars(engine, asset_id="BTC", timeframe="1d")
    engine.dispose()
    return bars


def forecasts_on(bars: pd.DataFrame, y_pred: np.ndarray) -> pd.DataFrame:
    """Forecasts of each bar's log return by the close before it; of as many last bars as there are numbers."""
    made, n = bars.iloc[-len(y_pred) - 1 :].reset_index(drop=True), len(y_pred)
    moved = np.diff(np.log(made["close"]))
    return pd.DataFrame({
        "ts": made["ts"].iloc[:n] + DAY, "target_ts": made["ts"].iloc[:n] + 2 * DAY, "asset_id": "BTC",
        "timeframe": "1d", "model": "seer", "fold": 0, "horizon": 1, "target": "log_return",
        "close_at_ts": made["close"].iloc[:n], "y_true": moved, "y_pred": y_pred, "y_naive": 0.0,
    })  # fmt: skip


def stated(folder: Path, table: pd.DataFrame, name: str, **more) -> BacktestSettings:
    """The settings of a backtest of those forecasts, in a folder of their own."""
    place = folder / name / "forecasts"
    place.mkdir(parents=True, exist_ok=True)
    table.to_parquet(place / "forecasts.parquet")
    values = {"forecasts": place / "forecasts.parquet", "seen_until": "2020-01-01", "n_shuffles": 20}
    return BacktestSettings.from_values(values | {"sensitivity": False} | more)


@pytest.fixture(scope="module")
def seer(house) -> pd.DataFrame:
    """Forecasts that know the coming bar."""
    bars = bars_of(house)
    return forecasts_on(bars, np.diff(np.log(bars["close"].to_numpy()))[-400:])


# From a tuned model through the command and its page


@pytest.fixture(scope="module")
def traded(house) -> tuple[Path, str]:
    """The folder in which a model was evaluated and traded by the commands, and what the last one said."""
    write_json(house / "linear.json", LINEAR)
    model = ["--params-file", "linear.json", "--asset-id", "BTC", "--end-date", END, "--model-name", "linear"]
    run_command(house, "evaluate", *model, "--schemes", "walk-forward", "--importance-repeats", 0, "--no-report")
    words = ["--forecasts", "linear_BTC_evaluation/test_forecasts.parquet", "--n-shuffles", 5]
    return house, run_command(house, "backtest", *words)


def test_the_command_leaves_every_file_and_its_page(traded):
    house, said = traded
    folder = house / "linear_BTC_backtest"
    assert {*FILES, "manifest.json"} <= {path.name for path in folder.iterdir()}
    manifest = verify_manifest(folder / "manifest.json")
    assert manifest["kind"] == "backtest" and sorted(manifest["artifacts"]) == sorted(FILES)
    assert manifest["data"]["seen"]["in_sample"] is False
    page = nbformat.read(house / "linear_BTC_backtest.ipynb", 4)
    assert not [one for cell in page.cells for one in cell.get("outputs", []) if one.output_type == "error"]
    found = read_json(folder / "backtest_metrics.json")
    assert found["sentence"] in said and str(folder.relative_to(house)) in said
    assert "buy and hold" in found["sentence"] and "cannot be charged" in found["search"]
    equity = pd.read_csv(folder / "equity.csv")
    assert not equity["in_sample"].any() and pd.Timestamp(equity["ts"][0]) >= pd.Timestamp(END, tz="UTC")
    assert np.allclose(equity["cash"] + equity["position_value"], equity["equity"], rtol=1e-12)
    trades = pd.read_csv(folder / "trades.csv")
    assert trades["net_pnl"].sum() == pytest.approx(found["end_equity"] - found["capital"])


def test_a_backtest_is_a_look_at_the_test_rows(traded):
    looks = read_json(traded[0] / "BTC_1d_test_looks.json")["looks"]
    assert len(looks) == 1 and len(looks[0]["strategies"]) == 1


def test_the_same_run_twice_gives_the_same_bytes(traded):
    house, _ = traded
    folder = house / "linear_BTC_backtest"
    before = {name: file_hash(folder / name) for name in FILES}
    words = ["--forecasts", "linear_BTC_evaluation/test_forecasts.parquet", "--n-shuffles", 5, "--no-report"]
    run_command(house, "backtest", *words)
    assert {name: file_hash(folder / name) for name in FILES} == before


def test_rows_that_the_model_has_seen_are_refused_or_marked(traded):
    house, _ = traded
    seen = "linear_BTC_walk-forward/forecasts.parquet"
    process = start_command(house, "backtest", "--forecasts", seen)
    said, problem = process.communicate(timeout=120)
    assert process.returncode == 2 and not said
    assert "are about rows that were seen" in problem and "--in-sample" in problem and "Traceback" not in problem
    more = ["--in-sample", "--n-shuffles", 2, "--no-sensitivity", "--no-report", "--output-path", "marked"]
    assert "IN SAMPLE" in run_command(house, "backtest", "--forecasts", seen, *more)
    folder = house / "marked" / "linear_BTC_backtest"
    assert all(pd.read_csv(folder / f"{name}.csv")["in_sample"].all() for name in ("equity", "trades"))
    assert read_json(folder / "backtest_metrics.json")["in_sample"] is True
    assert "IN SAMPLE" in (folder / "backtest.html").read_text().upper()


# What can be known another way


def test_perfect_foresight_earns_what_the_bars_allow_net_of_costs(house, seer):
    costs = {"taker_fee": 0.0007, "half_spread": 0.0003, "slippage": 0.0002}
    run = run_backtest(stated(house, seer, "foresight", **costs), db=url_of(house))
    opens = bars_of(house)["open"].to_numpy()[-400:]  # of each bar that was forecast
    closes = bars_of(house)["close"].to_numpy()[-400:]
    long = np.expm1(seer["y_pred"].to_numpy()) > 2 * sum(costs.values())
    enter, leave = 1.0007 * (1 + 0.0005), 0.9993 * (1 - 0.0005)
    capital, held = 10_000.0, False
    for price, wanted in zip(opens, long, strict=True):
        if wanted != held:
            capital, held = capital * (leave * price if held else 1 / (enter * price)), wanted
    capital = capital * closes[-1] if held else capital
    assert run.result.values[-1] == pytest.approx(capital, rel=1e-9)
    assert run.figures["total_return"] > 1 and run.figures["shuffled_that_earn_less"] == 1.0


def test_the_naive_twin_never_trades_and_the_market_is_bought_once(house, seer):
    run = run_backtest(stated(house, seer, "twins"), db=url_of(house))
    assert (run.others["naive forecast"] == 10_000).all()
    bars = bars_of(house)
    held = 10_000 / (1.0001 * 1.001) / bars["open"].iloc[-400] * bars["close"].iloc[-1]
    assert run.others["buy and hold"].iloc[-1] == pytest.approx(held, rel=1e-9)


def test_a_signal_shifted_into_the_future_is_caught_by_the_audit(house):
    bars = bars_of(house)
    moves = np.diff(np.log(bars["close"].to_numpy()))
    rng = np.random.default_rng(0)
    honest = 0.2 * moves[:-1] + rng.normal(0, 0.002, len(moves) - 1)  # made at the close of the move it rests on
    table = forecasts_on(bars, honest)
    for name, shift, code in (("honest", 0, 0), ("shifted", 1, 5)):
        shifted = table.assign(y_pred=table["y_pred"].shift(-shift)).dropna(subset="y_pred")
        shifted.to_parquet(house / f"{name}.parquet")
        process = start_command(house, "audit", "--forecasts", f"{name}.parquet")
        said, problem = process.communicate(timeout=120)
        assert process.returncode == code, said + problem


def test_a_strategy_of_ones_own_is_a_function_of_forecasts(house, seer):
    def always(forecasts: pd.DataFrame) -> pd.DataFrame:
        assert forecasts["y_true"].isna().all()  # what came is hidden from it
        return forecasts[["ts", "asset_id"]].head(1).assign(kind="market", unit="fraction", size=1.0)

    run = run_backtest(stated(house, seer, "own"), db=url_of(house), strategy=always)
    assert run.result.values[-1] == pytest.approx(run.others["buy and hold"].iloc[-1], rel=1e-12)


def test_a_perpetual_pays_its_funding_and_says_where_none_is_stored(house, seer):
    without = run_backtest(stated(house, seer, "perpetual", market="perpetual", side="long"), db=url_of(house))
    assert any("no funding rates are stored of BTC" in note for note in without.figures["notes"])
    engine = connect(url_of(house))
    moments = pd.date_range("2019-01-01", "2022-12-31", freq="8h", tz="UTC")
    write_funding(engine, pd.DataFrame({"ts": moments, "rate": 0.001}), asset_id="BTC")
    engine.dispose()
    paid = run_backtest(stated(house, seer, "funded", market="perpetual", side="long"), db=url_of(house))
    assert paid.figures["costs_funding"] > 0 and not paid.figures["notes"]
    assert paid.result.values[-1] < without.result.values[-1]


# What a hostile reader found


def several(house: Path, names: list[str]) -> pd.DataFrame:
    """Three markets that take turns in promising something, under these names; the last of them ends earlier."""
    bars, tables = bars_of(house), []
    engine = connect(url_of(house))
    for number, name in enumerate(names):
        own = bars.copy()
        own[["open", "high", "low", "close"]] *= np.linspace(1, 1.2 + 0.3 * number, len(own))[:, None]
        write_bars(engine, own, asset_id=name, timeframe="1d", venue="sample", replace=True)
        turn = np.where(np.arange(90) // 10 % 3 == number, 0.05, 0.0)
        tables.append(forecasts_on(own, turn).assign(asset_id=name).iloc[: 90 - 7 * number])
    engine.dispose()
    return pd.concat(tables).sort_values(["ts", "asset_id"], kind="stable", ignore_index=True)


def test_names_of_assets_decide_nothing_and_ends_may_differ(house):
    totals = []
    for names in (["AAA", "MMM", "ZZZ"], ["ZZZ", "AAA", "MMM"]):
        settings = stated(house, several(house, names), "-".join(names), fraction=1.0)
        run = run_backtest(settings, db=url_of(house))
        assert not (run.result.orders["status"] == "rejected").any()
        assert run.looks.models == 1 and run.looks.strategies == 1
        totals.append(run.figures["total_return"])
    assert totals[0] == pytest.approx(totals[1], rel=1e-12) and totals[0] != 0


def test_an_equal_part_for_each_asset_unless_said(house):
    run = run_backtest(stated(house, several(house, ["AAA", "MMM", "ZZZ"]), "parts"), db=url_of(house))
    assert {*run.result.given["size"]} == {0.0, 1 / 3}


def test_orders_that_are_too_small_are_counted_and_nothing_breaks(house, seer):
    settings = stated(house, seer, "small", min_notional=20_000, sensitivity=True)
    run = run_backtest(settings, db=url_of(house))
    assert "orders was filled" in run.sentence and any("were refused" in note for note in run.figures["notes"])


@pytest.mark.parametrize("every_row", [True, False])
@pytest.mark.parametrize("share", [0.5, 0.98])
def test_a_strategy_that_reads_the_next_row_is_refused_however_seldom_it_acts(house, seer, share, every_row):
    def peek(forecasts: pd.DataFrame) -> pd.DataFrame:
        rise = forecasts["close_at_ts"].shift(-1) / forecasts["close_at_ts"]
        buys = forecasts[["ts", "asset_id"]].assign(kind="market", unit="fraction", size=(rise > limit).astype(float))
        return buys if every_row else buys[buys["size"] > 0]

    limit = (seer["close_at_ts"].shift(-1) / seer["close_at_ts"]).quantile(share)
    with pytest.raises(KallosError, match="decides by forecasts that had not been made"):
        run_backtest(stated(house, seer, "peek"), db=url_of(house), strategy=peek)


def test_a_strategy_that_reads_the_past_alone_is_let_through(house, seer):
    def follow(forecasts: pd.DataFrame) -> pd.DataFrame:
        rises = forecasts["close_at_ts"] > forecasts["close_at_ts"].rolling(5).mean()
        return forecasts[["ts", "asset_id"]].assign(kind="market", unit="fraction", size=rises.astype(float))

    assert len(run_backtest(stated(house, seer, "follow"), db=url_of(house), strategy=follow).result.trades)


def test_every_version_of_ones_own_strategy_is_a_look(house, seer):
    def buyer(share: float):
        return lambda rows: rows[["ts", "asset_id"]].head(1).assign(kind="market", unit="fraction", size=share)

    runs = [run_backtest(stated(house, seer, "versions"), db=url_of(house), strategy=buyer(n / 10)) for n in (1, 2, 2)]
    assert [run.looks.strategies for run in runs] == [1, 2, 2]


def test_seen_rows_get_no_verdict(house, seer):
    run = run_backtest(stated(house, seer, "seen", in_sample=True, seen_until="2023-01-01"), db=url_of(house))
    assert run.sentence.startswith("IN SAMPLE") and "ore than luck:" not in run.sentence


def test_the_end_of_a_label_is_its_horizon_whatever_came(house):
    bars, exits = bars_of(house), []
    for came in (1, 3, 10):
        table = forecasts_on(bars.iloc[:-20], np.full(2, 0.05)).assign(horizon=10)
        table["target_ts"] = table["ts"] + came * DAY
        run = run_backtest(stated(house, table, f"label {came}"), db=url_of(house))
        exits.append(run.result.trades["exit_ts"].iloc[-1])
    assert len({*exits}) == 1


def test_slippage_by_volatility_learns_from_the_bars_before(house, seer):
    settings = stated(house, seer.iloc[:1], "volatile", slippage_volatility=1.0, entry=0.0, side="long")
    table = seer.iloc[:1].assign(y_pred=0.5)
    table.to_parquet(settings.forecasts)
    run = run_backtest(settings, db=url_of(house))
    assert run.result.fills["slippage"].iloc[0] > 10.0  # of 10,000, at a volatility of percents


# What is refused


BAD = {
    "NaN": (lambda table: table.assign(y_pred=np.nan), "y_pred: empty (NaN)"),
    "unsorted": (lambda table: table.iloc[::-1], "not sorted by time"),
    "off the bars": (lambda table: table.assign(ts=table["ts"] + pd.Timedelta(hours=1)), "do not lie on its bars"),
    "unknown asset": (lambda table: table.assign(asset_id="DOGE"), "no bars of 'DOGE'"),
    "two models": (lambda table: table.assign(model=["a", "b"] * (len(table) // 2)), "several values of model"),
    "no rows": (lambda table: table.iloc[:0], "no forecasts to trade"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_forecasts_are_refused(house, seer, name):
    spoil, message = BAD[name]
    with pytest.raises(KallosError, match="(?s)" + message.replace("(", r"\(").replace(")", r"\)")):
        run_backtest(stated(house, spoil(seer), f"bad {name}"), db=url_of(house))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--taker-fee", -0.001], "taker_fee: Input should be greater than or equal to 0, got -0.001"),
        (["--capital", 0], "capital: Input should be greater than 0, got 0"),
        (["--side", "short"], "short positions on spot need a lender"),
        (["--leverage", 3], "leverage on spot needs a lender"),
        (["--signal", "probability"], "p_up"),
        (["--seen-until", "yesterday"], "--seen-until must be a date"),
    ],
)
def test_wrong_settings_end_with_words_and_code_2(house, seer, words, message):
    settings = stated(house, seer, "words")
    given = ["--forecasts", settings.forecasts, "--seen-until", "2020-01-01", "--no-report", *words]
    process = start_command(house, "backtest", *given)
    said, problem = process.communicate(timeout=120)
    assert process.returncode == 2, said + problem
    assert message in problem and "Traceback" not in problem and json.dumps(said) == '""'
