"""DeepSpeed's files: what is refused and why. What is read is tested with real engines in tests/dist/test_interop.py."""

import collections
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.interop import foreign
from anyshard.trainer.checkpoint.interop.commands import open_source
from anyshard.trainer.checkpoint.interop.deepspeed_source import DeepSpeedSource
from anyshard.trainer.checkpoint.interop.universal_source import UniversalSource

SHAPES = collections.OrderedDict(w=torch.Size([2, 3]), b=torch.Size([3]))
FLAT = torch.arange(9.0)


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("it ran",))


def model_states(**changes: Any) -> dict[str, Any]:
    frozen = torch.full((4,), 7.0)
    return {
        "module": {"w": FLAT[:6].view(2, 3), "b": FLAT[6:], "frozen": frozen, "seen": torch.tensor([5]), "tied": FLAT[:6]},
        "buffer_names": ["seen"],
        "param_shapes": [SHAPES],
        "shared_params": {"tied": "w"},
        "global_steps": 4,
        "global_samples": 32,
        "skipped_steps": 1,
        "dp_world_size": 2,
        **changes,
    }


def stage_1(rank: int, **changes: Any) -> dict[str, Any]:
    """The optimizer states of one of two ranks: b and w share one flat tensor, cut in the middle of w."""
    from deepspeed.utils.tensor_fragment import fragment_address

    parts = {0: {"w": fragment_address(5, 0)}, 1: {"w": fragment_address(1, 0), "b": fragment_address(3, 1)}}[rank]
    flat = FLAT[:5] if rank == 0 else FLAT[5:]
    state = {"exp_avg": flat + 10, "exp_avg_sq": flat + 20, "step": 3}
    content = {
        "base_optimizer_state": {"state": {0: state}, "param_groups": [{"lr": 0.1, "eps": 1e-8, "betas": (0.9, 0.99)}]},
        "single_partition_of_fp32_groups": [flat],
        "param_slice_mappings": [parts],
        "partition_count": [2],
        "zero_stage": 1,
        **changes,
    }
    return {"optimizer_state_dict": content}


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        torch.save(content, folder / f"{name}.pt")
    return folder


def zero_1(folder: Path, model: dict[str, Any] | None = None, **changes: Any) -> Path:
    ranks = {f"zero_pp_rank_{rank}_mp_rank_00_optim_states": stage_1(rank, **changes) for rank in (0, 1)}
    return write(folder, mp_rank_00_model_states=model or model_states(), **ranks)


def test_zero_1(tmp_path: Path) -> None:
    zero_1(tmp_path / "tag")
    (tmp_path / "latest").write_text("tag\n")
    source = open_source(tmp_path)
    assert isinstance(source, DeepSpeedSource)
    assert [key for key in source.tensors if key[1] == "param"] == [("w", "param"), ("b", "param"), ("frozen", "param")]
    assert torch.equal(source.read(("w", "param")), FLAT[:6].view(2, 3))
    assert torch.equal(source.read(("b", "exp_avg_sq")), FLAT[6:] + 20)
    assert torch.equal(source.read(("seen", "buffer")), torch.tensor([5]))
    assert torch.equal(source.read(("frozen", "param")), torch.full((4,), 7.0))
    record = source.record
    assert (record.step, record.tied, record.optimizer["kind"]) == (4, {"tied": "w"}, "adam")
    assert [(each.key, each.value, each.names) for each in record.scalars] == [("step", 3.0, ("w", "b"))]
    assert record.engine == {"global_steps": 4, "skipped_steps": 1, "optimizer_steps": 3, "loss_scaler": None}
    assert record.meta["samples"] == 32
    assert record.meta["imported"]["param_groups"] == [{"lr": 0.1, "eps": 1e-8, "betas": (0.9, 0.99)}]


def test_weights_only(tmp_path: Path) -> None:
    source = open_source(zero_1(tmp_path), weights_only=True)
    assert {key for _, key in source.tensors} == {"param", "buffer"}
    assert source.record.optimizer["kind"] == "none"
    assert source.record.scalars == []


