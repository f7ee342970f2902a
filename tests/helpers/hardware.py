"""What a test may need of the machine."""

from __future__ import annotations

import pytest
import torch

has_fp16 = bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
NO_FP16 = "this CPU has no fp16 arithmetic (avx512_fp16), and DeepSpeed refuses fp16 without"
needs_fp16 = pytest.mark.skipif(not has_fp16, reason=NO_FP16)
