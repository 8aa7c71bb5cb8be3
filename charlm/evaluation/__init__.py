"""How good a model is: exact losses over whole texts."""

from charlm.evaluation.evaluate import EvalResult, evaluate

__all__ = ["EvalResult", "evaluate"]
