"""How many bytes a rank needs, by kind and tier: pure arithmetic over a parameter count and a layout.

Model states follow the ZeRO paper: with Psi parameters, mixed precision and Adam they are 2 Psi of weights, 2 Psi of
gradients and K Psi = 12 Psi of optimizer state (fp32 master, two moments); stage 1 divides the last by dp, stage 2 the
gradients too, stage 3 the weights too.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC'20, section 3 and
table 1. Activations: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", MLSys'23, eq. 1
and 2, without the score matrix that fused attention never stores.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 2**30
FRAMEWORK_BYTES = 600 * 2**20
"""Python, torch, DeepSpeed and transformers in a rank's memory before any model (benchmarks/bench_memory.py measures it)."""


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on.

    Attributes:
        num_params: trainable elements of one tensor-parallel rank, tied ones once.
        intermediate_size: width of the feed-forward layer (summed over the experts that a token visits).
    """

    num_params: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True)
class Layout:
    """What is divided over what.

    Attributes:
        dp: ranks that ZeRO divides the state over: those that share a sequence too.
        tp: ranks that share the layers; `ModelShape.num_params` counts one rank's part already.
        state_bytes: optimizer state of one element beside its master (8 for AdamW).
        optimizer_on_host, params_on_host: offloaded to CPU memory.
    """

    dp: int
    stage: int
    dtype: str
    state_bytes: int
    optimizer_on_host: bool = False
    params_on_host: bool = False
    tp: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind, and which of them are in host memory.

    Attributes:
        staging: host memory for checkpoints on their way to storage.
        shared_memory: this rank's part of the checkpoints that are kept in shared memory.
        optimizer_on_nvme, params_on_nvme: on a drive, and in host memory only as far as `swap_host` says.
        swap_host: page-locked buffers, and state that is too small for a drive.
        nvme_bytes: in swap files.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    optimizer_on_host: bool
    params_on_host: bool
    staging: int = 0
    shared_memory: int = 0
    optimizer_on_nvme: bool = False
    params_on_nvme: bool = False
    swap_host: int = 0
    nvme_bytes: int = 0

    @property
    def process_bytes(self) -> int:
        """Resident memory of a rank on a CPU, where device and host are one, with what Python and the libraries take."""
        return FRAMEWORK_BYTES + self.device_bytes + self.host_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes on the accelerator."""
        total = self.activations + self.logits
        total += 0 if self.params_on_host else self.weights
        # gradients follow the optimizer: what it consumes on the host is copied there as it is made
        return total + (0 if self.optimizer_on_host else self.optimizer + self.gradients)

    @property
    def host_bytes(self) -> int:
        """Bytes in CPU memory because of offload and of checkpoints."""
        weights = self.weights if self.params_on_host and not self.params_on_nvme else 0
        optimizer = self.optimizer if self.optimizer_on_host and not self.optimizer_on_nvme else 0
        gradients = self.gradients if self.optimizer_on_host else 0
        return weights + optimizer + gradients + self.swap_host + self.staging + self.shared_memory

    def to_dict(self) -> dict[str, int | bool]:
        """For plan.json."""
        return {
            **asdict(self),
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "process_bytes": self.process_bytes,
        }


STAGING_BLOCK_BYTES, MIN_STAGING_BLOCKS, STAGING_SHARE = 16 * 2**20, 4, 0.25
"""As in trainer/checkpoint/staging.py, which a test compares."""


