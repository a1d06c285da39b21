"""The audit against planted leaks, each to be named by column and row, and against honest markets, real ones too."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import KFold, TimeSeriesSplit

from kallos.core.columns import timeframe_delta
from kallos.core.errors import ConfigError, DataError
from kallos.core.runs import write_json
from kallos.data.features import Feature, compute_features, register, registered, unregister
from kallos.data.files import read_bars_file
from kallos.data.labels import make_labels
from kallos.data.purged import CombinatorialPurgedCV, PurgedKFold
from kallos.data.sample import sample_bars
from kallos.evaluation.boundaries import scaler_rows, split_overlap
from kallos.evaluation.causality import perturbation, truncation
from kallos.evaluation.chance import lag_cliff, martingale, permutation
from kallos.evaluation.feature_probes import EXACT, probe_features
from kallos.evaluation.leakage import PROBES, audit
from kallos.models.partition import DataSettings, partition_bars
from kallos.models.preprocessing import create_feature_transformer
from kallos.models.tables import write_tables

REAL = {"1d": "BTCUSDT_spot_1d.csv.gz", "4h": "BTCUSDT_spot_4h.csv.gz", "15m": "BTCUSDT_perp_15m.parquet"}
GROUPS = {"bounded_features": ["rsi"], "unbounded_features": ["log_return_1", "atr_relative"]}


@pytest.fixture(scope="module")
def bars() -> pd.DataFrame:
    """Four-hourly bars with two gaps, and a halt of three bars in which nothing was traded."""
    made = sample_bars(timeframe="4h", start="2023-01-01", end="2024-12-31", seed=3)
    made.loc[700:702, ["open", "high", "low", "close"]] = made["close"][699]
    made.loc[700:702, made.columns[5:10]] = 0.0
    return made.drop(index=[1500, 1501, 2600]).reset_index(drop=True)


# Planted leaks in features


def centred(columns):
    close = pd.Series(columns["close"])
    return np.log(close / close.rolling(5, center=True).mean()).to_numpy()


def filled_backward(columns):
    """The log volume; where nothing was traded, the next one that was."""
    volume = pd.Series(columns["volume"])
    return np.log(volume.where(volume > 0).bfill().ffill().fillna(1)).to_numpy()


def warmed_backward(columns):
    """An average whose first rows, where it is not yet known, are filled from the first that is."""
    return pd.Series(columns["close"]).rolling(20, min_periods=1).mean().shift(-5).bfill().ffill().to_numpy()


def warm_up_filled(columns):
    close = pd.Series(columns["close"])
    return (close / close.rolling(20).mean()).bfill().fillna(1).to_numpy()


def scaled_by_all(columns):
    close = columns["close"]
    return (close - close.mean()) / max(close.std(), 1e-9)


def ranked_among_all(columns):
    return pd.Series(columns["close"]).rank(pct=True).to_numpy()


def target_inside(columns):
    """The next return, among noise that is drawn anew from the same seed."""
    ahead = pd.Series(np.log(columns["close"])).diff().shift(-1).fillna(0)
    return (ahead + 0.01 * np.random.default_rng(0).standard_normal(len(ahead))).to_numpy()


def day_still_open(columns):
    """The close of the day that the bar lies in, at every bar of that day."""
    day = (columns["ts"] - np.timedelta64(1, "us")).astype("datetime64[D]")
    close = pd.Series(columns["close"])
    return (close / close.groupby(day).transform("last")).to_numpy()


def day_when_complete(columns):
    """The same, hidden: the open day's close is told only where the day is there to its end."""
    day = (columns["ts"] - np.timedelta64(1, "us")).astype("datetime64[D]")
    close = pd.Series(columns["close"])
    whole = close.groupby(day).transform("size") == 6
    return np.where(whole, close / close.groupby(day).transform("last"), 1.0)


def peek_if_there(columns):
    close = columns["close"]
    return np.append(close[1:], close[-1:]) / close


