"""What the tests of finished runs share: the folder that a run of the pipeline leaves, made in seconds."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from kallos.core.runs import write_json, write_manifest
from kallos.models.trainer import train_and_save_model
from kallos.workflow.data_fingerprints import data_fingerprints
from kallos.workflow.run_records import KIND

FEATURES = {"volume_features": ["volume_ratio"], "bounded_features": ["rsi"], "unbounded_features": []}
SETTINGS = {"assets": ["BTC"], "timeframes": ["1d"], "seed": 3, "features": FEATURES, "model": {"name": "linear"}}
NETWORK = {"hidden_dim": 4, "n_rnn_layers": 1, "dropout": 0.0, "batch_size": 128, "learning_rate": 1e-3}
ASKED = {"asset_id": "BTC", "timeframe": "1d", "features": ["volume_ratio", "rsi"]}


def leave_run(url: str, settings: dict, run_id: str) -> Path:
    """The folder of a run of these settings, with a model that was really trained and tables that the seed makes."""
    folder = Path(settings["paths"]["reports"]) / run_id
    part, seed = folder / "1d", settings["seed"]
    best = write_json(
        part / "optuna_best.json", {"hyperparameters": _hyperparameters(settings), "seconds": len(run_id)}
    )
    _train(url, settings, best, part)
    rng = np.random.default_rng(seed)
    times = pd.date_range("2022-07-01", periods=40, tz="UTC")
    forecasts = pd.DataFrame({"ts": times, "model": settings["model"]["name"], "y_pred": rng.normal(size=40)})
    forecasts.to_parquet(part / "preds_test.parquet")
    forecasts.assign(equity=10_000 + forecasts["y_pred"].cumsum()).to_csv(part / "equity.csv", index=False)
    forecasts[::8].to_csv(part / "trades.csv", index=False)
    skill = {"skill": float(forecasts["y_pred"].mean()), "rmse": 1.0 + seed / 100}
    write_json(part / "metrics_test.json", skill | {"looks": [{"at": run_id}]})
    write_json(part / "backtest_metrics.json", {"sharpe": float(seed), "trades": 5})
    return end_run(folder, settings, data={"1d": data_fingerprints(url, **ASKED)}, skill=skill)


def _hyperparameters(settings: dict) -> dict:
    return {"input_chunk_length": 5} | (NETWORK if settings["model"]["name"] == "gru" else {"alpha": 1.0})


def _train(url: str, settings: dict, best: Path, part: Path) -> None:
    name, steps = settings["model"]["name"], part / "steps"
    how = {"seed": settings["seed"], "timeframe": "1d", "feature_groups": settings["features"], "n_epochs": 1}
    train_and_save_model("BTC", "2022-06-30", url, name, best, steps, **how)
    for end in ("pt", "pt.ckpt"):
        if (steps / f"{name}_BTC.{end}").exists():
            shutil.copy(steps / f"{name}_BTC.{end}", part / f"model.{end}")
    shutil.copy(steps / f"{name}_BTC_scaler.pkl", part / "scaler.pkl")
    shutil.rmtree(steps)


def end_run(folder: Path, settings: dict, *, data: dict | None = None, skill: dict | None = None, **summary) -> Path:
    """The folder, with a summary and a manifest that vouches for all files of its parts."""
    part = {"status": "done", "asset_id": "BTC", "timeframe": "1d", "metrics_test": skill or {"skill": 0.1}}
    about = {"run_id": folder.name, "status": "done", "started_at": "2024-05-01T10:00:00Z", "parts": {"1d": part}}
    write_json(folder / "summary.json", about | summary)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*/*")) if path.is_file()}
    record = {"settings": settings, "seed": settings["seed"], "data": data or {}, "artifacts": files}
    write_manifest(folder / "manifest.json", KIND, **record)
    return folder


def vouch_again(folder: Path) -> None:
    """Makes the manifest vouch for the part's files as they are now, as if the run had made them so."""
    from kallos.core.runs import read_json

    kept = read_json(folder / "manifest.json")
    end_run(folder, kept["settings"], data=kept["data"])
