"""Makes one launch line per job of an ablation for a cluster, and submits it to a scheduler."""

import shlex
import subprocess
from collections.abc import Sequence

from .job import Job
from .rows import Row


def launch_line(job: Job, program: Sequence[str], gpus_per_machine: int) -> str:
    """Returns the shell line that starts a job; it runs on every machine of the job.

    With several machines the line expects the name of the first one in ``$HOST0``.

    Raises:
        ValueError: the processes do not fill whole machines.
    """
    machines, per_machine = _machines(job.row, gpus_per_machine)
    if machines == 1:
        where = "--standalone"
    else:
        where = f"--nnodes {machines} --rdzv-backend c10d --rdzv-endpoint $HOST0:29500"
        # Keeps jobs apart that have the same first machine.
        where += f" --rdzv-id {shlex.quote(job.name)}"
    words = shlex.join([*program, *job.train_arguments()])
    return f"torchrun {where} --nproc-per-node {per_machine} {words}"


def _machines(row: Row, gpus_per_machine: int) -> tuple[int, int]:
    """Returns the number of machines and the processes on each."""
    per_machine = min(row.processes, gpus_per_machine)
    if row.processes % per_machine:
        raise ValueError(
            f"row {row.name} has {row.processes} processes (MEGDET.ABLATION.GPUS), which do not "
            f"fill whole machines of {gpus_per_machine} GPUs: change --gpus-per-machine"
        )
    return row.processes // per_machine, per_machine


def submit(
    template: str, jobs: Sequence[Job], program: Sequence[str], gpus_per_machine: int
) -> None:
    """Runs a shell command for each job.

    Args:
        template: the command with {line}, {machines}, {gpus} (per machine) and {name}.

    Raises:
        ValueError: the template is wrong, or a command fails. The message lists the jobs that were
            submitted before.
    """
    submitted: list[str] = []
    for job in jobs:
        line = launch_line(job, program, gpus_per_machine)
        try:
            _submit(template, line, job.name, *_machines(job.row, gpus_per_machine))
        except ValueError as error:
            before = f"; submitted before it: {', '.join(submitted)}" if submitted else ""
            raise ValueError(f"{job.name}: {error}{before}") from None
        submitted.append(job.name)


def _submit(template: str, line: str, name: str, machines: int, gpus: int) -> None:
    try:
        command = template.format(
            line=shlex.quote(line), machines=machines, gpus=gpus, name=shlex.quote(name)
        )
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"--submit {template}: {error!r}; it may contain {{line}}, {{machines}}, {{gpus}} and "
            "{name}. Double every other brace: ${{HOME}}"
        ) from None
    try:
        subprocess.run(command, shell=True, check=True)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{command} ended with exit code {error.returncode}") from None