LEAKS = {
    "centred": (centred, ("close",), 4),
    "filled_backward": (filled_backward, ("volume",), 0),
    "warmed_backward": (warmed_backward, ("close",), 0),
    "warm_up_filled": (warm_up_filled, ("close",), 0),
    "scaled_by_all": (scaled_by_all, ("close",), 0),
    "ranked_among_all": (ranked_among_all, ("close",), 0),
    "target_inside": (target_inside, ("close",), 0),
    "day_still_open": (day_still_open, ("ts", "close"), 0),
    "day_when_complete": (day_when_complete, ("ts", "close"), 0),
    "peek_if_there": (peek_if_there, ("close",), 0),
}


@pytest.fixture(params=LEAKS)
def leak(request: pytest.FixtureRequest) -> Iterator[str]:
    compute, inputs, warmup = LEAKS[request.param]
    register(Feature(request.param, "unbounded_features", compute, inputs, warmup, "a planted leak"))
    yield request.param
    unregister(request.param)


def looks_ahead(bars: pd.DataFrame, timeframe: str, name: str, ts: pd.Timestamp) -> bool:
    """Whether the feature's value at that row is another one, or none, where the history ends with that row's bar."""
    closes = bars["ts"] + timeframe_delta(timeframe)
    tables = (compute_features(part, timeframe=timeframe, names=[name]) for part in (bars, bars[closes <= ts]))
    then, later = (table.set_index("ts")[name].get(ts, np.nan) for table in tables)
    return not np.isclose(then, later, rtol=1e-9)


def test_every_planted_feature_is_named_with_its_column_and_a_row_that_looks_ahead(bars, leak):
    probes = probe_features(bars, timeframe="4h", names=["log_return_1", leak])
    found = {probe.name: probe.findings for probe in probes}
    for kind in ("truncation", "perturbation"):
        assert [finding.column for finding in found[kind]] == [leak], kind
        assert looks_ahead(bars, "4h", leak, found[kind][0].ts) or leak == "filled_backward"
    assert {finding.column for finding in found["warm-up"]} <= {leak}


def at_night(leak: Callable) -> Callable:
    """A feature that is honest but at four on Mondays, a row in forty-two."""

    def compute(columns):
        hours = columns["ts"].astype("datetime64[h]").astype("int64")
        return np.where(hours % 168 == 100, leak(columns), np.log(columns["volume"] + 1))

    return compute


RARE = {
    "next_volume": lambda c: np.log(np.append(c["volume"][1:], c["volume"][-1]) + 1),
    "next_return": lambda c: np.append(np.diff(np.log(c["close"])), 0.0),
    "in_ten_bars": lambda c: np.append(c["close"][10:], np.ones(min(10, len(c["close"])))),
    "smoothed": lambda c: pd.Series(c["close"]).rolling(3, center=True, min_periods=1).mean().to_numpy(),
}


@pytest.mark.parametrize("seed", range(3))
def test_a_leak_of_one_row_a_week_is_found_there(bars, seed):
    for name, rare in RARE.items():
        columns = ("ts", "close", "volume")
        register(Feature(name, "unbounded_features", at_night(rare), columns, 2, "a leak that sleeps"))
    try:
        cut, changed, _ = probe_features(bars, timeframe="4h", names=["rsi", *RARE], seed=seed)
    finally:
        for name in RARE:
            unregister(name)
    for probe in (cut, changed):
        assert {finding.column for finding in probe.findings} == {*RARE}, probe.name
        assert all(f.ts.dayofweek == 0 and f.ts.hour == 4 for f in probe.findings)


def test_a_fill_that_needs_a_halt_is_found_at_the_halt(bars):
    compute = partial(compute_features, timeframe="4h", names=["filled_backward"])
    register(Feature("filled_backward", "unbounded_features", filled_backward, ("volume",), 0, "a planted leak"))
    try:
        for probe in (truncation, perturbation):
            assert not probe(compute, bars, timeframe="4h", cuts=[300, 698, 704, 2000]).findings
            found = probe(compute, bars, timeframe="4h", cuts=[300, 701, 2000]).findings
            assert [(f.column, f.ts) for f in found] == [("filled_backward", bars["ts"][700] + pd.Timedelta("4h"))]
    finally:
        unregister("filled_backward")


