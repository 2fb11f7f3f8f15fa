"""Measures how exact synchronized batch norms are, and what they do on unusual inputs.

    python benchmarks/exactness.py
    python benchmarks/exactness.py --rows empty checkpoint --output result.json
    python benchmarks/exactness.py --devices cuda --rows "host waits" "N, H, W"   # in this order

It compares CGBN, Detectron2's NaiveSyncBatchNorm in both modes and torch's SyncBatchNorm with batch
norm of the pooled mini-batch in float64, on the same inputs. Each cell of the table starts new
processes, which end with it: some norms hang or abort, and that is a result too.

Most cells have three errors, each the largest over channels and ranks: of y in standard deviations,
of dx relative to the largest |dx|, of running_var relative to its value. The reference gets the
inputs as rounded to their dtype, so this rounding is no error of a norm.

The benchmark always runs on CPU, and also on a GPU if there is one: by NCCL if every process has a
GPU, by gloo if processes share one. SyncBatchNorm takes CPU tensors only in one process and in
evaluation. It prints a table, and with --output writes all answers as JSON, after every row.
"""

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import _functional_collectives as functional_collectives
from torch.utils.checkpoint import checkpoint

from megdet_d2 import CrossGPUBatchNorm
from megdet_d2._older_torch import CheckpointPolicy, create_selective_checkpoint_contexts
from megdet_d2.norm.batch_norm import name_layers
from megdet_d2.norm.collective import raise_if_out_of_step

NORMS = {
    "CGBN": CrossGPUBatchNorm,
    "NaiveSync": NaiveSyncBatchNorm,
    "NaiveSync N": partial(NaiveSyncBatchNorm, stats_mode="N"),
    "SyncBatchNorm": nn.SyncBatchNorm,
}
COLLECTIVE_TIMEOUT = 10  # seconds until the backend gives up waiting; its default is 30 minutes
HANGS = f"hangs, until the backend's limit of {COLLECTIVE_TIMEOUT} s"
LOST = "loses its peer"
LIMIT = 60  # seconds until the processes of a cell are killed
C = 8
EQUAL = [(2, C, 12, 10)] * 3
UNEQUAL = [(2, C, 12, 20), (3, C, 16, 10), (1, C, 6, 14)]
LARGE = [(2, C, 64, 48)] * 3
ONE_EMPTY = [(2, C, 12, 10), (0, C, 12, 10)]


# --- the measurements: every process calls one, with the norm and the device --------------------

Make = Callable[..., nn.Module]
Figures = dict[str, Any]
"""What a process reports: numbers or short texts by name."""


def pool_error(
    make: Make,
    device: torch.device,
    shapes: Sequence[tuple[int, ...]] = EQUAL,
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
    std: float = 1.0,
    differ: float = 0.0,
    steps: int = 1,
    groups: list[list[int]] | None = None,
    **options: Any,
) -> Figures:
    """Returns errors against the pooled batch of all ranks, or of the rank's group.

    They are those of the last of ``steps``.
    """
    rank, members = comm.get_rank(), list(range(comm.get_world_size()))
    if groups is not None:
        made = {tuple(ranks): dist.new_group(ranks) for ranks in groups}
        members = next(ranks for ranks in groups if rank in ranks)
        options["process_group"] = made[tuple(members)]
    layer: Any = make(C, **options).to(device)
    options.pop("process_group", None)
    reference = nn.BatchNorm1d(C, **options).double()
    for norm in (layer, reference):
        if norm.running_var is not None:
            norm.running_var.zero_()  # so that the error of one step is not hidden by the start
    for i in range(steps):
        xs, dys = random_parts(shapes, dtype, mean, std, differ, seed=i)
        y, dx = forward_backward(layer, xs[rank].to(device), dys[rank].to(device))
        sizes = [len(by_channel(xs[r])) for r in members]
        pooled = forward_backward(
            reference,
            torch.cat([by_channel(xs[r]) for r in members]),
            torch.cat([by_channel(dys[r]) for r in members]),
        )
        y_expected, dx_expected = (t.split(sizes)[members.index(rank)] for t in pooled)
    dx_scale = pooled[1].abs().max()
    errors = {
        "y": largest(by_channel(y) - y_expected),
        "dx": largest((by_channel(dx) - dx_expected) / dx_scale),
    }
    if reference.running_var is not None:
        running_var = layer.running_var.double().cpu()
        errors["running_var"] = largest(running_var / reference.running_var - 1)
    return errors


