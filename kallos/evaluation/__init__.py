"""Whether a forecast is worth anything."""

from kallos import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "verdict": (
            "DieboldMariano",
            "Verdict",
            "diebold_mariano",
            "judge",
        ),
        "trials": ("judge_best_trial",),
        "causality": (
            "Compute",
            "FORGOTTEN",
            "Finding",
            "Probe",
            "ROUNDING",
            "another_future",
            "compare",
            "computed",
            "label_span",
            "merge",
            "perturbation",
            "scale_of",
            "truncation",
            "warm_up",
            "with_others",
        ),
        "feature_probes": (
            "EXACT",
            "Stretch",
            "anew",
            "bars_needed",
            "can_be_tried",
            "probe_features",
            "stressed",
            "stretches",
            "suspects",
        ),
        "boundaries": (
            "Folds",
            "made_again",
            "scaled_rows",
            "scaler_rows",
            "split_overlap",
        ),
        "chance": (
            "FALSE_ALARM",
            "GREAT",
            "lag_cliff",
            "martingale",
            "permutation",
        ),
        "leakage": (
            "Audit",
            "PROBES",
            "audit",
        ),
    },
)
