"""What must hold of every score, bet and interval on any forecasts, against scikit-learn, scipy and slow loops."""

import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from sklearn import metrics as peer

from kallos.core.classification import CLASSES, brier_losses, calibration_error, calibration_table, score_classes
from kallos.core.columns import FORECAST_KEYS, NAIVE_PROBABILITIES, PROBABILITIES
from kallos.core.metrics import score_forecasts, sign_strategy_returns
from kallos.core.schemas import FORECASTS, check_table
from kallos.evaluation.conformal import conformal_intervals, conformal_quantile, coverage
from kallos.evaluation.multiple_testing import bets_per_year, strategy_returns
from kallos.evaluation.verdict import judge

HOUR = pd.Timedelta("1h")
START = pd.Timestamp("2024-01-01", tz="UTC")


def table(made, ended, **columns) -> pd.DataFrame:
    """Forecasts made and ended at whole hours."""
    rows = pd.DataFrame({"ts": START + np.asarray(made) * HOUR, "target_ts": START + np.asarray(ended) * HOUR})
    rows[FORECAST_KEYS] = ["BTC", "1h", "gru", 0, 5, "return"]
    rows = rows.assign(close_at_ts=100.0, y_true=0.01, y_pred=0.01, y_naive=0.0)
    return rows.assign(**columns)


@st.composite
def labels(draw, least: int = 1) -> pd.DataFrame:
    """Forecasts of labels, of few or many rows, of any classes, with probabilities that may be zero."""
    n = draw(st.integers(least, 60))
    weights = st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)
    given_ = np.array(draw(st.lists(weights, min_size=n, max_size=n)), float)
    naive = np.array(draw(weights), float)
    allowed = draw(st.lists(st.sampled_from(CLASSES), min_size=1, max_size=3, unique=True))
    truth = draw(st.lists(st.sampled_from(allowed), min_size=n, max_size=n))
    rows = table(range(n), np.arange(n) + 5, target="label", y_true=np.array(truth, float), return_true=0.01)
    rows[PROBABILITIES] = given_ / given_.sum(axis=1, keepdims=True)
    rows[NAIVE_PROBABILITIES] = naive / naive.sum()
    expected = {"y_pred": rows["p_up"] - rows["p_down"], "y_naive": rows["p_naive_up"] - rows["p_naive_down"]}
    return check_table(rows.assign(**expected), FORECASTS, what="the test's labels")


@st.composite
def spans(draw) -> pd.DataFrame:
    """Bets that begin at some of forty hours, in two folds, each lasting one to five of them, or a part of one."""
    made = sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=30)))
    lengths = draw(st.lists(st.sampled_from([0.5, 1, 2, 3, 4, 5]), min_size=len(made), max_size=len(made)))
    sides = draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=len(made), max_size=len(made)))
    split = draw(st.integers(0, len(made)))
    rows = table(made, np.add(made, lengths), y_pred=sides, fold=(np.arange(len(made)) >= split).astype(int))
    return rows.sample(frac=1, random_state=draw(st.integers(0, 9)))


