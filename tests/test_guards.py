"""Memory that really runs out, a NaN really in a batch, a loss that really diverges: what fits and studies do."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState

from kallos.core.config import TrainSettings, TuneSettings
from kallos.core.devices import Device, trainer_kwargs
from kallos.core.errors import ConfigError, Diverged, OutOfMemory, TrainingError
from kallos.core.runs import read_json
from kallos.models import fits, helpers, rounds
from kallos.models.architectures import choose_device
from kallos.models.budget import best_trial, finished_trials
from kallos.models.datasets import load_table
from kallos.models.fits import FitPlan, fit_fold
from kallos.models.layouts import study_layout
from kallos.models.rounds import Help, Others, validate_in_turns
from kallos.models.trainer import train
from kallos.models.tuner import best_params_path, replay, tune
from kallos.models.validation import prepare_fold, run_fold
from kallos.models.windows import WindowBatches
from tests.study_runs import END, small_settings, study_of, write_market

SMALL = {"hidden_dim": 8, "n_rnn_layers": 1, "batch_size": 64, "input_chunk_length": 30, "learning_rate": 3e-3}
SPACE = {"hidden_dim": 4, "n_rnn_layers": 1, "dropout": 0, "batch_size": 64, "input_chunk_length": 30}
PLAN = FitPlan(n_epochs=2, device=Device())


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    """An SQLite database with a small market."""
    made = f"sqlite:///{tmp_path_factory.mktemp('market') / 'kallos.db'}"
    write_market(made)
    return made


@pytest.fixture(scope="module")
def folds(url) -> list:
    """The folds of a study on it."""
    settings = gru(Path())
    table = load_table(settings, url)
    return [prepare_fold(table, bounds, settings=settings) for bounds in study_layout(table, settings)]


def gru(folder: Path, **more) -> TuneSettings:
    return small_settings(
        folder, **{"model_name": "gru", "search_space": SPACE, "precision": "32", "n_trials": 1} | more
    )


# Memory that runs out

ROOM = 400  # MiB: a batch of 1024 windows takes more, half of it less
CHILD = """
import json, resource, sys
from kallos.core.config import RunSettings
from kallos.core.devices import Device
from kallos.core.errors import OutOfMemory
from kallos.models import fits
from tests.test_guards import big_fold

room, batch, hidden = map(int, sys.argv[1:])
settings = RunSettings(asset_id="BTC", end_date="2023-01-01", model_name="gru", precision="32")
fold, plan = big_fold(), fits.FitPlan(n_epochs=1, patience=None, device=Device())
values = {"hidden_dim": hidden, "n_rnn_layers": 1, "dropout": 0.0, "input_chunk_length": 60, "learning_rate": 1e-3}
how = {"settings": settings, "plan": plan, "seed": 0}
fits.fit_fold(fold, values | {"batch_size": 8, "hidden_dim": 64}, **how)  # whatever is loaded and compiled once
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + room * 2**20, resource.RLIM_INFINITY))
try:
    fit = fits.fit_fold(fold, values | {"batch_size": batch}, **how)
    print(json.dumps([fit.batch_size, fit.accumulated, float(fit.history["train_loss"].iloc[0])]))
except OutOfMemory as error:
    print(json.dumps(["OutOfMemory", error.exit_code, str(error)]))
"""


def big_fold():
    """A fold with two batches of a thousand windows."""
    import pandas as pd
    from darts import TimeSeries

    from kallos.models.datasets import DartsFold

    values = np.random.default_rng(0).normal(size=(2107, 3)).astype("float32")
    times = pd.date_range("2020-01-01", periods=len(values), freq="h")
    pair = TimeSeries(times, values[:, :1]), TimeSeries(times, values[:, 1:])
    return DartsFold(fold=0, train=[pair], val=[], lookback=60, transformer=None, truth=None)


def in_a_child(root: Path, room: int, batch: int, hidden: int) -> tuple[list, str]:
    """What a child with so many MiB of address space to spare says of a fit with that batch, and its log."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(room), str(batch), str(hidden)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=200)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]), run.stderr


