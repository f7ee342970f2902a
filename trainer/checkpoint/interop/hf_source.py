"""A Hugging Face folder: the tensors that `from_pretrained` would give the model, under the model's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from anyshard.configs import schema
from anyshard.trainer.checkpoint import layout
from anyshard.trainer.checkpoint.interop.source import Key, Record
from anyshard.trainer.checkpoint.manifest import BUFFER, PARAM, Tensor
from anyshard.trainer.models.describe import describe_model
from anyshard.trainer.models.fill import Filler
from anyshard.trainer.models.hf import build
from anyshard.trainer.models.pretrained import PretrainedTensors


class HfSource:
    """Weights alone, in float32: that is what a run holds as masters."""

    format = "hf"

    def __init__(self, path: Path) -> None:
        """Compare the files with the model of config.json.

        Raises:
            ConfigError: the folder holds no such model.
        """
        self.path = path
        config = schema.Config(model=schema.Model(path=str(path)), data=schema.Data(sequence_length=2))
        model = build(config, device=torch.device("meta"), dtype=torch.float32)
        filler = Filler(model, device=torch.device("cpu"), dtype=torch.float32, partition=None)
        self._files = PretrainedTensors(filler, str(path))
        slots = {name: slot for slot in filler.slots for name in slot.names}
        self._slots = {}
        self.tensors: dict[Key, Tensor] = {}
        for (name, key), shape in layout.global_tensors(model).items():
            self._slots[name, key] = slots[name]
            dtype = "float32" if key == PARAM else layout.dtype_name(slots[name].tensor.dtype)
            self.tensors[name, key] = Tensor(name, key, dtype, shape)
        description = describe_model(model)
        assert description is not None
        description["dtype"] = description["config"].get("dtype") or "float32"
        dp_1 = {"dp": 1, "tp": 1, "pp": 1, "sp": 1, "zero": 0, "offload_optimizer": "none", "offload_param": "none"}
        meta = {
            "step": 0,
            "samples": 0,
            "tokens": 0,
            "layout": dp_1,
            "data_fingerprint": None,
            "global_batch_size": None,
            "optimizer": {},
            "callbacks": {},
            "imported": {"format": self.format, "from": str(path)},
            "model": description,
        }
        engine = {"global_steps": 0, "skipped_steps": 0, "optimizer_steps": 0, "loss_scaler": None}
        optimizer: dict[str, Any] = {"class": "none", "kind": "none", "groups": {}}
        notes = ["weights only: the optimizer of the run that resumes starts fresh, at step 0"]
        self.record = Record(0, optimizer, engine, dp_1, layout.tied_names(model), meta, [], notes)

    def read(self, key: Key) -> torch.Tensor:
        """One whole tensor."""
        tensor = self._files.read(self._slots[key])
        return tensor if key[1] == BUFFER else tensor.float()
