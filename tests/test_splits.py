"""Splitters: published values, tables worked out by hand, a purge by brute force, and what scikit-learn expects."""

import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold, check_cv, cross_val_predict, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kallos.core.errors import ConfigError, DataError
from kallos.data.purged import CombinatorialPurgedCV, PurgedKFold, path_folds
from kallos.data.spans import Part, row_spans, touches
from kallos.data.splits import ChronologicalSplit, WalkForwardSplit, layout_table, walk_forward_bounds

HOURS = pd.date_range("2024-01-01", periods=60, freq="1h", tz="UTC")
MINUTES = pd.date_range("2024-01-01", periods=10, freq="1min", tz="UTC")
TWO_MINUTES = pd.Series(MINUTES + pd.Timedelta("2min"), index=MINUTES)


def as_lists(splitter, X):
    return [(train.tolist(), test.tolist()) for train, test in splitter.split(X)]


# Published values


@pytest.mark.parametrize(
    ("groups", "tested", "splits", "paths"),
    [(5, 2, 10, 4), (6, 2, 15, 5), (8, 2, 28, 7), (10, 2, 45, 9), (10, 3, 120, 36)],
)
def test_combinatorial_counts(groups, tested, splits, paths):
    cv = CombinatorialPurgedCV(groups, tested)
    assert (cv.get_n_splits(), cv.n_paths) == (splits, paths)
    assert len(list(cv.split(range(120)))) == splits
    assert cv.path_ids().max() + 1 == paths


def test_combinatorial_twelve_rows():
    cv = CombinatorialPurgedCV(3, 2, horizon=1)
    tests = [[*range(8)], [*range(4), *range(8, 12)], [*range(4, 12)]]
    assert as_lists(cv, range(12)) == list(zip([[9, 10, 11], [5, 6], [0, 1, 2]], tests, strict=True))
    assert cv.path_ids().tolist() == [[0, 0], [1, 0], [1, 1]]


@pytest.mark.parametrize(("start", "end", "kept"), [("00:01", "00:02", range(3, 10)), ("00:08", "00:11", range(6))])
def test_purging_by_label_end(start, end, kept):
    test = [pd.Timestamp(f"2024-01-01 {moment}", tz="UTC").as_unit("ns").value for moment in (start, end)]
    spans = row_spans(MINUTES, t1=TWO_MINUTES)
    assert np.flatnonzero(~touches(spans, start=test[0], end=test[1])).tolist() == [*kept]


def test_purging_by_label_end_in_a_fold():
    train, test = list(PurgedKFold(5, t1=TWO_MINUTES).split(MINUTES))[-1]
    assert (train.tolist(), test.tolist()) == ([*range(6)], [8, 9])


# Worked out by hand

WINDOWS = {
    "expanding": [([0, 1, 2, 3, 4, 5], [8, 9]), ([*range(8)], [10, 11])],
    "rolling": [([2, 3, 4, 5], [8, 9]), ([4, 5, 6, 7], [10, 11])],
    "anchored": [([2, 3, 4, 5], [8, 9]), ([2, 3, 4, 5, 6, 7], [10, 11])],
}


@pytest.mark.parametrize("window", WINDOWS)
def test_walk_forward_windows(window):
    split = WalkForwardSplit(folds=2, val_length=2, train_length=4, horizon=1, embargo=1, train_window=window)
    assert as_lists(split, range(12)) == WINDOWS[window]


KFOLDS = {  # 12 rows, 3 folds, tests [0..3], [4..7], [8..11]
    (0, 1, 0): [[*range(4, 12)], [0, 1, 2, 3, 8, 9, 10, 11], [*range(8)]],
    (2, 1, 0): [[*range(6, 12)], [0, 1, 10, 11], [*range(6)]],
    (2, 2, 0): [[*range(7, 12)], [0, 1, 11], [*range(6)]],
    (1, 2, 1): [[*range(7, 12)], [0, 1, 2, 11], [*range(7)]],
}


