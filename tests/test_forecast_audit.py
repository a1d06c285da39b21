"""The audit of forecasts: tables and forecasts that stand too early are caught, honest ones of every kind are not."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from kallos.core.columns import NAIVE_PROBABILITIES, PROBABILITIES
from kallos.core.errors import DataError, KallosError
from kallos.data.features import compute_features
from kallos.data.labels import make_labels
from kallos.data.sample import sample_bars
from kallos.data.store import write_bars
from kallos.data.tables import connect
from kallos.evaluation.forecast_probes import audit_forecasts
from kallos.main import app

STEP = pd.Timedelta("4h")
FOLDS = 4


def market(seed: int = 0, signal: float = 0.2, end: str = "2024-03-31") -> pd.DataFrame:
    return sample_bars(timeframe="4h", start="2023-01-01", end=end, seed=seed, signal=signal)


def boosting() -> HistGradientBoostingRegressor:
    return HistGradientBoostingRegressor(max_iter=40, max_leaf_nodes=8)


MODELS = {"ridge": lambda: Ridge(1e-6), "boosting": boosting}
SHRUNK = {"shrunk": lambda: make_pipeline(StandardScaler(), Ridge(5e4))}
INDICATORS = ["rsi", "mfi", "macd_diff_relative", "realised_volatility_30", "volume_ratio"]


def wild(seed: int) -> pd.DataFrame:
    """Tails of Student's t with 2.5 degrees of freedom, clustered volatility, and a volume that has its hours."""
    rng, bars = np.random.default_rng(seed), market(seed, signal=0.0, end="2024-10-31")
    calm = np.exp(0.1 * pd.Series(rng.standard_normal(len(bars))).ewm(alpha=0.02).sum())
    times = (calm / np.sqrt(rng.chisquare(2.5, len(bars)) / 2.5)).clip(upper=30).to_numpy()
    moved = {name: times * np.log(bars[name] / bars["open"]) for name in ("open", "high", "low", "close")}
    opened = np.log(bars["open"][0]) + moved["close"].cumsum().shift(fill_value=0.0)
    hours = np.exp(rng.normal(0, 0.5, 6))[np.arange(len(bars)) % 6]
    amounts = {name: bars[name] * hours * calm for name in bars if "volume" in name}
    return bars.assign(**{name: np.exp(opened + log) for name, log in moved.items()}, **amounts)


def inputs(bars: pd.DataFrame, model: str) -> np.ndarray:
    """The last ten returns, or the last ten values of indicators."""
    last = np.log(bars[["close"]]).diff()
    if model == "shrunk":
        table = compute_features(bars, timeframe="4h", names=INDICATORS).set_index("ts")
        last = table[INDICATORS].reindex(bars["ts"] + STEP).reset_index(drop=True)
    return pd.concat([last.shift(n) for n in range(10)], axis=1).to_numpy()


def honest(bars: pd.DataFrame, model: str = "ridge", *, horizon: int = 1, rows: int = 1000) -> pd.DataFrame:
    """The Forecasts table of a model that is fitted anew before each of four folds."""
    close, X = np.log(bars["close"]), inputs(bars, model)
    first = np.isfinite(X).all(axis=1).argmax()
    y = (close.shift(-horizon) - close).to_numpy()
    last, closes, parts = len(bars) - horizon, bars["ts"] + STEP, []
    for fold, at in enumerate(np.array_split(np.arange(last - rows, last), FOLDS)):
        train = np.arange(first, at[0] - horizon)
        said = (MODELS | SHRUNK)[model]().fit(X[train], y[train]).predict(X[at])
        values = {"close_at_ts": bars["close"][at].array, "y_true": y[at], "y_pred": said, "y_naive": 0.0}
        keys = {"asset_id": "X", "timeframe": "4h", "model": model, "fold": fold, "horizon": horizon}
        times = {"ts": closes[at].array, "target_ts": closes[at + horizon].array}
        parts.append(pd.DataFrame(times | keys | {"target": "log_return"} | values))
    return pd.concat(parts, ignore_index=True)


