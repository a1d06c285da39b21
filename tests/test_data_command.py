"""The tables that `kallos-run data` writes: what is in them, that nothing leaks between them, that they repeat."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kallos.core.columns import timeframe_delta
from kallos.core.errors import ArtifactError, ConfigError, DataError
from kallos.core.runs import file_hash, verify_manifest
from kallos.core.schemas import LABELS, check_table
from kallos.data.bars import check_bars
from kallos.data.features import registered
from kallos.data.labels import make_labels
from kallos.data.purged import PurgedKFold
from kallos.data.sample import sample_bars
from kallos.data.store import write_bars
from kallos.data.tables import connect
from kallos.models import tables as tables_module
from kallos.models.container import TimeSeriesDataContainer
from kallos.models.partition import PARTS, DataSettings, partition_bars
from kallos.models.tables import build_tables, table_file, write_tables

ALL_FEATURES = {
    group: [name for name, feature in registered().items() if feature.group == group]
    for group in ("volume_features", "bounded_features", "unbounded_features")
}


@pytest.fixture(scope="module")
def bars() -> pd.DataFrame:
    """Two years of the sample market with two holes."""
    whole = sample_bars(timeframe="4h", start="2022-01-01", end="2023-12-31", seed=3)
    return whole.drop([*range(1500, 1530), 3900]).reset_index(drop=True)


def make(folder: Path, **values: object) -> DataSettings:
    return DataSettings.from_values({"asset_id": "BTC", "timeframe": "4h", "output_path": folder / "BTC_4h"} | values)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in folder.iterdir() if path.name != "manifest.json"}


# From the database to the folder


def test_both_databases_give_the_same_bytes(bars: pd.DataFrame, tmp_path: Path, postgres_url: str):
    found = []
    for number, url in enumerate((f"sqlite:///{tmp_path / 'kallos.db'}", postgres_url)):
        write_bars(connect(url), bars, asset_id="BTC", timeframe="4h", venue="sample")
        built = build_tables(make(tmp_path / str(number)), db=url)
        manifest = verify_manifest(built.manifest_path)
        found.append((hashes(built.folder), manifest["data"], manifest["results"]))
    assert found[0] == found[1]


def test_a_process_of_its_own_gives_the_same_bytes(bars: pd.DataFrame, tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'kallos.db'}"
    write_bars(connect(url), bars, asset_id="BTC", timeframe="4h", venue="sample")
    here = build_tables(make(tmp_path / "here"), db=url)
    values = {"asset_id": "BTC", "timeframe": "4h", "output_path": str(tmp_path / "there")}
    code = f"""from kallos.models.partition import DataSettings
from kallos.models.tables import build_tables
build_tables(DataSettings.from_values({values}), db={url!r})"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert hashes(tmp_path / "there") == hashes(here.folder)


def test_only_the_range_that_was_asked_for_is_read(bars: pd.DataFrame, tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'kallos.db'}"
    write_bars(connect(url), bars, asset_id="BTC", timeframe="4h", venue="sample")
    settings = make(tmp_path, start="2022-03-01", end="2023-06-30", train_end="2022-12-31", end_date="2023-03-31")
    build_tables(settings, db=url)
    container = TimeSeriesDataContainer.load(tmp_path / "BTC_4h")
    assert container.train["ts"].iloc[0] > pd.Timestamp("2022-03-01", tz="UTC")
    assert container.test["ts"].iloc[-1] <= pd.Timestamp("2023-06-30", tz="UTC")
    for part, border in (("train", "2022-12-31"), ("val", "2023-03-31")):
        table, moment = container.table(part), pd.Timestamp(border, tz="UTC")
        known = table.filter(regex="^t1_").max(axis=None)
        assert table["ts"].iloc[-1] <= moment and known <= moment
    assert container.val["ts"].iloc[0] == pd.Timestamp("2022-12-31 04:00", tz="UTC")
    assert container.test["ts"].iloc[0] == pd.Timestamp("2023-03-31 04:00", tz="UTC")


def test_without_bars_nothing_is_written(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'kallos.db'}"
    connect(url)
    with pytest.raises(DataError, match="BTC"):
        build_tables(make(tmp_path), db=url)
    assert not (tmp_path / "BTC_4h").exists()


# The folder as a whole


