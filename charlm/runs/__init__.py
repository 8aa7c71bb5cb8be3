"""A training run on disk: its directory, its checkpoints, its log. Nothing here knows the Trainer."""