@pytest.mark.parametrize(("horizon", "lookback", "embargo"), KFOLDS)
@pytest.mark.parametrize("X", [range(12), HOURS[:12]])
def test_purged_k_fold(horizon, lookback, embargo, X):
    split = PurgedKFold(3, horizon=horizon, lookback=lookback, embargo=embargo)
    assert [train for train, _ in as_lists(split, X)] == KFOLDS[horizon, lookback, embargo]


def test_groups_beside_one_another_are_one_block():
    cv = CombinatorialPurgedCV(4, 2, horizon=1, lookback=2, embargo=1)
    trains = [train for train, _ in as_lists(cv, range(16))]  # groups 01 02 03 12 13 23
    assert trains == [[*range(11, 16)], [15], [*range(7, 11)], [0, 1, 2, 15], [0, 1, 2], [*range(7)]]


@pytest.mark.parametrize("embargo", [3, 0.25, 3 / 12, "3h", pd.Timedelta("3h"), pd.Timedelta("3h").to_pytimedelta()])
def test_embargo_in_rows_share_and_time(embargo):
    folds = list(PurgedKFold(3, horizon=1, embargo=embargo).split(HOURS[:12]))
    assert [train.tolist() for train, _ in folds] == [[8, 9, 10, 11], [0, 1, 2], [*range(7)]]
    parts = next(ChronologicalSplit(0.5, 0.25, horizon=1, embargo=embargo).parts(HOURS[:12]))
    assert np.flatnonzero(parts == Part.TRAIN).tolist() == [0, 1]


def test_early_label_ends_purge_less():
    ends = HOURS[:12] + pd.to_timedelta([9, 0, 0, 1, 0, 0, 5, 0, 0, 0, 0, 0], unit="h")
    _, second, _ = PurgedKFold(3, t1=ends).split(HOURS[:12])
    assert second[0].tolist() == [1, 2]  # row 0 and 3 reach row 4; row 6 ends with row 11


def test_a_gap_in_time_is_seen_by_label_ends():
    ts = HOURS[:6].append(HOURS[16:22])  # ten hours are missing after row 5
    timed = PurgedKFold(2, t1=ts + pd.Timedelta("2h"))
    assert [train.tolist() for train, _ in timed.split(ts)] == [[*range(6, 12)], [*range(6)]]
    counted = PurgedKFold(2, horizon=2)
    assert [train.tolist() for train, _ in counted.split(ts)] == [[*range(8, 12)], [*range(4)]]


def test_chronological_by_share_and_date():
    X = pd.DataFrame({"close": 1.0}, index=HOURS)
    by_share = ChronologicalSplit(0.5, 0.25, horizon=2).rows(X)
    assert {name: (rows[0], rows[-1], len(rows)) for name, rows in by_share.items()} == {
        "train": (0, 27, 28), "val": (30, 42, 13), "test": (45, 59, 15),
    }  # fmt: skip
    by_date = ChronologicalSplit("2024-01-02T05:00", HOURS[44].to_pydatetime(), "2024-01-03T06:00", horizon=2).rows(X)
    assert {name: [*rows] for name, rows in by_date.items()} == {
        "train": [*range(28)], "val": [*range(30, 43)], "test": [*range(45, 55)],
    }  # fmt: skip
    ((train, val),) = ChronologicalSplit(0.5, 0.25, horizon=2).split(X)
    assert np.array_equal(train, by_share["train"]) and np.array_equal(val, by_share["val"])


def test_chronological_embargo_goes_beyond_the_purge():
    ends = HOURS + pd.to_timedelta(np.where(np.arange(60) % 3, 0, 6), unit="h")
    parts = next(ChronologicalSplit(0.5, 0.25, t1=ends, embargo=2).parts(HOURS))
    assert np.flatnonzero(parts[:30] == Part.PURGE).tolist() == [24, 27]
    assert np.flatnonzero(parts[:30] == Part.EMBARGO).tolist() == [28, 29]


