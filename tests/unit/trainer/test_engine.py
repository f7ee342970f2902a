"""What the engine refuses before it is built."""

from __future__ import annotations

import pytest

from anyshard.configs.errors import EnvError
from anyshard.configs.schema import Dtype
from anyshard.trainer.engine import require_dtype


@pytest.mark.parametrize(("dtype", "method"), [(Dtype.fp16, "is_fp16_supported"), (Dtype.bf16, "is_bf16_supported")])
def test_a_type_that_the_device_does_not_compute_in(monkeypatch: pytest.MonkeyPatch, dtype: Dtype, method: str) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), method, lambda self: False)
    with pytest.raises(EnvError, match=rf"precision\.dtype={dtype.value}: this device does not compute in it.*Use precision="):
        require_dtype(dtype)
    require_dtype(Dtype.fp32)
