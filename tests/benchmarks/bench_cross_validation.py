"""What combinatorial cross-validation costs beyond its fits: splitting, scaling, hashing, files, processes, loading.

The whole of `cross_validate` is timed, and within it `run_fold`, which is a fold's fit and its forecasts. What is left
is the overhead, as a share of the folds' time. A small GRU is what the aim of 2 % is meant for; a ridge regression,
whose fit takes no time to speak of, shows the same seconds without anything to hide behind. Run it with `make bench`.
"""

import argparse
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from market import END, span, store_market

from kallos.core.runs import write_json
from kallos.data.sample import sample_bars
from kallos.models import cross_validation
from kallos.models.cross_validation import ValidationSettings, cross_validate

AIM = 0.02
MODELS = {
    "gru": {
        "hidden_dim": 32, "n_rnn_layers": 1, "dropout": 0.0, "batch_size": 64, "input_chunk_length": 30,
        "learning_rate": 1e-3,
    },
    "linear": {"input_chunk_length": 10, "alpha": 10.0},
}  # fmt: skip
PARTS = ("run_fold", "fold_from_parts", "load_rows", "keep_table", "fold_keys", "write_manifest", "paths_of")


def timed(name: str, spent: Counter) -> Callable:
    """The function of that name in the module, which adds its seconds to what was spent."""
    function = getattr(cross_validation, name)

    def call(*args, **kwargs):
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - begun

    return call


def run(settings: ValidationSettings, url: str) -> Counter:
    """Seconds by part of one cross-validation from nothing, and of the whole."""
    shutil.rmtree(settings.folder, ignore_errors=True)
    spent = Counter()
    with ExitStack() as stack:
        for name in PARTS:
            stack.enter_context(patch.object(cross_validation, name, timed(name, spent)))
        begun = time.perf_counter()
        cross_validate(settings, db=url, progress=False)
        spent["whole"] = time.perf_counter() - begun
    return spent


def settings_of(model_name: str, folder: Path, epochs: int, patience: int = 5) -> ValidationSettings:
    """cpcv of six groups, two of them tested: fifteen fits."""
    params = write_json(folder / f"{model_name}.json", MODELS[model_name])
    what = {"asset_id": "BTC", "end_date": END, "model_name": model_name, "scheme": "cpcv", "device": "cpu"}
    fit = {"max_epochs": epochs, "patience": patience}
    return ValidationSettings.from_values(what | fit | {"params_file": params, "output_path": folder / model_name})


def main() -> None:
    """Prints a line a model: seconds of the folds and beyond them, the share, and where they went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--patience", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = store_market(sample_bars(timeframe="1d", seed=1), f"sqlite:///{folder}/kallos.db")
        for model_name in MODELS:
            run(settings_of(model_name, folder, 1), url)  # compiles and warms up
            settings = settings_of(model_name, folder, options.epochs, options.patience)
            runs = [run(settings, url) for _ in range(options.repeats)]
            shares = [(spent["whole"] - spent["run_fold"]) / spent["run_fold"] for spent in runs]
            parts = ", ".join(f"{part} {span([spent[part] for spent in runs], 3)}" for part in PARTS[1:])
            aim = f" (aim: under {AIM:.0%})" if model_name == "gru" else ""
            folds = span([spent["run_fold"] for spent in runs])
            print(f"{model_name}: 15 folds {folds} s, beyond them {span([100 * s for s in shares])} %{aim}")
            print(f"  seconds: {parts}")


if __name__ == "__main__":
    main()
