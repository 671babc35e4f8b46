"""`relora join`."""

from __future__ import annotations

from typing import Annotated

import typer

from relora_train.cli.output import tell
from relora_train.runs.joining import join_run


def join(
    rdzv_endpoint: Annotated[str, typer.Option(metavar="HOST:PORT", help="The profile's launch.rdzv_endpoint.")],
    nnodes: Annotated[int, typer.Option(min=2, help="Its launch.nnodes.")],
    node_rank: Annotated[
        int,
        typer.Option(
            min=1,
            envvar=["NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX"],
            help="This machine's number; the flow's has 0.",
        ),
    ],
    nproc_per_node: Annotated[str, typer.Option(help="Its launch.nproc_per_node: a number, or gpu.")] = "1",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    wait_seconds: Annotated[int, typer.Option(min=1, help="Leave when no stage has begun for so long.")] = 600,
) -> None:
    """Train along on another machine, stage after stage, with a run that was started with launch.nnodes above 1."""
    joined = join_run(
        rdzv_endpoint=rdzv_endpoint,
        nnodes=nnodes,
        node_rank=node_rank,
        nproc_per_node=nproc_per_node,
        device=device,
        wait_seconds=wait_seconds,
        tell=tell,
    )
    tell(f"This machine took part in {joined} of the run's stages.")
