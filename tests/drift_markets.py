"""Markets on which drift is proven: quiet ones, and ones that change at a known bar; what a bundle keeps of them."""

import numpy as np
import pandas as pd

from kallos.data.features import compute_features
from kallos.data.sample import sample_bars
from kallos.inference.drift import Drift, measure_drift

FEATURES = ["volume_ratio", "rsi", "mfi", "macd_diff_relative", "realised_volatility_30"]
PRICES = ["open", "high", "low", "close"]
WARM, KEPT, BETWEEN, AFTER = 330, 1000, 100, 60  # bars: warm-up, reference, until the change, after it


def market(bars: int, *, seed: int, signal: float = 0.2) -> pd.DataFrame:
    """So many daily bars of a sample market."""
    end = pd.Timestamp("2005-01-03") + (bars - 1) * pd.Timedelta("1D")
    return sample_bars(timeframe="1d", start="2005-01-03", end=str(end.date()), seed=seed, signal=signal)


def wilder(bars: pd.DataFrame, *, first: int, times: float) -> pd.DataFrame:
    """The bars, their log moves so many times as large from this one on."""
    changed, base = bars.copy(), bars["open"].iloc[first]
    changed.loc[first:, PRICES] = base * (bars.loc[first:, PRICES] / base) ** times
    return changed


def joined(old: pd.DataFrame, new: pd.DataFrame, *, first: int) -> pd.DataFrame:
    """The old bars, and from this one on the new ones, at the price that was reached."""
    later = new.iloc[first:].copy()
    later[PRICES] *= old["close"].iloc[first - 1] / later["open"].iloc[0]
    return pd.concat([old.iloc[:first], later], ignore_index=True)


def rows_of(bars: pd.DataFrame, *, signal: float = 0.2) -> pd.DataFrame:
    """Features with the forecast that the signal allows for, and with what came of it; the last row does not know."""
    table = compute_features(bars, timeframe="1d", names=FEATURES)
    moves = np.log(table["close"]).diff()
    return table.assign(y_true=moves.shift(-1), y_pred=signal * moves, y_naive=0.0).iloc[1:].reset_index(drop=True)


def reference_of(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """What a bundle keeps of these rows."""
    wrong = {"forecast_errors": table["y_pred"] - table["y_true"], "naive_errors": table["y_naive"] - table["y_true"]}
    arrays = {"features": table[FEATURES], "names": FEATURES, "forecasts": table["y_pred"], **wrong}
    return {name: np.asarray(values) for name, values in arrays.items()} | {"forecasts_are": np.array("out of sample")}


def quiet_check(seed: int, **how: object) -> Drift:
    """A check of a market that goes on as it did."""
    table = rows_of(market(WARM + KEPT + 150, seed=seed))
    recent = table.iloc[:-1].tail(33)
    return measure_drift(reference_of(table.iloc[:KEPT]), recent, recent, **how)


def changing(kind: str, seed: int) -> tuple[pd.DataFrame, float]:
    """Bars that change at WARM + KEPT + BETWEEN, and the signal that the model believes in."""
    n, first = WARM + KEPT + BETWEEN + AFTER, WARM + KEPT + BETWEEN
    if kind == "wilder":
        return wilder(market(n, seed=seed), first=first, times=5.0), 0.2
    old, new = (market(n, seed=seed, signal=signal) for signal in (0.6, -0.6))
    return (joined(old, new, first=first) if kind == "reversed" else old), 0.6


def delay(kind: str, seed: int, *, step: int = 1) -> float:
    """Bars after the change until a check, one every `step` bars, fires; infinity if none does."""
    bars, signal = changing(kind, seed)
    table, change = rows_of(bars, signal=signal), bars["ts"].iloc[WARM + KEPT + BETWEEN]
    reference = reference_of(table.iloc[:KEPT])
    for bar in range(step, AFTER + 1, step):
        known = table[table["ts"] <= change + bar * pd.Timedelta("1D")]
        recent = known.tail(34)
        recent = recent.assign(y_true=recent["y_true"].where(recent["ts"] < recent["ts"].iloc[-1]))
        if measure_drift(reference, recent.tail(33), recent, rows=33).fired:
            return bar
    return float("inf")