def test_a_warm_up_that_is_too_short_is_found_and_one_that_is_long_enough_is_not(bars):
    def smooth(columns):
        return pd.Series(columns["close"]).ewm(alpha=1 / 14, adjust=False).mean().to_numpy()

    for warmup, guilty in ((60, True), (280, False)):
        register(Feature("smooth", "unbounded_features", smooth, ("close",), warmup, "an average that never forgets"))
        *causal, short = probe_features(bars, timeframe="4h", names=["smooth"])
        unregister("smooth")
        assert not any(probe.findings for probe in causal)
        assert [finding.column for finding in short.findings] == ["smooth"] * guilty


def test_a_feature_that_breaks_is_named_as_such(bars):
    register(Feature("broken", "unbounded_features", lambda c: c["close"] / c["close"][500], ("close",), 0, "breaks"))
    try:
        with pytest.raises(ConfigError, match=r"feature 'broken' breaks on \d+ bars; got 'IndexError"):
            audit(bars, asset_id="X", timeframe="4h", names=["broken"], probes=["truncation"])
    finally:
        unregister("broken")


# Labels, splits, scalers


def too_early(bars: pd.DataFrame, by: int) -> pd.DataFrame:
    """Labels over five bars that claim to be known `by` bars before they are."""
    labels = make_labels(bars, timeframe="4h", horizons=[5], barriers=None)
    return labels.assign(t1_h5=labels["t1_h5"] - by * pd.Timedelta("4h"))


def test_a_label_that_ends_after_its_span_is_named(bars):
    how = {"asset_id": "X", "timeframe": "4h", "names": ["rsi"], "horizons": (5,), "probes": ["label span"]}
    honest = audit(bars, labels=partial(too_early, by=0), **how)
    assert honest.passed
    assert honest.comparisons["label span"] > 10_000
    found = audit(bars, labels=partial(too_early, by=1), **how).findings
    assert {*found["column"]} <= {"label_h5", "return_h5"}
    row = found[found["column"] == "return_h5"].iloc[0]
    claimed = too_early(bars, by=1).set_index("ts").loc[row["ts"]]
    later = bars["ts"] >= claimed["t1_h5"]  # bars that open when the label claims to be known
    prices = ["open", "high", "low", "close"]
    other = bars.assign(**{name: bars[name].where(~later, bars[name] * 1.1) for name in prices})
    assert too_early(other, by=1).set_index("ts").loc[row["ts"], "return_h5"] != claimed["return_h5"]


@pytest.mark.parametrize(
    ("splitter", "first_guilty"),
    [
        (TimeSeriesSplit(3), lambda fold, test: test[0] - 4),  # five bars ahead, the last of which closes in the test
        (TimeSeriesSplit(3, gap=3), lambda fold, test: test[0] - 4),
        (PurgedKFold(n_splits=4, horizon=1), lambda fold, test: test[-1] + 2),
        (CombinatorialPurgedCV(n_groups=4, n_test_groups=2, horizon=2), None),
        (KFold(4, shuffle=True, random_state=1), None),
    ],
)
def test_a_label_over_the_border_is_named(bars, splitter, first_guilty: Callable | None):
    labels = make_labels(bars, timeframe="4h", horizons=[5], barriers=None).iloc[:1200].reset_index(drop=True)
    X = pd.DataFrame(index=pd.DatetimeIndex(labels["ts"]))
    probe = split_overlap(splitter.split(X), labels["ts"], t1=labels["t1_h5"], timeframe="4h", column="label_h5")
    (finding,) = probe.findings
    assert finding.column == "label_h5"
    train, test = next(iter(splitter.split(X)))
    row = labels.index[labels["ts"] == finding.ts][0]
    if first_guilty:
        assert row == first_guilty(0, test)
    shared = brute_force(labels, train, test)
    assert row == min(shared)
    assert probe.comparisons == sum(len(train) for train, _ in splitter.split(X))


def brute_force(labels: pd.DataFrame, train: np.ndarray, test: np.ndarray) -> list[int]:
    """Training rows whose own bar, or label, shares a bar with the label of a test row, bar by bar."""
    closes = labels["ts"].to_numpy()
    ends = labels["t1_h5"].to_numpy()
    asked = np.logical_or.reduce([(closes > closes[j]) & (closes <= ends[j]) for j in test])
    return [i for i in train if asked[(closes >= closes[i]) & (closes <= ends[i])].any()]


