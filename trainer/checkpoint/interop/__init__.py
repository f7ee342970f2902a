"""Checkpoints of other formats: read into ours, and ours written as theirs. `python -m anyshard.trainer.checkpoint.interop`."""
