"""Evaluation of models: exact losses on whole texts, and the surprisal of each character."""

from charlm.evaluation.evaluate import EvalResult, evaluate
from charlm.evaluation.page import surprisal_page
from charlm.evaluation.surprisal import Surprisal, surprisal
from charlm.text.verbatim import Verbatim, verbatim

__all__ = ["EvalResult", "Surprisal", "Verbatim", "evaluate", "surprisal", "surprisal_page", "verbatim"]
