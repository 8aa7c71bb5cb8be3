"""Training: the loop, its settings, optimizers, schedules, callbacks, logs and checkpoints."""

from typing import TYPE_CHECKING

from charlm.training.config import TrainerConfig
from charlm.training.recipes import RECIPES, Recommendation, recommend
from charlm.training.schedules import learning_rate_at

if TYPE_CHECKING:
    from charlm.runs.checkpoint import CheckpointInfo, list_checkpoints, verify_checkpoint
    from charlm.runs.history import RunHistory, read_history
    from charlm.training.budget import StepsEstimate, steps_within
    from charlm.training.callbacks import Callback
    from charlm.training.memory import training_bytes
    from charlm.training.optimizers import AdamW, Muon, OptimizerFactory, build_optimizers
    from charlm.training.records import EvalRecord, SampleRecord, StepRecord, TrainResult
    from charlm.training.resume import read_timetable
    from charlm.training.timetable import Timetable
    from charlm.training.trainer import Trainer

__all__ = [
    "RECIPES",
    "AdamW",
    "Callback",
    "CheckpointInfo",
    "EvalRecord",
    "Muon",
    "OptimizerFactory",
    "Recommendation",
    "RunHistory",
    "SampleRecord",
    "StepRecord",
    "StepsEstimate",
    "Timetable",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
    "build_optimizers",
    "learning_rate_at",
    "list_checkpoints",
    "read_history",
    "read_timetable",
    "recommend",
    "steps_within",
    "training_bytes",
    "verify_checkpoint",
]

_HOMES = {
    "AdamW": "charlm.training.optimizers",
    "Callback": "charlm.training.callbacks",
    "CheckpointInfo": "charlm.runs.checkpoint",
    "EvalRecord": "charlm.training.records",
    "Muon": "charlm.training.optimizers",
    "OptimizerFactory": "charlm.training.optimizers",
    "RunHistory": "charlm.runs.history",
    "SampleRecord": "charlm.training.records",
    "StepRecord": "charlm.training.records",
    "StepsEstimate": "charlm.training.budget",
    "Timetable": "charlm.training.timetable",
    "TrainResult": "charlm.training.records",
    "Trainer": "charlm.training.trainer",
    "build_optimizers": "charlm.training.optimizers",
    "list_checkpoints": "charlm.runs.checkpoint",
    "read_history": "charlm.runs.history",
    "read_timetable": "charlm.training.resume",
    "steps_within": "charlm.training.budget",
    "training_bytes": "charlm.training.memory",
    "verify_checkpoint": "charlm.runs.checkpoint",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Load what needs torch when it is first used, so that `charlm train --help` does not."""
        import importlib  # noqa: PLC0415 - only when a name is missing

        if name not in _HOMES:
            from charlm.errors import renamed  # noqa: PLC0415 - only when a name is missing

            raise renamed("module 'charlm.training'", name, {"Evaluation": "EvalRecord"})
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
