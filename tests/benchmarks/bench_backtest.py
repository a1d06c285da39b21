"""A backtest of a million bars against vectorbt and backtesting.py, side by side in one run.

All sides are long or flat by the same signal, which turns 20,000 times: bought with all cash and sold at the next open,
with a proportional fee and slippage. Timed is what leads to equity, returns, Sharpe ratio and trade records, in turns
and without the garbage collector; vectorbt with its numba engine, with its Rust engine, and the quicker one of its two
ways to say it. Then the first call in a fresh process, and a thousand settings over a hundred thousand bars: time,
cores in use and memory. Run it with `make bench`.
"""

import argparse
import gc
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pandas as pd

from kallos.evaluation.many import bar_returns, simulate_many, summarize
from kallos.evaluation.simulation import AccountSettings, simulate

CAPITAL, FEE, SLIPPAGE, SEED = 10_000.0, 1e-4, 5e-5, 0
ACCOUNT = AccountSettings(capital=CAPITAL, taker_fee=FEE, maker_fee=FEE, half_spread=0.0, slippage=SLIPPAGE)
MINUTE = pd.Timedelta(minutes=1)
FIRST = """import time; begun = time.perf_counter()
import sys; sys.path.insert(0, {folder!r}); import bench_backtest as bench
bars, decided = bench.scene(1_000, 20); prepared = time.perf_counter()
run = bench.simulate(bars, bench.table(bars, decided), bench.ACCOUNT, timeframe="1m"); run.trades
print(prepared - begun, time.perf_counter() - prepared)"""


def scene(n: int, flips: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Bars of a random walk of minutes, and the bars at whose close the signal turns: in, out, in."""
    rng = np.random.default_rng(SEED)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 1e-3, n)))
    first = np.r_[100.0, close[:-1]]
    ts = pd.date_range("2020-01-01", periods=n, freq="1min", tz="UTC")
    prices = {"open": first, "high": np.maximum(first, close) * 1.0005, "low": np.minimum(first, close) * 0.9995}
    bars = pd.DataFrame({"ts": ts, **prices, "close": close, "volume": 1e6})
    return bars, np.sort(rng.choice(np.arange(1, n - 2), flips, replace=False))


def span(values: Sequence[float], digits: int = 2) -> str:
    """The median and the range; without `market`, which imports what no backtest needs."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(bars: pd.DataFrame, decided: np.ndarray) -> pd.DataFrame:
    """The orders of kallos."""
    columns = {"ts": bars["ts"].iloc[decided].array + MINUTE, "asset_id": "A", "kind": "market", "unit": "fraction"}
    return pd.DataFrame(columns | {"size": (np.arange(len(decided)) % 2 == 0).astype(float)})


def of_kallos(bars: pd.DataFrame, decided: np.ndarray) -> Callable:
    orders = table(bars, decided)

    def run() -> tuple[float, int, float]:
        found = simulate(bars, orders, ACCOUNT, timeframe="1m")
        merits = summarize(found, bar_returns(found))
        assert len(found.trades) == merits["trades"]
        return merits["equity"], merits["trades"], merits["sharpe"]

    return run


def of_vectorbt(bars: pd.DataFrame, decided: np.ndarray, engine: str, way: str) -> Callable:
    import vectorbt

    close, first, entries, exits = bars["close"], bars["open"], *np.zeros((2, len(bars)), bool)
    entries[decided[::2] + 1] = exits[decided[1::2] + 1] = True
    size = np.where(entries, np.inf, np.where(exits, -np.inf, np.nan))
    how = {"price": first, "fees": FEE, "slippage": SLIPPAGE, "init_cash": CAPITAL, "freq": "1min"}
    how |= {"direction": "longonly", "engine": engine}

    def run() -> tuple[float, int, float]:
        signals = way == "signals"
        made = vectorbt.Portfolio
        found = made.from_signals(close, entries, exits, **how) if signals else made.from_orders(close, size, **how)
        sharpe, records = found.sharpe_ratio(engine=engine), found.trades.records
        assert len(found.returns()) == len(bars)
        return found.value().iloc[-1], len(records), sharpe

    return run


def of_backtesting(bars: pd.DataFrame, decided: np.ndarray) -> Callable:
    import backtesting

    where = np.zeros(len(bars), np.int8)
    where[decided[::2]], where[decided[1::2]] = 1, -1

    class Follow(backtesting.Strategy):
        def init(self) -> None:
            pass

        def next(self) -> None:
            turn = where[len(self.data) - 1]
            if turn > 0:
                self.buy()
            elif turn < 0:
                self.position.close()

    named = bars.set_index("ts").rename(columns=str.capitalize)
    cash = 1e6 * CAPITAL  # it trades whole units, and must be able to buy them to the end

    def run() -> tuple[float, int, float]:
        with redirect_stderr(io.StringIO()):  # its progress bar
            how = {"cash": cash, "commission": FEE, "spread": SLIPPAGE, "finalize_trades": False}
            found = backtesting.Backtest(named, Follow, **how).run()
        assert len(found["_trades"]) == len(decided) // 2
        return found["_equity_curve"]["Equity"].iloc[-1], len(found["_trades"]), found["Sharpe Ratio"]

    return run


def timed(run: Callable) -> float:
    gc.collect()
    gc.disable()
    begun = time.perf_counter()
    run()
    passed = time.perf_counter() - begun
    gc.enable()
    return passed


def compare(n: int, flips: int, rounds: int) -> None:
    """Prints the median time of each side and how many times that of kallos it is."""
    bars, decided = scene(n, flips)
    sides = {"kallos": of_kallos(bars, decided)}
    try:
        import vectorbt_rust  # noqa: F401

        engines = ("numba", "rust")
    except ImportError:
        engines = ("numba",)
        print("vectorbt's Rust engine is not installed (pip install vectorbt-rust)")
    ways = [(engine, way) for engine in engines for way in ("signals", "orders")]
    sides |= {f"vectorbt {engine}, {way}": of_vectorbt(bars, decided, engine, way) for engine, way in ways}
    first = {name: run() for name, run in sides.items()}  # and all is compiled now
    for name, (equity, trades, _) in first.items():
        assert abs(equity / first["kallos"][0] - 1) < 1e-9, f"{name} ends with {equity}"
        assert trades == first["kallos"][1], f"{name} has {trades} trades"
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times[name].append(timed(run))
    slow = of_backtesting(bars, decided)
    times["backtesting.py"] = [timed(slow) for _ in range(2)]
    print(f"{n:,} bars, {flips:,} flips, fee and slippage, {rounds} rounds: final equity of all is the same to 1e-9")
    for name, passed in times.items():
        ratios = [one / own for one, own in zip(passed, times["kallos"], strict=False)]
        print(f"  {name:24} {statistics.median(passed) * 1e3:8.1f} ms, {span(ratios, 1)} times kallos")


def fresh(rounds: int) -> None:
    """Prints what the first backtest of a process takes, with compiled code from an earlier one."""
    code = FIRST.format(folder=sys.path[0])
    command = [sys.executable, "-c", code]
    made = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(rounds)]
    parts = np.array([one.stdout.split() for one in made], float)
    print(f"a fresh process: imports {span(parts[:, 0])} s, first call {span(parts[:, 1])} s, under 2 s wanted")