def test_a_failure_leaves_the_former_folder(bars: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    partition = partition_bars(bars, settings=make(tmp_path))
    built = write_tables(partition)
    before = hashes(built.folder)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tables_module, "report_text", fail)
    with pytest.raises(OSError, match="no space"):
        write_tables(partition_bars(bars, settings=make(tmp_path, horizons=2)))
    assert hashes(built.folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["BTC_4h"]
    verify_manifest(built.manifest_path)


def test_a_killed_process_leaves_the_former_folder(bars: pd.DataFrame, tmp_path: Path):
    built = write_tables(partition_bars(bars, settings=make(tmp_path)))
    before = hashes(built.folder)
    bars.to_parquet(tmp_path / "bars.parquet")
    code = f"""import os, signal, pandas as pd
from kallos.models import tables
from kallos.models.partition import DataSettings, partition_bars
tables.report_text = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
values = {{"asset_id": "BTC", "timeframe": "4h", "horizons": "2", "output_path": {str(built.folder)!r}}}
bars = pd.read_parquet({str(tmp_path / "bars.parquet")!r})
tables.write_tables(partition_bars(bars, settings=DataSettings.from_values(values)))"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert hashes(built.folder) == before
    verify_manifest(built.manifest_path)
    assert write_tables(partition_bars(bars, settings=make(tmp_path, horizons=2))).folder == built.folder
    assert TimeSeriesDataContainer.load(built.folder).settings.horizons == (2,)


def test_files_of_others_are_never_deleted(bars: pd.DataFrame, tmp_path: Path):
    partition = partition_bars(bars, settings=make(tmp_path))
    built = write_tables(partition)
    (built.folder / "model.pt").write_text("mine")
    with pytest.raises(ConfigError, match=r"other files; got 'model\.pt'"):
        write_tables(partition)
    assert (built.folder / "model.pt").read_text() == "mine"


def test_a_link_stays_a_link(bars: pd.DataFrame, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "BTC_4h").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for _ in range(2):
        write_tables(partition_bars(bars, settings=make(tmp_path)))
    assert (tmp_path / "BTC_4h").is_symlink()
    assert TimeSeriesDataContainer.load(tmp_path / "BTC_4h").test.shape[0] > 0


def test_a_folder_that_cannot_be_made_is_refused(bars: pd.DataFrame, tmp_path: Path):
    (tmp_path / "file").write_text("")
    settings = make(tmp_path, output_path=tmp_path / "file" / "deeper")
    with pytest.raises(ConfigError, match="Choose another --output-path"):
        write_tables(partition_bars(bars, settings=settings))


# What is in the tables


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_no_part_knows_of_a_later_one(data: st.DataObject):
    whole = sample_bars(timeframe="1d", start="2020-01-01", end="2023-12-31", seed=data.draw(st.integers(0, 99)))
    holes = data.draw(st.sets(st.integers(400, 1400), max_size=3))
    bars = whole.drop([row for hole in holes for row in range(hole, hole + 2)], errors="ignore").reset_index(drop=True)
    values = {
        "asset_id": "BTC",
        "feature_groups": {"unbounded_features": ["log_return_1", "realised_volatility_7"]},
        "horizons": data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3)),
        "labels": data.draw(st.sampled_from(["triple_barrier", "forward_return"])),
        "weighting": data.draw(st.sampled_from(["uniqueness", "return_attribution"])),
        "volatility_window": 20,
        "embargo": (embargo := data.draw(st.integers(0, 10))),
        "train_share": data.draw(st.sampled_from([0.5, 0.7])),
    }
    chosen = DataSettings.from_values(values)
    partition = partition_bars(bars, settings=chosen)
    labels = make_labels(bars, timeframe="1d", horizons=chosen.horizons, barriers=chosen.barriers).set_index("ts")
    firsts = {part: table["ts"].iloc[0] for part, table in partition.tables.items()}
    for part, later in (("train", "val"), ("val", "test"), ("test", None)):
        table = partition.tables[part]
        ends = table.filter(regex="^t1_").max(axis=1)
        if later:
            assert ends.max() < firsts[later]
            left_out = (
                (bars["ts"] + timeframe_delta("1d")).between(table["ts"].iloc[-1], firsts[later], "neither").sum()
            )
            assert left_out >= embargo
        for name in labels.columns.drop(list(labels.filter(regex="weight"))):
            pd.testing.assert_series_equal(
                table.set_index("ts")[name], labels[name].reindex(pd.DatetimeIndex(table["ts"])), check_freq=False
            )
        for h in chosen.horizons:
            assert np.isclose(table[f"sample_weight_h{h}"].mean(), 1)
            assert table[f"sample_weight_h{h}"].isna().equals(table[f"label_h{h}"].isna())
        check_table(table[["ts", *labels.columns]], LABELS, what=part)


def test_every_registered_feature_and_a_bars_own_column(bars: pd.DataFrame):
    groups = ALL_FEATURES | {"volume_features": ["volume", *ALL_FEATURES["volume_features"]]}
    chosen = DataSettings.from_values({"asset_id": "BTC", "timeframe": "4h", "feature_groups": groups})
    partition = partition_bars(bars, settings=chosen)
    for part in PARTS:
        scaled = partition.scaled[part]
        assert [name for name in scaled if "_h" not in name or name in registered()][1:] == chosen.feature_groups.names
        assert np.isfinite(scaled[chosen.feature_groups.names]).all(axis=None)
    assert partition.tables["train"]["volume"].min() >= 0
    assert abs(partition.scaled["train"]["volume"].mean()) < 1e-9


def test_rows_with_an_empty_feature_are_dropped_and_counted(bars: pd.DataFrame):
    holed = bars.copy()
    holed.loc[3000:3009, "taker_buy_base_asset_volume"] = np.nan
    groups = {"bounded_features": ["taker_buy_ratio"], "unbounded_features": ["log_return_1"]}
    chosen = DataSettings.from_values({"asset_id": "BTC", "timeframe": "4h", "feature_groups": groups})
    partition = partition_bars(holed, settings=chosen)
    kept = pd.concat(partition.tables.values())["ts"]
    assert not (holed["ts"][3000:3010] + timeframe_delta("4h")).isin(kept).any()
    assert all(np.isfinite(table["taker_buy_ratio"]).all() for table in partition.tables.values())
    assert sum(partition.losses.values()) >= len(kept)


# What the container hands out


@pytest.fixture(scope="module")
def container(bars: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> TimeSeriesDataContainer:
    """The tables of the bars, loaded."""
    built = write_tables(partition_bars(bars, settings=make(tmp_path_factory.mktemp("data"))))
    return TimeSeriesDataContainer.load(built.folder)


def test_nothing_heavy_is_imported_and_no_test_row_read(container: TimeSeriesDataContainer):
    code = f"""import sys, pandas as pd
from kallos.models.container import TimeSeriesDataContainer
read = []
real = pd.read_parquet
container = TimeSeriesDataContainer.load({str(container.folder)!r})
pd.read_parquet = lambda file: read.append(1) or real(file)
container.numpy("train", 5, lookback=3), container.pandas("train", 5)
assert len(read) == 1, read
assert not {{"torch", "darts", "plotly"}} & {{*sys.modules}}"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_made_anew_is_not_mixed_with_the_old(bars: pd.DataFrame, tmp_path: Path):
    write_tables(partition_bars(bars, settings=make(tmp_path)))
    container = TimeSeriesDataContainer.load(tmp_path / "BTC_4h")
    assert len(container.train)
    write_tables(partition_bars(bars, settings=make(tmp_path, horizons="1,5,20,50")))
    with pytest.raises(ArtifactError, match="has changed since the folder was loaded"):
        container.table("test")


@pytest.mark.parametrize("name", ["transformer.joblib", table_file("test", scaled=True), "REPORT.md"])
def test_a_missing_file_is_named(bars: pd.DataFrame, tmp_path: Path, name: str):
    write_tables(partition_bars(bars, settings=make(tmp_path)))
    (tmp_path / "BTC_4h" / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        TimeSeriesDataContainer.load(tmp_path / "BTC_4h")


def test_every_window_is_without_a_gap(container: TimeSeriesDataContainer):
    table, step = container.table("train", scaled=True), timeframe_delta("4h")
    position = dict(zip(table["ts"].dt.tz_localize(None), range(len(table)), strict=True))
    arrays = container.numpy("train", 5, lookback=24)
    for window, ts in zip(arrays.X[::20], arrays.ts[::20], strict=True):
        rows = table.iloc[position[pd.Timestamp(ts)] - 23 : position[pd.Timestamp(ts)] + 1]
        assert (rows["ts"].diff().dropna() == step).all()
        assert np.array_equal(rows[container.features], window)


def test_cross_validation_by_label_ends(container: TimeSeriesDataContainer):
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import cross_val_score

    frame = container.pandas("train", 20)
    folds = PurgedKFold(n_splits=4, t1=frame["t1"], embargo=10)
    scores = cross_val_score(Ridge(), frame[container.features], frame["return"], cv=folds)
    assert scores.shape == (4,)


def test_darts_takes_the_series(container: TimeSeriesDataContainer):
    from darts.models import LinearRegressionModel

    target, features = zip(*container.darts("train", 5), strict=True)
    model = LinearRegressionModel(lags=3, lags_past_covariates=3, output_chunk_length=5)
    long = [len(series) > 20 for series in target]
    pick = lambda series: [one for one, enough in zip(series, long, strict=True) if enough]  # noqa: E731
    model.fit(pick(target), past_covariates=pick(features))
    later, known = container.darts("val", 5)[0]
    forecast = model.predict(5, series=later[:50], past_covariates=known[:50])
    assert forecast.time_index[-1] == later.time_index[54]
    close = container.val.set_index(container.val["ts"].dt.tz_localize(None))["close"]
    moved = np.log(close[later.time_index[54]] / close[later.time_index[49]])
    assert np.isclose(later.values()[54, 0], moved, atol=1e-6)


# Real data


def test_real_bars(real_data: Path, tmp_path: Path):
    raw = pd.read_parquet(real_data / "bars" / "BTCUSDT_perp_15m.parquet").rename(columns={"timestamp": "ts"})
    bars = check_bars(raw.assign(ts=raw["ts"].dt.tz_localize("UTC")), timeframe="15m", what="BTC")
    settings = make(tmp_path, timeframe="15m", end_date="2025-12-31", embargo=96)
    built = write_tables(partition_bars(bars, settings=settings))
    container = TimeSeriesDataContainer.load(built.folder)
    assert len(container.train) + len(container.val) + len(container.test) > 75_000
    assert container.test["ts"].iloc[0] == pd.Timestamp("2025-12-31 00:15", tz="UTC")
    for h in (1, 5, 20):
        assert container.train[f"label_h{h}"].value_counts(normalize=True).min() > 0.1


# Time is not rows


def test_training_knows_nothing_after_its_end_though_a_gap_follows(bars: pd.DataFrame, tmp_path: Path):
    """The bars go on for two days after the end of training, then are missing for five."""
    gap = bars["ts"][1499]  # the last bar before the hole
    end = gap - pd.Timedelta("2D")
    for labels in ("forward_return", "triple_barrier"):
        values = {"train_end": str(end), "end_date": "2023-06-01", "horizons": "1,5,20", "labels": labels}
        parts = partition_bars(bars, settings=make(tmp_path, **values)).tables
        for part, last in (("train", end), ("val", pd.Timestamp("2023-06-01", tz="UTC"))):
            ends = parts[part][["t1_h1", "t1_h5", "t1_h20"]].max(axis=1)
            assert ends.max() <= last
            assert ends.max() > last - pd.Timedelta("1D")


def test_nothing_after_the_border_changes_a_training_row(bars: pd.DataFrame, tmp_path: Path):
    """Features of longer bars, labels, weights and the scaler's numbers, with another market behind the border."""
    groups = {"bounded_features": ["rsi", "mfi_1d"], "unbounded_features": ["log_return_3_12h"]}
    settings = make(
        tmp_path, feature_groups=groups, horizons="1,5", train_end="2023-03-05T08:00", weighting="uniqueness"
    )
    honest = partition_bars(bars, settings=settings)
    later = bars["ts"] >= settings.train_end
    wild = bars.copy()
    for name in ("open", "high", "low", "close", "volume"):
        wild[name] = wild[name].where(~later, wild[name] * 1.7)
    other = partition_bars(wild, settings=settings)
    pd.testing.assert_frame_equal(other.tables["train"], honest.tables["train"], check_exact=True)
    pd.testing.assert_frame_equal(other.scaled["train"], honest.scaled["train"], check_exact=True)


def test_gaps_everywhere_are_said_to_be_the_reason(bars: pd.DataFrame, tmp_path: Path):
    short = {"feature_groups": {"unbounded_features": ["log_return_1"]}, "labels": "forward_return"}
    pairs = bars[np.arange(len(bars)) % 3 > 0].reset_index(drop=True)
    with pytest.raises(DataError, match="no row has both its features and a label"):
        partition_bars(pairs, settings=make(tmp_path, horizons="1", **short))
    single = bars[::2].reset_index(drop=True)
    with pytest.raises(DataError, match="a run of more than 1 bars without a gap"):
        partition_bars(single, settings=make(tmp_path, horizons="1", **short))


def test_darts_series_are_refused_where_no_stretch_is_long_enough(bars: pd.DataFrame, tmp_path: Path):
    """Runs of sixteen bars: a row has its label over fourteen, but no row has fourteen others before it."""
    short = {"feature_groups": {"unbounded_features": ["log_return_1"]}, "labels": "forward_return", "horizons": "14"}
    runs = bars[np.arange(len(bars)) % 17 > 0].reset_index(drop=True)
    box = TimeSeriesDataContainer.load(write_tables(partition_bars(runs, settings=make(tmp_path, **short))).folder)
    assert len(box.numpy("train", 14).y) == len(box.train)
    with pytest.raises(DataError, match="train has no stretch of more than 14 rows without a gap"):
        box.darts("train", 14)
