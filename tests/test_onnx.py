"""Models as ONNX graphs: they forecast what darts forecasts, and nothing else that calls itself a graph is opened."""

import ast
import copy
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_fuzz
import pandas as pd
import pytest
import torch
from darts import TimeSeries
from darts.models.forecasting.forecasting_model import ForecastingModel
from onnx import helper, numpy_helper

from kallos.core.devices import Device
from kallos.core.errors import ArtifactError
from kallos.inference.onnx_export import export_onnx, merge_onnx
from kallos.inference.onnx_guard import check_onnx, open_session
from kallos.inference.onnx_nodes import ALLOWED
from kallos.models.architectures import MODELS, create_model
from kallos.models.label_forecasts import direct_forecasts, forecast_ends
from kallos.models.recurrent import use_fast_layers

LENGTH, N_FEATURES = 8, 3
SMALL = {
    "hidden_dim": 6, "n_rnn_layers": 2, "dropout": 0.2, "d_model": 8, "nhead": 2, "dim_feedforward": 8,
    "num_encoder_layers": 1, "num_decoder_layers": 1, "num_filters": 3, "kernel_size": 3, "layer_widths": 8,
    "num_stacks": 2, "num_blocks": 1, "num_layers": 2, "hidden_size": 8, "ff_size": 8, "lstm_layers": 2,
    "num_attention_heads": 2, "n_estimators": 10, "max_depth": 5, "max_iter": 10, "batch_size": 32,
}  # fmt: skip
NETWORKS = [name for name, spec in MODELS.items() if spec.is_network]
CASES = [(name, horizon, False) for name in NETWORKS for horizon in (1, 3)]
for name in MODELS.keys() - {*NETWORKS}:
    CASES += [(name, horizon, True) for horizon in (1, 3)]
    CASES += [] if MODELS[name].is_classifier else [(name, horizon, False) for horizon in (1, 3)]
CASES.sort()


def series(n: int, *, seed: int = 0, classes: bool = False) -> tuple[TimeSeries, TimeSeries]:
    """(target, features), in which the first feature tells the next value of the target."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, N_FEATURES)).astype("float32")
    target = np.roll(features[:, 0], 1) + rng.normal(0, 0.3, n)
    target = np.digitize(target, (-0.5, 0.5)) - 1.0 if classes else target
    times = pd.date_range("2024-01-01", periods=n, freq="1D")
    return TimeSeries(times, target.astype("float32")[:, None]), TimeSeries(times, features)


def fitted(name: str, horizon: int = 1, labels: bool = False, **more: object) -> tuple[ForecastingModel, dict]:
    """A small model, and what its export is told."""
    spec = MODELS[name]
    values = {one: value for one, value in SMALL.items() if one in spec.space} | {"input_chunk_length": LENGTH} | more
    model = create_model(name, values, horizon=horizon, direct=labels, n_epochs=1, device=Device())
    target, features = series(120, classes=spec.is_classifier)
    model.fit([target], past_covariates=[features], **({"verbose": False} if spec.is_network else {}))
    about = {"model_name": name, "hyperparameters": values, "horizon": horizon}
    return model, about | {"n_features": N_FEATURES, "labels": labels}


def windows(sides: tuple[TimeSeries, TimeSeries], length: int = LENGTH) -> list[np.ndarray]:
    """(n, length, columns) all windows of the target, and those of the features."""
    values = [side.values().astype("float32") for side in sides]
    return [np.lib.stride_tricks.sliding_window_view(one, length, axis=0).swapaxes(1, 2).copy() for one in values]


def run(data: bytes, target: np.ndarray, features: np.ndarray) -> np.ndarray:
    """What the graph forecasts of the windows."""
    return open_session(data).run(None, {"target_0": target, "features_0": features})[0]


def by_darts(model: ForecastingModel, about: dict, n: int) -> tuple[list[np.ndarray], np.ndarray]:
    """n windows, and darts' own forecast after each."""
    spec, horizon = MODELS[about["model_name"]], about["horizon"]
    sides = series(n + LENGTH + horizon, seed=7, classes=spec.is_classifier)
    inputs = [one[:n] for one in windows(sides)]
    if spec.is_network:
        asked = {one: about[one] for one in ("model_name", "horizon", "labels")}
        pairs = [tuple(side[at : at + LENGTH] for side in sides) for at in range(n)]
        return inputs, forecast_ends(model, pairs, **asked)
    if about["labels"]:
        found = direct_forecasts(model, [sides], classes=spec.is_classifier)[1]
        return inputs, found.reshape(len(found), -1)[:n]
    how = {"forecast_horizon": horizon, "retrain": False, "last_points_only": False, "show_warnings": False}
    paths = model.historical_forecasts(sides[0], past_covariates=sides[1], **how)
    return inputs, np.stack([path.values().ravel() for path in paths])[:n]


