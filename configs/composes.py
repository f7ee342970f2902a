"""What composes with what, asked of the rules cell by cell; the table in the README is this one."""

from __future__ import annotations

from anyshard.configs.compose import compose
from anyshard.configs.rules import check

STAGES = ("z0", "z1", "z2", "z3")
OFFLOADS = ("none", "cpu", "cpu_param", "nvme", "nvme_param")
PRECISIONS = ("fp32", "bf16", "fp16")


def legal_cells() -> list[tuple[str, str, str]]:
    """Every (zero, offload, precision) that the rules accept, at any dp."""
    cells = [(stage, offload, precision) for stage in STAGES for offload in OFFLOADS for precision in PRECISIONS]
    drive = "offload.nvme_path=/mnt/nvme"
    return [
        cell for cell in cells if not check(compose([f"zero={cell[0]}", f"offload={cell[1]}", f"precision={cell[2]}", drive]))
    ]


def composition_table() -> str:
    """The table as Markdown: precisions that work for each stage and offload."""
    legal = legal_cells()
    lines = ["| | " + " | ".join(f"`offload={offload}`" for offload in OFFLOADS) + " |", "|---" * (len(OFFLOADS) + 1) + "|"]
    for stage in STAGES:
        cells = [", ".join(p for p in PRECISIONS if (stage, offload, p) in legal) or "-" for offload in OFFLOADS]
        lines.append(f"| `zero={stage}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def axes_table() -> str:
    """The axes of the mesh as Markdown: which stages of ZeRO each works with, at degree 2 beside data parallelism."""
    lines = ["| | " + " | ".join(f"`zero={stage}`" for stage in STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    for axis in ("dp", "tp", "pp", "sp"):
        asked = [
            f"parallel.{axis}=2",
            "parallel.dp=2",
            "launch.procs_per_node=4" if axis != "dp" else "launch.procs_per_node=2",
        ]
        cells = [compose([*asked, f"zero={stage}", "precision=fp32"]) for stage in STAGES]
        lines.append(f"| `parallel.{axis}` | " + " | ".join("-" if check(cell) else "yes" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(composition_table())
    print(axes_table())