def test_the_audit_names_a_careless_splitter_and_clears_the_house(bars):
    how = {"asset_id": "X", "timeframe": "4h", "names": ["rsi", "log_return_1"], "probes": ["split overlap"]}
    assert audit(bars, **how).passed
    found = audit(bars, splitters={"careless": TimeSeriesSplit(3, gap=4)}, **how).findings
    assert found["column"].tolist() == ["label_h20"]
    assert "careless, fold 0" in found["said"][0]


@pytest.mark.parametrize("rows", [1, 50, "all"])
def test_a_scaler_that_saw_more_than_its_rows_is_named(bars, rows):
    table = compute_features(
        bars, timeframe="4h", names=[name for names in GROUPS.values() for name in names]
    ).set_index("ts")
    train = np.arange(2000)
    seen = len(table) if rows == "all" else 2000 + rows
    assert not scaler_rows(create_feature_transformer(GROUPS).fit(table[:2000]), table, train).findings
    found = scaler_rows(create_feature_transformer(GROUPS).fit(table[:seen]), table, train).findings
    assert {finding.column for finding in found} == {"log_return_1", "atr_relative"}
    if rows == "all":
        assert {finding.ts for finding in found} == {table.index[2000]}


def test_a_folder_is_tried_as_it_lies_there(bars, tmp_path: Path):
    values = {"asset_id": "X", "timeframe": "4h", "horizons": (1, 5), "feature_groups": GROUPS}
    settings = DataSettings(**values, output_path=tmp_path / "tables")
    how = {"asset_id": "X", "timeframe": "4h", "names": ["rsi"], "folder": tmp_path / "tables", "horizons": (1, 5)}
    tables = ["split overlap", "scaler", "lag cliff"]

    honest = partition_bars(bars, settings=settings)
    write_tables(honest)
    assert audit(bars, probes=tables, **how).passed

    unpurged = partition_bars(bars, settings=settings)
    first = unpurged.tables["val"]["ts"][0]
    for kept in (unpurged.tables, unpurged.scaled):
        kept["train"] = pd.concat([kept["train"], kept["val"].head(40)], ignore_index=True)
        kept["val"] = kept["val"].iloc[40:].reset_index(drop=True)
    unpurged.tables["train"]["log_return_1"] *= 1.0
    write_tables(unpurged)
    found = audit(bars, probes=tables, **how).findings
    assert {*found["probe"]} == {"split overlap", "scaler"}
    assert {"label_h5"} <= {*found.loc[found["probe"] == "split overlap", "column"]}
    assert (found.loc[found["probe"] == "split overlap", "ts"] >= first).all()

    ahead = partition_bars(bars, settings=settings)
    for table in ahead.tables.values():
        table["log_return_1"] += 0.3 * table["return_h1"].fillna(0)
    ahead.transformer.fit(ahead.tables["train"])
    for part, table in ahead.tables.items():
        names = [*ahead.transformer.get_feature_names_out()]
        ahead.scaled[part][names] = ahead.transformer.transform(table)[names]
    write_tables(ahead)
    found = audit(bars, probes=tables, **how).findings
    assert found[["probe", "column"]].to_numpy().tolist() == [["lag cliff", "log_return_1"]]
    assert found["ts"][0] in pd.concat(ahead.tables.values())["ts"].array


def smoothed_over_the_next_bar(tables: dict[str, pd.DataFrame]) -> str:
    for table in tables.values():
        table["rsi"] = table["rsi"].rolling(3, center=True, min_periods=1).mean()
    return "rsi"


def standardised_over_all(tables: dict[str, pd.DataFrame]) -> str:
    whole = pd.concat(tables.values())["atr_relative"]
    for table in tables.values():
        table["atr_relative"] = (table["atr_relative"] - whole.mean()) / whole.std()
    return "atr_relative"


def target_in_every_hundredth_row(tables: dict[str, pd.DataFrame]) -> str:
    for table in tables.values():
        table["log_return_1"] = table["log_return_1"].where(table.index % 100 != 50, table["return_h1"])
    return "log_return_1"


