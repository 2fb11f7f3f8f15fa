"""An ablation's trainings on a cluster: one launch line each, printed or handed to a scheduler."""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .local import train_arguments
from .rows import Row


def launch_line(row: Row, seed: int, folder: Path, script: str, gpus_per_machine: int) -> str:
    """One shell line that starts a row on a cluster, on every machine of it.

    ``$HOST0`` is the first machine's name; with one machine there is no need of it.
    """
    machines, per_machine = _machines(row, gpus_per_machine)
    if machines == 1:
        where = "--standalone"
    else:
        where = f"--nnodes {machines} --rdzv-backend c10d --rdzv-endpoint $HOST0:29500"
        # Two trainings whose first machine is the same one do not meet in one rendezvous.
        where += f" --rdzv-id {shlex.quote(f'{row.name}-seed{seed}')}"
    words = shlex.join([script, *train_arguments(row, seed, folder)])
    return f"torchrun {where} --nproc-per-node {per_machine} {words}"


def _machines(row: Row, gpus_per_machine: int) -> tuple[int, int]:
    per_machine = min(row.processes, gpus_per_machine)
    if row.processes % per_machine:
        raise ValueError(
            f"row {row.name} is of {row.processes} processes (MEGDET.ABLATION.GPUS), no whole "
            f"number of machines of {gpus_per_machine}: change --gpus-per-machine"
        )
    return row.processes // per_machine, per_machine


def submit(
    template: str, trainings: Sequence[tuple[Row, int, Path]], script: str, gpus_per_machine: int
) -> None:
    """Runs the command ``template`` for each (row, seed, folder).

    Args:
        template: a shell command with {line}, {machines}, {gpus} (of a machine) and {name}.

    Raises:
        ValueError: it cannot be filled in, or ends with an error; the message has what was
            submitted before.
    """
    submitted: list[str] = []
    for row, seed, folder in trainings:
        line = launch_line(row, seed, folder, script, gpus_per_machine)
        name = f"{row.name}-seed{seed}"
        try:
            _submit(template, line, name, *_machines(row, gpus_per_machine))
        except ValueError as error:
            before = f"; submitted before it: {', '.join(submitted)}" if submitted else ""
            raise ValueError(f"{name}: {error}{before}") from None
        submitted.append(name)


def _submit(template: str, line: str, name: str, machines: int, gpus: int) -> None:
    try:
        command = template.format(
            line=shlex.quote(line), machines=machines, gpus=gpus, name=shlex.quote(name)
        )
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"--submit {template}: {error!r}; it may have {{line}}, {{machines}}, {{gpus}} and "
            "{name}, and doubles every other brace: ${{HOME}}"
        ) from None
    try:
        subprocess.run(command, shell=True, check=True)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{command} ended with exit code {error.returncode}") from None
