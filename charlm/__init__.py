"""charlm: character-level language models, from raw text to a trained model, to text again.

A public name is loaded when it is first used (PEP 562). So `import charlm` is quick, and torch is imported
only when a name needs it. `charlm.__all__` lists the names. The others live in `charlm.training`,
`charlm.evaluation`, `charlm.generation`, `charlm.compression`, `charlm.interchange`, `charlm.plotting`,
`charlm.errors` and `charlm.testing`, which are loaded in the same way.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from charlm import compression as compression
    from charlm import errors as errors
    from charlm import evaluation as evaluation
    from charlm import generation as generation
    from charlm import interchange as interchange
    from charlm import plotting as plotting
    from charlm import testing as testing
    from charlm import training as training
    from charlm.backends.base import DeviceBackend as DeviceBackend
    from charlm.backends.registry import get_backend as get_backend
    from charlm.backends.registry import register_backend as register_backend
    from charlm.config import Config as Config
    from charlm.data.blocks import BlockDataset as BlockDataset
    from charlm.errors import CharLMError as CharLMError
    from charlm.evaluation.evaluate import EvalResult as EvalResult
    from charlm.lm import CharLM as CharLM
    from charlm.lm import load as load
    from charlm.models.base import LanguageModel as LanguageModel
    from charlm.models.bigram import BigramLM as BigramLM
    from charlm.models.config import GPTConfig as GPTConfig
    from charlm.models.gpt import GPT as GPT
    from charlm.models.mixture import MixtureLM as MixtureLM
    from charlm.models.ngram import NGramLM as NGramLM
    from charlm.text.corpus import load_corpus as load_corpus
    from charlm.text.tokenizer import ByteTokenizer as ByteTokenizer
    from charlm.text.tokenizer import CharTokenizer as CharTokenizer
    from charlm.text.tokenizer import Tokenizer as Tokenizer
    from charlm.training.config import TrainerConfig as TrainerConfig
    from charlm.training.trainer import Trainer as Trainer

__version__ = "0.2.0"

_HOMES = {
    "BigramLM": "charlm.models.bigram",
    "BlockDataset": "charlm.data.blocks",
    "ByteTokenizer": "charlm.text.tokenizer",
    "CharLM": "charlm.lm",
    "CharLMError": "charlm.errors",
    "CharTokenizer": "charlm.text.tokenizer",
    "Config": "charlm.config",
    "DeviceBackend": "charlm.backends.base",
    "EvalResult": "charlm.evaluation.evaluate",
    "GPT": "charlm.models.gpt",
    "GPTConfig": "charlm.models.config",
    "LanguageModel": "charlm.models.base",
    "MixtureLM": "charlm.models.mixture",
    "NGramLM": "charlm.models.ngram",
    "Tokenizer": "charlm.text.tokenizer",
    "Trainer": "charlm.training.trainer",
    "TrainerConfig": "charlm.training.config",
    "get_backend": "charlm.backends.registry",
    "load": "charlm.lm",
    "load_corpus": "charlm.text.corpus",
    "register_backend": "charlm.backends.registry",
}

_MODULES = (
    "compression",
    "errors",
    "evaluation",
    "generation",
    "interchange",
    "plotting",
    "testing",
    "training",
)

__all__ = [
    "GPT",
    "BigramLM",
    "BlockDataset",
    "ByteTokenizer",
    "CharLM",
    "CharLMError",
    "CharTokenizer",
    "Config",
    "DeviceBackend",
    "EvalResult",
    "GPTConfig",
    "LanguageModel",
    "MixtureLM",
    "NGramLM",
    "Tokenizer",
    "Trainer",
    "TrainerConfig",
    "get_backend",
    "load",
    "load_corpus",
    "register_backend",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return importlib.import_module(f"charlm.{name}")
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module 'charlm' has no attribute {name!r}")
        value = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
