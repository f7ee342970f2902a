"""A drive as a tier: masters and states read, stepped and written back in sub-groups, parameters read before their use."""

from __future__ import annotations

from anyshard.configs import schema
from anyshard.configs.errors import ConfigError, Problem
from anyshard.offload import derive
from anyshard.offload.derive import FP32_BYTES, Aio
from anyshard.offload.op_cache import status
from anyshard.offload.tiers import Fragment, Parts, TierBytes

GIB = 2**30


class NvmeTier:
    """See `offload/tiers.py`. Folders and what they must be able to do are in `swap_space.py`."""

    name = "nvme"

    def lack(self, config: schema.Config) -> Problem | None:
        """libaio or a compiler, where DeepSpeed's operator is not built yet."""
        (entry,) = status(["async_io"])
        if entry.state == "missing":
            kind = "optimizer" if config.offload.optimizer is schema.Device.nvme else "param"
            reason = f"DeepSpeed's operator async_io cannot be built: {entry.reason}"
            return Problem(f"offload.{kind}", "nvme", reason, entry.fix)
        return None

    def optimizer(self, config: schema.Config, parts: Parts, *, folder: str, aio: Aio) -> Fragment:
        """Sub-groups that fit `offload.buffers_gib` with their buffers."""
        swap = self._derive(config, parts, aio)
        overlap = config.offload.overlap
        block = {
            "device": "nvme",
            "nvme_path": folder,
            "buffer_count": swap.buffer_count,
            "pin_memory": config.offload.pin_memory,
            "pipeline_read": overlap in ("read", "both"),
            "pipeline_write": overlap in ("write", "both"),
            "ratio": config.offload.ratio,
        }
        held = TierBytes(swap.memory_bytes + swap.pinned_bytes, swap.pinned_bytes, swap.nvme_bytes)
        return Fragment({"offload_optimizer": block, "sub_group_size": swap.sub_group_elements}, _top(aio), held)

    def _derive(self, config: schema.Config, parts: Parts, aio: Aio) -> derive.OptimizerSwap:
        offload = config.offload
        try:
            return derive.derive_optimizer(
                parts.groups,
                num_states=parts.num_states,
                overlap=offload.overlap,
                budget_bytes=int(offload.buffers_gib * GIB),
                aio=aio,
                max_sub_group=config.zero.sub_group_size,
            )
        except derive.DoesNotFitError as error:
            reason = (
                f"the largest parameter's part has {error.largest:,} elements, and {error.buffer_count} buffers of "
                f"{FP32_BYTES} bytes each take {error.needed_bytes / GIB:.2f} GiB."
            )
            fix = f"Set offload.buffers_gib={_up(error.needed_bytes)}"
            fewer = "" if offload.overlap == "none" else ", or offload.overlap=none, which takes a third of it or half"
            raise ConfigError(Problem("offload.buffers_gib", offload.buffers_gib, reason, f"{fix}{fewer}.")) from error

    def param(self, config: schema.Config, parts: Parts, *, folder: str, aio: Aio) -> Fragment:
        """Every part of at least 1 MiB in a file; a buffer for each that a module uses at a time."""
        offload = config.offload
        budget_bytes, size = int(offload.buffers_gib * GIB), config.zero.sub_group_size
        if offload.optimizer is schema.Device.nvme:
            size = self._derive(config, parts, aio).sub_group_elements
        size = derive.sub_group_for_params(
            parts.groups, size, dp=parts.dp, element_bytes=parts.element_bytes, budget_bytes=budget_bytes, aio=aio
        )
        swap = derive.derive_params(
            parts.names, parts.groups, dp=parts.dp, element_bytes=parts.element_bytes, sub_group_elements=size, aio=aio
        )
        if swap.pinned_bytes > budget_bytes:
            reason = (
                f"{swap.buffer_count} buffers of {swap.buffer_bytes / derive.MIB:.0f} MiB for the parameters that are used at "
                f"a time, and {swap.reserve_bytes / derive.MIB:.0f} MiB to write them, take {swap.pinned_bytes / GIB:.2f} GiB."
            )
            fix = f"Set offload.buffers_gib={_up(swap.pinned_bytes)}, or offload.param=cpu."
            raise ConfigError(Problem("offload.buffers_gib", offload.buffers_gib, reason, fix))
        block = {
            "device": "nvme",
            "nvme_path": folder,
            "buffer_count": swap.buffer_count,
            "buffer_size": swap.buffer_elements,
            "max_in_cpu": 0,  # its default of 1e9 elements would keep all but the largest models in memory
            "pin_memory": offload.pin_memory,
        }
        zero = {
            "offload_param": block,
            "sub_group_size": size,
            # what is held or fetched ahead takes a buffer, of which there are as many as one module needs
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
        }
        held = TierBytes(swap.memory_bytes + swap.pinned_bytes, swap.pinned_bytes, swap.nvme_bytes)
        return Fragment(zero, _top(aio), held)


def _top(aio: Aio) -> dict[str, object]:
    settings = {
        "block_size": aio.block_bytes,
        "queue_depth": aio.queue_depth,
        "intra_op_parallelism": aio.threads,
        "single_submit": False,
        "overlap_events": True,
    }
    return {"aio": settings}


def _up(num_bytes: int) -> str:
    """GiB, rounded up to hundredths."""
    return f"{-(-num_bytes * 100 // GIB) / 100:g}"
