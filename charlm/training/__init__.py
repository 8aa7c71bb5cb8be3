"""Training: the loop, its settings, optimizers, schedules, callbacks, logs and checkpoints."""

from typing import TYPE_CHECKING

from charlm.training.config import TrainerConfig
from charlm.training.recipes import RECIPES, Recommendation, recommend
from charlm.training.schedules import learning_rate_at

if TYPE_CHECKING:
    from charlm.runs.checkpoint import CheckpointInfo, list_checkpoints, verify_checkpoint
    from charlm.runs.history import RunHistory, read_histories, read_history
    from charlm.runs.table import history_table
    from charlm.training.budget import StepsEstimate, steps_for_epochs, steps_within
    from charlm.training.callbacks import Callback
    from charlm.training.loggers import Logger
    from charlm.training.memory import training_bytes
    from charlm.training.optimizers import AdamW, Muon, OptimizerFactory, build_optimizers
    from charlm.training.progress import ProgressBar
    from charlm.training.records import EvalRecord, SampleRecord, StepRecord, TrainResult
    from charlm.training.resume import read_timetable
    from charlm.training.services import TensorBoard, WandB
    from charlm.training.timetable import Timetable
    from charlm.training.trainer import Trainer

__all__ = [
    "RECIPES",
    "AdamW",
    "Callback",
    "CheckpointInfo",
    "EvalRecord",
    "Logger",
    "Muon",
    "OptimizerFactory",
    "ProgressBar",
    "Recommendation",
    "RunHistory",
    "SampleRecord",
    "StepRecord",
    "StepsEstimate",
    "TensorBoard",
    "Timetable",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
    "WandB",
    "build_optimizers",
    "history_table",
    "learning_rate_at",
    "list_checkpoints",
    "read_histories",
    "read_history",
    "read_timetable",
    "recommend",
    "steps_for_epochs",
    "steps_within",
    "training_bytes",
    "verify_checkpoint",
]

_HOMES = {
    "AdamW": "charlm.training.optimizers",
    "Callback": "charlm.training.callbacks",
    "CheckpointInfo": "charlm.runs.checkpoint",
    "EvalRecord": "charlm.training.records",
    "Logger": "charlm.training.loggers",
    "Muon": "charlm.training.optimizers",
    "OptimizerFactory": "charlm.training.optimizers",
    "ProgressBar": "charlm.training.progress",
    "RunHistory": "charlm.runs.history",
    "SampleRecord": "charlm.training.records",
    "StepRecord": "charlm.training.records",
    "StepsEstimate": "charlm.training.budget",
    "TensorBoard": "charlm.training.services",
    "Timetable": "charlm.training.timetable",
    "TrainResult": "charlm.training.records",
    "Trainer": "charlm.training.trainer",
    "WandB": "charlm.training.services",
    "build_optimizers": "charlm.training.optimizers",
    "history_table": "charlm.runs.table",
    "list_checkpoints": "charlm.runs.checkpoint",
    "read_histories": "charlm.runs.history",
    "read_history": "charlm.runs.history",
    "read_timetable": "charlm.training.resume",
    "steps_for_epochs": "charlm.training.budget",
    "steps_within": "charlm.training.budget",
    "training_bytes": "charlm.training.memory",
    "verify_checkpoint": "charlm.runs.checkpoint",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a module that needs torch at its first use, so that `charlm train --help` imports none."""
        import importlib  # noqa: PLC0415 - only when a name is missing

        if name not in _HOMES:
            from charlm.errors import renamed  # noqa: PLC0415 - only when a name is missing

            raise renamed("module 'charlm.training'", name, {"Evaluation": "EvalRecord"})
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