def test_the_loss_scale_comes_along(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(init_scale=512.0, scale_window=9, min_scale=1, delayed_shift=1, consecutive_hysteresis=False)
    source = open_source(zero_1(tmp_path, loss_scaler=scaler))
    assert source.record.engine["loss_scaler"] == {
        "cur_scale": 512.0,
        "cur_iter": 0,
        "last_overflow_iter": -1,
        "cur_hysteresis": 1,
    }


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero_1(tmp_path, model=model_states(client=Hostile()))
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt: refused: it names .*print, and only tensors"):
        open_source(tmp_path)
    assert "it ran" not in capsys.readouterr().out
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match=r"model_states.pt: "):
        open_source(tmp_path)
    assert "it ran" not in capsys.readouterr().out


def test_damaged_files(tmp_path: Path) -> None:
    file = zero_1(tmp_path) / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"model_states.pt: cannot be read"):
        open_source(tmp_path)
    torch.save([1], file)
    with pytest.raises(CheckpointError, match="holds a list, not a dictionary"):
        open_source(tmp_path)
    with pytest.raises(CheckpointError, match=r"nothing.pt: cannot be read \(No such file"):
        foreign.load(tmp_path / "nothing.pt")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mp_rank_01_model_states.pt", "tensor or pipeline parallelism"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor or pipeline parallelism"),
        ("layer_00-model_00-model_states.pt", "tensor or pipeline parallelism"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "experts in files of their own"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts in files of their own"),
        ("offloaded_tensors", "optimizer states on NVMe"),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    (zero_1(tmp_path) / name).touch()
    with pytest.raises(CheckpointError, match=reason):
        open_source(tmp_path)


def test_what_is_incomplete_is_refused(tmp_path: Path) -> None:
    zero_1(tmp_path / "a", partition_count=[3])
    with pytest.raises(CheckpointError, match="3 ranks wrote it, the files of 2 are here"):
        open_source(tmp_path / "a")
    write(tmp_path / "b", mp_rank_00_model_states=model_states())
    with pytest.raises(CheckpointError, match=r"no \*zero_pp_rank_\*_optim_states.pt"):
        open_source(tmp_path / "b")
    write(tmp_path / "c", zero_pp_rank_0_mp_rank_00_optim_states=stage_1(0))
    with pytest.raises(CheckpointError, match=r"no \*model_states.pt"):
        open_source(tmp_path / "c")
    zero_1(tmp_path / "d", model={key: value for key, value in model_states().items() if key != "param_shapes"})
    with pytest.raises(CheckpointError, match="has no param_shapes"):
        open_source(tmp_path / "d")
    zero_1(tmp_path / "e", zero_stage=3)
    with pytest.raises(CheckpointError, match="2 ranks wrote it, the model states of 1 are here"):
        open_source(tmp_path / "e")
    zero_1(tmp_path / "f", base_optimizer_state=[])
    with pytest.raises(CheckpointError, match="elastic_checkpoint"):
        open_source(tmp_path / "f")
    zero_1(tmp_path / "g", model=model_states(param_shapes=[{**SHAPES, "b": torch.Size([4])}]))
    with pytest.raises(CheckpointError, match="the ranks hold 3 elements of b, which has 4"):
        open_source(tmp_path / "g")
    zero_1(tmp_path / "h", param_slice_mappings=[{"w": 5}])
    with pytest.raises(CheckpointError, match="the record of w is not what DeepSpeed writes"):
        open_source(tmp_path / "h")
    for name, changes in (("j", {"zero_stage": "one"}), ("k", {"base_optimizer_state": {"param_groups": []}})):
        with pytest.raises(CheckpointError, match="its records are not those that DeepSpeed writes"):
            open_source(zero_1(tmp_path / name, **changes))
    source = open_source(zero_1(tmp_path / "i", single_partition_of_fp32_groups=[FLAT[:4]]))
    with pytest.raises(CheckpointError, match=r"ends before w \[param\] does"):
        source.read(("w", "param"))


def test_which_optimizer() -> None:
    def kind(*keys: str, **group: float) -> Any:
        return foreign.optimizer_kind(keys, group, Path("x"))[0]["kind"]

    assert kind("exp_avg", "exp_avg_sq", eps=1e-8) == "adam"
    assert kind("exp_avg", "exp_avg_sq") == kind("exp_avg") == "lion"
    assert kind("momentum_buffer") == "sgd"
    assert kind("sum") == "adagrad"
    assert kind() == "none"
    with pytest.raises(CheckpointError, match="the optimizer states row are of no optimizer that is known"):
        kind("row")


def test_frozen_parameters_that_are_not_all_there() -> None:
    models = [{"frozen_param_fragments": {"f": torch.ones(2)}}, {"frozen_param_fragments": {"f": torch.zeros(2)}}]
    assert foreign.frozen_parameter(models, "f", (3,), Path("x")).tolist() == [1, 1, 0]
    with pytest.raises(CheckpointError, match="2 of 3 elements of f"):
        foreign.frozen_parameter(models[:1], "f", (3,), Path("x"))


def universal(folder: Path, **changes: Any) -> Path:
    optimizer = {"param_groups": [{"lr": 0.1, "eps": 1e-8}], "optimizer_state_dict": {"state": {0: {"step": 3}}}}
    write(folder, mp_rank_00_model_states=model_states(**changes))
    write(folder / "zero", optimizer_state=optimizer)
    for name, content in (("w", {"param": FLAT[:6].view(2, 3)}), ("b", FLAT[6:])):  # as ZeRO 1 and 3 have it
        write(folder / "zero" / name, fp32=content, exp_avg=content, exp_avg_sq=content)
    for name in ("seen", "tied"):
        write(folder / "zero" / name, fp32={"param": torch.zeros(1)})
    return folder


def test_universal(tmp_path: Path) -> None:
    universal(tmp_path / "t_universal")
    (tmp_path / "latest_universal").write_text("t_universal")
    source = open_source(tmp_path)
    assert isinstance(source, UniversalSource)
    assert list(source.tensors) == [
        *((name, key) for name in ("w", "b") for key in ("param", "exp_avg", "exp_avg_sq")),
        ("seen", "buffer"),
    ]
    assert torch.equal(source.read(("b", "param")), FLAT[6:])
    assert source.read(("seen", "buffer")).tolist() == [5]
    assert [(each.value, each.names) for each in source.record.scalars] == [(3.0, ("w", "b"))]
    assert {key for _, key in open_source(tmp_path, weights_only=True).tensors} == {"param", "buffer"}


def test_universal_folders_that_are_refused(tmp_path: Path) -> None:
    folder = universal(tmp_path / "a", param_shapes=[{**SHAPES, "b": torch.Size([4])}])
    with pytest.raises(CheckpointError, match=r"it has 3 elements, b has shape \(4,\)"):
        open_source(folder)
    folder = universal(tmp_path / "b", param_shapes=[{**SHAPES, "more": torch.Size([4])}])
    with pytest.raises(CheckpointError, match="zero/ lacks more"):
        open_source(folder)
    with pytest.raises(CheckpointError, match="its records are not those that DeepSpeed writes"):
        open_source(universal(tmp_path / "d", global_steps="many"))
    folder = universal(tmp_path / "c")
    write(folder / "zero" / "b", fp32={"param": None})
    with pytest.raises(CheckpointError, match=r"fp32.pt: it holds no tensor"):
        open_source(folder)
    (folder / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no .*model_states.pt beside zero/"):
        open_source(folder)


class ByName:
    """An enumeration member as some libraries have it pickled."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return (getattr, (self.owner, self.name))


def test_a_stage_that_was_pickled_by_its_name(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save({"zero_stage": ByName(ZeroStageEnum, "gradients")}, tmp_path / "states.pt")
    assert foreign.load(tmp_path / "states.pt") == {"zero_stage": 2}
    for owner, name in ((ZeroStageEnum, "__class__"), ("text", "upper")):
        torch.save({"zero_stage": ByName(owner, name)}, tmp_path / "hostile.pt")
        with pytest.raises(CheckpointError, match="refused: it names getattr"):
            foreign.load(tmp_path / "hostile.pt")
