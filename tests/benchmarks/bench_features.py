"""All features of a million bars against the bare TA-Lib calls and bare numpy, as a ratio, side by side in one run.

The bare side makes the same columns from ready arrays: what several features share it computes once, and it takes no
care of warm-ups, gaps, holes and markets that stand still. Run it with `make bench`.
"""

import argparse
import statistics
import time

import numpy as np
import talib

from kallos.data.features import compute_features, registered
from kallos.data.sample import sample_bars

Arrays = dict[str, np.ndarray]


def bare_oscillators(bars: Arrays) -> Arrays:
    """Oscillators and volume."""
    high, low, close, volume = (bars[name] for name in ("high", "low", "close", "volume"))
    slow_k, slow_d = talib.STOCH(high, low, close, 14, 3, 0, 3, 0)
    return {
        "volume_ratio": volume / talib.SMA(volume, 20),
        "obv_slope": talib.LINEARREG_SLOPE(talib.OBV(close, volume), 14),
        "rsi": talib.RSI(close, 14),
        "mfi": talib.MFI(high, low, close, volume, 14),
        "adx": talib.ADX(high, low, close, 14),
        "stochastic_k": slow_k,
        "stochastic_d": slow_d,
        "williams_r": talib.WILLR(high, low, close, 14),
        "taker_buy_ratio": bars["taker_buy_base_asset_volume"] / volume,
    }


def bare_calendar(ts: np.ndarray) -> Arrays:
    """Waves of the hour and the weekday."""
    seconds = ts.astype("datetime64[s]").astype("int64")
    hour = 2 * np.pi * (seconds % 86_400) / 86_400
    day = 2 * np.pi * ((seconds // 86_400 + 3) % 7) / 7
    waves = {"sine": np.sin, "cosine": np.cos}
    return {f"{name}_{wave}": waves[wave](turn) for name, turn in (("hour", hour), ("weekday", day)) for wave in waves}


def bare_trend(bars: Arrays) -> Arrays:
    """Trend and range."""
    opened, high, low, close = (bars[name] for name in ("open", "high", "low", "close"))
    macd, atr = talib.MACD(close, 12, 26, 9)[2], talib.ATR(high, low, close, 14)
    upper, middle, lower = talib.BBANDS(close, 20, 2, 2)
    square = np.log(high / low) ** 2 / 2 - (2 * np.log(2) - 1) * np.log(close / opened) ** 2
    return {
        "macd_diff": macd,
        "macd_diff_relative": macd / close,
        "atr": atr,
        "atr_relative": atr / close,
        "bollinger_width": (upper - lower) / middle,
        "bollinger_position": (close - lower) / (upper - lower),
        "garman_klass_volatility": np.sqrt(talib.SMA(square, 14)),
    }


def bare_returns(close: np.ndarray) -> Arrays:
    """Returns, volatilities, distances from means."""
    found = {}
    for lag in (1, 3, 7, 14, 30):
        found[f"log_return_{lag}"] = np.full(len(close), np.nan)
        found[f"log_return_{lag}"][lag:] = np.log(close[lag:] / close[:-lag])
    squares = found["log_return_1"] ** 2
    found |= {f"realised_volatility_{n}": np.sqrt(talib.SMA(squares, n)) for n in (7, 30)}
    return found | {f"sma_distance_{n}": np.log(close / talib.SMA(close, n)) for n in (20, 50, 200)}


def bare_features(bars: Arrays) -> Arrays:
    """Every feature that kallos ships."""
    return bare_oscillators(bars) | bare_calendar(bars["ts"]) | bare_trend(bars) | bare_returns(bars["close"])


def main() -> None:
    """Prints the medians of both sides, and the median and range of their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--bars", type=int, default=1_000_000)
    options = parser.parse_args()
    bars = sample_bars(timeframe="1m", start="2022-01-01", end="2024-12-31")[: options.bars]
    closes = (bars["ts"] + (bars["ts"].iloc[1] - bars["ts"].iloc[0])).to_numpy("datetime64[us]")
    arrays = {name: np.ascontiguousarray(bars[name]) for name in bars.columns[1:]} | {"ts": closes}
    pairs = []
    for repeat in range(options.repeats + 1):
        begun = time.perf_counter()
        table = compute_features(bars, timeframe="1m")
        between = time.perf_counter()
        bare = bare_features(arrays)
        pairs += [(between - begun, time.perf_counter() - between)] if repeat else []  # the first pair warms up
    for name in registered():  # both sides do the same work
        np.testing.assert_allclose(table[name], bare[name][-len(table) :], rtol=1e-6, atol=1e-6)
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"{len(bars):,} bars, {len(registered())} features, {options.repeats} pairs")
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"kallos {ours:.3f} s, bare {theirs:.3f} s, ratio {ratio}, at most 1.5 wanted")


if __name__ == "__main__":
    main()
