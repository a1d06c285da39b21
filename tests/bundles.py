"""Bundles for tests: they load and forecast, and are made in milliseconds of a graph with random weights."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
from onnx import TensorProto, helper, numpy_helper

from kallos.core.columns import timeframe_delta
from kallos.data.bars import segment_ids
from kallos.data.sample import sample_bars
from kallos.inference.bar_arrays import arrays_of
from kallos.inference.bundle import golden_example
from kallos.inference.bundle_files import BundleFiles, read_bundle_files, seal, zip_bytes
from kallos.inference.model_cards import UNITS, model_card
from kallos.inference.onnx_guard import IR_VERSION, OPSETS
from kallos.inference.packed_models import read_packed_model
from kallos.inference.recipes import compute_recipes, describe_feature

FEATURES = ("rsi", "log_return_7", "volume_ratio", "hour_sine")
ROWS = 20


def small_bars(*, timeframe: str = "1d", end: str = "2023-12-31", seed: int = 0) -> pd.DataFrame:
    """Bars of the sample market that bundles are made on: some 1,500 of them."""
    start = pd.Timestamp(end, tz="UTC") - 1500 * timeframe_delta(timeframe)
    return sample_bars(timeframe=timeframe, start=str(start.date()), end=end, seed=seed)


def _graph(seed: int) -> bytes:
    """The last target, and a random weight for every value of the window."""
    rng, k = np.random.default_rng(seed), len(FEATURES)
    constants = {
        "flat_target": np.array([-1, ROWS]),
        "flat_features": np.array([-1, ROWS * k]),
        "weights": rng.normal(0, 0.03, (ROWS * (k + 1), 1)).astype("float32"),
    }
    nodes = [
        helper.make_node("Reshape", ["target_0", "flat_target"], ["t"]),
        helper.make_node("Reshape", ["features_0", "flat_features"], ["f"]),
        helper.make_node("Concat", ["t", "f"], ["row"], axis=1),
        helper.make_node("MatMul", ["row", "weights"], ["forecast_0"]),
    ]
    sizes = {"target_0": 1, "features_0": k}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", ROWS, size]) for n, size in sizes.items()]
    outputs = [helper.make_tensor_value_info("forecast_0", TensorProto.FLOAT, ["batch", 1])]
    held = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, held)
    opsets = [helper.make_opsetid(*one) for one in OPSETS.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()


def _manifest(asset_id: str, timeframe: str, bars: pd.DataFrame, name: str | None) -> dict:
    span = {"first": bars["ts"].iloc[0].isoformat(), "last": bars["ts"].iloc[-1].isoformat(), "rows": len(bars)}
    member = {"label": "small", "asset_id": asset_id, "model": "linear", "hyperparameters": {}, "trained": span}
    member |= {"input_chunk_length": ROWS, "features": [*FEATURES], "labels": None, "frequencies": None}
    member |= {"inputs": ["target_0", "features_0"], "output": "forecast_0"}
    about = {"schema": 1, "kind": "bundle", "id": name or f"small_{asset_id}_{timeframe}", "asset_id": asset_id}
    about |= {"timeframe": timeframe, "model": "small", "target": "log_return", "unit": UNITS["log_return"]}
    about |= {"horizon": 1, "members": [member], "combination": None, "intervals": {"0.5": 0.01, "0.9": 0.03}}
    about |= {"trained": span | {"seen_until": span["last"]}, "gap_policy": "a gap gives no forecast.", "versions": {}}
    metrics = {"n": 100, "rmse": 0.02, "rmse_naive": 0.0199, "skill": -0.01}
    said = {"sentence": "No skill: made of random weights.", "has_skill": False, "rows": "rows of nobody"}
    return about | {"evaluation": said | {"metrics": metrics, "same_model": True, "largest_difference": 0.0}}


def _reference(parts, bars: pd.DataFrame, arrays: dict) -> bytes:
    values, known = compute_recipes(parts.members[0].recipes, arrays, timeframe=parts.timeframe)
    ts = pd.DatetimeIndex(bars["ts"][known] + timeframe_delta(parts.timeframe)).as_unit("us")
    rng = np.random.default_rng(7)
    errors = rng.normal(0, 0.02, (2, len(ts)))
    held = io.BytesIO()
    np.savez_compressed(
        held, ts=ts.asi8, features=values[known].astype("float32"), names=np.array(FEATURES, "U"),
        segments=segment_ids(ts, timeframe=parts.timeframe).astype("int32"), forecast_ts=ts.asi8,
        forecasts=rng.normal(0, 0.005, len(ts)), forecasts_are=np.array("out of sample"),
        forecast_errors=errors[0], naive_errors=errors[1],
    )  # fmt: skip
    return held.getvalue()


def bundle_contents(
    *, seed: int = 0, asset_id: str = "BTC", timeframe: str = "1d", name: str | None = None
) -> tuple[dict, dict[str, bytes]]:
    """The manifest and the files of a small bundle, ready to be sealed."""
    bars, scale = small_bars(timeframe=timeframe), {"rsi": 10.0, "volume_ratio": 1.0, "hour_sine": 1.0}
    numbers = {n: {"curve": "none", "center": 0.0, "scale": scale.get(n, 0.05)} for n in (*FEATURES, "log_return")}
    numbers["rsi"]["center"] = 50.0
    files = {"model.onnx": _graph(seed), "card.md": b"", "reference.npz": b"", "golden.json": b"{}"}
    files["features.json"] = json.dumps({"small": [describe_feature(n).as_json() for n in FEATURES]}).encode()
    files["scaler.json"] = json.dumps({"small": numbers}).encode()
    manifest = _manifest(asset_id, timeframe, bars, name)
    parts = read_packed_model(BundleFiles(manifest, files, ""))
    arrays = {asset_id: arrays_of(bars, columns=parts.columns_of[asset_id], what="bars")}
    manifest |= {"bars_needed": parts.bars_needed, "columns": [*parts.columns_of[asset_id]], "assets": [asset_id]}
    files["golden.json"] = json.dumps(golden_example(parts, arrays, tolerance=1e-7)).encode()
    files |= {"reference.npz": _reference(parts, bars, arrays[asset_id]), "card.md": model_card(manifest).encode()}
    return manifest, files


def small_bundle(
    folder: Path,
    seed: int = 0,
    *,
    asset_id: str = "BTC",
    timeframe: str = "1d",
    name: str | None = None,
    zipped: bool = False,
    sign_with: Path | None = None,
) -> Path:
    """The path of a bundle in the folder, named by its id; the same seed gives the same forecasts."""
    manifest, files = bundle_contents(seed=seed, asset_id=asset_id, timeframe=timeframe, name=name)
    sealed = seal(manifest, files, sign_with=sign_with)
    folder.mkdir(parents=True, exist_ok=True)
    if zipped:
        path = folder / f"{manifest['id']}.zip"
        path.write_bytes(zip_bytes(sealed))
    else:
        path = folder / manifest["id"]
        path.mkdir(exist_ok=True)
        for file, content in sealed.items():
            (path / file).write_bytes(content)
    read_bundle_files(path)
    return path