# Against brute force


@st.composite
def markets(draw):
    """Rising times with gaps, label ends in any order, and the parameters of a splitter."""
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 1, 2, 7]), min_size=8, max_size=40))
    hours = np.cumsum(steps)
    lengths = draw(st.lists(st.integers(0, 9), min_size=len(steps), max_size=len(steps)))
    lookback, embargo = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    ts = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(hours, unit="h")
    kind = draw(st.sampled_from(["rows", "times"]))
    n_groups = draw(st.integers(2, 6))
    n_test = draw(st.integers(1, n_groups - 1))
    return ts, pd.Series(ts + pd.to_timedelta(lengths, unit="h"), index=ts), kind, lookback, embargo, n_groups, n_test


def blocks_of(test):
    """Stretches of neighbouring row numbers."""
    return np.split(test, np.flatnonzero(np.diff(test) > 1) + 1)


def brute_force(starts, nows, ends, test, embargo):
    """The training rows: each against every test row, then the rows after each block's last purged one."""
    n = len(nows)
    free = {
        i for i in range(n)
        if i not in test and not any(starts[i] <= ends[j] and ends[i] >= nows[j] for j in test)
    }  # fmt: skip
    for block in blocks_of(np.array(sorted(test))):
        last = max(ends[j] for j in block)
        after = [i for i in range(block[-1] + 1, n) if starts[i] > last]
        free -= {*range(after[0], after[0] + embargo)} if after else set()
    return sorted(free)


@settings(max_examples=150, deadline=None)
@given(markets())
def test_purge_equals_brute_force(market):
    ts, t1, kind, lookback, embargo, n_groups, n_test = market
    n = len(ts)
    if kind == "times":
        cv = CombinatorialPurgedCV(n_groups, n_test, t1=t1, lookback=lookback, embargo=embargo)
        nows, ends = list(ts), list(t1)
        starts = [ts[max(0, i - lookback + 1)] for i in range(n)]
    else:
        cv = CombinatorialPurgedCV(n_groups, n_test, horizon=3, lookback=lookback, embargo=embargo)
        nows = [*range(n)]
        starts, ends = [i - lookback + 1 for i in nows], [i + 3 for i in nows]
    tested = np.zeros(n, dtype=int)
    for parts, groups in zip(cv.parts(ts), cv.test_groups(), strict=True):
        test = np.flatnonzero(parts == Part.TEST)
        assert np.array_equal(test, np.concatenate([np.array_split(np.arange(n), n_groups)[g] for g in groups]))
        expected = brute_force(starts, nows, ends, {*test.tolist()}, embargo)
        assert np.flatnonzero(parts == Part.TRAIN).tolist() == expected
        tested[test] += 1
    assert (tested == cv.n_paths).all()


@settings(max_examples=100, deadline=None)
@given(markets(), st.floats(0.3, 0.6))
def test_chronological_equals_brute_force(market, share):
    ts, t1, _, _, embargo, _, _ = market
    parts = next(ChronologicalSplit(share, 0.3, t1=t1, embargo=embargo).parts(ts))
    n = len(ts)
    cuts = [round(share * n), round(share * n) + round(0.3 * n)]

    def reached(embargo):
        return {i for cut in cuts for i in range(cut) if t1.iloc[i] >= ts[max(0, cut - embargo)]}

    assert {*np.flatnonzero(parts == Part.PURGE)} == reached(0)
    assert {*np.flatnonzero(parts == Part.EMBARGO)} == reached(embargo) - reached(0)


