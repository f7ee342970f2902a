"""Host memory as a tier: masters and states stepped by DeepSpeed's CPU optimizers, parameters copied to the device for use."""

from __future__ import annotations

from anyshard.configs import schema
from anyshard.configs.errors import Problem
from anyshard.offload.derive import FP32_BYTES, Aio
from anyshard.offload.op_cache import OPS, needed_ops, status
from anyshard.offload.tiers import Fragment, Parts, TierBytes


class CpuTier:
    """See `offload/tiers.py`."""

    name = "cpu"

    def lack(self, config: schema.Config) -> Problem | None:
        """A compiler, where DeepSpeed's CPU optimizer is not built yet."""
        names = [name for name in needed_ops(config, "cuda") if name.startswith("cpu_")]
        for entry in status(names):
            if entry.state == "missing":
                what = f"DeepSpeed's operator {entry.op.name} ({OPS[entry.op.name].used_for}) cannot be built:"
                return Problem("offload.optimizer", config.offload.optimizer.value, f"{what} {entry.reason}", entry.fix)
        return None

    def optimizer(self, config: schema.Config, parts: Parts, *, folder: str, aio: Aio) -> Fragment:
        """Everything in memory, page-locked where there is an accelerator."""
        offload = config.offload
        block = {"device": "cpu", "pin_memory": offload.pin_memory, "ratio": offload.ratio}
        host = sum(map(sum, parts.groups)) * FP32_BYTES * (parts.num_states + 1)
        return Fragment({"offload_optimizer": block}, bytes=TierBytes(host))

    def param(self, config: schema.Config, parts: Parts, *, folder: str, aio: Aio) -> Fragment:
        """Everything in memory, page-locked where there is an accelerator."""
        host = sum(parts.names.values()) * parts.element_bytes
        block = {"device": "cpu", "pin_memory": config.offload.pin_memory}
        return Fragment({"offload_param": block}, bytes=TierBytes(host, host if config.offload.pin_memory else 0))