@pytest.mark.parametrize(("name", "horizon", "labels"), CASES)
def test_a_graph_forecasts_what_darts_forecasts(name, horizon, labels):
    model, about = fitted(name, horizon, labels)
    data = export_onnx(model, **about)
    (target, features), expected = by_darts(model, about, 1000)
    found = run(data, target, features)
    width = 3 if MODELS[name].is_classifier else 1 if labels and name not in NETWORKS else horizon
    assert found.shape == expected.shape == (1000, width) and found.dtype == "float32"
    assert expected.std() > 0 and np.abs(found - expected).max() < 1e-5
    alone = np.concatenate([run(data, target[at : at + 1], features[at : at + 1]) for at in (0, 500, 999)])
    assert np.abs(alone - expected[[0, 500, 999]]).max() < 1e-5
    onnx.checker.check_model(data, full_check=True)


def test_an_export_leaves_no_trace():
    """Neither in the model, which may be in training and may have fast layers, nor in PyTorch's switches and draws."""
    model, about = fitted("gru", hidden_dim=7)
    expected = export_onnx(model, **about)
    network = model.model.train()
    use_fast_layers(network)
    before = copy.deepcopy(network.state_dict()), [type(layer) for layer in network.modules()], torch.get_rng_state()
    assert export_onnx(model, **about) == expected
    assert network.training and [type(layer) for layer in network.modules()] == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[2]) and torch.backends.mha.get_fastpath_enabled()


def test_an_export_says_nothing(capfd, caplog):
    for name in ("transformer", "tft"):
        model, about = fitted(name)
        capfd.readouterr(), caplog.clear()
        open_session(export_onnx(model, **about))
        assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_network_that_forecast_a_batch_before_has_a_free_batch_still():
    model, about = fitted("tft")
    target, features = series(60)
    model.predict(1, [target, target], past_covariates=[features, features])  # a mask for two windows stays behind
    inputs = [one[:5] for one in windows((target, features))]
    before = export_onnx(model, **about)
    assert run(before, *inputs).shape == (5, 1)
    model.predict(1, [target] * 3, past_covariates=[features] * 3)
    assert export_onnx(model, **about) == before


def test_members_become_one_graph():
    made = [fitted("lstm"), fitted("tcn", 2, input_chunk_length=12), fitted("random_forest_classifier", 1, True)]
    graphs = [export_onnx(model, **about) for model, about in made]
    feeds, expected = {}, []
    for number, (data, (_, about)) in enumerate(zip(graphs, made, strict=True)):
        inputs = [one[:40] for one in windows(series(80), about["hyperparameters"]["input_chunk_length"])]
        feeds |= dict(zip((f"target_{number}", f"features_{number}"), inputs, strict=True))
        expected.append(run(data, *inputs))
    session = open_session(merge_onnx(graphs))
    assert [one.name for one in session.get_outputs()] == ["forecast_0", "forecast_1", "forecast_2"]
    assert [one.name for one in session.get_inputs()] == [*feeds]
    for one, other in zip(session.run(None, feeds), expected, strict=True):
        assert np.abs(one - other).max() < 1e-6
    assert np.array_equal(run(merge_onnx(graphs[:1]), feeds["target_0"], feeds["features_0"]), expected[0])


@pytest.fixture(scope="module")
def graphs() -> dict[str, bytes]:
    """A graph of each kind of node that matters: recurrent, attention, convolution, trees."""
    made = {name: fitted(name) for name in ("gru", "transformer", "tcn", "random_forest", "linear")}
    made["hist_gradient_boosting_classifier"] = fitted("hist_gradient_boosting_classifier", 1, True)
    return {name: export_onnx(model, **about) for name, (model, about) in made.items()}


def test_every_graph_is_made_of_what_is_allowed(graphs):
    for data in graphs.values():
        proto = onnx.load_from_string(data)
        assert {(node.domain, node.op_type) for node in proto.graph.node} <= {
            (domain, operator) for domain, operators in ALLOWED.items() for operator in operators
        }
        assert not any(one.data_location or one.external_data for one in proto.graph.initializer)


