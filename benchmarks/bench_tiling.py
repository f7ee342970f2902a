"""Peak memory of a step by the length of the sequence: whole, and with loss and feed-forward blocks in tiles.

    python benchmarks/bench_tiling.py [--lengths 2048 4096 8192]

Each measurement is a process of its own, whose peak resident memory after one step is compared with that before it. The model
has two layers, and an eighth of the vocabulary of Llama 3. With tiles memory must grow linearly, and by at most a third of the
bytes for each token. Exit code 1 when it does not.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

from common import machine, repeat_with, verdict

MODEL = {
    "model_type": "llama",
    "vocab_size": 16032,
    "hidden_size": 128,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
}
TILE_TOKENS = 256
MAX_SHARE = 1 / 3


def measure(length: int, tiled: bool) -> float:
    """Bytes of one step above what the process had before it."""
    import torch

    from anyshard.configs import schema
    from anyshard.trainer.lm import Manner, full_lm_loss
    from anyshard.trainer.models.hf import build

    torch.set_num_threads(1)
    config = schema.Config(model=schema.Model(config=MODEL), data=schema.Data(sequence_length=length))
    config.train.mlp_tile_tokens = TILE_TOKENS if tiled else None
    config.train.activation_checkpointing = True
    model = build(config, device=torch.device("cpu"), dtype=torch.float32)
    manner = Manner(tile_tokens=TILE_TOKENS if tiled else None)
    tokens = torch.randint(0, MODEL["vocab_size"], (1, length + 1))
    small = {"input_ids": tokens[:, :64], "labels": tokens[:, 1:65]}
    full_lm_loss(model, small, manner).backward()  # gradients exist from now on
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    full_lm_loss(model, {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}, manner).backward()
    return 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(**json.loads(options.measure)))
        return 0
    print(machine())
    found: dict[bool, list[float]] = {}
    for tiled in (False, True):
        for length in options.lengths:
            asked = json.dumps({"length": length, "tiled": tiled})
            command = [sys.executable, __file__, "--measure", asked]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.setdefault(tiled, []).append(float(done.stdout.split()[-1]))
            print(f"{'tiles' if tiled else 'whole'}, {length} tokens: {found[tiled][-1] / 2**20:.0f} MiB", flush=True)
    grown = {
        tiled: (sizes[-1] - sizes[0]) / (options.lengths[-1] - options.lengths[0]) / 1024 for tiled, sizes in found.items()
    }
    print(f"for each further token: whole {grown[False]:.1f} KiB, tiles {grown[True]:.1f} KiB")
    repeat_with()
    linear = found[True][-1] / found[True][0] / (options.lengths[-1] / options.lengths[0])
    met = verdict("growth with tiles over that of the sequence", linear, 1.1, unit="x")
    return 0 if verdict("tiles, of the bytes of the whole", grown[True] / grown[False], MAX_SHARE, unit="x") and met else 1


if __name__ == "__main__":
    sys.exit(main())