@settings(max_examples=100, deadline=None)
@given(st.integers(40, 200), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), st.booleans())
def test_walk_forward_is_what_it_was(n, folds, val_length, train_length, hole, expanding):
    """The bounds of the studies made before the splitters had parts."""
    starts = [n - val_length - back * val_length for back in reversed(range(folds))]
    before = [
        (i, 0 if expanding else v - hole - 1 - train_length, v - hole - 1, v, v + val_length)
        for i, v in enumerate(starts)
    ]
    window = "expanding" if expanding else "rolling"
    sizes = {"folds": folds, "val_length": val_length, "train_length": train_length}
    split = WalkForwardSplit(**sizes, horizon=1, embargo=hole, train_window=window)
    bounds = walk_forward_bounds(n, **sizes, horizon=1, embargo=hole, train_window=window)
    assert [(b.fold, b.train_start, b.train_stop, b.val_start, b.val_stop) for b in bounds] == before
    expected = [(list(range(a, b)), list(range(v, w))) for _, a, b, v, w in before]
    assert as_lists(split, np.zeros((n, 2))) == expected


# What scikit-learn expects

SPLITTERS = [
    WalkForwardSplit(folds=3, val_length=10, train_length=12, horizon=2),
    ChronologicalSplit(0.6, 0.2, horizon=2, embargo=1),
    PurgedKFold(4, horizon=2, lookback=3, embargo=0.02),
    PurgedKFold(4, t1=pd.Series(HOURS + pd.Timedelta("3h"), index=HOURS), embargo="2h"),
    CombinatorialPurgedCV(5, 2, horizon=2, lookback=3),
]


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(60, 3)), index=HOURS, columns=[*"abc"])
    return X, pd.Series(X["a"] + rng.normal(size=60), index=HOURS)


@pytest.mark.parametrize("cv", SPLITTERS, ids=lambda cv: type(cv).__name__)
class TestScikitLearn:
    def test_cross_validation_takes_it(self, cv, problem):
        model = make_pipeline(StandardScaler(), Ridge())
        assert len(cross_val_score(model, *problem, cv=cv)) == cv.get_n_splits(*problem)
        found = cross_validate(model, *problem, cv=cv, return_indices=True, scoring="r2", n_jobs=1)
        for ours, theirs in zip(cv.split(problem[0]), zip(*found["indices"].values(), strict=True), strict=True):
            assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])

    def test_search_takes_it(self, cv, problem):
        search = GridSearchCV(Ridge(), {"alpha": [0.1, 1.0]}, cv=cv).fit(*problem)
        assert search.n_splits_ == cv.get_n_splits()
        assert repr(clone(search).cv) == repr(cv)

    def test_arrays_and_lists(self, cv, problem):
        values = problem[0].to_numpy()
        assert as_lists(cv, values) == as_lists(cv, values.tolist()) == as_lists(cv, problem[0])

    def test_split_yields_integers_and_keeps_no_state(self, cv, problem):
        before = vars(cv).copy()
        first, second = as_lists(cv, problem[0]), as_lists(cv, problem[0])
        assert first == second and all(vars(cv)[name] is value for name, value in before.items())
        assert all(side.dtype == np.intp and side.ndim == 1 for pair in cv.split(problem[0]) for side in pair)
        assert len(first) == cv.get_n_splits() == cv.get_n_splits(*problem)
        assert all(not {*train} & {*test} for train, test in first)

    def test_copies(self, cv, problem):
        for copy in (clone(cv), pickle.loads(pickle.dumps(cv)), check_cv(cv)):
            assert type(copy) is type(cv) and repr(copy) == repr(cv)
            assert as_lists(copy, problem[0]) == as_lists(cv, problem[0])
        assert {*cv.get_params()} == {*clone(cv).get_params()}

    def test_table_and_figure(self, cv, problem):
        X = problem[0]
        table = cv.table(X)
        assert [*table] == ["fold", "part", "start", "end", "rows"]
        for fold, (train, test) in enumerate(cv.split(X)):
            rows = table[table["fold"] == fold].groupby("part")["rows"].sum()
            assert rows["train"] == len(train) and rows[cv.scored.name.lower()] == len(test)
        assert {trace.name for trace in cv.plot(X).data} == {*table["part"]}
        assert cv.plot(X.to_numpy()).data