@pytest.mark.slow
def test_a_batch_without_memory_is_halved_until_it_fits(root):
    (size, accumulated, loss), log = in_a_child(root, room=ROOM, batch=1024, hidden=256)
    assert size < 1024 and size * accumulated == 1024
    assert log.count("memory ran out, the batch is halved") == np.log2(accumulated)
    assert 0.5 < loss < 2


@pytest.mark.slow
def test_at_the_smallest_batch_memory_that_runs_out_is_an_error(root):
    (kind, code, said), log = in_a_child(root, room=1, batch=32, hidden=1024)
    assert (kind, code) == ("OutOfMemory", 4) and said.startswith("memory ran out"), said
    assert log.count("the batch is halved") == 2  # to 16 and to 8


class ShortOfMemory:
    """A machine that cannot hold a batch of more than `most` windows, from its `after`-th batch on."""

    def __init__(self, most: int, after: int = 0):
        self.most, self.left, self._take = most, after, WindowBatches.__getitems__

    def __enter__(self):
        machine = self

        def getitems(windows, indices):
            machine.left -= 1
            if len(indices) > machine.most and machine.left < 0:
                raise MemoryError
            return machine._take(windows, indices)

        self._patch = patch.object(WindowBatches, "__getitems__", getitems)
        self._patch.start()

    def __exit__(self, *error):
        self._patch.stop()


def test_a_trial_that_ran_short_of_memory_says_so_and_repeats(url, folds, tmp_path):
    settings = gru(tmp_path)
    with ShortOfMemory(16):
        trial = tune(settings, db=url, progress=False).trials[0]
        assert replay(trial, folds, settings=settings) == trial.value
    assert trial.state == TrialState.COMPLETE and trial.user_attrs["fold_batch_sizes"] == [16, 16]
    plenty = tune(gru(tmp_path / "plenty"), db=url, progress=False).trials[0]
    assert "fold_batch_sizes" not in plenty.user_attrs
    assert trial.value == pytest.approx(plenty.value, rel=1e-3)


