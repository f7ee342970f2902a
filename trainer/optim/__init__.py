"""Optimizers, their param groups and learning-rate schedules."""