def later(table: pd.DataFrame, bars: int = 1) -> pd.DataFrame:
    """Each row holds what was forecast so many bars later."""
    return table.assign(y_pred=table["y_pred"].shift(-bars)).dropna().reset_index(drop=True)


def as_target(table: pd.DataFrame, target: str) -> pd.DataFrame:
    """The same forecasts, of the price."""
    before = table["close_at_ts"] if target == "close" else np.log(table["close_at_ts"])
    to_price = (lambda r: before * np.exp(r)) if target == "close" else (lambda r: before + r)
    return table.assign(
        target=target, y_true=to_price(table["y_true"]), y_pred=to_price(table["y_pred"]), y_naive=before
    )


@pytest.fixture(scope="module")
def bars() -> pd.DataFrame:
    return market()


@pytest.fixture(scope="module")
def table(bars) -> pd.DataFrame:
    return honest(bars)


# What the bars vouch for


@pytest.mark.parametrize("target", ["log_return", "close", "log_close"])
def test_every_target_is_recomputed(bars, table, target):
    table = table if target == "log_return" else as_target(table, target)
    assert audit_forecasts(table, bars).passed
    for column, change in {"y_true": 1.001, "close_at_ts": 1.0001}.items():
        wrong = table.assign(**{column: table[column].where(table.index != 17, table[column] * change)})
        found = audit_forecasts(wrong, bars).findings
        assert found[["probe", "column", "count"]].to_numpy().tolist() == [["forecast bars", column, 1]]
        assert found["ts"][0] == table["ts"][17]
    moved = table.assign(ts=table["ts"] - STEP, target_ts=table["target_ts"] - STEP)
    assert "close_at_ts" in {*audit_forecasts(moved, bars).findings["column"]}


def test_a_naive_forecast_that_knows_is_named(bars, table):
    found = audit_forecasts(
        as_target(table, "close").assign(y_naive=as_target(table, "close")["y_true"]), bars
    ).findings
    assert "y_naive" in {*found["column"]}


def test_times_off_the_bars_and_beyond_the_horizon_are_named(bars, table):
    off = table["ts"].where(table.index != 3, table["ts"] + pd.Timedelta("1min"))
    found = audit_forecasts(table.assign(ts=off), bars).findings
    assert {*found["column"]} == {"ts", "target_ts"}
    assert found["ts"][0] == off[3]
    gap = bars.drop(index=len(bars) - 100).reset_index(drop=True)
    assert {*audit_forecasts(table, gap).findings["column"]} >= {"ts", "target_ts"}


def of_labels(bars: pd.DataFrame, *, leak: bool) -> pd.DataFrame:
    """Forecasts of triple-barrier classes by the last return, or by the next."""
    labels = make_labels(bars, timeframe="4h", horizons=[5]).set_index("ts").tail(1100)
    closes = bars.set_index(bars["ts"] + STEP)["close"]
    tilt = (np.log(closes).diff().shift(-1 if leak else 0) * 10).clip(-0.3, 0.3).reindex(labels.index).fillna(0)
    p = {"p_down": 0.35 - tilt, "p_flat": 0.3 + 0 * tilt, "p_up": 0.35 + tilt}
    naive = dict.fromkeys(NAIVE_PROBABILITIES, 1 / 3)
    keys = {"asset_id": "X", "timeframe": "4h", "model": "classifier", "fold": 0, "horizon": 5, "target": "label"}
    values = {
        "close_at_ts": closes.reindex(labels.index),
        "y_true": labels["label_h5"],
        "y_pred": p["p_up"] - p["p_down"],
    }
    values |= {"y_naive": 0.0, "return_true": labels["return_h5"]}
    assert {*p} == {*PROBABILITIES}
    made = pd.DataFrame({"target_ts": labels["t1_h5"], **keys, **values, **p, **naive})
    return made.reset_index(names="ts")


