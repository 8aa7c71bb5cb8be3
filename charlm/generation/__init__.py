"""Generation of text: prediction states, the decoding loop, sampling options, filters and caches."""

from typing import TYPE_CHECKING

from charlm.errors import renamed
from charlm.generation.cache import Cache, KVCache, LayerCache
from charlm.generation.constraints import Constraint
from charlm.generation.decode import next_ids, stream_ids
from charlm.generation.engine import Engine, Predictor, TorchEngine
from charlm.generation.filters import (
    Filter,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    remove_ids,
    scale_temperature,
)
from charlm.generation.options import Draft, Overflow, Sampling, SamplingOptions
from charlm.generation.passes import Pass, context_start
from charlm.generation.sampling import sample
from charlm.generation.state import PredictionState
from charlm.generation.stopping import StopMatcher
from charlm.patterns.automaton import Automaton

__all__ = [
    "Automaton",
    "Cache",
    "Constraint",
    "Draft",
    "Engine",
    "Filter",
    "KVCache",
    "LayerCache",
    "Overflow",
    "Pass",
    "PredictionState",
    "Predictor",
    "Sampling",
    "SamplingOptions",
    "StopMatcher",
    "TorchEngine",
    "context_start",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "next_ids",
    "penalise_repetition",
    "remove_ids",
    "sample",
    "scale_temperature",
    "stream_ids",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        former = {"PlainState": "PredictionState(TorchEngine(model, rows))"}
        raise renamed("module 'charlm.generation'", name, former)