def many(n: int, settings: int) -> None:
    """Prints time, cores in use and memory of many settings."""
    bars, _ = scene(n, 0)
    close = bars["close"].to_numpy()
    total = np.cumsum(close)

    def above(window: int) -> np.ndarray:
        """1.0 while the close is above its mean of that many bars."""
        wanted = np.zeros(n)
        wanted[window:] = close[window:] * window > total[window:] - total[:-window]
        return wanted

    windows = np.linspace(20, 2_000, settings).astype(int)
    simulate_many({"A": bars}, windows[:2], above, ACCOUNT, timeframe="1m")
    begun, before = time.perf_counter(), time.process_time()
    found = simulate_many({"A": bars}, windows, above, ACCOUNT, timeframe="1m")
    wall, used = time.perf_counter() - begun, time.process_time() - before
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 2**10  # getrusage would tell that of the parent, if it is larger
    print(f"{settings:,} settings over {n:,} bars, {found['trades'].mean():.0f} trades each: {wall:.1f} s, "
          f"{used / wall:.1f} cores, peak {peak:.0f} MiB")  # fmt: skip


def main() -> None:
    """Runs the parts, the one that shows its memory in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bars", type=int, default=1_000_000)
    parser.add_argument("--flips", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--settings", type=int, default=1_000)
    parser.add_argument("--many", action="store_true", help="only the settings")
    options = parser.parse_args()
    if options.many:
        many(options.bars // 10, options.settings)
        return
    compare(options.bars, options.flips, options.rounds)
    fresh(3)
    sizes = ["--bars", str(options.bars), "--settings", str(options.settings)]
    subprocess.run([sys.executable, __file__, "--many", *sizes], check=True)


if __name__ == "__main__":
    main()