def turned_labels(tables: dict[str, pd.DataFrame]) -> str:
    tables["train"].loc[7, "label_h5"] -= 1
    return "label_h5"


PLANTED = [smoothed_over_the_next_bar, standardised_over_all, target_in_every_hundredth_row, turned_labels]


@pytest.mark.parametrize("plant", PLANTED)
def test_tables_must_come_from_the_bars(bars, tmp_path: Path, plant):
    """Each plants a leak into the files and fits the scaler to it, so that nothing else gives it away."""
    span = {"start": "2023-02-01T00:00", "end": "2024-11-01T00:00"}
    values = {"asset_id": "X", "timeframe": "4h", "horizons": (1, 5), "feature_groups": GROUPS, **span}
    settings = DataSettings(**values, output_path=tmp_path / "tables")
    within = bars[bars["ts"].between(settings.start, settings.end - pd.Timedelta("4h"))].reset_index(drop=True)
    how = {"asset_id": "X", "timeframe": "4h", "names": ["rsi"], "folder": tmp_path / "tables", "horizons": (1, 5)}
    made = partition_bars(within, settings=settings)
    write_tables(made)
    assert audit(bars, probes=["tables", "scaler"], **how).passed  # the bars may go on before and after
    column = plant(made.tables)
    made.transformer.fit(made.tables["train"])
    for part, table in made.tables.items():
        names = [*made.transformer.get_feature_names_out()]
        made.scaled[part][names] = made.transformer.transform(table)[names]
    write_tables(made)
    found = audit(bars, probes=["tables", "scaler"], **how).findings
    assert found[["probe", "column"]].to_numpy().tolist() == [["tables", column]]
    assert found["ts"][0] in pd.concat(made.tables.values())["ts"].array


# Luck


@pytest.fixture(scope="module")
def honest() -> pd.DataFrame:
    market = sample_bars(timeframe="4h", start="2022-01-01", end="2024-12-31", seed=11, signal=0.2)
    return compute_features(market, timeframe="4h")


def test_an_honest_signal_of_a_short_life_is_no_leak(honest):
    probe = lag_cliff(honest, timeframe="4h", horizons=(1, 5))
    assert (probe.findings, probe.comparisons) == ((), 2 * len(registered()))


@pytest.mark.parametrize(("horizon", "noise"), [(1, 1.0), (1, 4.0), (5, 2.0)])
def test_a_target_in_a_column_is_found_by_the_lag_cliff(honest, horizon, noise):
    ahead = np.log(honest["close"]).shift(-horizon) - np.log(honest["close"])
    rng = np.random.default_rng(5)
    mixed = honest.assign(mixed=ahead.fillna(0) + noise * ahead.std() * rng.standard_normal(len(ahead)))
    found = lag_cliff(mixed, timeframe="4h", columns=["mixed", "rsi", "atr"], horizons=(horizon,)).findings
    assert [finding.column for finding in found] == ["mixed"]
    assert found[0].ts in honest["ts"].array


def test_shuffled_labels_are_forecast_through_a_porous_split_only(honest):
    ends = pd.Series((honest["ts"] + pd.Timedelta("20h")).array, index=honest["ts"])
    tight = {"purged": PurgedKFold(t1=ends), "combinatorial": CombinatorialPurgedCV(t1=ends)}
    porous = {"shuffled": KFold(4, shuffle=True, random_state=0)}
    for seed in range(3):
        found = permutation(honest, tight | porous, timeframe="4h", horizon=5, seed=seed).findings
        assert [(f.column, f.said.split(":")[0]) for f in found] == [("label_h5", "shuffled")]


@pytest.mark.slow
def test_the_martingale_shows_what_looks_ahead_and_nothing_else():
    names = ["rsi", "log_return_1", "centred", "target_inside", "day_still_open", "peek_if_there"]
    for name in names[2:]:
        register(Feature(name, "unbounded_features", *LEAKS[name], "a planted leak"))
    try:
        compute = partial(compute_features, timeframe="4h", names=names)
        for seed in range(3):
            found = martingale(compute, timeframe="4h", seed=seed, horizons=(1, 5)).findings
            assert {finding.column for finding in found} == {*names[2:]}
    finally:
        for name in names[2:]:
            unregister(name)


