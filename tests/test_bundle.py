"""Bundles of every kind of model: the forecasts of the trained model and of its verdict; and what is refused."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest

from kallos.core.config import TrainSettings
from kallos.core.errors import ArtifactError, ConfigError
from kallos.core.runs import write_json
from kallos.data.features import Feature, compute_features, register, unregister
from kallos.data.sample import sample_bars
from kallos.data.store import write_bars, write_features
from kallos.data.tables import connect
from kallos.evaluation.held_out import forecast_held_out, load_all_rows
from kallos.inference.bundle import load_bundle
from kallos.inference.bundle_files import read_bundle_files, seal, zip_bytes
from kallos.inference.bundle_making import make_bundle
from kallos.inference.drift_sources import truth_of
from kallos.models.base_forecasts import ensemble_settings
from kallos.models.cross_validation import ValidationSettings
from kallos.models.ensemble_training import train_ensemble
from kallos.models.label_trainer import LabelTrainSettings, train_on_labels
from kallos.models.labelled import complete_from_splits
from kallos.models.partition import DataSettings, partition_bars
from kallos.models.saved_ensembles import load_ensemble, load_ensemble_rows
from kallos.models.tables import write_tables
from kallos.models.trainer import train
from tests.bundles import bundle_contents, small_bars, small_bundle
from tests.study_runs import END

SMALL = {
    "linear": {"input_chunk_length": 4, "alpha": 10.0},
    "hist_gradient_boosting": {"input_chunk_length": 3, "max_iter": 12, "max_leaf_nodes": 5},
    "random_forest": {"input_chunk_length": 3, "n_estimators": 5, "max_depth": 4},
    "gru": {"input_chunk_length": 12, "hidden_dim": 6, "n_rnn_layers": 1, "dropout": 0.0, "batch_size": 64,
            "learning_rate": 1e-3},
    "transformer": {"input_chunk_length": 8, "d_model": 8, "nhead": 2, "num_encoder_layers": 1,
                    "num_decoder_layers": 1, "dim_feedforward": 8, "batch_size": 64, "learning_rate": 1e-3},
    "logistic_classifier": {"input_chunk_length": 3, "C": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def market_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with the small sample market of two assets, reaching beyond the end date."""
    url = f"sqlite:///{tmp_path_factory.mktemp('market') / 'kallos.db'}"
    engine = connect(url)
    for asset_id, seed in (("BTC", 1), ("ETH", 2)):
        bars = sample_bars(start="2019-01-01", end="2022-12-31", seed=seed)
        write_bars(engine, bars, asset_id=asset_id, timeframe="1d", venue="sample")
        write_features(engine, compute_features(bars, timeframe="1d"), asset_id=asset_id, timeframe="1d")
    engine.dispose()
    return url


def bars_of(url: str, asset_id: str = "BTC") -> pd.DataFrame:
    return sample_bars(start="2019-01-01", end="2022-12-31", seed={"BTC": 1, "ETH": 2}[asset_id])


def params_file(folder: Path, model: str) -> Path:
    return write_json(folder / f"{model}.json", {"hyperparameters": SMALL[model]})


def given(folder: Path, model: str, **more) -> dict:
    values = {"asset_id": "BTC", "end_date": END, "model_name": model, "output_path": str(folder)}
    epochs = {"n_epochs": 1} if model in ("gru", "transformer") else {}
    return values | epochs | {"params_file": str(params_file(folder, model))} | more


QUESTIONS = [
    ("linear", {}),
    ("linear", {"target_col": "close", "horizon": 3}),
    ("linear", {"target_col": "log_close"}),
    ("random_forest", {"horizon": 2}),
    ("hist_gradient_boosting", {}),
    ("gru", {}),
    ("gru", {"horizon": 3}),
    ("transformer", {"target_col": "close"}),
]