def external(proto: onnx.ModelProto) -> None:
    onnx.external_data_helper.set_external_data(proto.graph.initializer[0], "../../../outside.bin")
    proto.graph.initializer[0].ClearField("raw_data")


def loop(proto: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    proto.graph.node.append(helper.make_node("Loop", ["", ""], ["looped"], body=body))


def oversize(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[:] = [2**31, 2**31, 4]


def unknown(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].domain = "ai.onnx.contrib"


def nested(proto: onnx.ModelProto) -> None:
    graph = onnx.GraphProto(name="inner")
    for _ in range(20):
        graph = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=graph)], "outer", [], [])
    proto.graph.node.append(graph.node[0])


def shadowed(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((1, LENGTH, 1), "float32"), "target_0"))


ATTACKS = {
    external: "data in another file",
    loop: "a subgraph",
    oversize: "which is not its",
    unknown: "of no kind that kallos writes",
    nested: "a subgraph",
    shadowed: "has the name of something else",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_planted_attack_is_refused_by_name(attack, graphs):
    for data in graphs.values():
        proto = onnx.load_from_string(data)
        attack(proto)
        with pytest.raises(ArtifactError, match=ATTACKS[attack]):
            open_session(proto.SerializeToString())


def test_a_graph_that_ends_early_is_refused(graphs):
    data = graphs["gru"]
    for end in range(0, len(data), 7):
        with pytest.raises(ArtifactError):
            check_onnx(data[:end])
    for more in (b"\0", b"\x08\x08", data[:50], data):
        with pytest.raises(ArtifactError):
            check_onnx(data + more)


def fuzz(graphs: dict[str, bytes], folder: Path, *, seed: int, count: int) -> dict[str, int]:
    """How often damaged graphs were refused, not opened, failed or ran, counted by a process that lived to tell."""
    for name, data in graphs.items():
        (folder / f"{name}.onnx").write_bytes(data)
    words = [sys.executable, onnx_fuzz.__file__, str(folder), str(seed), str(count)]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": root})
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    return ast.literal_eval(done.stdout)


def test_damaged_bytes_are_refused_or_do_no_harm(graphs, tmp_path):
    found = fuzz(graphs, tmp_path, seed=0, count=1500)
    assert found["refused"] > 800 and found["ran"] > 100 and found["megabytes"] < 1500


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_graphs_are_refused_or_do_no_harm(graphs, tmp_path, seed):
    assert fuzz(graphs, tmp_path, seed=seed, count=20_000)["megabytes"] < 1500


def test_sessions_answer_many_threads_at_once(graphs):
    inputs = [one[:9] for one in windows(series(60))]
    expected = {name: run(data, *inputs) for name, data in graphs.items()}
    sessions, wrong = {name: open_session(data) for name, data in graphs.items()}, []

    def ask() -> None:
        for _ in range(40):
            for name, session in sessions.items():
                found = session.run(None, dict(zip(("target_0", "features_0"), inputs, strict=True)))[0]
                if not np.array_equal(found, expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_window_takes_microseconds():
    model, about = fitted("gru", hidden_dim=32, n_rnn_layers=1, input_chunk_length=40)
    session = open_session(export_onnx(model, **about))
    feed = {"target_0": np.ones((1, 40, 1), "float32"), "features_0": np.ones((1, 40, N_FEATURES), "float32")}
    took = []
    for _ in range(300):
        begun = time.perf_counter()
        session.run(None, feed)
        took.append(time.perf_counter() - begun)
    assert sorted(took)[30] < 3e-4  # it is 3e-5 on a core of its own


def test_a_large_forest_is_checked_in_no_time():
    rng = np.random.default_rng(0)
    times = pd.date_range("2024-01-01", periods=4000, freq="1D")
    target, features = (TimeSeries(times, rng.standard_normal((4000, n)).astype("float32")) for n in (1, N_FEATURES))
    values = {"input_chunk_length": 2, "n_estimators": 60, "max_depth": 12, "max_features": 0.2}
    model = create_model("random_forest", values)
    model.fit(target, past_covariates=features)
    about = {"model_name": "random_forest", "hyperparameters": values, "horizon": 1, "labels": False}
    data = export_onnx(model, n_features=N_FEATURES, **about)
    begun = time.perf_counter()
    check_onnx(data)
    assert len(data) > 500_000 and time.perf_counter() - begun < 1.5
