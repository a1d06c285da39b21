"""Small markets, orders and accounts for the proofs of the backtest: one line a bar, one line an order."""

import numpy as np
import pandas as pd

from kallos.core.columns import timeframe_delta
from kallos.evaluation.simulation import AccountSettings, simulate

START = pd.Timestamp("2024-01-01", tz="UTC")
FREE = {"maker_fee": 0.0, "taker_fee": 0.0, "half_spread": 0.0}
FLAT = (100, 100, 100, 100)


def opens(places, timeframe: str = "1h") -> pd.DatetimeIndex:
    """The open times of the bars at those places of the grid."""
    times = [START + int(place) * timeframe_delta(timeframe) for place in places]
    return pd.DatetimeIndex(times, tz="UTC").as_unit("us")


def market(*rows, volume=1000.0, timeframe: str = "1h", missing=(), filled=()) -> pd.DataFrame:
    """Bars from (open, high, low, close); `missing` places of the grid are left out, nobody traded `filled` rows."""
    places = [place for place in range(len(rows) + len(missing)) if place not in missing]
    table = pd.DataFrame(np.asarray(rows, float), columns=["open", "high", "low", "close"])
    table.insert(0, "ts", opens(places, timeframe))
    table["volume"] = np.broadcast_to(np.asarray(volume, float), len(rows)).copy()
    return table.assign(is_filled=[row in filled for row in range(len(rows))]) if filled else table


def order(bar: int, kind: str = "market", size: float = 1.0, unit: str = "units", asset: str = "A", **extra) -> dict:
    """An order decided at the close of that bar, so that the open of the next one is the first that can fill it."""
    return {"bar": bar, "asset_id": asset, "kind": kind, "unit": unit, "size": size, **extra}


def order_table(rows: list[dict], timeframe: str = "1h") -> pd.DataFrame:
    """The table of orders; only the optional columns that one of them uses."""
    table = pd.DataFrame(rows, columns=None if rows else ["bar", "asset_id", "kind", "unit", "size"])
    table.insert(0, "ts", opens(table.pop("bar") + 1, timeframe))
    if "replaces" in table:
        table["replaces"] = [one is not False for one in table["replaces"]]
    return table.astype({"size": float}).sort_values("ts", kind="stable", ignore_index=True)


def play(bars, *rows: dict, timeframe: str = "1h", funding=None, **account):
    """The backtest of those orders, in an account without costs unless they are named."""
    tables = bars if isinstance(bars, dict) else {"A": bars}
    settings = AccountSettings(**{**FREE, **account})
    return simulate(tables, order_table([*rows], timeframe), settings, timeframe=timeframe, funding=funding)


def seen(result, *names: str) -> list[tuple]:
    """The fills as tuples: the number of the bar's place on the grid, units, price, and the columns asked for."""
    fills, step = result.fills, timeframe_delta(result.timeframe)
    places = ((fills["ts"] - START) // step).astype(int)
    rows = zip(places, fills["units"], fills["price"], *(fills[name] for name in names), strict=True)
    return [(bar, round(units, 8), round(price, 8), *rest) for bar, units, price, *rest in rows]


def rates(*rows: tuple[str, float]) -> pd.DataFrame:
    """Funding rates from (time, rate)."""
    times = pd.DatetimeIndex([pd.Timestamp(time, tz="UTC") for time, _ in rows]).as_unit("us")
    return pd.DataFrame({"ts": times, "rate": [float(rate) for _, rate in rows]})
