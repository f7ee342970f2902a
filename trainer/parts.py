"""One rank's parts of a model as ZeRO-3 will cut it, from its table of parameters: for the planner and for ranks (no torch)."""

from __future__ import annotations

from anyshard.configs import schema
from anyshard.offload.derive import part
from anyshard.offload.memory import BYTES
from anyshard.offload.tiers import Parts
from anyshard.trainer.models.param_table import Param, ParamTable
from anyshard.trainer.optim.states import num_states


def parts_of(config: schema.Config, table: ParamTable, dp: int) -> Parts:
    """The parts of one rank."""
    tp = config.parallel.tp
    numels = {param.name: part(param.local_numel(tp), dp) for param in table.params}
    decay, no_decay = optimizer_groups(table, config.optimizer)
    groups = [[numels[param.name] for param in group] for group in (decay, no_decay) if group]
    states = num_states(config.optimizer.name, momentum=config.optimizer.momentum)
    return Parts(numels, groups, dp, states, BYTES[config.precision.dtype.value])


def optimizer_groups(table: ParamTable, optimizer: schema.Optimizer) -> tuple[list[Param], list[Param]]:
    """Trained parameters that decay, and those that do not: as `optim/groups.py` groups them."""
    embeddings = set() if optimizer.decay_embeddings else set(table.embedding_names)
    trained = [param for param in table.params if param.trainable]
    decay = [param for param in trained if len(param.shape) >= 2 and param.name not in embeddings]
    names = {param.name for param in decay}
    return decay, [param for param in trained if param.name not in names]