@pytest.mark.soak
def test_two_hundred_quiet_runs_raise_no_more_alarms_than_they_may():
    """At a level of 5 %, 200 runs have ten alarms on average and 20 or more in one series of three hundred."""
    alarms = dict.fromkeys(("martingale", "lag cliff", "permutation"), 0)
    compute = partial(compute_features, timeframe="4h")
    for seed in range(200):
        how = {"timeframe": "4h", "level": 0.05}
        table = compute(sample_bars(timeframe="4h", start="2023-06-01", seed=seed, signal=0.2 * (seed % 2)))
        own = {"purged": PurgedKFold(horizon=5), "combinatorial": CombinatorialPurgedCV(n_groups=5, horizon=5)}
        results = [
            martingale(compute, seed=seed, horizons=(1, 5, 20), **how),
            lag_cliff(table, horizons=(1, 5, 20), **how),
            permutation(table, own, horizon=5, seed=seed, **how),
        ]
        for probe in results:
            alarms[probe.name] += bool(probe.findings)
    print(f"alarms in 200 quiet runs at the 5 % level: {alarms}")
    assert max(alarms.values()) < 20


# The whole


def test_an_audit_repeats_and_says_how_many_comparisons_it_made(bars, tmp_path: Path):
    how = {"asset_id": "X", "timeframe": "4h", "names": ["rsi", "volume_ratio"], "seed": 4}
    told = []
    first, second = audit(bars, on_step=told.append, **how), audit(bars, **how)
    assert first.to_dict() == second.to_dict()
    assert first.passed
    assert [*first.comparisons] == [*PROBES]
    assert all(first.comparisons.values())
    assert f"no leak found in {sum(first.comparisons.values()):,} comparisons" in first.text()
    assert told[0] == "features"
    assert told[-1] == "martingale"
    assert write_json(tmp_path / "audit.json", first.to_dict()).stat().st_size > 500
    assert f"no leak found in {sum(first.comparisons.values()):,} comparisons" in first._repr_html_()


def test_what_cannot_be_tried_is_said(bars):
    how = {"asset_id": "X", "timeframe": "4h", "probes": EXACT}
    some = audit(bars.drop(columns="volume").assign(volume=1.0).head(800), names=["rsi", "rsi_1w", "rsi_1h"], **how)
    assert "rsi_1w, rsi_1h" in some.text()
    with pytest.raises(DataError, match="no feature can be tried"):
        audit(bars.head(100), names=["rsi"], **how)
    with pytest.raises(ConfigError, match="unknown feature"):
        audit(bars, names=["rsy"], **how)


@pytest.mark.slow
@pytest.mark.parametrize("timeframe", REAL)
def test_the_shipped_features_are_clean_on_real_bars(real_data: Path, timeframe):
    market = read_bars_file(real_data / "bars" / REAL[timeframe], timeframe=timeframe)
    result = audit(market, asset_id="BTC", timeframe=timeframe)
    print(result.text())
    assert result.passed
    assert all(result.comparisons.values())
    assert sum(result.comparisons.values()) > 500_000


@pytest.mark.slow
@pytest.mark.parametrize("timeframe", REAL)
def test_planted_features_are_found_on_real_bars(real_data: Path, timeframe):
    market = read_bars_file(real_data / "bars" / REAL[timeframe], timeframe=timeframe)
    names = [name for name in LEAKS if timeframe != "1d" or not name.startswith("day")]
    for name in names:
        register(Feature(name, "unbounded_features", *LEAKS[name], "a planted leak"))
    try:
        result = audit(market, asset_id="BTC", timeframe=timeframe, names=[*names, "rsi"], probes=["truncation"])
    finally:
        for name in names:
            unregister(name)
    if timeframe == "15m":
        names.remove("day_when_complete")  # its days have 96 bars, and it knows of days of six
    assert {*result.findings["column"]} == {*names}
    assert result.findings["ts"].between(market["ts"].iloc[0], market["ts"].iloc[-1] + timeframe_delta(timeframe)).all()