def staging_bytes(saved_bytes: int, *, bound_bytes: int | None, free_bytes: int, background: bool) -> int:
    """Host memory that a rank takes for checkpoints on their way to storage.

    Args:
        saved_bytes: what the rank writes of one checkpoint.
        bound_bytes: `checkpoint.staging_gib`; None takes at most a quarter of what is free.
        free_bytes: this rank's part of the host memory that nothing uses.
        background: training goes on meanwhile.
    """
    if not background:
        return MIN_STAGING_BLOCKS * STAGING_BLOCK_BYTES
    bound = int(STAGING_SHARE * free_bytes) if bound_bytes is None else bound_bytes
    blocks = -(-saved_bytes // STAGING_BLOCK_BYTES) + 1
    return STAGING_BLOCK_BYTES * max(MIN_STAGING_BLOCKS, min(2 * blocks, bound // STAGING_BLOCK_BYTES))


def model_state_bytes(num_params: int, layout: Layout) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state of one rank.

    With fp32 training DeepSpeed keeps a separate fp32 master from stage 1 on; at stage 0 the weights are the master.
    """
    size = BYTES[layout.dtype]
    master = 0 if layout.dtype == "fp32" and layout.stage == 0 else 4
    optimizer = (master + layout.state_bytes) * num_params
    return (
        size * num_params / (layout.dp if layout.stage >= 3 else 1),
        size * num_params / (layout.dp if layout.stage >= 2 else 1),
        optimizer / (layout.dp if layout.stage >= 1 else 1),
    )


def activation_bytes(
    shape: ModelShape,
    *,
    micro_batch_size: int,
    sequence_length: int,
    dtype: str,
    recompute: bool,
    tp: int = 1,
    mlp_tile_tokens: int | None = None,
) -> int:
    """Bytes of activations kept for the backward pass of one micro-batch.

    One layer keeps, per token: the inputs of both norms and of both blocks (4 h), q, k, v and the attention output (4 h), and
    the feed-forward inputs (3 f for a gated one). With recomputation only each layer's input, and one whole layer at a time.
    Tensor parallelism divides what is inside the two blocks; their inputs are whole on every rank. Of feed-forward blocks that
    are computed in tiles (`train.mlp_tile_tokens`) one tile of one layer exists at a time.
    """
    tokens, size = micro_batch_size * sequence_length, BYTES[dtype]
    tile = 0 if mlp_tile_tokens is None else min(mlp_tile_tokens, tokens) * size * 3 * shape.intermediate_size // tp
    inside = 4 * shape.hidden_size + (3 * shape.intermediate_size if mlp_tile_tokens is None else 0)
    layer = tokens * size * (4 * shape.hidden_size + inside // tp)
    if recompute:
        return shape.num_layers * tokens * size * shape.hidden_size + layer + tile
    return shape.num_layers * layer + tile


def logits_bytes(
    shape: ModelShape,
    *,
    micro_batch_size: int,
    sequence_length: int,
    dtype: str,
    tp: int = 1,
    loss_tile_tokens: int | None = None,
) -> int:
    """Bytes of the logits at the end of the forward pass: as computed, in fp32 for the loss, and its gradient; of one tile."""
    tokens = micro_batch_size * sequence_length
    tokens = tokens if loss_tile_tokens is None else min(tokens, loss_tile_tokens)
    return tokens * -(-shape.vocab_size // tp) * (BYTES[dtype] + 4 + 4)


def plan_memory(
    shape: ModelShape,
    layout: Layout,
    *,
    micro_batch_size: int,
    sequence_length: int,
    recompute: bool,
    loss_tile_tokens: int | None = None,
    mlp_tile_tokens: int | None = None,
) -> Memory:
    """Bytes of one rank by kind. Leaves out the framework's own (a CUDA context and NCCL take 1 to 2 GiB) and buckets.

    Args:
        sequence_length: tokens that a rank computes of each sequence.
    """
    weights, gradients, optimizer = model_state_bytes(shape.num_params, layout)
    return Memory(
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(optimizer),
        activations=activation_bytes(
            shape,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            dtype=layout.dtype,
            recompute=recompute,
            tp=layout.tp,
            mlp_tile_tokens=mlp_tile_tokens,
        ),
        logits=logits_bytes(
            shape,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            dtype=layout.dtype,
            tp=layout.tp,
            loss_tile_tokens=loss_tile_tokens,
        ),
        optimizer_on_host=layout.optimizer_on_host,
        params_on_host=layout.params_on_host,
    )