@given(labels())
@settings(deadline=None, max_examples=40)
def test_scores_of_classes_are_those_of_scikit_learn(rows: pd.DataFrame):
    found, truth, given_ = score_classes(rows).iloc[0], rows["y_true"], rows[PROBABILITIES].to_numpy()
    numbers = found.drop(FORECAST_KEYS).astype(float)
    assert not np.isinf(numbers).any()
    named = np.take(CLASSES, given_.argmax(axis=1))
    same = {
        "accuracy": peer.accuracy_score(truth, named),
        "f1": peer.f1_score(truth, named, average="macro", zero_division=0),
        "log_loss": peer.log_loss(truth, given_, labels=CLASSES),
        "brier": peer.brier_score_loss(truth, given_, labels=CLASSES),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same["balanced_accuracy"] = peer.balanced_accuracy_score(truth, named)
    if truth.nunique() > 1:
        same["mcc"] = peer.matthews_corrcoef(truth, named)
    if truth.nunique() == 3:
        same["roc_auc"] = peer.roc_auc_score(truth, given_, multi_class="ovr")
    for name, value in same.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    assert np.isnan(found["mcc"]) == (truth.nunique() == 1)
    if found["brier_naive"] > 0:
        assert found["brier_skill"] == pytest.approx(1 - found["brier"] / found["brier_naive"])


@given(labels())
@settings(deadline=None, max_examples=25)
def test_every_row_is_in_one_bin_and_down_mirrors_up(rows: pd.DataFrame):
    for of in ("top", "down", "flat", "up"):
        found = calibration_table(rows, of=of)
        assert found["n"].sum() == len(rows) and found["probability"].is_monotonic_increasing
        assert ((found["lower"] <= found["share"] + 1e-12) & (found["share"] <= found["upper"] + 1e-12)).all()
    assert 0 <= calibration_error(rows) <= 1
    swapped = dict(zip(PROBABILITIES, reversed(PROBABILITIES), strict=True))
    swapped |= dict(zip(NAIVE_PROBABILITIES, reversed(NAIVE_PROBABILITIES), strict=True))
    mirrored = rows.rename(columns=swapped).assign(**{name: -rows[name] for name in ("y_true", "y_pred", "y_naive")})
    ours, theirs = (score_classes(side).iloc[0] for side in (rows, mirrored))
    for name in ("brier", "brier_skill", "log_loss", "roc_auc"):
        assert ours[name] == pytest.approx(theirs[name], nan_ok=True)
    down, up = calibration_table(rows, of="down"), calibration_table(mirrored, of="up")
    pd.testing.assert_frame_equal(down, up)


@given(labels(least=50))
@settings(deadline=None, max_examples=25)
def test_the_verdict_on_labels_is_the_brier_skill_score(rows: pd.DataFrame):
    verdict, score = judge(rows), score_classes(rows).iloc[0]
    assert [verdict.brier, verdict.brier_naive] == pytest.approx([score["brier"], score["brier_naive"]])
    assert verdict.skill == pytest.approx(score["brier_skill"], nan_ok=True)
    assert np.isnan(verdict.rmse) and "Brier score" in verdict.sentence
    assert not (verdict.has_skill and verdict.skill_lower <= 0)


EXTREME = st.floats(-1e300, 1e300, allow_nan=False)


@given(
    st.lists(st.tuples(EXTREME, EXTREME, EXTREME), min_size=1, max_size=8),
    st.sampled_from(["close", "log_close", "log_return", "return"]),
)
@settings(deadline=None, max_examples=150)
def test_no_number_breaks_a_score(values: list, target: str):
    rows = table(range(len(values)), np.arange(len(values)) + 1, target=target)
    rows[["y_true", "y_pred", "y_naive"]] = values
    with np.errstate(all="ignore"):
        found = score_forecasts(rows).drop(columns=FORECAST_KEYS).astype(float).to_numpy()
    assert not np.isinf(found).any()


@given(st.lists(st.tuples(st.floats(1, 1e5), st.floats(1, 1e5), st.floats(1, 1e5)), min_size=2, max_size=30))
@settings(deadline=None, max_examples=60)
def test_errors_of_prices_are_those_of_scikit_learn(values: list):
    rows = table(range(len(values)), np.arange(len(values)) + 1, target="close")
    rows[["y_true", "y_pred", "y_naive"]] = values
    truth, said, naive = np.transpose(values)
    found = score_forecasts(rows).iloc[0]
    assert found["mape"] == pytest.approx(peer.mean_absolute_percentage_error(truth, said))
    assert found["smape"] == pytest.approx(np.mean(2 * abs(truth - said) / (truth + said)))
    if np.ptp(truth) > 0:
        assert found["r2"] == pytest.approx(peer.r2_score(truth, said), rel=1e-6, abs=1e-6)
    if (base := peer.mean_absolute_error(truth, naive)) > 0:
        assert found["relative_mae"] == pytest.approx(peer.mean_absolute_error(truth, said) / base)


def traded_slowly(rows: pd.DataFrame) -> list[float]:
    """What each bet trades: a bet takes over from the one that was made first of those that end where it begins."""
    taken, traded = set(), {}
    for fold, own in rows.groupby("fold"):
        for _, bet in own.sort_values("ts").iterrows():
            ended = own[own["target_ts"] == bet["ts"]]
            before = ended["ts"].min()
            held = 0.0 if ended.empty else ended.loc[ended["ts"] == before, "y_pred"].item()
            traded[fold, bet["ts"]] = abs(bet["y_pred"] - held)
            taken |= set() if ended.empty else {(fold, before)}
    keys = [*zip(rows["fold"], rows["ts"], strict=True)]
    closed = [abs(side) * (key not in taken) for key, side in zip(keys, rows["y_pred"], strict=True)]
    return [traded[key] + more for key, more in zip(keys, closed, strict=True)]


@given(spans())
@settings(deadline=None, max_examples=60)
def test_bets_of_any_length_pay_for_what_they_trade(rows: pd.DataFrame):
    found = sign_strategy_returns(rows, fee=1.0)
    assert found["cost"].tolist() == traded_slowly(rows)
    assert (found["cost"] <= 3).all() and found.index.equals(rows.index)
    assert found["cost"].sum() >= found["position"].abs().gt(0).any() * 2  # something was opened and closed


@given(spans())
@settings(deadline=None, max_examples=60)
def test_bets_are_taken_one_after_the_other(rows: pd.DataFrame):
    assume((rows["target_ts"] - rows["ts"] != 5 * HOUR).any())  # those that all last a horizon follow below
    taken = strategy_returns(rows, fee=0.0)
    expected, lengths = [], []
    for _, own in rows.sort_values("ts").groupby("fold"):
        free = START
        for _, bet in own.iterrows():
            if bet["ts"] >= free:
                expected.append(bet["ts"])
                lengths.append(bet["target_ts"] - bet["ts"])
                free = bet["target_ts"]
    assert sorted(expected) == taken.index.tolist()
    assert bets_per_year(rows) == pytest.approx(pd.Timedelta(days=365) / pd.Series(lengths).mean())


@given(st.integers(1, 7), st.integers(1, 80), st.sets(st.integers(0, 79)), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_bets_of_one_length_are_every_horizon_th(horizon: int, n: int, missing: set, seed: int):
    kept = np.setdiff1d(np.arange(n), [*missing][: n // 3])
    sides = np.random.default_rng(seed).normal(size=len(kept))
    rows = table(kept, kept + horizon, horizon=horizon, y_pred=sides, fold=(kept > n // 2).astype(int))
    bets = rows[rows.groupby("fold").cumcount() % horizon == 0]  # as it was before bets could be irregular
    expected = sign_strategy_returns(bets).set_index("ts")["net_return"].sort_index()
    assert strategy_returns(rows).equals(expected)
    assert bets_per_year(rows) == 8760 / horizon


def traded_before(bets: pd.DataFrame) -> np.ndarray:
    """The trades of bets that all last equally long, as they were computed before others were allowed."""
    earlier = bets.drop(columns="ts").rename(columns={"target_ts": "ts", "position": "before"})
    later = bets.drop(columns=["target_ts", "position"]).rename(columns={"ts": "target_ts"}).assign(goes_on=1)
    for neighbours, at in ((earlier, "ts"), (later, "target_ts")):
        bets = bets.merge(neighbours, how="left", on=[*FORECAST_KEYS, at], validate="one_to_one")
    opened = (bets["position"] - bets["before"].fillna(0)).abs()
    return (opened + bets["position"].abs().where(bets["goes_on"].isna(), 0)).to_numpy()


@given(st.integers(1, 5), st.sets(st.integers(0, 60), min_size=1), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_bets_of_one_length_trade_as_they_always_did(horizon: int, made: set, seed: int):
    made = np.array(sorted(made))
    rng = np.random.default_rng(seed)
    rows = table(made, made + horizon, horizon=horizon, y_pred=rng.integers(-1, 2, len(made)).astype(float))
    rows = rows.assign(fold=rng.integers(0, 2, len(made))).sample(frac=1, random_state=seed)
    bets = rows[[*FORECAST_KEYS, "ts", "target_ts"]].assign(position=rows["y_pred"])
    assert np.array_equal(sign_strategy_returns(rows, fee=0.001)["cost"].to_numpy(), 0.001 * traded_before(bets))


@given(st.integers(20, 90), st.integers(1, 9), st.integers(0, 1000), st.sampled_from(["past", "others"]))
@settings(deadline=None, max_examples=40)
def test_no_interval_knows_its_own_future(n: int, horizon: int, seed: int, learn_from: str):
    rng = np.random.default_rng(seed)
    made = np.sort(rng.choice(2 * n, n, replace=False))
    truth, fold = rng.standard_t(3, n), np.arange(n) * 3 // n
    rows = table(made, made + rng.integers(1, horizon + 1, n), horizon=horizon, y_true=truth, fold=fold)
    row = int(rng.integers(n))
    if learn_from == "past":
        unknown = rows["target_ts"] > rows["ts"].iloc[row]
    else:
        own = rows[rows["fold"] == fold[row]]
        unknown = (rows["target_ts"] > own["ts"].min()) & (rows["ts"] < own["target_ts"].max())
    assert unknown.iloc[row]
    changed = rows.assign(y_true=rows["y_true"].mask(unknown, rng.normal(0, 1e6, n)))
    bounds = [
        conformal_intervals(side, level=0.7, learn_from=learn_from)[["y_lower", "y_upper"]].iloc[row]
        for side in (rows, changed)
    ]
    assert bounds[0].equals(bounds[1])
    residuals = (rows["y_true"] - rows["y_pred"]).abs()[~unknown]
    half = conformal_quantile(residuals, level=0.7)
    assert bounds[0]["y_upper"] - rows["y_pred"].iloc[row] == pytest.approx(half, nan_ok=True)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
def test_coverage_of_exchangeable_rows_is_within_its_band(level: float):
    """Of one split with n residuals the share is Beta distributed (Vovk 2012), and so is its mean over many splits."""
    n, tests, shares = 60, 4000, []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        scores = rng.standard_t(3, n + tests)
        half = conformal_quantile(np.abs(scores[:n]), level=level)
        shares.append(np.mean(np.abs(scores[n:]) <= half))
    rank = int(np.ceil((n + 1) * level - 1e-9))
    law = beta(rank, n + 1 - rank)
    assert np.mean(shares) == pytest.approx(law.mean(), abs=4 * law.std() / 10)
    assert np.mean((shares > law.ppf(0.05)) & (shares < law.ppf(0.95))) > 0.8


def test_intervals_of_many_series_hold_their_level():
    """Walk-forward intervals of exchangeable residuals: every row's chance is exact, so the pooled share is too."""
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows = table(range(200), np.arange(200) + 1, horizon=1, y_true=rng.standard_t(3, 200))
        found.append(coverage(conformal_intervals(rows, level=0.8)))
    found = pd.concat(found)
    exact = np.mean([np.ceil((n + 1) * 0.8 - 1e-9) / (n + 1) for n in range(4, 200)])
    assert found["coverage"].mean() == pytest.approx(exact, abs=4 * found["coverage"].std() / np.sqrt(60))
    assert (found["n"] == 196).all()


def test_brier_losses_are_proper():
    """Whoever believes p loses least, on average, by saying p."""
    rng = np.random.default_rng(0)
    for believed in rng.dirichlet(np.ones(3), 20):
        for said in rng.dirichlet(np.ones(3), 20):
            mean = [believed @ brier_losses(CLASSES, [saying] * 3) for saying in (believed, said)]
            assert mean[0] <= mean[1]


def test_scores_load_scikit_learn_only_when_it_is_needed():
    code = "import sys, kallos.core.classification; assert not {'sklearn', 'scipy', 'plotly'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
