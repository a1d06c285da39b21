"""The data floor as a person uses it: real files and an exchange in, tables and an audit out, by the command line."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from exchange_server import Listing, candles, serving

from kallos.data.assets import list_assets
from kallos.data.bars import gap_map, resample_bars
from kallos.data.ingest import load_repair_report
from kallos.data.ledger import read_back
from kallos.data.records import read_funding, read_quarantine, read_repairs
from kallos.data.sample import sample_bars
from kallos.data.store import read_bars, read_features
from kallos.data.tables import connect
from kallos.models.container import TimeSeriesDataContainer

BTC = ("--asset-id", "BTC", "--timeframe", "1d")
LEAKY = """
import numpy as np
from kallos.data.features import Feature, register


def centred(bars):
    close = np.pad(bars["close"], 1, mode="edge")
    return (close[:-2] + close[1:-1] + close[2:]) / 3 / bars["close"]


register(Feature("own_centred", "unbounded_features", centred, ("close",), 0, "mean of three closes"))
"""


def kallos_run(*words: object, cwd: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """A command line that ends with that exit code."""
    program = "import sys; sys.argv[0] = 'kallos-run'; from kallos.main import main; main()"
    inherited = {name: value for name, value in os.environ.items() if name != "KALLOS_DB_URL"}
    command = [sys.executable, "-c", program, *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=inherited | environment)
    assert run.returncode == code, run.stdout + run.stderr
    return run


# Real files


FILES = {
    "BTCUSDT_spot_1d.csv.gz": ("BTC", "1d", 2742, 0),
    "BTCUSDT_spot_4h.csv.gz": ("BTC", "4h", 15440, 16),
    "BTCUSDT_spot_1h.csv.gz": ("BTC", "1h", 28673 - 43, 108 + 43),
    "BTCUSDT_perp_15m.parquet": ("BTC_PERP", "15m", 75840, 0),
    "ETHUSDT_spot_1d.csv.gz": ("ETH", "1d", 1309, 0),
    "ETHUSDT_spot_4h.csv.gz": ("ETH", "4h", 18371, 16),
}
MESSY = {
    "cdd_BTCUSDT_1h.csv.gz": ("CDD", "1h"),
    "coinbase_BTCUSD_1h.csv.gz": ("COINBASE", "1h"),
    "partials_BTCUSDT_1h.csv.gz": ("PARTIALS", "1h"),
    "tiny_SHIBUSDT_3m.csv.gz": ("SHIB", "3m"),
}


@pytest.fixture(scope="module")
def real_market(real_data, tmp_path_factory) -> Path:
    """A folder whose data/kallos.db holds all real files, ingested by the command line."""
    folder = tmp_path_factory.mktemp("market")
    clean = {real_data / "bars" / name: known[:2] for name, known in FILES.items()}
    for path, (asset, timeframe) in (clean | {real_data / "messy" / name: key for name, key in MESSY.items()}).items():
        kallos_run("ingest", path, "--asset-id", asset, "--timeframe", timeframe, cwd=folder)
    return folder


def stored(folder: Path, asset: str, timeframe: str, read=read_bars) -> pd.DataFrame:
    return read(connect(f"sqlite:///{folder}/data/kallos.db"), asset_id=asset, timeframe=timeframe)


def report_on(folder: Path, asset: str, timeframe: str):
    return load_repair_report(folder / "reports" / "ingest" / f"{asset}_{timeframe}.json")


@pytest.mark.slow
def test_the_six_clean_files_are_stored_and_what_is_known_of_them_holds(real_market):
    for asset, timeframe, rows, missing in FILES.values():
        bars = stored(real_market, asset, timeframe)
        assert (len(bars), gap_map(bars["ts"], timeframe=timeframe)["missing"].sum()) == (rows, missing)
        if "quote_asset_volume" in bars:
            traded = bars[bars["volume"] > 0]
            price = traded["quote_asset_volume"] / traded["volume"]
            assert ((price >= traded["low"] * (1 - 1e-9)) & (price <= traded["high"] * (1 + 1e-9))).all()
            assert (traded["taker_buy_base_asset_volume"] <= traded["volume"] * (1 + 1e-12)).all()


@pytest.mark.slow
def test_four_hours_in_the_database_make_the_day_in_the_database(real_market):
    made = resample_bars(stored(real_market, "BTC", "4h"), timeframe="4h", to="1d").set_index("ts")
    days = stored(real_market, "BTC", "1d").set_index("ts")
    both = made.index.intersection(days.index)
    prices = ["open", "high", "low", "close"]
    assert len(both) > 2500 and (made.loc[both, prices] == days.loc[both, prices]).all(axis=None)
    quarters = stored(real_market, "BTC_PERP", "15m")
    for longer, rows in (("1h", 75840 // 4), ("4h", 75840 // 16)):
        assert len(resample_bars(quarters, timeframe="15m", to=longer)) == rows


@pytest.mark.slow
def test_the_messy_files_end_as_their_readme_says(real_market, real_data, tmp_path):
    cdd, partials = report_on(real_market, "CDD", "1h"), report_on(real_market, "PARTIALS", "1h")
    assert cdd.counts["duplicate"] + cdd.counts["partial_version"] == 2649
    assert (cdd.counts["times_disagree"], cdd.counts["spike"]) == (91, 1)
    assert cdd.counts["newest_first"] and cdd.counts["flat_filler"] and cdd.missing_values["number_of_trades"] > 0
    kept_out = Counter(stored(real_market, "CDD", "1h", read_quarantine)["rule"])
    assert (kept_out["times_disagree"], kept_out["spike"]) == (91, 1)
    assert (partials.counts["partial_version"], partials.counts["off_grid"]) == (5, 43)
    coinbase = report_on(real_market, "COINBASE", "1h")
    assert coinbase.counts["unordered"] and coinbase.counts["newest_first"]
    # the file's prices lie near 1e4 and its volume in coins far below them, so the quote volume was not taken for it
    assert stored(real_market, "COINBASE", "1h")["volume"].median() < 5_000
    text = pd.read_csv(real_data / "messy" / "tiny_SHIBUSDT_3m.csv.gz", float_precision="round_trip")
    shib = stored(real_market, "SHIB", "3m")
    names = ["open", "high", "low", "close", "volume"]
    assert np.array_equal(shib[names].to_numpy(), text[names].to_numpy("float64"))
    excel = ("ingest", real_data / "messy" / "excel_BTCUSDT_4h.csv.gz", "--asset-id", "X", "--timeframe", "4h")
    refused = kallos_run(*excel, cwd=tmp_path, code=2)
    assert "no reading of this file is right" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_repairs_of_a_real_file_can_be_read_back(real_market):
    bars, changes = (stored(real_market, "CDD", "1h", read) for read in (read_bars, read_repairs))
    flats = changes[changes["rule"] == "flat_filler"]
    assert len(flats) == report_on(real_market, "CDD", "1h").counts["flat_filler"] == bars["is_filled"].sum()
    assert not read_back(bars, changes)["is_filled"].any()


# The notebook that people open first


def explored(folder: Path, **parameters: object) -> str:
    """All that the notebook says, run by papermill; it complains of nothing."""
    notebook = Path(__file__).parents[1] / "nbs" / "explore.ipynb"
    done = papermill.execute_notebook(str(notebook), str(folder / "out.ipynb"), parameters, kernel_name="python3")
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"]
    assert (folder / "out.ipynb").stat().st_size < 2_000_000
    return nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=outputs)]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_explore_runs_without_any_data(tmp_path, monkeypatch):
    monkeypatch.setenv("KALLOS_DB_URL", f"sqlite:///{tmp_path}/none.db")
    said = explored(tmp_path)
    assert "The sample market is shown instead." in said and "flat_filler" in said and "no leak found" in said
    assert "kallos-run sample --asset-id BTC --timeframe 1d" in said and "1,461 bars" in said
    assert "Study linear_BTC_1d_log_return_h1" in said and "nothing of it was stored" in said
    assert "WalkForwardSplit" in said and "CombinatorialPurgedCV" in said and "IN-SAMPLE" in said
    assert not [*tmp_path.glob("*.db")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_explore_shows_the_report_of_the_ingest(tmp_path, monkeypatch):
    days = sample_bars(start="2021-01-01", end="2023-12-31")
    days.assign(close=days["close"].where(days.index != 500, -5.0)).to_csv(tmp_path / "days.csv", index=False)
    (tmp_path / "config").mkdir()
    for name in ("settings.ini", "config/train.yaml"):
        (tmp_path / name).touch()
    kallos_run("ingest", "days.csv", *BTC, cwd=tmp_path)
    monkeypatch.setenv("KALLOS_DB_URL", f"sqlite:///{tmp_path}/data/kallos.db")
    monkeypatch.chdir(tmp_path)
    said = explored(tmp_path)
    assert "days.csv: 1,095 rows read, 1,094 bars of 1d kept" in said and "non_positive_price" in said
    assert "1,094 bars, 1 missing, 0 filled, 0 changed, 1 kept out" in said


# Tables and the audit


@pytest.fixture(scope="module")
def sample_market(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    kallos_run("sample", *BTC, "--start", "2020-01-01", cwd=folder)
    (folder / "leaky.py").write_text(LEAKY)
    return folder


@pytest.mark.slow
def test_one_command_makes_tables_that_load(sample_market):
    said = kallos_run("data", *BTC, "--horizons", "1,5", "--output-path", "tables", cwd=sample_market).stdout
    assert "train: " in said and "REPORT.md" in said
    X, y, weight, ts = TimeSeriesDataContainer.load(sample_market / "tables").numpy("train", 5)
    assert len(X) == len(y) == len(weight) == len(ts) > 500 and {*np.unique(y)} <= {-1, 0, 1}
    again = kallos_run("audit", *BTC, "--tables", "tables", "--probes", "split overlap,scaler", cwd=sample_market)
    assert "no leak found" in again.stdout


@pytest.mark.slow
def test_the_audit_ends_with_5_and_names_the_leak(sample_market):
    own = ("--own-features", "leaky.py", "--features", "own_centred,rsi", "--report", "audit.json")
    run = kallos_run("audit", *BTC, *own, cwd=sample_market, code=5)
    assert "the audit found a leak; got 'own_centred'" in run.stderr
    found = json.loads((sample_market / "audit.json").read_text())
    assert not found["passed"] and {finding["column"] for finding in found["findings"]} == {"own_centred"}
    found = json.loads(kallos_run("audit", *BTC, "--features", "rsi", "--json", cwd=sample_market).stdout)
    assert found["passed"] and found["findings"] == []


@pytest.mark.slow
def test_features_grow_with_the_bars_and_own_features_join_them(sample_market, tmp_path):
    url = f"sqlite:///{tmp_path}/grown.db"
    days = sample_bars(start="2020-01-01", end="2023-12-31")
    for name, part in {"a.csv": days[:-10], "b.csv": days[-12:]}.items():
        part.to_csv(tmp_path / name, index=False)
        kallos_run("ingest", name, *BTC, "--db-url", url, cwd=tmp_path)
        said = kallos_run("features", *BTC, "--db-url", url, cwd=tmp_path).stdout
    assert "10 computed, from the bar of 2023-12-22 00:00" in said
    grown = read_features(connect(url), asset_id="BTC", timeframe="1d")
    kallos_run("features", *BTC, "--db-url", url, "--full", cwd=tmp_path)
    whole = read_features(connect(url), asset_id="BTC", timeframe="1d")
    pd.testing.assert_frame_equal(grown, whole, check_exact=True)
    own = ("--own-features", sample_market / "leaky.py")
    said = kallos_run("features", *BTC, "--db-url", url, *own, cwd=tmp_path).stdout
    assert "own features: own_centred" in said and "all computed" in said


# An exchange


@pytest.mark.slow
def test_fetch_fills_a_database_and_goes_on(tmp_path):
    pytest.importorskip("ccxt", reason="needs ccxt: pip install 'kallos[exchange]'")
    now = pd.Timestamp("2024-03-01 00:30", tz="UTC")
    bars = sample_bars(timeframe="1h", start="2024-01-01", end="2024-03-01")
    rates = [
        (due, "0.0001")
        for due in pd.date_range("2024-01-01", "2024-03-01", freq="8h", tz="UTC").as_unit("ms").asi8.tolist()
    ]
    spot = Listing("BTCUSDT", "BTC", "USDT", {"1h": candles(bars[bars["ts"] <= now], "1h")})
    perpetual = Listing("BTCUSDT", "BTC", "USDT", spot.candles, host="fapi", funding=rates)
    with serving(spot, perpetual, now=now) as server:
        ask = ("fetch", "--exchange", "binance", "--timeframe", "1h", "--exchange-url", server.url)
        symbols = ("--symbol", "BTC/USDT", "--symbol", "BTC/USDT:USDT")
        refused = kallos_run(*ask, *symbols, "--since", "2024-01-01", cwd=tmp_path, code=2)
        assert "several symbols in one fetch" in refused.stderr
        both = (*symbols, "--funding", "--allow-batch-symbols")
        said = kallos_run(*ask, *both, "--since", "2024-01-01", "--until", "2024-02-01", cwd=tmp_path).stdout
        assert "BTC/USDT 1h -> BTCUSDT: 744 new" in said, said
        said = kallos_run(*ask, *both, cwd=tmp_path).stdout
        assert "696 new" in said, said
    engine = connect(f"sqlite:///{tmp_path}/data/kallos.db")
    assert list_assets(engine)[["asset_id", "market", "bars"]].to_numpy().tolist() == [
        ["BTCUSDT", "spot", 1440],
        ["BTCUSDT_PERP", "perpetual", 1440],
    ]
    assert len(read_funding(engine, asset_id="BTCUSDT_PERP")) == len(rates)
