"""Batch arithmetic, under the name that the trainer's users know; it is defined in `configs/batch.py`, where rules need it."""

from anyshard.configs.batch import BatchPlan, plan_batch

__all__ = ["BatchPlan", "plan_batch"]
