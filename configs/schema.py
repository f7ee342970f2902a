"""Every knob of a run: one dataclass per configuration group, each key with its unit, range and reason.

This is the only place where a key is defined, with its parts `schema_layout.py` and `schema_launch.py`. All of
`docs/configuration.md`, `anyshard config explain` and the range checks is read from the metadata here; what crosses
groups is in `rules.py`. Nothing here imports torch or DeepSpeed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional, Union

from anyshard.configs.fields import key
from anyshard.configs.schema_launch import DeepspeedLauncher as DeepspeedLauncher
from anyshard.configs.schema_launch import Launch as Launch
from anyshard.configs.schema_launch import NodeCheck as NodeCheck
from anyshard.configs.schema_launch import Rendezvous as Rendezvous
from anyshard.configs.schema_launch import Runner as Runner
from anyshard.configs.schema_launch import Slurm as Slurm
from anyshard.configs.schema_launch import Starter as Starter
from anyshard.configs.schema_launch import Torchrun as Torchrun
from anyshard.configs.schema_layout import Balance as Balance
from anyshard.configs.schema_layout import Device as Device
from anyshard.configs.schema_layout import Dtype as Dtype
from anyshard.configs.schema_layout import Offload as Offload
from anyshard.configs.schema_layout import Parallel as Parallel
from anyshard.configs.schema_layout import Precision as Precision
from anyshard.configs.schema_layout import Zero as Zero


class Init(Enum):
    random = "random"
    pretrained = "pretrained"


class Pack(Enum):
    stream = "stream"
    documents = "documents"


# "async" is a keyword, so the class form cannot spell this member
Mode = Enum("Mode", {"sync": "sync", "async": "async"})


class Best(Enum):
    lowest = "lowest"
    highest = "highest"


class CountedOver(Enum):
    micro_batch = "micro_batch"
    micro_step = "micro_step"


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
    name: str = key("custom", "Name shown in plans and logs; each preset sets its own.", why="for a model without a preset")
    builder: str = key(
        "hf",
        "Registered builder of the model: hf, or a plugin's.",
        why="the one that comes along; it builds any causal language model of transformers",
    )
    path: Optional[str] = key(
        None,
        "Hugging Face model: a directory, a config.json or a hub id (with model=hf, which adds nothing to it).",
        why="null: the presets hold their model.config",
    )
    init: Init = key(
        Init.random,
        "random: fresh weights from the seed. pretrained: the safetensors of model.path.",
        why="presets are architectures; there are weights only where model.path is",
    )
    config: dict[str, Any] = key(
        {},
        "Hugging Face configuration (model_type and its fields); merged over that of model.path where both are given.",
        why="empty: the preset fills it",
    )
    attention: str = key(
        "sdpa",
        "Attention implementation of transformers (sdpa, eager, flash_attention_2, ...).",
        why="transformers' own default; torch's fused kernels, on CPUs as well",
    )
    trust_remote_code: bool = key(False, "Run Python code that comes with a hub model.", why="off: it is a stranger's code")
    options: dict[str, Any] = key({}, "Options of a model registered by a plugin.")


@dataclass
class Data:
    name: str = key("custom", "Name shown in plans and logs; each preset sets its own.", why="for data without a preset")
    source: str = key(
        "python_stdlib",
        "Registered source of documents: python_stdlib, text, hf, synthetic, or a plugin's.",
        why="needs no download, and is real text",
    )
    path: Optional[str] = key(
        None,
        "File, glob, directory, or (source hf) a datasets folder or hub id.",
        why="null: python_stdlib and synthetic read no files of yours",
    )
    validation_path: Optional[str] = key(
        None,
        "Documents of the validation split; with source hf also the name of a split of data.path.",
        why="null: data.validation_fraction of the documents of data.path",
    )
    field: str = key(
        "text",
        "Field that holds the text in .jsonl lines and in Hugging Face datasets.",
        why="its name in FineWeb, C4, TinyStories and most other corpora of the hub",
    )
    hf_config: Optional[str] = key(None, "Configuration name of a Hugging Face dataset.", why="null: the dataset's own default")
    hf_split: str = key(
        "train",
        "Split of a Hugging Face dataset that is trained on.",
        why="what the datasets library calls files that name no split",
    )
    streaming: bool = key(
        False,
        "Read a Hugging Face dataset as a stream, without storing it first.",
        why="a stored dataset is tokenised anew without another download",
    )
    max_tokens: Optional[int] = key(
        None, "Stop tokenising after this many training tokens.", unit="tokens", gt=0, why="null: the whole corpus"
    )
    tokenizer: str = key(
        "bytes",
        "bytes, bpe (trained on the corpus once, cached), or a Hugging Face tokenizer by path.",
        why="needs no training and no download; its 257 ids fit every preset",
    )
    bpe_vocab_size: int = key(
        4096,
        "Vocabulary size of tokenizer=bpe.",
        unit="tokens",
        ge=257,
        le=262144,
        why="the vocabulary of the default model, llama_15m",
    )
    sequence_length: int = key(
        512,
        "Length of one training sample.",
        unit="tokens",
        ge=2,
        why="every preset takes it: the shortest, gpt2_124m, has 1,024 positions",
    )
    pack: Pack = key(
        Pack.stream,
        "stream: documents are concatenated. documents: the same, but attention, positions and loss stop at document ends.",
        why="as GPT-3, which masks nothing between documents (arXiv 2005.14165, appendix B)",
    )
    validation_fraction: float = key(
        0.05,
        "Share of the documents kept for validation, split by document.",
        ge=0.0,
        le=0.5,
        why="of python_stdlib it holds out over 1,000 samples; an evaluation takes 64",
    )
    num_samples: int = key(4096, "Samples of source synthetic.", ge=1, unit="samples", why="128 steps of the default batch")
    shuffle: bool = key(
        True,
        "Visit samples in a random order that depends on the seed and the epoch alone.",
        why="files that follow each other are alike, as would be a batch's samples",
    )
    cache_dir: Optional[str] = key(None, "Folder of tokenised data.", why="null: $ANYSHARD_CACHE or ~/.cache/anyshard")
    options: dict[str, Any] = key({}, "Options of a data source registered by a plugin.")


@dataclass
class Optimizer:
    name: str = key(
        "adamw",
        "Registered optimizer: adamw, lion, sgd, adagrad, or a plugin's.",
        why="what Llama was trained with (arXiv 2302.13971, section 2.3)",
    )
    lr: float = key(3e-4, "Peak learning rate.", ge=0, why="GPT-3's at 350M (arXiv 2005.14165, table 2.1) and Llama 7B's")
    betas: list[float] = key(
        [0.9, 0.95],
        "Decay rates of the moments (adamw, lion): two numbers from 0 to below 1.",
        why="as GPT-3 and Llama (arXiv 2005.14165, appendix B; 2302.13971, section 2.3)",
    )
    eps: float = key(
        1e-8, "Term added to the denominator (adamw, adagrad).", gt=0, why="as Adam's paper (arXiv 1412.6980) and GPT-3"
    )
    momentum: float = key(0.9, "Momentum (sgd).", ge=0, le=1, why="as ResNet (arXiv 1512.03385, section 3.4)")
    weight_decay: float = key(
        0.1,
        "Decoupled weight decay (sgd: added to the gradient) of parameters of two or more dimensions.",
        ge=0,
        why="as GPT-3 and Llama",
    )
    decay_embeddings: bool = key(
        False,
        "Apply weight decay to embeddings and to the output head tied to them.",
        why="rows of tokens that a batch lacks would shrink without a gradient",
    )
    options: dict[str, Any] = key({}, "Options of an optimizer registered by a plugin.")


@dataclass
class Schedule:
    name: str = key("cosine", "Registered schedule: constant, cosine, linear, wsd, or a plugin's.", why="as GPT-3 and Llama")
    warmup_steps: Union[int, float] = key(
        0,
        "Linear warm-up; an integer counts steps, a fraction below 1 is of train.max_steps.",
        unit="steps or share",
        ge=0,
        why="the files of schedule set 0.02; 0 is for a schedule without a file",
    )
    min_lr_ratio: float = key(
        0.1,
        "Learning rate at the end, as a share of the peak (cosine, linear, wsd).",
        ge=0,
        le=1,
        why="as GPT-3 and Llama: a tenth of the peak",
    )
    decay_steps: Union[int, float] = key(
        0.2,
        "Length of the final decay of wsd; a fraction below 1 is of train.max_steps.",
        unit="steps or share",
        ge=0,
        why="a fifth of the run matches a cosine (arXiv 2405.18392)",
    )


@dataclass
class Train:
    max_steps: int = key(
        1000,
        "Optimizer steps of the whole run.",
        unit="steps",
        gt=0,
        why="16 million tokens at the defaults, more than a pass over python_stdlib as bytes",
    )
    global_batch_size: int = key(
        32,
        "Sequences in one optimizer step over all ranks.",
        unit="sequences",
        gt=0,
        why="divides by the micro-batch of 4 on 1, 2, 4 and 8 data-parallel ranks",
    )
    micro_batch_size: int = key(
        4,
        "Sequences in one forward and backward of one rank.",
        unit="sequences",
        gt=0,
        why="divides the batch of 32 on 1, 2, 4 and 8 data-parallel ranks",
    )
    max_grad_norm: float = key(1.0, "Global gradient norm is clipped to this; 0 is off.", ge=0, why="1.0, as GPT-3 and Llama")
    activation_checkpointing: bool = key(
        False,
        "Recompute activations of each decoder layer in the backward pass.",
        why="costs one more forward pass, about a third of the step",
    )
    loss_tile_tokens: Optional[int] = key(
        None,
        "Tokens whose logits exist at once in the loss; null: those of the whole micro-batch.",
        unit="tokens",
        gt=0,
        why="null: in tiles logits are computed twice; it pays for large vocabularies",
    )
    mlp_tile_tokens: Optional[int] = key(
        None,
        "Tokens that feed-forward blocks compute at once; null: all of the micro-batch.",
        unit="tokens",
        gt=0,
        why="null: blocks are computed twice in tiles; it pays for long sequences only",
    )
    balance_experts_over: CountedOver = key(
        CountedOver.micro_batch,
        "Whose tokens count how often an expert is chosen, for the load-balancing loss that model.config.output_router_logits "
        "adds: of each micro-batch, or of those that all ranks compute at once.",
        why="micro_batch: the same under every layout; micro_step: freer experts (arXiv 2501.11873)",
    )
    check_data_every_steps: int = key(
        100,
        "Compare the data of ranks that must have the same (tp, pp, sp) every so many steps; 0: never.",
        unit="steps",
        ge=0,
        why="a digest and 8 bytes from each rank cost nothing in one of 100 steps",
    )
    eval_every_steps: int = key(
        200,
        "Evaluate on the validation split every so many steps; 0 is only at the end.",
        unit="steps",
        ge=0,
        why="an evaluation of 64 samples then costs under 1 % of the steps",
    )
    eval_samples: int = key(
        64,
        "Validation sequences of one evaluation over all ranks; 0 turns evaluation off.",
        unit="sequences",
        ge=0,
        why="two global batches of 32, forward only: two thirds of a step's cost",
    )
    log_every_steps: int = key(
        10,
        "Write a line and a metrics record every so many steps.",
        unit="steps",
        gt=0,
        why="a record waits for the device and for all ranks; steps between do not",
    )
    detect_hang_s: Optional[float] = key(
        300.0,
        "A rank that ends no micro-step for this long writes the stacks of its threads to its log; null: never.",
        unit="s",
        gt=0,
        why="half of launch.timeout_s, after which the collective that it waits in fails",
    )
    detect_nan: bool = key(
        True,
        "Stop with an error when a logged loss, or every gradient since the last, is not finite.",
        why="weights that are not finite never recover; the last checkpoint is the way back",
    )


@dataclass
class Checkpoint:
    every_steps: int = key(
        200,
        "Save every so many steps; 0 is only at the end and on a stop.",
        unit="steps",
        ge=0,
        why="as train.eval_every_steps: best_metric needs an evaluation at the saved step",
    )
    mode: Mode = key(
        Mode["async"],
        "async: training goes on while the state is copied, written and committed. sync: it waits until it is committed.",
        why="async: the disk writes while training goes on",
    )
    keep: int = key(
        3,
        "Newest committed checkpoints that are kept; 0 keeps all.",
        ge=0,
        unit="checkpoints",
        why="resume=auto passes over damaged ones: two in reserve",
    )
    keep_every: int = key(
        0,
        "Committed checkpoints whose step is a multiple of this stay as well; 0: none do.",
        unit="steps",
        ge=0,
        why="what is kept for good fills the disk",
    )
    best_metric: Optional[str] = key(
        None,
        "The checkpoint with the best value of this number of the evaluation (loss, perplexity, ...) stays as well.",
        why="null: none does",
    )
    best_is: Best = key(
        Best.lowest,
        "Which value of checkpoint.best_metric is the best.",
        why="the evaluation's own numbers, loss and perplexity, are better lower",
    )
    dir: Optional[str] = key(
        None, "Folder of checkpoints, also in an object store (s3://bucket/folder).", why="null: <run.dir>/checkpoints"
    )
    at_end: bool = key(True, "Save after the last step.", why="the trained weights are what the run is for")
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
        why="off: it takes the host memory of two states",
    )
    verify: bool = key(
        True,
        "Check every byte that is read on restore against its checksum.",
        why="a flipped bit is found before it is trained on",
    )


@dataclass
class Tracking:
    name: str = key("jsonl", "jsonl: files only. wandb: Weights & Biases as well.", why="needs no account and no network")
    project: str = key("anyshard", "wandb project.", why="wandb wants a name")
    entity: Optional[str] = key(None, "wandb entity.", why="null: the default of the API key's account")
    group: Optional[str] = key(None, "wandb group.", why="null: the run is in none")
    tags: list[str] = key([], "wandb tags.")
    mode: WandbMode = key(
        WandbMode.auto,
        "auto: online with an API key, else offline.",
        why="auto: without a key wandb would ask for one, and no rank can answer",
    )


@dataclass
class Cluster:
    name: str = key("auto", "Name of the hardware.", why="auto: the hardware of the host that starts the run")
    devices_per_node: Optional[int] = key(
        None, "Accelerators in a node.", ge=1, why="null: what is found on this host", unit="devices"
    )
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
    at_step: Optional[int] = key(
        None, "End early after this step with a save and exit code 75.", unit="steps", ge=1, why="null: train.max_steps ends it"
    )
    at_s: Optional[float] = key(
        None,
        "End early this long after the start of the ranks, with a save and exit code 75.",
        unit="s",
        gt=0,
        why="null: time does not end it",
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
    seed: int = key(
        42,
        "Seed of weights, data order and dropout.",
        ge=0,
        why="arbitrary, but fixed: the same configuration gives the same run",
    )
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
        why="auto: a run that is started again goes on, whoever starts it",
    )
    callbacks: dict[str, Any] = key(
        {},
        "Registered callbacks by name, each with its options; null turns one off.",
        why="none: each takes time; experiments turn theirs on",
    )
    deepspeed_extra: dict[str, Any] = key(
        {},
        "Raw DeepSpeed keys, merged last and shown as overrides.",
        why="none: what matters has a key of its own; the rest stays DeepSpeed's default",
    )


GROUPS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default_factory))
"""Names of the configuration groups, in the order of `Config`."""
