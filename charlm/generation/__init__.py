"""From a prompt to more text: sampling options, filters, the key/value cache and the decoding loop."""

from charlm.generation.cache import KVCache, LayerCache
from charlm.generation.decode import stream_ids
from charlm.generation.filters import Filter, keep_min_p, keep_top_k, keep_top_p, scale_temperature
from charlm.generation.options import Draft, Overflow, Sampling, SamplingOptions
from charlm.generation.plain import PlainState, Predictor
from charlm.generation.sampling import sample
from charlm.generation.state import PredictionState, context_start
from charlm.generation.stopping import StopMatcher

__all__ = [
    "Draft",
    "Filter",
    "KVCache",
    "LayerCache",
    "Overflow",
    "PlainState",
    "PredictionState",
    "Predictor",
    "Sampling",
    "SamplingOptions",
    "StopMatcher",
    "context_start",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "sample",
    "scale_temperature",
    "stream_ids",
]