def test_k_fold_without_purge_is_scikit_learns():
    for n in (20, 23):
        ours, theirs = PurgedKFold(4, horizon=0).split(range(n)), KFold(4).split(range(n))
        assert [(a.tolist(), b.tolist()) for a, b in ours] == [(a.tolist(), b.tolist()) for a, b in theirs]


def test_k_fold_is_a_partition(problem):
    assert np.isfinite(cross_val_predict(Ridge(), *problem, cv=PurgedKFold(4, horizon=2))).all()


def test_label_ends_follow_the_rows_into_an_inner_search(problem):
    X, y = problem
    t1 = pd.Series(HOURS + pd.Timedelta("3h"), index=HOURS)
    inner = GridSearchCV(Ridge(), {"alpha": [0.1, 1.0]}, cv=PurgedKFold(3, t1=t1))
    assert np.isfinite(cross_val_score(inner, X, y, cv=CombinatorialPurgedCV(4, 2, t1=t1))).all()
    with pytest.raises(DataError, match="30 rows, but the label ends have 60 times"):
        list(PurgedKFold(3, t1=t1).split(X.to_numpy()[:30]))


# Paths


@pytest.mark.parametrize(("groups", "tested"), [(3, 2), (5, 2), (6, 3), (4, 1)])
def test_every_path_is_a_whole_history(groups, tested):
    cv, n = CombinatorialPurgedCV(groups, tested, horizon=1), 41
    seen = np.full((cv.get_n_splits(), n), False)
    for fold, (_, test) in enumerate(cv.split(range(n))):
        seen[fold, test] = True
    folds = path_folds(cv, range(n))
    assert folds.shape == (cv.n_paths, n) and seen[folds, np.arange(n)].all()
    assert all(len({*folds[:, row]}) == cv.n_paths for row in range(n))  # no forecast is used twice
    ids = cv.path_ids()
    for fold, (test_groups, of_path) in enumerate(zip(cv.test_groups(), ids, strict=True)):
        firsts = [np.array_split(np.arange(n), groups)[group][0] for group in test_groups]
        assert folds[of_path, firsts].tolist() == [fold] * tested


# Refusals


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CombinatorialPurgedCV(20, 10), "more than 20,000 splits; got '184,756'. Each split is a fit: test 5"),
        (lambda: CombinatorialPurgedCV(5, 5), "5 test groups are too many"),
        (lambda: CombinatorialPurgedCV(5, 0), "n_test_groups must be a whole number; got 0. Use 1 or more"),
        (lambda: PurgedKFold(2.5), "n_splits must be a whole number; got 2.5"),
        (lambda: PurgedKFold(3, horizon=-1), "horizon must be a whole number; got -1"),
        (lambda: PurgedKFold(3, lookback=0), "lookback must be a whole number; got 0. Use 1 or more"),
        (lambda: PurgedKFold(3, embargo="soon"), "this is no embargo; got 'soon'"),
        (lambda: PurgedKFold(3, embargo=-0.1), "this is no embargo; got -0.1"),
        (lambda: WalkForwardSplit(val_length=0, train_length=3), "val_length must be a whole number; got 0"),
    ],
)
def test_wrong_parameters_are_refused_at_once(make, said):
    with pytest.raises(ConfigError) as caught:
        make()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("split", "X", "said"),
    [
        (PurgedKFold(5), range(4), "5 groups need at least as many rows; got 4"),
        (PurgedKFold(2, horizon=20), range(20), "fold 0 has no row to train on; got '20 rows'. Use fewer folds"),
        (PurgedKFold(2), HOURS[::-1], "the rows are not by rising time"),
        (PurgedKFold(2), HOURS.repeat(2), "several rows of one time"),
        (PurgedKFold(2, t1=HOURS), np.zeros(60), "label ends are times, but the rows have none"),
        (PurgedKFold(2, t1=HOURS.insert(0, pd.NaT)[:60]), HOURS, "1 rows have no label end"),
        (PurgedKFold(2, embargo="1h"), np.zeros(60), "an embargo of a length of time needs rows with times"),
        (ChronologicalSplit("2024-01-02"), np.zeros(60), "a date needs rows with times"),
        (ChronologicalSplit("2030-01-02"), HOURS, "train, validation and test need rows each"),
        (ChronologicalSplit(0.9, 0.2), HOURS, "train, validation and test need rows each"),
    ],
)
def test_what_cannot_be_split_is_refused(split, X, said):
    with pytest.raises((DataError, ConfigError)) as caught:
        list(split.split(X))
    assert said in str(caught.value)