def test_memory_that_runs_out_in_the_middle_begins_the_fit_anew(folds):
    seen = []
    plan = replace(PLAN, on_epoch=lambda fold, row: seen.append(row["epoch"]))
    with ShortOfMemory(32, after=len(folds[0].train[0][0]) // 64 + 8):
        anew = fit_fold(folds[0], SMALL, settings=gru(Path()), plan=plan, seed=3)
    with ShortOfMemory(32):
        whole = fit_fold(folds[0], SMALL, settings=gru(Path()), plan=PLAN, seed=3)
    assert seen == [1, 1, 2] and anew.accumulated == 2
    assert anew.history.equals(whole.history)
    assert all(torch.equal(anew.last_weights[name], value) for name, value in whole.last_weights.items())


def test_the_manifest_of_a_training_names_its_batches(url, tmp_path):
    tune(gru(tmp_path, max_epochs=1), db=url, progress=False)
    file = best_params_path(gru(tmp_path))
    how = {"asset_id": "BTC", "end_date": END, "params_file": file, "n_epochs": 1, "output_path": tmp_path}
    settings = TrainSettings.from_values(how | {"precision": "32"})
    with ShortOfMemory(32):
        manifest = read_json(train(settings, db=url).manifest_path, what="manifest")
    assert manifest["results"] == {"batch_size": 32, "accumulated": 2}
    assert manifest["settings"]["hyperparameters"]["batch_size"] == 64
    fixed = settings.model_copy(update={"batch_size": 128, "gradient_clip": 0.5})
    manifest = read_json(train(fixed, db=url).manifest_path, what="manifest")
    assert manifest["results"] == {"batch_size": 128, "accumulated": 1}
    assert manifest["settings"]["hyperparameters"]["batch_size"] == 128
    assert manifest["settings"]["gradient_clip"] == 0.5


def test_a_model_without_epochs_has_no_batch_to_halve(url, folds):
    linear = small_settings(Path())
    with patch("sklearn.linear_model.Ridge.fit", side_effect=MemoryError), pytest.raises(OutOfMemory):
        fit_fold(folds[0], {"input_chunk_length": 5, "alpha": 1.0}, settings=linear, plan=PLAN, seed=0)
    with pytest.raises(ConfigError, match="linear has no gradient"):
        clipped = linear.model_copy(update={"gradient_clip": 1.0})
        fit_fold(folds[0], {"input_chunk_length": 5, "alpha": 1.0}, settings=clipped, plan=PLAN, seed=0)


# A loss that is no number, and one that diverges


class Poisoned:
    """Windows of which the seventh batch that is taken holds a NaN in its second feature."""

    def __enter__(self):
        self.count, take = 0, WindowBatches.__getitems__

        def getitems(windows, indices):
            batch = take(windows, indices)
            self.count += 1
            if self.count == 7:
                batch.past_covariates[3, 5, 1] = np.nan
            return batch

        self._patch = patch.object(WindowBatches, "__getitems__", getitems)
        self._patch.start()

    def __exit__(self, *error):
        self._patch.stop()


def test_a_final_training_names_the_poisoned_batch(url, tmp_path):
    best = {"model_name": "gru", "n_epochs": 2, "hyperparameters": SMALL}
    (tmp_path / "best.json").write_text(json.dumps(best))
    how = {"asset_id": "BTC", "end_date": END, "params_file": tmp_path / "best.json", "n_epochs": 2}
    settings = TrainSettings.from_values(how | {"output_path": tmp_path, "precision": "32"})
    with Poisoned(), pytest.raises(TrainingError) as raised:
        train(settings, db=url)
    assert type(raised.value) is Diverged
    at = r"loss is no number at step \d+ \(epoch 1, batch \d+ of \d+, learning rate 0.003\): "
    assert raised.match(at + r"feature rsi is not finite in 1 of 64 windows; got nan\. Mend these rows")
    assert not [*tmp_path.glob("*.pt")]


def test_a_final_training_with_a_learning_rate_beyond_reason_says_that_it_is(url, tmp_path):
    (tmp_path / "best.json").write_text(json.dumps(SMALL | {"learning_rate": 1e6}))
    how = {
        "asset_id": "BTC",
        "end_date": END,
        "params_file": tmp_path / "best.json",
        "n_epochs": 2,
        "model_name": "gru",
    }
    settings = TrainSettings.from_values(how | {"output_path": tmp_path})
    at = r"has diverged at step 2 \(epoch 1, batch 2 of \d+, learning rate 1e\+06\): the learning rate is too large"
    with pytest.raises(Diverged, match=at):
        train(settings, db=url)


def test_a_trial_that_diverges_is_pruned_and_never_chosen(url, folds, tmp_path):
    rates = [1e6, 1e-3]
    settings = gru(tmp_path, n_trials=6, search_space=SPACE | {"learning_rate": rates}, seed=2, sampler="random")
    study = tune(settings, db=url, progress=False)
    trials = finished_trials(study)
    assert sorted(trial.user_attrs["slot"] for trial in trials) == list(range(6))
    wild = [trial for trial in trials if trial.params["learning_rate"] == 1e6]
    assert wild and len(wild) < 6
    for trial in wild:
        assert trial.state == TrialState.PRUNED and trial.value is None and "failure" not in trial.user_attrs
        assert "the learning rate is too large" in trial.user_attrs["diverged"]
        assert replay(trial, folds, settings=settings) is None
    assert best_trial(study).params["learning_rate"] == 1e-3
    assert read_json(best_params_path(settings), what="parameters")["hyperparameters"]["learning_rate"] == 1e-3


def test_a_study_of_nothing_but_diverging_trials_says_why(url, tmp_path):
    settings = gru(tmp_path, n_trials=2, search_space=SPACE | {"learning_rate": 1e6})
    with pytest.raises(TrainingError, match=r"no trial of .* completed: the training loss has diverged at step 2"):
        tune(settings, db=url, progress=False)
    assert [trial.state.name for trial in study_of(url, settings).trials] == ["PRUNED", "PRUNED"]


@pytest.mark.parametrize("name", ["gru", "nlinear", "nbeats", "tcn", "tide"])
def test_ordinary_training_at_the_largest_learning_rate_of_the_space_does_not_diverge(folds, name):
    values = {"input_chunk_length": 30, "batch_size": 32, "learning_rate": 1e-2}
    plan = FitPlan(n_epochs=3, patience=None, device=Device())
    settings = small_settings(Path(), model_name=name)
    assert len(fit_fold(folds[0], values, settings=settings, plan=plan, seed=0).history) == 3


# How a trial ends does not depend on who ran which of its folds


class Slow(Others):
    """Somebody runs the last fold, slower than the folds here, and fails in its second epoch."""

    looks = 0

    def __init__(self, losses: list[float]):
        self._losses = losses

    def look(self, ended: list[int]) -> dict[int, Help]:
        self.looks += 1
        return {1: Help(self._losses[:1])} if 6 < self.looks < 12 else {1: Help([])} if self.looks <= 6 else {}


def failing(epochs: dict[int, int]):
    """`run_fold` with folds that diverge after so many epochs."""

    def run(fold, *more, plan, **how):
        def on_epoch(number, row):
            plan.on_epoch(number, row)
            if row["epoch"] == epochs.get(fold.fold):
                raise Diverged(f"fold {fold.fold}")

        return run_fold(fold, *more, plan=replace(plan, on_epoch=on_epoch), **how)

    return run


def test_a_fold_that_fails_waits_for_the_others(folds):
    how = {"settings": gru(Path()), "plan": replace(PLAN, n_epochs=4), "seed": 3}
    losses = list(run_fold(folds[1], SMALL, **how).fit.history["val_loss"])
    alone, helped = (_end(folds, others, how) for others in (Others(), Slow(losses)))
    assert alone == helped
    assert [epoch for epoch, _ in alone[0]] == [1] and alone[1] == "fold 1"


def _end(folds: list, others: Others, how: dict) -> tuple[list, str]:
    """What a trial told of its rounds, and with what it ended."""
    told = []
    with patch.object(rounds, "run_fold", failing({0: 3, 1: 1})), pytest.raises(Diverged) as raised:
        validate_in_turns(folds, SMALL, on_round=lambda *said: told.append(said), others=others, **how)
    return told, str(raised.value)


def test_the_trial_of_a_helper_that_failed_is_taken_back_at_once(url, folds, tmp_path):
    settings, plan = gru(tmp_path), PLAN
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
    trial = study.ask()
    values = {name: trial.suggest_categorical(name, [value]) for name, value in SMALL.items()}
    own = helpers.Helpers(trial, plan=plan, store=None, on_wait=lambda: None)
    with patch.object(helpers, "LOOK_SECONDS", 0.0):
        own.look([])
        how = {"folds": folds, "settings": settings, "plan": plan, "store": None}
        with patch.object(helpers, "run_fold", failing({1: 1})):
            assert helpers.lend_a_hand(study, study.trials, lambda: True, **how)
        assert own.look([]) == {}
        assert validate_in_turns(
            folds, values, on_round=lambda *said: None, others=own, settings=settings, plan=plan, seed=1
        )


# Settings that reach the fit


def test_clipping_and_precision_reach_the_trainer(folds):
    fit = fit_fold(folds[0], SMALL, settings=gru(Path(), gradient_clip=0.5), plan=PLAN, seed=0)
    assert fit.model.trainer.gradient_clip_val == 0.5
    answers = {"is_available": lambda: True, "is_bf16_supported": lambda including_emulation: False}
    with patch.multiple("torch.cuda", **answers):
        device = choose_device(gru(Path(), precision="auto"))
    assert (device.precision, trainer_kwargs(device)["precision"]) == ("16", "16-mixed")


def test_a_larger_batch_than_the_floor_is_what_is_halved(folds):
    with ShortOfMemory(most=0), pytest.raises(OutOfMemory):
        fit_fold(folds[0], SMALL | {"batch_size": fits.LEAST_BATCH}, settings=gru(Path()), plan=PLAN, seed=0)