@pytest.mark.parametrize(("model", "question"), QUESTIONS)
def test_what_was_judged_is_what_is_served(model, question, market_url, tmp_path):
    settings = TrainSettings.from_values(given(tmp_path, model, **question))
    trained = train(settings, db=market_url)
    made = make_bundle(trained.manifest_path, db=market_url)
    bundle = load_bundle(made.path)
    judged = ValidationSettings.from_values(
        {name: value for name, value in given(tmp_path, model, **question).items() if name != "n_epochs"}
    )
    how = {"table": load_all_rows(judged, market_url), "n_epochs": settings.n_epochs, "folder": tmp_path}
    forecasts = pd.read_parquet(forecast_held_out(judged, SMALL[model], **how))
    ours = bundle.predict(bars_of(market_url), since=forecasts["ts"].min() - pd.Timedelta(1, "us"))
    ours = ours.set_index("ts").loc[forecasts["ts"]]
    unit = bundle.members[0].scale
    assert len(forecasts) > 150 and (ours["status"] == "ok").all()
    assert np.abs(ours["y_pred"].to_numpy() - forecasts["y_pred"].to_numpy()).max() <= 1e-6 * unit
    assert np.allclose(ours["y_naive"], forecasts["y_naive"])
    assert list(ours["target_ts"]) == list(forecasts["target_ts"])


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory, market_url: str) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "splits"
    made = DataSettings(asset_id="BTC", timeframe="1d", horizons="4", volatility_window=30, output_path=folder)
    write_tables(partition_bars(bars_of(market_url), settings=made))
    return folder


@pytest.mark.parametrize("model", ["linear", "logistic_classifier", "gru"])
def test_models_of_labels_travel_too(model, splits, market_url, tmp_path):
    values = {"splits": str(splits), "model_name": model, "output_path": str(tmp_path), "max_epochs": 1}
    values |= {"params_file": str(params_file(tmp_path, model))}
    run = train_on_labels(LabelTrainSettings.from_values(complete_from_splits(values)))
    made = make_bundle(run.folder / "manifest.json", db=market_url)
    bundle = load_bundle(made.path)
    ours = bundle.predict(bars_of(market_url), since=run.forecasts["ts"].min() - pd.Timedelta(1, "us"))
    ours = ours.set_index("ts").loc[run.forecasts["ts"]]
    assert (ours["status"] == "ok").all() and bundle.is_classifier == (model == "logistic_classifier")
    names = ["p_down", "p_flat", "p_up", "p_naive_up"] if bundle.is_classifier else ["y_pred"]
    for name in (*names, "y_naive"):
        assert np.abs(ours[name].to_numpy() - run.forecasts[name].to_numpy()).max() <= 1e-6
    assert bundle.members[0].labels == {
        "horizon": 4,
        "profit_taking": 1.0,
        "stop_loss": 1.0,
        "window": 30,
        "floor": 1e-4,
    }
    assert np.allclose(truth_of(ours.reset_index(), bars_of(market_url), bundle), run.forecasts["y_true"], atol=1e-12)
    newest = bundle.predict(bars_of(market_url))
    assert newest["status"].iloc[0] == "ok" and newest["horizon"].iloc[0] == 4


def test_an_ensemble_of_two_assets_is_one_bundle(market_url, tmp_path):
    for model in ("linear", "hist_gradient_boosting"):
        for asset in ("BTC", "ETH"):
            write_json(tmp_path / f"{model}_{asset}_best_params.json", {"hyperparameters": SMALL[model]})
    values = {"asset_id": "BTC", "models": "linear,hist_gradient_boosting,linear@ETH", "end_date": END}
    values |= {"output_path": str(tmp_path), "n_splits": 3, "method": "stacking"}
    ensemble = train_ensemble(ensemble_settings(values), db=market_url, progress=False)
    made = make_bundle(ensemble.manifest_path, db=market_url, zipped=True)
    bundle = load_bundle(made.path)
    assert bundle.assets == ("BTC", "ETH") and len(bundle.members) == 3
    saved = load_ensemble(ensemble.manifest_path)
    rows = load_ensemble_rows(saved, market_url)
    expected = saved.predict(rows, n_rows=50)
    bars = {asset: bars_of(market_url, asset) for asset in bundle.assets}
    ours = bundle.predict(bars, since=expected["ts"].min() - pd.Timedelta(1, "us"))
    assert np.abs(ours["y_pred"].to_numpy() - expected["y_pred"].to_numpy()).max() <= 1e-6 * expected["y_pred"].std()
    late = bundle.predict(bars | {"ETH": bars["ETH"].iloc[:-1]})
    assert late["status"].iloc[0] == "gap" and "ETH has no bar" in late["reason"].iloc[0]


