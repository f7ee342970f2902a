import pytest

from anyshard.configs import schema
from anyshard.configs.errors import EnvError
from anyshard.trainer import tracking


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_without_a_key_wandb_is_offline(no_key):
    assert tracking.wandb_mode(schema.WandbMode.auto) == "offline"


def test_a_key_in_the_environment_or_netrc_is_online(no_key, monkeypatch):
    no_key.write_text("machine api.wandb.ai login user password secret\n")
    no_key.chmod(0o600)
    assert tracking.wandb_mode(schema.WandbMode.auto) == "online"
    no_key.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert tracking.wandb_mode(schema.WandbMode.auto) == "online"


def test_a_netrc_file_that_cannot_be_read_is_told_and_means_offline(no_key, caplog):
    no_key.write_text("machines are great\n")
    assert tracking.wandb_mode(schema.WandbMode.auto) == "offline"
    (told,) = caplog.messages
    assert "netrc cannot be read (bad toplevel token 'machines'" in told


def test_the_environment_and_the_configuration_win(no_key, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.wandb_mode(schema.WandbMode.auto) == "disabled"
    assert tracking.wandb_mode(schema.WandbMode.offline) == "offline"


def test_only_rank_0_tracks_and_only_where_asked():
    config = schema.Config()
    assert tracking.build_trackers(config, None, rank=0) == []
    config.tracking.name = "wandb"
    assert tracking.build_trackers(config, None, rank=1) == []


def test_an_offline_run_keeps_its_id(no_key, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = schema.Config()
    config.tracking.name = "wandb"
    ids = []
    for loss in (2.0, 1.0):
        (tracker,) = tracking.build_trackers(config, tmp_path, rank=0)
        tracker.log({"step": 1, "train/loss": loss, "note": "text is left out"})
        tracker.finish(failed=False)
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1] != ""
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) >= 1


def test_online_without_a_key_is_the_environments_fault(no_key, tmp_path):
    config = schema.Config()
    config.tracking.name, config.tracking.mode = "wandb", schema.WandbMode.online
    with pytest.raises(EnvError, match=r"tracking\.mode=online: wandb cannot start .*Run 'wandb login'"):
        tracking.build_trackers(config, tmp_path, rank=0)