def test_classes_that_end_at_a_barrier(bars):
    assert audit_forecasts(of_labels(bars, leak=False), bars).passed
    found = audit_forecasts(of_labels(bars, leak=True), bars).findings
    assert "forecast cliff" in {*found["probe"]}
    table = of_labels(bars, leak=False)
    turned = table.assign(y_true=-table["y_true"])
    assert {*audit_forecasts(turned, bars).findings["column"]} >= {"y_true"}
    early = table.assign(
        target_ts=table["target_ts"].where(table["target_ts"] - table["ts"] <= STEP, table["ts"] + STEP)
    )
    assert "return_true" in {*audit_forecasts(early, bars).findings["column"]}


# What the forecasts know


@pytest.mark.parametrize("model", MODELS)
def test_forecasts_of_later_bars_are_caught_and_honest_ones_pass(bars, model):
    table = honest(bars, model)
    assert audit_forecasts(table, bars).passed
    for shift in (1, 3):
        found = audit_forecasts(later(table, shift), bars).findings
        assert found["probe"][0] == "forecast cliff"
        assert f"bar {shift} after this time" in found["said"][0]


def test_a_model_without_any_skill_is_caught_too():
    martingale = market(seed=2, signal=0.0)
    table = honest(martingale)
    assert audit_forecasts(table, martingale).passed
    assert [*audit_forecasts(later(table), martingale).findings["probe"]] == ["forecast cliff"]


@pytest.mark.parametrize("seed", [5, 16])
def test_a_model_that_knows_the_size_of_the_next_bar_is_honest(seed):
    """Ten values of indicators foretell volume and volatility where these have tails, clusters and hours."""
    bars = wild(seed)
    table = honest(bars, "shrunk", rows=2400)
    assert audit_forecasts(table, bars).passed
    found = audit_forecasts(later(table), bars).findings
    assert "of bar 1 after this time" in found["said"][0]


def test_the_best_forecast_of_the_sample_market_is_not_too_good(bars):
    """It is the planted autocorrelation times the last return."""
    known = pd.Series(0.2 * np.log(bars["close"]).diff().to_numpy(), bars["ts"] + STEP)
    table = honest(bars, rows=2000)
    assert audit_forecasts(table.assign(y_pred=known[table["ts"]].to_numpy()), bars).passed


@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_foresight_is_caught_at_every_horizon(bars, horizon):
    table = honest(bars, horizon=horizon)
    assert audit_forecasts(table, bars).passed
    assert "too good" in {*audit_forecasts(table.assign(y_pred=table["y_true"]), bars).findings["probe"]}
    of_target = later(table, horizon)  # as if the index had been the target's
    assert "forecast cliff" in {*audit_forecasts(of_target, bars).findings["probe"]}


def test_every_model_horizon_and_fold_is_tried(bars):
    tables = [honest(bars), honest(bars, "boosting"), honest(bars, horizon=5)]
    whole = audit_forecasts(pd.concat(tables, ignore_index=True), bars)
    assert whole.passed
    assert len(whole.tried) == 3
    tables[1] = later(tables[1])
    found = audit_forecasts(pd.concat(tables, ignore_index=True), bars).findings
    assert {said.split(",")[0] for said in found["said"]} == {"boosting"}
    paths = [honest(bars).assign(fold=0), later(honest(bars)).assign(fold=1)]  # the same times twice, as in CPCV
    found = audit_forecasts(pd.concat(paths, ignore_index=True), bars).findings
    assert all("fold 1" in said for said in found["said"])
    assert len(found)


def test_a_constant_and_a_short_series_are_said_to_be_untested(bars, table):
    for made in (table.assign(y_pred=0.001), table.tail(100).reset_index(drop=True)):
        probe = next(probe for probe in audit_forecasts(made, bars).probes if probe.name == "forecast cliff")
        assert (probe.comparisons, probe.findings) == (0, ())
        assert "1 series not tested" in probe.note