def test_layout_of_a_study_is_the_splitters_table():
    split = WalkForwardSplit(folds=2, val_length=5, train_length=8, horizon=2)
    pd.testing.assert_frame_equal(layout_table(split.bounds(40), HOURS[:40]), split.table(HOURS[:40]))


def test_a_table_with_its_times_in_a_column():
    t1 = pd.Series(HOURS + pd.Timedelta("3h"), index=HOURS)
    cv = PurgedKFold(3, t1=t1, embargo="2h")
    assert as_lists(cv, pd.DataFrame({"ts": HOURS, "close": 1.0})) == as_lists(cv, HOURS)


def test_splitters_load_neither_scikit_learn_nor_plotly():
    code = "import sys, kallos.data.purged; print({'sklearn', 'plotly', 'torch', 'darts'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# Time is not rows


def test_nothing_known_after_a_date_trains_up_to_it_though_a_gap_follows():
    """Sixteen hours, a gap of three days; the labels of five hours before the gap end in it, or just before it."""
    ts = HOURS[:20].append(HOURS[:40] + pd.Timedelta("4D"))
    t1 = pd.Series(ts + pd.Timedelta("5h"), index=ts)
    for end in (10, 14, 17, 19):
        split = ChronologicalSplit(ts[end], 0.3, t1=t1)
        train = split.rows(ts)["train"]
        assert t1.iloc[train].max() == ts[end] and len(train) == end - 4
        embargoed = ChronologicalSplit(ts[end], 0.3, t1=t1, embargo="2h").rows(ts)["train"]
        assert t1.iloc[embargoed].max() == ts[end] - pd.Timedelta("2h")
        assert len(ChronologicalSplit(ts[end], 0.3, t1=t1, embargo=2).rows(ts)["train"]) < len(train)
    by_share = ChronologicalSplit(20 / 60, 0.3, t1=t1).rows(ts)["train"]
    assert len(by_share) == 20  # a share asks for no moment: all that ends before the next row may train


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (WalkForwardSplit(folds=2, val_length=12, train_length=12, horizon=2), "several rows of one time"),
        (PurgedKFold(3, t1=pd.Series(HOURS.repeat(3), index=HOURS.repeat(3)), lookback=6), "several rows of one time"),
    ],
)
def test_rows_of_several_assets_are_not_counted_as_time(split, said):
    with pytest.raises(DataError, match=said):
        list(split.split(pd.DataFrame(index=HOURS.repeat(3))))


def test_several_assets_are_split_by_label_ends():
    """Three rows an hour; without a window, moments alone decide, also where a fold's edge parts rows of one hour."""
    ts = HOURS[:20].repeat(3)
    t1 = pd.Series(ts + pd.Timedelta("2h"), index=ts)
    for train, test in PurgedKFold(7, t1=t1).split(ts):
        first, last = ts[test[0]], t1.iloc[test].max()
        assert all(t1.iloc[row] < first or ts[row] > last for row in train)


def test_a_walk_forward_refuses_rows_that_come_newest_first():
    with pytest.raises(DataError, match="not by rising time"):
        list(WalkForwardSplit(folds=2, val_length=5, train_length=8).split(pd.DataFrame(index=HOURS[::-1])))