def test_a_feature_that_is_code_is_refused_by_its_name(market_url, tmp_path):
    register(Feature("secret_sauce", "unbounded_features", lambda bars: bars["close"], ("close",), 0, "mine"))
    try:
        url = f"sqlite:///{tmp_path / 'own.db'}"
        engine, bars = connect(url), bars_of(market_url)
        write_bars(engine, bars, asset_id="BTC", timeframe="1d")
        write_features(engine, compute_features(bars, timeframe="1d"), asset_id="BTC", timeframe="1d")
        engine.dispose()
        groups = {"unbounded_features": ["secret_sauce", "log_return_7"]}
        trained = train(TrainSettings.from_values(given(tmp_path, "linear", feature_groups=groups)), db=url)
        with pytest.raises(ConfigError, match="cannot travel in a bundle; got 'secret_sauce'"):
            make_bundle(trained.manifest_path, db=url)
    finally:
        unregister("secret_sauce")
    assert not [path for path in tmp_path.iterdir() if "bundle" in path.name]


# What a bundle from a stranger may try


def planted(tmp_path: Path, **changed: bytes) -> Path:
    """A bundle with other contents, hashes and all."""
    manifest, files = bundle_contents()
    path = tmp_path / "planted.zip"
    path.write_bytes(zip_bytes(seal(manifest, files | changed)))
    return path


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_no_pickle_is_ever_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = io.BytesIO()
    np.savez(held, ts=np.array([Evil()], dtype=object))
    attacks = {
        "reference.npz": held.getvalue(),
        "model.onnx": pickle.dumps(Evil()),
        "features.json": pickle.dumps(Evil()),
        "golden.json": pickle.dumps(Evil()),
    }
    for name, content in attacks.items():
        path = planted(tmp_path, **{name: content})
        with pytest.raises(ArtifactError):
            load_bundle(path)
            from kallos.inference.bundle_files import read_reference

            read_reference(path)
    assert not (tmp_path / "pwned").exists()


def test_weights_outside_the_bundle_are_refused(tmp_path):
    _, files = bundle_contents()
    model = onnx.load_model_from_string(files["model.onnx"])
    tensor = model.graph.initializer[-1]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    tensor.raw_data = b""
    with pytest.raises(ArtifactError, match=r"no ONNX graph of kallos|ONNX graph is refused"):
        load_bundle(planted(tmp_path, **{"model.onnx": model.SerializeToString()}))


def test_a_tensor_that_claims_too_much_is_refused(tmp_path):
    _, files = bundle_contents()
    model = onnx.load_model_from_string(files["model.onnx"])
    model.graph.initializer[-1].dims[:] = [1 << 40, 1 << 20]
    with pytest.raises(ArtifactError, match=r"no ONNX graph of kallos|ONNX graph is refused"):
        load_bundle(planted(tmp_path, **{"model.onnx": model.SerializeToString()}))


def test_a_zip_that_climbs_is_refused(tmp_path):
    manifest, files = bundle_contents()
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        for name, content in seal(manifest, files).items():
            archive.writestr(name, content)
        archive.writestr("../../slipped", "x")
    with pytest.raises(ArtifactError, match=r"no such file; got '../../slipped'"):
        load_bundle(tmp_path / "slip.zip")
    assert not (tmp_path.parent.parent / "slipped").exists()


