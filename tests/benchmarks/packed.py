"""What the benchmarks of inference share: a small gru that was trained, its bundle, and the bars it is asked about.

It defines and runs nothing.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kallos.core.runs import write_json
from kallos.data.features import compute_features
from kallos.data.sample import sample_bars
from kallos.data.store import write_bars, write_features
from kallos.data.tables import connect
from kallos.inference.bundle_making import make_bundle
from kallos.models.trainer import train_and_save_model

BOUNDED = "rsi mfi adx stochastic_k williams_r".split()  # noqa: SIM905
UNBOUNDED = """macd_diff_relative atr_relative bollinger_width garman_klass_volatility log_return_1 log_return_3
log_return_7 realised_volatility_7 sma_distance_20""".split()  # noqa: SIM905
GROUPS = {"volume_features": ["volume_ratio"], "bounded_features": BOUNDED, "unbounded_features": UNBOUNDED}
GRU = {
    "hidden_dim": 32, "n_rnn_layers": 1, "dropout": 0.0, "batch_size": 256,
    "input_chunk_length": 40, "learning_rate": 1e-3,
}  # fmt: skip


class Packed(NamedTuple):
    """A trained model and its bundle."""

    manifest: Path  # of the training
    bundle: Path  # a zip
    bars: pd.DataFrame  # on which it was trained, and a few after


def database(folder: Path) -> str:
    """The URL of the database that the model was trained on."""
    return f"sqlite:///{folder / 'bench.db'}"


def packed_gru(folder: Path, *, timeframe: str = "1m") -> Packed:
    """A gru of 32 units that reads 40 rows of 15 features, trained for an epoch, and packed."""
    bars, url = (
        sample_bars(timeframe=timeframe, start="2024-01-01", end="2024-01-07"),
        f"sqlite:///{folder / 'bench.db'}",
    )
    engine, key = connect(url), {"asset_id": "BTC", "timeframe": timeframe}
    write_bars(engine, bars, **key)
    write_features(engine, compute_features(bars, timeframe=timeframe), **key)
    engine.dispose()
    params = write_json(folder / "params.json", {"hyperparameters": GRU})
    how = {"timeframe": timeframe, "feature_groups": GROUPS, "n_epochs": 1, "device": "cpu"}
    trained = train_and_save_model("BTC", "2024-01-06", url, "gru", params, folder, **how)
    return Packed(trained.manifest_path, make_bundle(trained.manifest_path, db=url, zipped=True).path, bars)


def arrays(bars: pd.DataFrame, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The bars as `Bundle.forecast` takes them."""
    found = {name: bars[name].to_numpy("float64") for name in columns if name != "ts"}
    return found | {"ts": bars["ts"].to_numpy("datetime64[us]")}
