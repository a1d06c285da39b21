"""Bundles of networks with random weights: made in a moment, and as good as any for what surrounds a forecast."""

import json
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from kallos.data.sample import sample_bars
from kallos.inference.bar_arrays import arrays_of
from kallos.inference.bundle import golden_example
from kallos.inference.bundle_files import BundleFiles, seal, zip_bytes
from kallos.inference.packed_models import read_packed_model
from kallos.inference.recipes import describe_feature

LENGTH, HIDDEN, SCALE = 10, 8, 0.01
FEATURES = {"rsi": (50.0, 15.0), "macd_diff_relative": (0.0, 0.003), "volume_ratio": (1.0, 1.0)}
LONGER = {"1m": "rsi_3m", "1h": "rsi_2h", "4h": "rsi_1d"}


def _gru(place: int, rng: np.random.Generator) -> dict[str, list]:
    """Nodes, inputs, outputs and weights of a small network."""
    k, named = len(FEATURES) + 2, [f"{name}_{place}" for name in ("target", "features", "forecast")]
    sizes = {"W": (1, 3 * HIDDEN, k), "R": (1, 3 * HIDDEN, HIDDEN), "head": (HIDDEN, 1)}
    weights = [numpy_helper.from_array(rng.normal(0, 0.3, s).astype("f4"), f"{n}{place}") for n, s in sizes.items()]
    steps = [
        ("Concat", named[:2], ["x"], {"axis": 2}),
        ("Transpose", ["x"], ["t"], {"perm": [1, 0, 2]}),
        ("GRU", ["t", "W", "R"], ["", "h"], {"hidden_size": HIDDEN}),
        ("Squeeze", ["h", "first"], ["s"], {}),
        ("MatMul", ["s", "head"], named[2:], {}),
    ]
    own = [
        [[name if name in ("", *named) else f"{name}{place}" for name in side] for side in step[1:3]] for step in steps
    ]
    nodes = [helper.make_node(step[0], *sides, **step[3]) for step, sides in zip(steps, own, strict=True)]
    shapes = {named[0]: ["batch", LENGTH, 1], named[1]: ["batch", LENGTH, k - 1], named[2]: ["batch", 1]}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    first = numpy_helper.from_array(np.array([0]), f"first{place}")
    return {"nodes": nodes, "inputs": ends[:2], "outputs": ends[2:], "weights": [*weights, first]}


def _graph(k: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    parts = [_gru(place, rng) for place in range(k)]
    whole = {name: [one for part in parts for one in part[name]] for name in parts[0]}
    graph = helper.make_graph(whole["nodes"], "grus", whole["inputs"], whole["outputs"], whole["weights"])
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def _manifest(name: str, assets: tuple[str, ...], timeframe: str) -> dict:
    labels, k = [f"gru@{asset}" for asset in assets], len(assets)
    features = [*FEATURES, LONGER[timeframe]]
    shared = {"labels": None, "input_chunk_length": LENGTH, "features": features, "frequencies": None}
    ends = [{"inputs": [f"target_{i}", f"features_{i}"], "output": f"forecast_{i}"} for i in range(k)]
    own = [{"label": label, "asset_id": asset} for label, asset in zip(labels, assets, strict=True)]
    rule = {"models": labels, "rule": "weights", "weights": [1 / k] * k, "intercept": 0.0, "n_rows": 0}
    about = {"schema": 1, "kind": "bundle", "id": name, "asset_id": assets[0], "timeframe": timeframe, "model": "gru"}
    about |= {"target": "log_return", "horizon": 1, "intervals": {"0.5": 0.01, "0.9": 0.03}}
    about |= {"members": [shared | one | end for one, end in zip(own, ends, strict=True)]}
    return about | {"combination": rule if k > 1 else None, "trained": {"seen_until": "2023-01-20T00:00:00+00:00"}}


def random_bundle(
    folder: Path, name: str = "gru_BTC_1h", *, assets: tuple[str, ...] = ("BTC",), timeframe: str = "1h", seed: int = 0
) -> Path:
    """A zipped bundle of one network an asset, with their mean if there are several."""
    manifest = _manifest(name, assets, timeframe)
    labels = [member["label"] for member in manifest["members"]]
    scales = FEATURES | {LONGER[timeframe]: FEATURES["rsi"], "log_return": (0.0, SCALE)}
    numbers = {n: {"curve": "none", "center": c, "scale": s} for n, (c, s) in scales.items()}
    recipes = [describe_feature(name).as_json() for name in manifest["members"][0]["features"]]
    texts = {"features.json": dict.fromkeys(labels, recipes), "scaler.json": dict.fromkeys(labels, numbers)}
    files = {name: json.dumps(text).encode() for name, text in texts.items()}
    files |= {
        "model.onnx": _graph(len(assets), seed),
        "card.md": b"# A card",
        "reference.npz": b"",
        "golden.json": b"{}",
    }
    packed = read_packed_model(BundleFiles(manifest, files, ""))
    bars = sample_bars(timeframe=timeframe, start="2022-12-25" if timeframe == "1m" else "2022-01-01", end="2022-12-31")
    arrays = {asset: arrays_of(bars, columns=packed.columns_of[asset], what="bars") for asset in assets}
    files["golden.json"] = json.dumps(golden_example(packed, arrays, tolerance=1e-6)).encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_bundle.zip"
    path.write_bytes(zip_bytes(seal(manifest, files)))
    return path
