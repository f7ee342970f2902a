"""The keys of the groups `parallel`, `zero`, `offload` and `precision`; the part of `schema.py` that says what lies where."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional, Union

from anyshard.configs.fields import key


class Device(Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class Balance(Enum):
    parameters = "parameters"
    layers = "layers"
    time = "time"


class Dtype(Enum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@dataclass
class Parallel:
    dp: Union[int, str] = key(
        "auto",
        "Data-parallel degree; auto: world / (tp * pp * sp).",
        unit="ranks",
        ge=1,
        why="auto: follows from the ranks, so a run resumes on any number",
    )
    tp: int = key(
        1,
        "Tensor-parallel degree.",
        ge=1,
        unit="ranks",
        why="more costs all-reduces in every layer; ZeRO divides the state without them",
    )
    pp: int = key(
        1,
        "Pipeline-parallel degree (stages).",
        ge=1,
        unit="ranks",
        why="more leaves stages idle while the pipeline fills and drains",
    )
    sp: int = key(
        1,
        "Sequence-parallel degree.",
        ge=1,
        unit="ranks",
        why="more exchanges activations in every layer; it pays for long sequences only",
    )
    ep: int = key(
        1,
        "Expert-parallel degree of a mixture of experts; above 1 it is refused in this version.",
        ge=1,
        unit="ranks",
        why="the only value that is not refused; ZeRO-3 shards experts as it does any weights",
    )
    order: list[str] = key(
        ["tp", "sp", "pp", "dp"],
        "Axes in the order in which ranks are numbered: those of the first are neighbours.",
        why="tp communicates most, so its ranks share a node; dp least",
    )
    pp_balance: Balance = key(
        Balance.parameters,
        "What stages of a pipeline share out evenly: parameters, layers, or the time of a micro-batch, measured at the start.",
        why="parameters: of the heaviest stage, embedding and head included, are fewest",
    )
    pp_layers: Optional[list[int]] = key(
        None, "Decoder layers of each stage, by hand.", why="null: by parallel.pp_balance", unit="layers"
    )


@dataclass
class Zero:
    stage: int = key(
        1,
        "ZeRO stage: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters are sharded over dp.",
        ge=0,
        le=3,
        why="shards 12 of 16 bytes a parameter without more communication (arXiv 1910.02054)",
    )
    overlap_comm: bool = key(
        True,
        "Overlap gradient reduction with the backward pass.",
        why="hides communication, for a second buffer of reduce_bucket_size; DeepSpeed's default at stage 3 only",
    )
    contiguous_gradients: bool = key(
        True,
        "Copy gradients to one buffer as they are made, against fragmentation.",
        why="DeepSpeed's default; costs a buffer of reduce_bucket_size",
    )
    reduce_bucket_size: int = key(
        50_000_000,
        "Elements reduced at once.",
        unit="elements",
        gt=0,
        why="a tenth of DeepSpeed's, whose buffer alone takes 1 GB in bf16, twice with overlap_comm",
    )
    allgather_bucket_size: int = key(
        50_000_000,
        "Elements gathered at once after a step (stages 1 and 2).",
        unit="elements",
        gt=0,
        why="as reduce_bucket_size; DeepSpeed uses it only where torch lacks all_gather_into_tensor",
    )
    round_robin_gradients: bool = key(
        False,
        "Spread the copy of offloaded gradients over ranks (stages 1 and 2).",
        why="DeepSpeed's default; helps only where the optimizer is offloaded",
    )
    prefetch_bucket_size: int = key(
        50_000_000,
        "Elements gathered ahead of use (stage 3).",
        unit="elements",
        ge=0,
        why="DeepSpeed's default; 100 MB of weights in bf16",
    )
    param_persistence_threshold: int = key(
        10_000,
        "Parameters of fewer elements stay gathered (stage 3).",
        unit="elements",
        ge=0,
        why="norms and biases stay (of Llama 3 70B: 8,192 elements), matrices do not",
    )
    max_live_parameters: int = key(
        1_000_000_000,
        "Elements gathered at any time (stage 3).",
        unit="elements",
        gt=0,
        why="DeepSpeed's default; 2 GB of weights in bf16",
    )
    max_reuse_distance: int = key(
        1_000_000_000,
        "A parameter used again within this many elements stays gathered (stage 3).",
        unit="elements",
        ge=0,
        why="DeepSpeed's default, the same as max_live_parameters",
    )
    sub_group_size: int = key(
        1_000_000_000,
        "Elements stepped at once by the optimizer (stage 3).",
        unit="elements",
        gt=0,
        why="DeepSpeed's default; a rank with fewer elements steps them all at once",
    )
    hpz_partition_size: int = key(
        1,
        "Ranks over which stage 3 keeps a secondary copy (ZeRO++ hpZ); 1 is off.",
        ge=1,
        unit="ranks",
        why="a second copy costs memory; it pays where nodes are joined slowly (arXiv 2306.10209)",
    )


@dataclass
class Offload:
    auto: bool = key(
        False,
        "Choose optimizer and param when the run is launched: the fastest placement that fits, by memory model and probe.",
        why="a placement that is written down stays the same on every machine",
    )
    optimizer: Device = key(
        Device.none, "Where fp32 masters and optimizer states live.", why="device memory is many times faster than the host's"
    )
    param: Device = key(
        Device.none, "Where parameters live between uses (stage 3).", why="offloaded, weights cross the bus in every pass"
    )
    nvme_path: Optional[str] = key(
        None,
        "Folder on NVMe, one sub-folder an attempt and rank; several with commas between are taken by ranks in turn.",
        why="null: only tier nvme needs one",
    )
    buffers_gib: float = key(
        1.0,
        "Page-locked buffers that a rank may have for NVMe; sub-groups are as large as fits.",
        unit="GiB",
        gt=0,
        why="AdamW with overlap=both: 22 million elements at a time, a drive's full rate",
    )
    overlap: str = key(
        "both",
        "What goes on while a sub-group is stepped: none, read the next, write the one before, or both; all are exact.",
        why="the drive is busy all the time, for three times the buffers of none",
    )
    ratio: float = key(
        1.0,
        "Share of the optimizer state that is offloaded; less than all is refused in this version.",
        gt=0.0,
        le=1.0,
        why="the only value that is not refused",
    )
    pin_memory: bool = key(
        True,
        "Page-lock host buffers; has no effect on a machine without accelerator.",
        why="DeepSpeed's default; only page-locked memory is copied asynchronously",
    )


@dataclass
class Precision:
    dtype: Dtype = key(
        Dtype.bf16,
        "Type of weights, activations and gradients; masters are always fp32.",
        why="half the memory of fp32 with its range: no loss scaling, unlike fp16",
    )
    initial_scale_power: int = key(
        16,
        "fp16: the loss scale starts at 2 to this power.",
        ge=0,
        le=32,
        why="DeepSpeed's default; overflows bring it down within a few steps",
    )
    scale_window: int = key(
        1000, "fp16: steps without overflow after which the loss scale doubles.", unit="steps", gt=0, why="DeepSpeed's default"
    )
    hysteresis: int = key(
        2,
        "fp16: overflows before the loss scale is halved; they need not follow each other.",
        ge=1,
        unit="steps",
        why="DeepSpeed's default: a single overflow may be chance",
    )
    min_scale: float = key(
        1.0, "fp16: the loss scale never falls below this.", gt=0, why="DeepSpeed's default: no scaling at all"
    )
