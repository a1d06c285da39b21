"""A study of kallos against the plain loop of darts and Optuna on the same suggestions, as a ratio of trials an hour.

kallos' time is that of `tune`, the start of its workers included; the plain loop's trials are recorded in `data/bench`
and run once (`--fresh` forgets them). The scores of both are compared too, beside the spread that the plain loop has
between random seeds. `--replay-pruners` shows instead what every pruner leaves of one unpruned study a seed, which is
kept in `data/bench` as well. Run it with `make bench`; the longest run is `--trials 20 --seeds 1`.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import joblib
import optuna
from bench_fold_fit import load_bars
from market import RECORDS, add_study_options, folds_of, span, store_market, study_settings, warm_up
from optuna.trial import TrialState
from plain_loop import PlainTrial, plain_trials
from pruner_replay import courses, replay_pruners

from kallos.core.config import TuneSettings
from kallos.models.budget import best_trial, finished_trials
from kallos.models.datasets import load_table
from kallos.models.tuner import tune

PRUNERS = ("none", "median", "successive_halving", "hyperband", "wilcoxon")


@dataclass(frozen=True)
class Round:
    """One study and the plain loop on its suggestions."""

    ours: float  # trials an hour
    plain: float
    score: float  # best score less the plain loop's best
    again: float  # that of kallos' best parameters by the plain loop, less the plain loop's best
    spread: float  # between the lowest and the highest score of the plain loop's best parameters, by random seed

    @property
    def ratio(self) -> float:
        """How many times the plain loop's trials an hour."""
        return self.ours / self.plain


def timed_study(settings: TuneSettings, url: str) -> tuple[optuna.Study, float]:
    """The finished study and its seconds."""
    begun = time.perf_counter()
    study = tune(settings, db=url, progress=sys.stderr.isatty())
    return study, time.perf_counter() - begun


def run_round(settings: TuneSettings, url: str, record: Path, spread: int) -> Round:
    """Runs a study, and the plain loop on its suggestions; prints both."""
    study, seconds = timed_study(settings, url)
    trials = sorted(finished_trials(study), key=lambda trial: trial.user_attrs["slot"])
    folds, how = folds_of(settings, url), {"n_epochs": settings.max_epochs, "record": record}
    plain = plain_trials([trial.params for trial in trials], folds, seed=settings.seed, **how)
    best, ours = min(plain, key=lambda trial: trial.score), best_trial(study)
    others = range(settings.seed + 1000, settings.seed + 1000 + spread)
    refits = [best, *[plain_trials([best.params], folds, seed=seed, **how)[0] for seed in others]]
    again = next(trial.score for trial in plain if trial.params == ours.params)
    rates = [len(trials) / spent * 3600 for spent in (seconds, sum(trial.seconds for trial in plain))]
    scores = [trial.score for trial in refits]
    result = Round(*rates, ours.value - best.score, again - best.score, max(scores) - min(scores))
    show(settings, trials, result, best, scores)
    return result


def show(settings: TuneSettings, trials: list, result: Round, best: PlainTrial, scores: list[float]) -> None:
    """Prints the times of a round in one line, its scores in another."""
    states = [trial.state for trial in trials]
    pruned, failed = states.count(TrialState.PRUNED), states.count(TrialState.FAIL)
    cut = f"{pruned} of {len(trials)} pruned" + (f", {failed} failed" if failed else "")
    rates = f"kallos {result.ours:.1f} trials/h, {cut}; plain loop {result.plain:.1f}"
    print(f"{settings.pruner}, seed {settings.seed}: {rates}, ratio {result.ratio:.2f}")
    told = f"plain loop {best.score:.4f}, kallos {result.score:+.4f}, its parameters by the plain loop"
    spread = f"same parameters by other random seeds {span(scores, 4)}"
    print(f"  best score: {told} {result.again:+.4f}; {spread}", flush=True)


def summarize(pruner: str, rounds: list[Round]) -> None:
    """Prints the medians and ranges over seeds."""
    ours, plain = (statistics.median(getattr(r, name) for r in rounds) for name in ("ours", "plain"))
    print(f"{pruner}: kallos {ours:.1f} trials/h, plain loop {plain:.1f}, ratio {span([r.ratio for r in rounds])}")
    score, again, spread = (span([getattr(r, name) for r in rounds], 4) for name in ("score", "again", "spread"))
    print(f"  best score less the plain loop's: {score}, retrained {again}; its spread by seed {spread}", flush=True)


def compare(options: argparse.Namespace, url: str, records: list[Path], folder: Path) -> None:
    """Prints every round, and a summary a pruner."""
    for pruner in options.pruner:
        rounds = []
        for seed, record in enumerate(records):
            how = {"seed": seed, "pruner": pruner, "n_jobs": options.n_jobs, "exact": options.exact}
            settings = study_settings(options, folder / f"{pruner}_{seed}", **how)
            rounds.append(run_round(settings, url, record, options.spread))
        summarize(pruner, rounds)


def replay(options: argparse.Namespace, url: str, slug: str) -> None:
    """Runs or resumes one unpruned study a seed, and prints what every pruner leaves of them."""
    studies = []
    for seed in range(options.seeds):
        sizes = f"{options.end_date}_{options.folds}_{options.epochs}{'_exact' if options.exact else ''}"
        folder = RECORDS / f"unpruned_{slug}_{seed}_{sizes}"
        if options.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        how = {"seed": seed, "pruner": "none", "n_jobs": options.n_jobs, "exact": options.exact}
        settings = study_settings(options, folder, **how)
        studies.append(courses(timed_study(settings, url)[0], settings, url)[: options.trials])
    print(f"{len(studies)} unpruned studies of {options.trials} trials")
    replay_pruners(studies, settings)


def parse_options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_study_options(parser)
    parser.add_argument("--seeds", type=int, default=3, help="studies, of seeds 0, 1, ...")
    parser.add_argument("--spread", type=int, default=1, help="refits of the best parameters by other random seeds")
    parser.add_argument("--pruner", nargs="+", choices=PRUNERS, default=["successive_halving"])
    parser.add_argument("--n-jobs", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="PyTorch's own layers")
    parser.add_argument("--fresh", action="store_true", help="forget what is recorded")
    parser.add_argument("--replay-pruners", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Prints two lines a study and two a pruner, or one line a replayed pruner."""
    options = parse_options()
    source, bars = load_bars()
    slug = source.partition(".")[0].replace(" ", "_")
    records = [RECORDS / f"plain_{slug}_{seed}.json" for seed in range(options.seeds)]
    with tempfile.TemporaryDirectory(prefix="kallos-bench-") as folder:
        url = store_market(bars, f"sqlite:///{folder}/kallos.db")
        settings = study_settings(options, Path(folder), exact=options.exact)
        rows = len(load_table(settings, url))
        print(f"{source}, {rows:,} rows, {options.folds} folds, up to {options.epochs} epochs,", end=" ")
        print(f"{options.trials} trials, {options.n_jobs} workers on {joblib.cpu_count()} cores", flush=True)
        if options.replay_pruners:
            replay(options, url, slug)
            return
        for record in records if options.fresh else []:
            record.unlink(missing_ok=True)
        warm_up(settings, url)
        compare(options, url, records, Path(folder))


if __name__ == "__main__":
    main()
