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
    },
)
