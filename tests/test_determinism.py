"""The same seed, settings and data give the same suggestions, weights and forecasts, to the bit, on one CPU."""

import json
from pathlib import Path

import pytest
import torch

from kallos.core.config import TrainSettings
from kallos.core.errors import ConfigError
from kallos.models.budget import finished_trials
from kallos.models.trainer import load_trained, train
from kallos.models.tuner import tune
from tests.study_runs import END, is_spent, small_settings, write_market

SPACE = {"hidden_dim": 4, "n_rnn_layers": 1, "input_chunk_length": 30, "learning_rate": [1e6, 1e-2, 1e-3, 1e-4]}


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    """An SQLite database with a small market."""
    made = f"sqlite:///{tmp_path_factory.mktemp('market') / 'kallos.db'}"
    write_market(made)
    return made


@pytest.mark.slow
def test_median_pruning_and_divergence_are_the_same_with_one_worker_and_with_two(url, tmp_path):
    how = {"pruner": "median", "deterministic": True, "n_trials": 12, "max_epochs": 5, "study_name": "one"}
    found = []
    for n_jobs in (1, 2):
        more = {"model_name": "gru", "search_space": SPACE, "n_jobs": n_jobs}
        settings = small_settings(tmp_path / str(n_jobs), **how, **more)
        trials = sorted(finished_trials(tune(settings, db=url, progress=False)), key=lambda t: t.user_attrs["slot"])
        found.append(
            [(t.params, t.state, t.value, t.intermediate_values, t.user_attrs.get("diverged")) for t in trials]
        )
    assert found[0] == found[1]
    pruned = [why for _, state, _, _, why in found[0] if state.name == "PRUNED"]
    assert None in pruned and any(pruned), "the test shows nothing: it needs both kinds of pruned trials"


def _trained(url: str, folder: Path, model: str) -> tuple[list, dict[str, torch.Tensor]]:
    values = {"gru": {"hidden_dim": 8, "batch_size": 64, "input_chunk_length": 30}, "linear": {"input_chunk_length": 5}}
    folder.mkdir()
    (folder / "best.json").write_text(json.dumps(values[model]))
    settings = {"asset_id": "BTC", "end_date": END, "params_file": folder / "best.json", "n_epochs": 2, "seed": 5}
    settings = TrainSettings.from_values(settings | {"model_name": model, "output_path": folder})
    made = train(settings, db=url)
    kept = load_trained(made.manifest_path)[0].model
    state = kept.state_dict() if model == "gru" else {"line": torch.tensor(kept.coef_)}
    return made.last_forecast.tolist(), state


@pytest.mark.parametrize("model", ["gru", "linear"])
def test_a_training_repeats_to_the_bit(url, tmp_path, model):
    (one, weights), (other, again) = (_trained(url, tmp_path / name, model) for name in ("one", "other"))
    assert one == other and weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_other_samplers_repeat_too_and_are_part_of_the_study(url, tmp_path, sampler):
    runs = [small_settings(tmp_path / name, n_trials=4, sampler=sampler, study_name="s") for name in "ab"]
    one, other = (tune(settings, db=url, progress=False) for settings in runs)
    assert [t.params for t in one.trials] == [t.params for t in other.trials]
    assert is_spent(url, runs[0])
    with pytest.raises(ConfigError, match=f"sampler: the study has {sampler}, this run tpe"):
        tune(runs[0].model_copy(update={"sampler": "tpe"}), db=url, progress=False)
    with pytest.raises(ConfigError, match="search_space: the study has"):
        tune(runs[0].model_copy(update={"search_space": {"alpha": 1.0}}), db=url, progress=False)
