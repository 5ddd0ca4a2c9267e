"""Shared parts of the programs that train: arguments, models, rows and their encoding, the trainer, the metrics."""