@pytest.mark.soak
def test_many_markets_models_and_shifts():
    """Of 40 markets, half martingales: no honest series is accused, and every moved one of a model with skill is."""
    counts = {}
    for seed in range(40):
        signal = 0.2 * (seed % 2)
        of_seed = market(seed=seed, signal=signal, end="2024-06-30")
        for model, horizon in ((m, h) for m in MODELS for h in (1, 5)):
            table = honest(of_seed, model, horizon=horizon)
            for shift in (0, 1, 3):
                key = (signal, model, horizon, shift)
                caught = not audit_forecasts(later(table, shift), of_seed).passed
                counts.setdefault(key, []).append(caught)
    rates = {key: np.mean(caught) for key, caught in counts.items()}
    print(*(f"{key}: {rate:.0%}" for key, rate in rates.items()), sep="\n")
    assert not any(rate for key, rate in rates.items() if key[-1] == 0)
    assert all(rate == 1 for (signal, _, horizon, shift), rate in rates.items() if signal and shift and horizon == 1)


# What is refused


def test_what_cannot_be_tried_is_refused_in_words(bars, table):
    faults = {
        "y_pred: empty": table.assign(y_pred=table["y_pred"].where(table.index != 5)),
        "not in the order of time; got": table.iloc[::-1],
        "unknown target; got 'magic'": table.assign(target="magic"),
        "a horizon is a whole number of bars; got": table.assign(horizon=1.5),
        "more than one timeframe; got": pd.concat([table, table.assign(timeframe="1d")], ignore_index=True),
        "unknown timeframe; got '7h'": table.assign(timeframe="7h"),
        "is not a table of forecasts: ": bars,
    }
    for message, wrong in faults.items():
        with pytest.raises(DataError) as caught:
            audit_forecasts(wrong, bars)
        assert message in str(caught.value), str(caught.value)
        assert str(caught.value).endswith(".")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bars, table) -> Path:
    made = tmp_path_factory.mktemp("forecasts")
    engine = connect(f"sqlite:///{made}/kallos.db")
    write_bars(engine, bars, asset_id="X", timeframe="4h", venue="sample")
    engine.dispose()
    table.to_parquet(made / "honest.parquet")
    later(table).to_parquet(made / "late.parquet")
    table.assign(asset_id="Y").to_parquet(made / "other.parquet")
    bars.to_parquet(made / "bars.parquet")
    (made / "words.parquet").write_text("not Parquet")
    return made


def typed(folder: Path, name: str, *words: str) -> tuple[int, str, str]:
    """(exit code, output, error) of the command."""
    db = ("--db-url", f"sqlite:///{folder}/kallos.db")
    run = CliRunner().invoke(app, ["audit", "--forecasts", str(folder / name), *words, *db])
    if isinstance(run.exception, KallosError):
        return run.exception.exit_code, run.stdout, str(run.exception)
    return run.exit_code, run.stdout, str(run.exception or "")


def test_the_command_line(folder):
    assert typed(folder, "honest.parquet")[0] == 0
    code, said, error = typed(folder, "late.parquet", "--asset-id", "X", "--report", str(folder / "audit.json"))
    assert (code, "LEAK in y_pred" in said, "the audit found a leak; got 'y_pred'" in error) == (5, True, True)
    kept = json.loads((folder / "audit.json").read_text())
    assert (kept["passed"], kept["forecasts"]) == (False, ["ridge, horizon 1, log_return"])


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("absent.parquet", (), "there is no such file; got"),
        ("words.parquet", (), "no readable Parquet file; got"),
        ("bars.parquet", (), "is not a table of forecasts"),
        ("other.parquet", (), "no bars of 'Y' in '4h'"),
        ("honest.parquet", ("--asset-id", "Z"), "not of this asset_id; got 'Z'. The table holds X."),
        ("honest.parquet", ("--timeframe", "1d"), "not of this timeframe; got '1d'"),
        ("honest.parquet", ("--features", "rsi"), "--features has no meaning beside --forecasts; got 'rsi'. Leave"),
        ("honest.parquet", ("--tables", "tables"), "--tables has no meaning beside --forecasts"),
        ("honest.parquet", ("--seed", "0"), "--seed has no meaning beside --forecasts"),
    ],
)
def test_wrong_input_ends_with_2(folder, name, words, message):
    code, _, error = typed(folder, name, *words)
    assert (code, message in error) == (2, True), error
