"""What each pruner would have cut from a study that was run without one, from the scores that its trials reported.

It defines and runs nothing. Trials are replayed one after another, in the order of their slots; side by side, as
workers run them, a pruner knows a little less.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.trial import TrialState

from kallos.core.config import TuneSettings
from kallos.models.budget import finished_trials
from kallos.models.pruning import create_pruner
from kallos.models.storages import study_storage
from kallos.models.studies import artifact_store, download_table


@dataclass(frozen=True)
class Course:
    """An unpruned trial, as its pruner would have seen it."""

    value: float
    by_epoch: dict[int, float]  # epoch, from 1 -> mean over folds of the best score so far
    by_fold: dict[int, float]  # fold -> score
    epochs: list[int]  # that each fold trained
    seconds: float

    def fold_epochs(self, step: int, *, is_fold: bool) -> int:
        """Fold-epochs run by the end of the epoch, or of the fold."""
        return sum(self.epochs[: step + 1]) if is_fold else sum(min(step, count) for count in self.epochs)


def courses(study: optuna.Study, settings: TuneSettings, url: str) -> list[Course]:
    """The completed trials in the order of their slots."""
    where = {"storage": study_storage(settings, url), "store": artifact_store(settings, url)}
    done = [trial for trial in finished_trials(study) if trial.state == TrialState.COMPLETE]
    found = []
    for trial in sorted(done, key=lambda trial: trial.user_attrs["slot"]):
        epochs = download_table(trial, "history", **where).groupby("fold").size().tolist()
        by_epoch = {step: v for step, v in sorted(trial.intermediate_values.items()) if step <= settings.max_epochs}
        by_fold = dict(enumerate(trial.user_attrs["fold_scores"]))
        found.append(Course(trial.value, by_epoch, by_fold, epochs, trial.duration.total_seconds()))
    return found


def variants(settings: TuneSettings) -> Iterator[tuple[str, BasePruner]]:
    """Yields pruners by label: those of kallos as they are set, then others."""
    for name in ("median", "successive_halving", "hyperband", "wilcoxon"):
        yield f"{name}, as set", create_pruner(settings.model_copy(update={"pruner": name}))
    for startup, warmup in product((2, 3, 4, 5), (1, 2, 3)):
        label = f"median, startup {startup}, warm-up {warmup}"
        yield label, MedianPruner(n_startup_trials=startup, n_warmup_steps=warmup)
    for first, factor in product((1, 2, 3, 4), (2, 3, 4)):
        how, label = {"min_resource": first, "reduction_factor": factor}, f"from epoch {first}, reduction {factor}"
        yield f"successive_halving {label}", SuccessiveHalvingPruner(**how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield f"hyperband {label}", HyperbandPruner(**how, max_resource=settings.max_epochs)


@dataclass(frozen=True)
class Cut:
    """What a pruner left of a study."""

    epochs: float  # share of the fold-epochs
    seconds: float  # share of the time
    loss: float  # best score that is left, less the best there was


def cut(trials: list[Course], pruner: BasePruner, *, is_fold: bool) -> Cut:
    """The study with that pruner; `is_fold` if it is asked after each fold rather than after each epoch."""
    study, left, seconds, values = optuna.create_study(pruner=pruner, study_name="replay"), 0, 0.0, []
    for course in trials:
        trial = study.ask()
        end = _end(trial, course.by_fold if is_fold else course.by_epoch)
        total = sum(course.epochs)
        run = total if end is None else course.fold_epochs(end, is_fold=is_fold)
        left, seconds = left + run, seconds + course.seconds * run / total
        values += [course.value] if end is None else []
        study.tell(trial, *([course.value] if end is None else [None, TrialState.PRUNED]))
    best = min(course.value for course in trials)
    whole = sum(sum(course.epochs) for course in trials), sum(course.seconds for course in trials)
    return Cut(left / whole[0], seconds / whole[1], min(values) - best)


def _end(trial: optuna.Trial, reports: dict[int, float]) -> int | None:
    """The step at which the pruner ends the trial; None if it never does."""
    for step, value in reports.items():
        trial.report(value, step)
        if trial.should_prune():
            return step
    return None


def replay_pruners(studies: list[list[Course]], settings: TuneSettings) -> None:
    """Prints one line a pruner: what it leaves of all studies, and how often the best trial lives."""
    for label, _ in variants(settings):
        pruners = [dict(variants(settings))[label] for _ in studies]  # halving remembers what it saw
        is_fold = label.startswith("wilcoxon")
        cuts = [cut(trials, pruner, is_fold=is_fold) for trials, pruner in zip(studies, pruners, strict=True)]
        epochs, seconds = (sum(getattr(c, name) for c in cuts) / len(cuts) for name in ("epochs", "seconds"))
        kept, worst = sum(c.loss == 0 for c in cuts), max(c.loss for c in cuts)
        line = f"{label:<45} leaves {epochs:4.0%} of the fold-epochs, {seconds:4.0%} of the time;"
        print(f"{line} best trial kept in {kept} of {len(cuts)}, at worst {worst:+.4f}", flush=True)