def test_every_changed_missing_or_extra_byte_is_refused(tmp_path):
    folder = small_bundle(tmp_path)
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    rng = np.random.default_rng(0)
    for name, content in sound.items():
        for how in ("flip", "cut", "add", "gone"):
            changed = bytearray(content)
            if how == "flip":
                changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
            changed = {"cut": changed[:-1], "add": changed + b" "}.get(how, changed)
            (folder / name).write_bytes(bytes(changed))
            if how == "gone":
                (folder / name).unlink()
            if name == "manifest.json" and how == "add":
                assert load_bundle(folder).digest != read_bundle_files_digest(sound)  # JSON, and another version
            else:
                try:
                    load_bundle(folder)
                except ArtifactError:
                    pass
                else:
                    assert name == "manifest.json" and how == "flip"  # a letter of a text that nothing depends on
            (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(ArtifactError, match="no such file"):
        load_bundle(folder)


def read_bundle_files_digest(files: dict[str, bytes]) -> str:
    from hashlib import sha256

    return sha256(files["manifest.json"]).hexdigest()


@pytest.mark.parametrize("name", ["manifest.json", "features.json", "scaler.json", "golden.json"])
def test_nonsense_of_any_kind_is_an_artifact_error(name, tmp_path):
    """Every value in every JSON file, one after the other, becomes something that it should not be."""
    manifest, files = bundle_contents()
    whole = manifest if name == "manifest.json" else json.loads(files[name])
    wrong = [None, -1, 1e308, "x" * 50, [], {}, [[[]]], True, 10**30]
    rng = np.random.default_rng(1)
    for place in places(whole, rng):
        for value in wrong:
            hurt = replaced(whole, place, value)
            about = hurt if name == "manifest.json" else manifest
            others = files if name == "manifest.json" else files | {name: json.dumps(hurt).encode()}
            (tmp_path / "hurt.zip").write_bytes(zip_bytes(seal(about, others)))
            try:
                load_bundle(tmp_path / "hurt.zip").predict(small_bars())
            except ArtifactError:
                continue


def places(value, rng, path=()):
    """Paths to what stands in a nested value; of long lists a few."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    items = [*items]
    chosen = items if len(items) < 30 else [items[i] for i in rng.choice(len(items), 2)]
    for key, inner in chosen:
        yield from places(inner, rng, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else [*value]
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


# A stranger's machine


def test_a_bundle_needs_next_to_nothing(tmp_path):
    path = small_bundle(tmp_path)
    small_bars().to_csv(tmp_path / "bars.csv", index=False)
    code = f"""
import sys
from kallos.inference.bundle import load_bundle
bundle = load_bundle({str(path)!r})
import pandas as pd
bars = pd.read_csv({str(tmp_path / "bars.csv")!r}, parse_dates=["ts"])
assert bundle.predict(bars)["status"].iloc[0] == "ok" and "No skill" in bundle._repr_html_()
print(*sorted({{name.split(".")[0] for name in sys.modules}}))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = {*run.stdout.split()}
    heavy = {"torch", "darts", "sklearn", "scipy", "numba", "sqlalchemy", "pandera", "pydantic", "optuna", "plotly"}
    assert not loaded & (heavy | {"onnx", "fastapi", "papermill", "matplotlib"})
    assert {"numpy", "pandas", "talib", "onnxruntime"} <= loaded


def test_signed_bundles(tmp_path):
    keys = [tmp_path / "private.pem", tmp_path / "public.pem"]
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", keys[0]], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", keys[0], "-pubout", "-out", keys[1]], check=True, capture_output=True)
    signed = small_bundle(tmp_path / "a", sign_with=keys[0])
    assert load_bundle(signed, public_key=keys[1]).digest == read_bundle_files(signed).digest
    with pytest.raises(ArtifactError, match="not signed"):
        load_bundle(small_bundle(tmp_path / "b"), public_key=keys[1])
