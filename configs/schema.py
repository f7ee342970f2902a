"""Every knob of a run: one dataclass per configuration group, each key with its unit, range and reason.

This is the only place where a key is defined. `docs/configuration.md`, `anyshard config explain` and the range checks
are all read from the metadata here; what crosses groups is in `rules.py`. Nothing here imports torch or DeepSpeed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional, Union


def key(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    why: str = "",
) -> Any:
    """A configuration key: a dataclass field whose metadata holds what `config explain` and the reference print.

    Args:
        default: the value used where no YAML file or override sets the key.
        doc: what the key does, one sentence.
        unit: unit of the value ("tokens", "s", "bytes"), empty for counts and names.
        ge, le, gt: bounds of a numeric value (>=, <=, >).
        why: the reason for the default, with its source.
    """
    metadata = {"doc": doc, "unit": unit, "ge": ge, "le": le, "gt": gt, "why": why}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Init(Enum):
    random = "random"
    pretrained = "pretrained"


class Pack(Enum):
    stream = "stream"
    documents = "documents"


class Device(Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class Dtype(Enum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


# "async" is a keyword, so the class form cannot spell this member
Mode = Enum("Mode", {"sync": "sync", "async": "async"})


class Best(Enum):
    lowest = "lowest"
    highest = "highest"


class Starter(Enum):
    srun = "srun"
    torchrun = "torchrun"


class Rendezvous(Enum):
    c10d = "c10d"
    static = "static"


class Runner(Enum):
    pdsh = "pdsh"
    openmpi = "openmpi"
    no_ssh = "no_ssh"


class WandbMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


RESUME_WORDS = ("auto", "never", "must")
"""Values of `resume` that are not a path."""

BUILT_IN_TOKENIZERS = ("bytes", "bpe")
"""Values of `data.tokenizer` that are not a path."""


@dataclass
class Run:
    dir: Optional[str] = key(None, "Run directory; everything the run writes is under it.", why="null: runs/<run.name>")
    name: Optional[str] = key(None, "Name of the run.", why="null: <model.name>-<data.name>-<date>-<time>")


@dataclass
class Model:
    name: str = key("custom", "Name shown in plans and logs; each preset sets its own.")
    builder: str = key("hf", "Registered builder of the model: hf, or a plugin's.")
    path: Optional[str] = key(
        None,
        "Hugging Face model: a directory, a config.json or a hub id (with model=hf, which adds nothing to it).",
    )
    init: Init = key(Init.random, "random: fresh weights from the seed. pretrained: the safetensors of model.path.")
    config: dict[str, Any] = key(
        {}, "Hugging Face configuration (model_type and its fields); merged over that of model.path where both are given."
    )
    attention: str = key("sdpa", "Attention implementation of transformers (sdpa, eager, flash_attention_2, ...).")
    trust_remote_code: bool = key(False, "Run Python code that comes with a hub model.", why="off: it is a stranger's code")
    options: dict[str, Any] = key({}, "Options of a model registered by a plugin.")


@dataclass
class Data:
    name: str = key("custom", "Name shown in plans and logs; each preset sets its own.")
    source: str = key("python_stdlib", "Registered source of documents: python_stdlib, text, hf, synthetic, or a plugin's.")
    path: Optional[str] = key(None, "File, glob, directory, or (source hf) a datasets folder or hub id.")
    validation_path: Optional[str] = key(
        None,
        "Documents of the validation split; with source hf also the name of a split of data.path.",
        why="null: data.validation_fraction of the documents of data.path",
    )
    field: str = key("text", "Field that holds the text in .jsonl lines and in Hugging Face datasets.")
    hf_config: Optional[str] = key(None, "Configuration name of a Hugging Face dataset.")
    hf_split: str = key("train", "Split of a Hugging Face dataset that is trained on.")
    streaming: bool = key(False, "Read a Hugging Face dataset as a stream, without storing it first.")
    max_tokens: Optional[int] = key(None, "Stop tokenising after this many training tokens.", unit="tokens", gt=0)
    tokenizer: str = key("bytes", "bytes, bpe (trained on the corpus once, cached), or a Hugging Face tokenizer by path.")
    bpe_vocab_size: int = key(4096, "Vocabulary size of tokenizer=bpe.", unit="tokens", ge=257, le=262144)
    sequence_length: int = key(512, "Length of one training sample.", unit="tokens", ge=2)
    pack: Pack = key(
        Pack.stream,
        "stream: documents are concatenated. documents: the same, but attention, positions and loss stop at document ends.",
    )
    validation_fraction: float = key(0.05, "Share of the documents kept for validation, split by document.", ge=0.0, le=0.5)
    num_samples: int = key(4096, "Samples of source synthetic.", ge=1)
    shuffle: bool = key(True, "Visit samples in a random order that depends on the seed and the epoch alone.")
    cache_dir: Optional[str] = key(None, "Folder of tokenised data.", why="null: $ANYSHARD_CACHE or ~/.cache/anyshard")
    options: dict[str, Any] = key({}, "Options of a data source registered by a plugin.")


@dataclass
class Parallel:
    dp: Union[int, str] = key("auto", "Data-parallel degree; auto: world / (tp * pp * sp).")
    tp: int = key(1, "Tensor-parallel degree.", ge=1)
    pp: int = key(1, "Pipeline-parallel degree (stages).", ge=1)
    sp: int = key(1, "Sequence-parallel degree.", ge=1)
    order: list[str] = key(
        ["tp", "sp", "pp", "dp"], "Axes in the order in which ranks are numbered: those of the first are neighbours."
    )


@dataclass
class Zero:
    stage: int = key(
        1, "ZeRO stage: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters are sharded over dp.", ge=0, le=3
    )
    overlap_comm: bool = key(True, "Overlap gradient reduction with the backward pass.")
    contiguous_gradients: bool = key(True, "Copy gradients to one buffer as they are made, against fragmentation.")
    reduce_bucket_size: int = key(50_000_000, "Elements reduced at once.", unit="elements", gt=0)
    allgather_bucket_size: int = key(
        50_000_000, "Elements gathered at once after a step (stages 1 and 2).", unit="elements", gt=0
    )
    round_robin_gradients: bool = key(False, "Spread the copy of offloaded gradients over ranks (stages 1 and 2).")
    prefetch_bucket_size: int = key(50_000_000, "Elements gathered ahead of use (stage 3).", unit="elements", ge=0)
    param_persistence_threshold: int = key(
        10_000, "Parameters of fewer elements stay gathered (stage 3).", unit="elements", ge=0
    )
    max_live_parameters: int = key(1_000_000_000, "Elements gathered at any time (stage 3).", unit="elements", gt=0)
    max_reuse_distance: int = key(
        1_000_000_000, "A parameter used again within this many elements stays gathered (stage 3).", unit="elements", ge=0
    )
    sub_group_size: int = key(1_000_000_000, "Elements stepped at once by the optimizer (stage 3).", unit="elements", gt=0)
    hpz_partition_size: int = key(1, "Ranks over which stage 3 keeps a secondary copy (ZeRO++ hpZ); 1 is off.", ge=1)


@dataclass
class Offload:
    optimizer: Device = key(Device.none, "Where fp32 masters and optimizer states live.")
    param: Device = key(Device.none, "Where parameters live between uses (stage 3).")
    nvme_path: Optional[str] = key(None, "Folder on NVMe, one sub-folder a run and rank.")
    ratio: float = key(
        1.0, "Share of the optimizer state that is offloaded; less than all is refused in this version.", gt=0.0, le=1.0
    )
    pin_memory: bool = key(True, "Page-lock host buffers; has no effect on a machine without accelerator.")


@dataclass
class Precision:
    dtype: Dtype = key(Dtype.bf16, "Type of weights, activations and gradients; masters are always fp32.")
    initial_scale_power: int = key(16, "fp16: the loss scale starts at 2 to this power.", ge=0, le=32)
    scale_window: int = key(1000, "fp16: steps without overflow after which the loss scale doubles.", unit="steps", gt=0)
    hysteresis: int = key(2, "fp16: overflows in a row before the loss scale is halved.", ge=1)
    min_scale: float = key(1.0, "fp16: the loss scale never falls below this.", gt=0)


@dataclass
class Optimizer:
    name: str = key("adamw", "Registered optimizer: adamw, lion, sgd, or a plugin's.")
    lr: float = key(3e-4, "Peak learning rate.", ge=0)
    betas: list[float] = key([0.9, 0.95], "Decay rates of the moments (adamw, lion).")
    eps: float = key(1e-8, "Term added to the denominator (adamw).", gt=0)
    momentum: float = key(0.9, "Momentum (sgd).", ge=0, le=1)
    weight_decay: float = key(0.1, "Decoupled weight decay, applied to parameters of two or more dimensions.", ge=0)
    decay_embeddings: bool = key(False, "Apply weight decay to embeddings and to the output head tied to them.")
    options: dict[str, Any] = key({}, "Options of an optimizer registered by a plugin.")


@dataclass
class Schedule:
    name: str = key("cosine", "Registered schedule: constant, cosine, linear, wsd, or a plugin's.")
    warmup_steps: Union[int, float] = key(
        0, "Linear warm-up; an integer counts steps, a fraction below 1 is of train.max_steps.", ge=0
    )
    min_lr_ratio: float = key(0.1, "Learning rate at the end, as a share of the peak (cosine, linear, wsd).", ge=0, le=1)
    decay_steps: Union[int, float] = key(
        0.2, "Length of the final decay of wsd; a fraction below 1 is of train.max_steps.", ge=0
    )


@dataclass
class Train:
    max_steps: int = key(1000, "Optimizer steps of the whole run.", unit="steps", gt=0)
    global_batch_size: int = key(32, "Sequences in one optimizer step over all ranks.", unit="sequences", gt=0)
    micro_batch_size: int = key(4, "Sequences in one forward and backward of one rank.", unit="sequences", gt=0)
    max_grad_norm: float = key(1.0, "Global gradient norm is clipped to this; 0 is off.", ge=0, why="1.0, as GPT-3 and Llama")
    activation_checkpointing: bool = key(False, "Recompute activations of each decoder layer in the backward pass.")
    eval_every_steps: int = key(
        200, "Evaluate on the validation split every so many steps; 0 is only at the end.", unit="steps", ge=0
    )
    eval_samples: int = key(
        64, "Validation sequences of one evaluation over all ranks; 0 turns evaluation off.", unit="sequences", ge=0
    )
    log_every_steps: int = key(10, "Write a line and a metrics record every so many steps.", unit="steps", gt=0)
    detect_hang_s: Optional[float] = key(
        300.0,
        "A rank that ends no micro-step for this long writes the stacks of its threads to its log; null: never.",
        unit="s",
        gt=0,
        why="half of launch.timeout_s, after which the collective that it waits in fails",
    )
    detect_nan: bool = key(True, "Stop with an error when a logged loss, or every gradient since the last, is not finite.")


@dataclass
class Checkpoint:
    every_steps: int = key(200, "Save every so many steps; 0 is only at the end and on a stop.", unit="steps", ge=0)
    mode: Mode = key(
        Mode["async"],
        "async: training goes on while the state is copied, written and committed. sync: it waits until it is committed.",
    )
    keep: int = key(3, "Newest committed checkpoints that are kept; 0 keeps all.", ge=0)
    keep_every: int = key(
        0, "Committed checkpoints whose step is a multiple of this stay as well; 0: none do.", unit="steps", ge=0
    )
    best_metric: Optional[str] = key(
        None,
        "The checkpoint with the best value of this number of the evaluation (loss, perplexity, ...) stays as well.",
        why="null: none does",
    )
    best_is: Best = key(Best.lowest, "Which value of checkpoint.best_metric is the best.")
    dir: Optional[str] = key(
        None, "Folder of checkpoints, also in an object store (s3://bucket/folder).", why="null: <run.dir>/checkpoints"
    )
    at_end: bool = key(True, "Save after the last step.")
    staging_gib: Optional[float] = key(
        None,
        "Host memory of one rank for states that are on their way to storage; with less than one state, steps wait longer.",
        unit="GiB",
        gt=0,
        why="null: two states, but at most a quarter of the free memory",
    )
    bandwidth_mib_s: Optional[float] = key(
        None, "Each rank writes no faster than this while training goes on.", unit="MiB/s", gt=0, why="null: no limit"
    )
    ram_every_steps: int = key(
        0,
        "Keep the state of every so many steps in the host's shared memory as well, where a restart after a crash finds it; "
        "0 is off. One node only.",
        unit="steps",
        ge=0,
    )
    verify: bool = key(True, "Check every byte that is read on restore against its checksum.")


@dataclass
class Tracking:
    name: str = key("jsonl", "jsonl: files only. wandb: Weights & Biases as well.")
    project: str = key("anyshard", "wandb project.")
    entity: Optional[str] = key(None, "wandb entity.")
    group: Optional[str] = key(None, "wandb group.")
    tags: list[str] = key([], "wandb tags.")
    mode: WandbMode = key(WandbMode.auto, "auto: online with an API key, else offline.")


@dataclass
class Torchrun:
    rendezvous: Rendezvous = key(
        Rendezvous.c10d, "How nodes meet. c10d: by themselves, in any order. static: each is told its number."
    )
    host: Optional[str] = key(None, "Name or address of the node that starts the run, where nodes meet.", why="null: this host")
    max_restarts: int = key(0, "Times that torchrun starts the ranks anew after one has failed.", ge=0)


@dataclass
class DeepspeedLauncher:
    hostfile: Optional[str] = key(None, "File with a line 'HOST slots=N' for each node.", why="null: one is written from hosts")
    hosts: list[str] = key([], "Names of the nodes, each with launch.procs_per_node slots.")
    include: Optional[str] = key(None, "Hosts and slots that are used: 'node0@node1:0,2'.")
    exclude: Optional[str] = key(None, "Hosts and slots that are not used.")
    runner: Runner = key(Runner.pdsh, "How other nodes are reached; no_ssh: the same command is given on every node.")
    node_rank: int = key(0, "Number of this node, with runner no_ssh.", ge=0)
    master_addr: Optional[str] = key(None, "Address of the first node.", why="null: the first host")
    launcher_args: str = key("", "Arguments handed to pdsh or mpirun.")


@dataclass
class Slurm:
    account: Optional[str] = key(None, "Account that is charged.")
    partition: Optional[str] = key(None, "Partition.", why="null: the cluster's default")
    qos: Optional[str] = key(None, "Quality of service.")
    time_min: Optional[int] = key(None, "Time limit.", unit="min", gt=0, why="null: the partition's")
    constraint: Optional[str] = key(None, "Features that nodes must have.")
    reservation: Optional[str] = key(None, "Reservation.")
    nodelist: Optional[str] = key(None, "Nodes that must be used.")
    exclude: Optional[str] = key(None, "Nodes that must not be used.")
    exclusive: bool = key(False, "Share nodes with no other job.")
    gpu_type: Optional[str] = key(None, "Type of the GPUs, as in --gpus-per-node=h100:8.")
    gres: Optional[str] = key(None, "Generic resources of a node, instead of --gpus-per-node: 'gpu:h100:8'.")
    cpus_per_task: Optional[int] = key(None, "Cores of each rank.", gt=0, why="null: the cluster's default")
    mem: Optional[str] = key(None, "Host memory of a node, as Slurm writes it: '200G', '0' for all.")
    array: Optional[int] = key(
        None, "Submit a chain of so many jobs, each of which goes on where the last one stopped, instead of requeueing.", ge=2
    )
    requeue: bool = key(True, "A job that is warned or preempted saves, goes back into the queue and continues.")
    warn_s: int = key(120, "Slurm warns so long before the time limit; the ranks save and end.", unit="s", ge=10)
    starter: Starter = key(
        Starter.srun, "srun: Slurm starts every rank. torchrun: Slurm starts one torchrun on each node, which starts the ranks."
    )
    container_image: Optional[str] = key(None, "Image that the ranks run in (pyxis: srun --container-image).")
    container_mounts: list[str] = key([], "Mounts of the container: '/data:/data:ro'; the run directory is added.")
    modules: list[str] = key([], "Modules that are loaded first.")
    prologue: list[str] = key([], "Lines of bash before the ranks start.")
    directives: list[str] = key([], "More '#SBATCH' options: '--mail-type=FAIL'.")
    srun_args: list[str] = key([], "More options of srun.")
    python: Optional[str] = key(None, "Python on the nodes.", why="null: the one that submits")
    template: Optional[str] = key(None, "Template of your own for the script; ours is launch/templates/slurm.sbatch.j2.")


@dataclass
class Launch:
    name: str = key("local", "Registered backend that starts the ranks: local, torchrun, deepspeed, slurm, or a plugin's.")
    nodes: int = key(1, "Nodes.", ge=1)
    procs_per_node: Union[int, str] = key("auto", "Ranks on each node; auto: one per GPU, or 1 without.")
    port: Optional[int] = key(
        None,
        "Port of the rendezvous.",
        ge=1,
        le=65535,
        why="null: a free port; 29500 with several nodes; on Slurm by the job's id",
    )
    timeout_s: float = key(600.0, "A collective that waits longer than this fails.", unit="s", gt=0)
    threads_per_proc: Optional[int] = key(None, "OMP threads of each rank.", ge=1, why="null: cores / procs_per_node")
    env: dict[str, str] = key({}, "Extra environment variables of the ranks.")
    torchrun: Torchrun = field(default_factory=Torchrun)
    deepspeed: DeepspeedLauncher = field(default_factory=DeepspeedLauncher)
    slurm: Slurm = field(default_factory=Slurm)


@dataclass
class Cluster:
    name: str = key("auto", "Name of the hardware.")
    devices_per_node: Optional[int] = key(None, "Accelerators in a node.", ge=1, why="null: what is found on this host")
    device_memory_gib: Optional[float] = key(
        None, "Memory of one accelerator.", unit="GiB", gt=0, why="null: what is found on this host"
    )
    host_memory_gib: Optional[float] = key(
        None, "Memory of one node.", unit="GiB", gt=0, why="null: what is found on this host"
    )
    peak_tflops: Optional[float] = key(
        None,
        "Dense peak of one device at precision.dtype, for MFU.",
        unit="TFLOP/s",
        gt=0,
        why="null: by device name; measured on a CPU",
    )


@dataclass
class Stop:
    at_step: Optional[int] = key(None, "End early after this step with a save and exit code 75.", unit="steps", ge=1)
    at_s: Optional[float] = key(
        None, "End early this long after the start of the ranks, with a save and exit code 75.", unit="s", gt=0
    )
    margin_s: Optional[float] = key(
        None,
        "In a job of Slurm, end so long before its time limit.",
        unit="s",
        gt=0,
        why="null: 60, but at most a tenth of what is left at the start",
    )


@dataclass
class Config:
    run: Run = field(default_factory=Run)
    seed: int = key(42, "Seed of weights, data order and dropout.", ge=0)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    zero: Zero = field(default_factory=Zero)
    offload: Offload = field(default_factory=Offload)
    precision: Precision = field(default_factory=Precision)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    launch: Launch = field(default_factory=Launch)
    cluster: Cluster = field(default_factory=Cluster)
    stop: Stop = field(default_factory=Stop)
    resume: str = key(
        "auto",
        "auto: continue from the newest good checkpoint of the run, if any. never: start fresh. must: refuse to start without "
        "one. A path: that checkpoint.",
    )
    callbacks: dict[str, Any] = key({}, "Registered callbacks by name, each with its options; null turns one off.")
    deepspeed_extra: dict[str, Any] = key({}, "Raw DeepSpeed keys, merged last and shown as overrides.")


GROUPS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default_factory))
"""Names of the configuration groups, in the order of `Config`."""