def counts(make: Make, device: torch.device) -> Figures:
    """Returns num_batches_tracked after three steps, and the error of the unbiased variance."""
    layer: Any = make(C).to(device)
    layer.running_var.zero_()
    xs, dys = random_parts([(1, C, 2, 2)] * dist.get_world_size())
    for _ in range(3):
        forward_backward(layer, xs[dist.get_rank()].to(device), dys[dist.get_rank()].to(device))
    # Expected after three steps with the same x and momentum 0.1, from 0.
    var = (1 - 0.9**3) * torch.cat([by_channel(x) for x in xs]).var(0)
    error = largest(layer.running_var.double().cpu() / var - 1)
    return {"num_batches_tracked": f"{layer.num_batches_tracked} of 3", "running_var": error}


def all_empty(make: Make, device: torch.device) -> Figures:
    """Returns what a step without any image changes."""
    layer = make(C).to(device)
    before = copy.deepcopy(layer.state_dict())
    empty = torch.zeros(0, C, 4, 4, device=device)
    forward_backward(layer, empty, empty)
    changed = [k for k, v in layer.state_dict().items() if not torch.equal(v, before[k])]
    finite = all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    return {
        "changed": ", ".join(changed) or "nothing",
        "gradients": "finite" if finite else "not finite",
    }


def one_inf(make: Make, device: torch.device) -> Figures:
    """Returns what a step with one infinite value does to the running statistics."""
    layer: Any = make(C).to(device)
    x = torch.randn(2, C, 4, 4, device=device)
    forward_backward(layer, x, x)
    before = copy.deepcopy(layer.state_dict())
    if dist.get_rank() == 1:
        x[0, 1, 2, 3] = math.inf
    forward_backward(layer, x, x)
    stats = [layer.running_mean, layer.running_var]
    if all(torch.equal(v, before[k]) for k, v in layer.state_dict().items()):
        state = "kept"
    else:
        state = "finite" if all(t.isfinite().all() for t in stats) else "not finite"
    skipped = getattr(layer, "num_batches_skipped", None)
    return {"running statistics": state, "counted": "no" if skipped is None else int(skipped)}


def collectives(make: Make, device: torch.device, channels: int) -> Figures:
    """Returns the name of each collective and the bytes of the buffer that it fills."""
    layer = make(channels).to(device)
    x = torch.randn(2, channels, 4, 4, device=device, requires_grad=True)
    with recorded_collectives() as forward:
        y = layer(x)
    with recorded_collectives() as backward:
        y.sum().backward()
    return {"forward": ", ".join(forward), "backward": ", ".join(backward)}


