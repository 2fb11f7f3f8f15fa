"""A meeting of the launchers of all machines, before any of them starts a process."""

import contextlib
import json
import socket
from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import urlparse

from torch.distributed import TCPStore

from megdet_d2._moved import renamed


class RendezvousError(RuntimeError):
    """An error of the meeting: a machine did not come, or its flags do not fit the others'."""


@contextlib.contextmanager
def reserved_port(port: int = 0) -> Iterator[int]:
    """Yields a port of this machine, which the system gives to no other program.

    A port that is looked up and let go may be another program's by the time that rank 0 listens on
    it, seconds later. Here a socket stays bound to the port and never listens. torch's store can
    still listen on it, since both sockets have ``SO_REUSEADDR``.

    Args:
        port: the port; 0 for any that is free.

    Raises:
        RendezvousError: the port is in use.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("", port))
        except OSError as error:
            raise RendezvousError(f"--dist-url: {_describe_taken(port, error)}") from None
        yield holder.getsockname()[1]


def rendezvous(
    url: str, machine_rank: int, num_machines: int, num_gpus: int, timeout: float
) -> None:
    """Waits for the launchers of all machines, and compares their flags.

    The launchers use the port of ``url`` and leave it free. So a wrong address or flag is an error
    within seconds, and not a process that waits for others.

    Args:
        url: ``--dist-url``; nothing is done unless it is tcp://HOST:PORT.
        machine_rank, num_machines, num_gpus: the flags of this machine.
        timeout: seconds to wait for the others.

    Raises:
        ValueError: a machine rank is out of range, or the URL has no port.
        RendezvousError: the port is in use; a machine has not come in time; a machine rank is given
            twice; or machines differ in the number of machines or of processes.
    """
    if not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--machine-rank is {machine_rank} of --num-machines {num_machines}; ranks count "
            f"from 0 to {num_machines - 1}"
        )
    if urlparse(url).scheme != "tcp":
        return
    address = urlparse(url).netloc
    leads = machine_rank == 0
    store = _connect(url, leads, timeout)
    mine = {"--num-machines": num_machines, "--num-gpus": num_gpus}
    try:
        twice = store.add(f"came/{machine_rank}", 1) > 1
        store.set(f"twice/{machine_rank}" if twice else f"flags/{machine_rank}", json.dumps(mine))
    except RuntimeError:
        raise RendezvousError(
            f"--dist-url {url}: machine 0 at {address} closed while this machine connected. "
            "Perhaps all machines had met before, and --machine-rank "
            f"{machine_rank} is given to two machines; give each its own"
        ) from None
    if leads:
        verdict = _judge(store, num_machines, mine, timeout)
        store.set("verdict", verdict)
        _wait(store, [f"read/{rank}" for rank in range(1, num_machines)], min(timeout, 10))
    elif twice:
        verdict = f"--machine-rank {machine_rank} is given to two machines; give each its own"
    else:
        if _wait(store, ["verdict"], timeout):
            verdict = store.get("verdict").decode()
        else:
            verdict = (
                f"machine 0 at {address} has ended or belongs to another training: it did not "
                f"answer within {timeout:g} s (MEGDET.TIMEOUT)"
            )
        store.set(f"read/{machine_rank}", "")
        # Waits until machine 0 has released the port, where its first process will listen.
        _wait(store, ["never"], min(timeout, 10))
    if verdict:
        raise RendezvousError(f"--dist-url {url}: {verdict}")


def _connect(url: str, leads: bool, timeout: float) -> TCPStore:
    """Returns the store at ``url``; machine 0, which ``leads``, serves it to the others."""
    parts = urlparse(url)
    if not parts.port or not parts.hostname:
        raise ValueError(f"--dist-url is {url!r}; give tcp://HOST:PORT")
    limit = timedelta(seconds=timeout)
    try:
        return TCPStore(
            parts.hostname, parts.port, is_master=leads, timeout=limit, wait_for_workers=False
        )
    except RuntimeError as error:
        if leads:
            raise RendezvousError(
                f"--dist-url {url}: {_describe_taken(parts.port, error)}"
            ) from None
        raise RendezvousError(
            f"--dist-url {url}: machine 0 did not answer at {parts.netloc} within {timeout:g} s "
            "(MEGDET.TIMEOUT). Start the command on it too, with --machine-rank 0, give every "
            "machine its address and its own --machine-rank, and let the port through"
        ) from None


def _judge(store: TCPStore, num_machines: int, mine: dict, timeout: float) -> str:
    """Returns the fault of the machines that came, or ""."""
    came = {0: mine}
    for rank in range(1, num_machines):
        if not _wait(store, [f"flags/{rank}"], timeout):
            return (
                f"machine {rank} of {num_machines} did not come within {timeout:g} s "
                f"(MEGDET.TIMEOUT). Start the command on every machine, with --machine-rank 0 to "
                f"{num_machines - 1}"
            )
        came[rank] = json.loads(store.get(f"flags/{rank}"))
    for flag in mine:
        values = {rank: flags[flag] for rank, flags in came.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"machine {rank}: {value}" for rank, value in values.items())
            return f"the machines differ in {flag} ({listed}); give all the same"
    return ""


def _wait(store: TCPStore, keys: list[str], timeout: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError:  # too late, or the other end has closed
        return False
    return True


def _describe_taken(port: int, error: Exception) -> str:
    return (
        f"cannot listen on port {port} ({_first_line(error)}). Perhaps another training runs here: "
        "choose another port, or, with one machine, --dist-url auto"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


__getattr__ = renamed(__name__, meet="rendezvous")
