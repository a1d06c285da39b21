"""What the tests of the pipeline share: a small market, and `kallos-run all` as a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from kallos.core.runs import file_hash

ROOT = Path(__file__).resolve().parents[1]
SHOWCASE = ROOT / "config" / "showcase.yaml"
KALLOS = str(Path(sys.executable).with_name("kallos-run"))
OTHER = {"12h": "1d", "1d": "12h"}  # the parts of the showcase: a network, and a linear model
LABELLED = {  # what a run forecasts -> its settings beside those of the showcase
    "label": {
        "labels": {"target_col": "label", "horizon": 3, "volatility_window": 30},
        "model": {"name": "logistic_classifier", "search_space": {"input_chunk_length": {"low": 1, "high": 5}}},
        "backtest": {"signal": "probability", "entry_probability": 0.35, "n_shuffles": 20, "sensitivity": False},
    },
    "return": {"labels": {"target_col": "return", "horizon": 3, "volatility_window": 30}},
}
NUMBERS = ("optuna_best.json", "metrics_test.json", "preds_test.parquet", "trades.csv", "equity.csv")


def shared(factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes of this test session share, and no other session."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def environment(folder: Path) -> dict[str, str]:
    """The variables of a command whose database is the folder's."""
    return os.environ | {"KALLOS_DB_URL": f"sqlite:///{folder / 'kallos.db'}"}


def kallos(folder: Path, *words: object, code: int | None = 0) -> str:
    """What `kallos-run` said in that folder; it must leave with the code, if one is named."""
    command = [KALLOS, *map(str, words)]
    how = {"cwd": folder, "env": environment(folder), "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=900, check=False, **how)
    said = done.stdout + done.stderr
    assert code is None or done.returncode == code, said
    assert "Traceback" not in said, said
    return said


def with_market(folder: Path) -> Path:
    """The folder, whose database now holds the sample market that the showcase was made of."""
    folder.mkdir(parents=True, exist_ok=True)
    kallos(folder, "sample", "--asset-id", "BTC", "--timeframe", "12h", "--start", "2023-01-01")
    return folder


def hashes(part: Path) -> dict[str, str]:
    """The hash of every file of numbers of a part."""
    return {name: file_hash(part / name) for name in NUMBERS}


def summary(run: Path) -> dict:
    """The run's summary."""
    return json.loads((run / "summary.json").read_text(encoding="utf8"))


def finished_run(folder: Path, parts: tuple[str, ...]) -> Path:
    """A run of the showcase's settings that was never stopped; made once, by whichever test process comes first."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        run = folder / "reports" / "whole"
        if not (run / "summary.json").exists():
            with_market(folder)
            kallos(folder, "all", "--config", SHOWCASE, "--run-id", "whole", "--timeframes", ",".join(parts))
    return run


def labelled_settings(folder: Path, target: str) -> Path:
    """The file of the settings of a run that forecasts labels: of the showcase, and those of `LABELLED`."""
    settings = yaml.safe_load(SHOWCASE.read_text(encoding="utf8")) | {"timeframes": ["1d"]} | LABELLED[target]
    del settings["per_timeframe"]
    path = folder / f"{target}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf8")
    return path


def labelled_run(folder: Path, target: str) -> Path:
    """A finished run that forecasts labels; made once, by whichever test process comes first."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        run = folder / "reports" / target
        if not (run / "summary.json").exists():
            kallos(with_market(folder), "all", "--config", labelled_settings(folder, target), "--run-id", target)
    return run