def host_waits(make: Make, device: torch.device) -> Figures:
    """Returns how often the host waits for the device, forward and backward."""
    layer = make(C).to(device)
    x = torch.randn(2, C, 16, 16, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    layer(x).backward(dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as forward:
        warnings.simplefilter("always")
        y = layer(x)
    with warnings.catch_warnings(record=True) as backward:
        warnings.simplefilter("always")
        y.backward(dy)
    return {"forward": len(forward), "backward": len(backward)}


def checkpointed(make: Make, device: torch.device, selective: bool) -> Figures | str:
    """Returns the updates of the running statistics and the collectives of a checkpointed step."""
    options: dict[str, Any] = {}
    if selective:
        if make is not CrossGPUBatchNorm:
            return "has no operator to save"
        options["context_fn"] = partial(create_selective_checkpoint_contexts, save_statistics)
    layer: Any = make(C, momentum=0.5).to(device)
    x = (torch.rand(EQUAL[0]) + 1).to(device).requires_grad_()
    everyone = x.detach().mean((0, 2, 3))
    dist.all_reduce(everyone)
    with recorded_collectives() as calls:
        y = checkpoint(nn.Sequential(layer, nn.ReLU()), x, use_reentrant=False, **options)
        y.sum().backward()
    # After k updates with momentum 1/2, from 0, the running mean is (1 - 2^-k) times the mean.
    left = 1 - (layer.running_mean / (everyone / dist.get_world_size())).mean()
    return {"updates": round(-math.log2(left)), "collectives": len(calls)}


def save_statistics(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Tells torch's checkpointing to save the result of CGBN's statistics operator."""
    if op is torch.ops.megdet_d2.statistics.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def compiled(make: Make, device: torch.device) -> Figures:
    """Returns the errors under torch.compile(fullgraph=True), and the number of graphs."""
    counter = CompileCounterWithBackend("aot_eager")

    def make_compiled(*args: Any, **options: Any) -> Any:
        return torch.compile(make(*args, **options), fullgraph=True, backend=counter)

    return {**pool_error(make_compiled, device), "graphs": counter.frame_count}


def evaluation(make: Make, device: torch.device) -> Figures:
    """Returns the difference from BatchNorm2d in evaluation."""
    x = torch.randn(EQUAL[0], device=device)
    expected = nn.BatchNorm2d(C).to(device).eval()(x)
    return {"difference from BatchNorm2d": largest(make(C).to(device).eval()(x) - expected)}


def double_backward(make: Make, device: torch.device) -> Figures:
    """Returns the error of the gradient of Σ dx², relative to its largest value."""
    rank = dist.get_rank()
    xs, dys = random_parts(EQUAL[: dist.get_world_size()])
    expected = penalty_gradient(
        nn.BatchNorm1d(C).double(),
        torch.cat([by_channel(x) for x in xs]),
        torch.cat([by_channel(dy) for dy in dys]),
    )
    found = penalty_gradient(make(C).to(device), xs[rank].to(device), dys[rank].to(device))
    expected = expected.split([len(by_channel(x)) for x in xs])[rank]
    return {"second gradient": largest((by_channel(found) - expected) / expected.abs().max())}


def out_of_step(
    make: Make, device: torch.device, widths: tuple[int, ...], path: tuple[str, ...]
) -> str:
    """Returns what happens if rank 0 runs stem, res and head, and the others those of ``path``."""
    parts: dict[str, nn.Module] = {}
    width = 3
    for name, channels in zip(("stem", "res", "head"), widths, strict=True):
        parts[name] = nn.Sequential(nn.Conv2d(width, channels, 1), make(channels))
        width = channels
    model: Any = name_layers(nn.ModuleDict(parts)).to(device)
    x = torch.randn(2, 3, 4, 4, device=device)
    for name in ("stem", "res", "head") if dist.get_rank() == 0 else path:
        x = model[name](x)
    x.square().sum().backward()
    raise_if_out_of_step()  # our Trainer calls it after a step; on CUDA, CGBN raises only here
    means: list[Any] = [None] * dist.get_world_size()
    norms: dict[str, Any] = {n: part.get_submodule("1") for n, part in model.items()}
    dist.all_gather_object(means, {n: norm.running_mean.tolist() for n, norm in norms.items()})
    mixed = means[0]["res"] == means[1]["head"]
    return "no error, res and head " + ("share statistics" if mixed else "keep apart")


# --- helpers of the measurements ----------------------------------------------------------------


def random_parts(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
    std: float = 1.0,
    differ: float = 0.0,
    seed: int = 0,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns x and dy of every rank, the same lists on each rank.

    On rank r, x has the standard deviation (1 + r differ) std and the mean (mean + r differ) std.
    """
    generator = torch.Generator().manual_seed(seed)
    xs, dys = [], []
    for rank in range(comm.get_world_size()):
        x, dy = torch.randn((2, *shapes[rank]), generator=generator, dtype=torch.float64)
        more = differ * rank
        xs.append(((x * (1 + more) + mean + more) * std).to(dtype))
        dys.append(dy.to(dtype))
    return xs, dys


def by_channel(x: torch.Tensor) -> torch.Tensor:
    """Returns (N, C, H, W) as (N·H·W, C) in float64 on the CPU."""
    return x.detach().double().cpu().movedim(1, -1).reshape(-1, x.shape[1])


def forward_backward(
    layer: nn.Module, x: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y and dx."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), torch.zeros_like(x) if x.grad is None else x.grad


def penalty_gradient(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of Σ dx² by x."""
    x = x.detach().clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), x)[0]


def largest(error: torch.Tensor) -> float:
    """Returns the largest |error|: NaN if there is a NaN, 0 if ``error`` is empty."""
    return error.abs().max().item() if error.numel() else 0.0


@contextlib.contextmanager
def recorded_collectives() -> Iterator[list[str]]:
    """Records collectives of torch.distributed, and its functional ones, called in the context."""
    calls: list[str] = []
    names = (
        "all_reduce all_gather all_gather_into_tensor all_gather_single all_gather_tensor "
        "all_gather_object all_to_all all_to_all_single broadcast gather reduce reduce_scatter "
        "reduce_scatter_tensor reduce_scatter_single scatter barrier"
    ).split()
    homes = (dist, functional_collectives)
    stock = {(home, n): getattr(home, n) for home in homes for n in names if hasattr(home, n)}

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            buffers = args[0] if isinstance(args[0], list) else [args[0]]
            size = sum(t.numel() * t.element_size() for t in buffers)
            calls.append(f"{name} {size:,} B")
            return function(*args, **kwargs)

        return call

    for (home, name), function in stock.items():
        setattr(home, name, recorded(name, function))
    try:
        yield calls
    finally:
        for (home, name), function in stock.items():
            setattr(home, name, function)


# --- the rows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the table: a measurement of every norm.

    Attributes:
        measure: takes how to make the norm, and the device.
        processes: number of ranks.
        devices: where it can be measured.
        init: start a process group.
    """

    name: str
    measure: Callable[[Make, torch.device], Figures | str]
    processes: int = 2
    devices: tuple[str, ...] = ("cpu", "cuda")
    init: bool = True


float32, bfloat16 = torch.float32, torch.bfloat16
ROWS = [
    Row("N, H, W differ by rank", partial(pool_error, shapes=UNEQUAL, differ=0.25), 3),
    Row("equal shapes", partial(pool_error)),
    Row("mean = 1e3 sigma, float32", partial(pool_error, shapes=LARGE, mean=1e3)),
    Row("mean = 1e4 sigma, float32", partial(pool_error, shapes=LARGE, mean=1e4)),
    Row(
        "mean = 3 sigma, bfloat16",
        partial(pool_error, shapes=LARGE, mean=3.0, dtype=bfloat16),
    ),
    Row(
        "mean = 30 sigma, bfloat16",
        partial(pool_error, shapes=LARGE, mean=30.0, dtype=bfloat16),
    ),
    Row(
        "variance 1e-8, eps 1e-3, mean 0",
        partial(pool_error, shapes=LARGE, std=1e-4, eps=1e-3),
    ),
    Row(
        "variance 1e-8, eps 1e-3, mean 1",
        partial(pool_error, shapes=LARGE, std=1e-4, mean=1e4, eps=1e-3),
    ),
    Row("one rank empty, float32", partial(pool_error, shapes=ONE_EMPTY)),
    Row(
        "one rank empty, bfloat16",
        partial(pool_error, shapes=ONE_EMPTY, dtype=bfloat16),
    ),
    Row("all ranks empty", all_empty),
    Row("one inf on one rank", one_inf),
    Row("collectives, C = 64", partial(collectives, channels=64)),
    Row("collectives, C = 64, 3 processes", partial(collectives, channels=64), 3),
    Row("collectives, C = 2048", partial(collectives, channels=2048)),
    Row("host waits for the device", host_waits, devices=("cuda",)),
    Row("trains on CPU, 3 steps", partial(pool_error, steps=3), devices=("cpu",)),
    Row("one process, CPU", pool_error, 1, devices=("cpu",)),
    Row("one process, CPU, no process group", pool_error, 1, ("cpu",), init=False),
    Row("evaluation", evaluation),
    Row("torch.utils.checkpoint", partial(checkpointed, selective=False)),
    Row("checkpoint, statistics saved", partial(checkpointed, selective=True)),
    Row("torch.compile fullgraph", compiled),
    Row("double backward", double_backward),
    Row("momentum=None, 3 steps", partial(pool_error, steps=3, momentum=None)),
    Row("affine=False", partial(pool_error, affine=False)),
    Row("track_running_stats=False", partial(pool_error, track_running_stats=False)),
    Row("counted, unbiased: 8 values", counts),
    Row("a group of 2, one of 1", partial(pool_error, groups=[[0, 1], [2]]), 3),
    Row(
        "rank 1 skips a layer, equal widths",
        partial(out_of_step, widths=(4, 4, 4), path=("stem", "head")),
    ),
    Row(
        "rank 1 skips a layer, another width",
        partial(out_of_step, widths=(4, 4, 70), path=("stem", "head")),
    ),
    Row(
        "rank 1 skips the last layer",
        partial(out_of_step, widths=(4, 4, 4), path=("stem", "res")),
    ),
    Row(
        "rank 1 swaps two layers",
        partial(out_of_step, widths=(4, 4, 4), path=("stem", "head", "res")),
    ),
]


# --- processes ----------------------------------------------------------------------------------


def attempt(row: Row, norm: str, device: str) -> list[dict[str, Any]]:
    """Measures a norm in new processes and returns the answer of every rank.

    An answer has a "value", or an "error" with its "message", or the "end" of a process that hangs
    or aborts. The processes are forked from a server that has imported everything, so they start
    fast. Their stderr is read only if they abort. All are killed before the call returns.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["detectron2.layers", "megdet_d2", "torch._dynamo.testing"])
    processes, answers = [], []  # with the pipe to each process
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(row.processes):
                ours, theirs = context.Pipe()
                args = (rank, ROWS.index(row), norm, device, folder, theirs)
                process = context.Process(target=serve, args=args, daemon=True)
                process.start()
                theirs.close()
                processes.append((process, ours))
            deadline = time.monotonic() + LIMIT
            for rank, (process, pipe) in enumerate(processes):
                try:
                    if pipe.poll(max(0.0, deadline - time.monotonic())):
                        answers.append(pipe.recv())
                    else:
                        answers.append({"end": f"hangs, ended after {LIMIT} s", "message": ""})
                except EOFError:
                    process.join()
                    code = process.exitcode or 0
                    end = f"exits with {code}"
                    if code < 0:
                        end = f"aborts ({signal.Signals(-code).name})"
                    message = Path(folder, f"stderr{rank}").read_text().strip()
                    answers.append({"end": end, "message": message})
        finally:
            for process, _ in processes:
                process.kill()
                process.join()
    return answers


def serve(rank: int, row: int, norm: str, device: str, folder: str, pipe: Any) -> None:
    """Measures in one process and sends the answer through ``pipe``.

    Args:
        row: index in ``ROWS``.
        folder: for stderr and for the store in which the processes meet.
    """
    with open(f"{folder}/stderr{rank}", "w") as file:
        os.dup2(file.fileno(), 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    processes, backend = ROWS[row].processes, "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        backend = "nccl" if torch.cuda.device_count() >= processes else "gloo"
    try:
        if ROWS[row].init:
            dist.init_process_group(
                backend,
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=processes,
                timeout=timedelta(seconds=COLLECTIVE_TIMEOUT),
            )
        answer = {"value": ROWS[row].measure(NORMS[norm], torch.device(device))}
    except Exception as error:
        # torch.compile appends the place in the user's code.
        message = str(error).partition("\nfrom user code")[0]
        answer = {"error": type(error).__name__, "message": message.strip()}
    pipe.send(answer)
    # The process stays until it is killed: if it ended, a peer that waits for it would fail.
    time.sleep(2 * LIMIT)


# --- the report ---------------------------------------------------------------------------------


def cell(answers: list[dict[str, Any]]) -> str:
    """Returns the largest figures over all ranks, or what happened on each rank."""
    values = [answer["value"] for answer in answers if isinstance(answer.get("value"), dict)]
    if len(values) == len(answers):
        return ", ".join(f"{key} {merged([v[key] for v in values])}" for key in values[0])
    texts = [in_words(answer) for answer in answers]
    if HANGS in texts and set(texts) <= {HANGS, LOST}:
        return HANGS  # which rank gives up first is chance
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))


def merged(figures: list[Any]) -> str:
    """Returns the largest of numbers, or all different texts."""
    if all(isinstance(figure, float) for figure in figures):
        text = "NaN" if any(map(math.isnan, figures)) else f"{max(figures):.2g}"
        return re.sub(r"e([-+])0?", lambda m: "e" + m[1].strip("+"), text)
    return " / ".join(dict.fromkeys(map(str, figures)))


def in_words(answer: dict[str, Any]) -> str:
    """Returns the answer of one rank as a short text."""
    if "value" in answer:
        return cell([answer]) if isinstance(answer["value"], dict) else answer["value"]
    if "end" in answer:
        return answer["end"]
    message = answer["message"]
    if "expected input tensor to be on GPU" in message:
        return "refuses CPU"
    if answer["error"] == "OutOfStepError":
        return f"OutOfStepError: {message.partition('. ')[2].partition('. ')[0] or message}"
    if "Timed out" in message:
        return HANGS
    if "closed by peer" in message or "reset by peer" in message:
        return LOST
    return answer["error"]


def processor() -> str:
    """Returns the name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown processor"


def choose(words: Sequence[str]) -> list[Row]:
    """Returns the rows with one of the words in their names, in the order of the words."""
    return list({id(r): r for word in words or [""] for r in ROWS if word in r.name}.values())


def main(args: argparse.Namespace) -> None:
    """Measures all rows, prints the tables and writes the JSON file."""
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    chosen, results, start = choose(args.rows), [], time.monotonic()
    for device in args.devices:
        for row in chosen:
            runs = device in here and device in row.devices
            for norm in NORMS:
                answers = attempt(row, norm, device) if runs else []
                text = cell(answers) if runs else "not run"
                if device not in row.devices:
                    text = "not run: CPU only" if device == "cuda" else "not run: GPU only"
                results.append((row.name, row.processes, device, norm, text, answers))
            if runs:
                print(f"{time.monotonic() - start:4.0f} s  {device}: {row.name}", file=sys.stderr)
                write(results, args.output)
        if device not in here:
            print("\nOn a GPU: not run, there is none here.")
            continue
        table = [
            [row.name, *(r[4] for r in results if r[0] == row.name and r[2] == device)]
            for row in chosen
        ]
        print(f"\nOn a {device.upper().replace('CUDA', 'GPU')}:\n")
        print(tabulate(table, ("", *NORMS), tablefmt="pipe", disable_numparse=True))
    write(results, args.output)


def write(results: Sequence[tuple], output: str) -> None:
    """Writes the results so far to the file ``output``, if it has a name."""
    if not output:
        return
    hardware = f"{processor()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        hardware += f"; {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    report = {
        "date": str(date.today()),
        "hardware": hardware,
        "torch": torch.__version__,
        "command": shlex.join(["python", *sys.argv]),
        "collective_timeout_s": COLLECTIVE_TIMEOUT,
        "limit_s": LIMIT,
        "columns": ["row", "processes", "device", "norm", "cell", "answers by rank"],
    }
    head = json.dumps(report, indent=1).removesuffix("\n}")
    # One result per line, so that the file can be read.
    lines = ",\n  ".join(json.dumps(result) for result in results)
    Path(output).write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows", nargs="*", default=[], metavar="WORD", help="only rows with one of these words"
    )
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), default=("cpu", "cuda"))
    parser.add_argument("--output", default="", metavar="FILE", help="also write JSON to this file")
    main(parser.parse_args())
