"""Measures updates of small detectors in 1, 2, 4 and 8 gloo processes of this machine.

The planner fits itself on 1 to 4 processes and predicts 8; see docs/planning.md. Every
process trains the same images again and again, so that nothing varies but the processes. Run it on
an idle machine: it takes about five minutes on two cores.

  python benchmarks/planner_gloo.py
"""

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from megdet_d2 import Trainer, configure_cgbn, load_config
from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.planner.collectives import time_all_reduces
from megdet_d2.planner.memory_step import make_batch

ROOT = Path(__file__).parents[1]
PROCESSES = (1, 2, 4, 8)
IMAGES, SIZE, OBJECTS = 2, (64, 96), 4
WARM_UP = 2
"""Updates before those that count."""
SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.BACKBONE.FREEZE_AT", "0",
    "MODEL.FPN.OUT_CHANNELS", "64", "MODEL.CGBN.BN_SIZE", "-1",
]  # fmt: skip
BOX = ["MODEL.ROI_BOX_HEAD.FC_DIM", "128", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64",
       "MODEL.RPN.POST_NMS_TOPK_TRAIN", "100", "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "200"]  # fmt: skip
FROZEN = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""]
MODELS = {
    "Faster R-CNN": ("Base-MegDet-R50-FPN.yaml", BOX),
    "Faster R-CNN, frozen norms": ("Base-MegDet-R50-FPN.yaml", [*BOX, *FROZEN]),
    "Faster R-CNN, wide box head": (
        "Base-MegDet-R50-FPN.yaml", [*BOX, *FROZEN, "MODEL.ROI_BOX_HEAD.FC_DIM", "2048"],
    ),
    "Mask R-CNN": (
        "Base-MegDet-Mask-R50-FPN.yaml",
        [*BOX, "MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.ROI_MASK_HEAD.NUM_CONV", "2"],
    ),
    "RetinaNet": ("Base-MegDet-RetinaNet-R50-FPN.yaml", ["MODEL.RETINANET.NUM_CONVS", "1"]),
}  # fmt: skip


def main() -> None:
    """Measures all models with all numbers of processes; writes the record and the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--updates", type=int, default=12, help="that count (default 12)")
    add("--models", nargs="*", default=list(MODELS), choices=MODELS)
    add("--processes", type=int, nargs="*", default=PROCESSES)
    add("--output", type=Path, help="record (default docs/results/planner_gloo_<date>.json)")
    add("--table", type=Path, default=ROOT / "megdet_d2/planner/gloo.csv")
    args = parser.parse_args()
    date = datetime.date.today().isoformat()
    output = args.output or ROOT / f"docs/results/planner_gloo_{date}.json"
    began = time.perf_counter()
    rows: list[dict] = []
    load = os.getloadavg()[0]
    for processes in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                train, (processes, folder, args.models, args.updates), nprocs=processes
            )
            rows += json.loads(Path(folder, "rows.json").read_text())
        for row in rows[-len(args.models) :]:
            print(f"{row['processes']} x {row['model']}: {1e3 * row['seconds']:.0f} ms", flush=True)
    record = {
        "command": "python benchmarks/planner_gloo.py",
        "date": date,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "load before": round(load, 2),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "images per process": IMAGES,
        "updates": args.updates,
        "all-reduce of two processes, seconds by bytes": time_all_reduces(2, "cpu"),
        "rows": rows,
    }
    output.write_text(json.dumps(record, indent=1) + "\n")
    with open(args.table, "w", newline="") as file:
        names = ("model", "processes", "cores", "layers", "parameters", "seconds")
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"Written: {output}, {args.table}. Now run  python scripts/planner_page.py")


def train(rank: int, processes: int, folder: str, models: list[str], updates: int) -> None:
    """Trains each model in this process; rank 0 writes the median seconds of an update."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
    )
    comm.create_local_process_group(processes)
    rows = []
    for name in models:
        torch.manual_seed(0)
        file, opts = MODELS[name]
        cfg = load_config(ROOT / "configs" / file, [*SMALL, *opts])
        row = {"model": name, "processes": processes, "cores": len(os.sched_getaffinity(0))}
        rows.append(row | time_updates(cfg, processes, updates))
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def time_updates(cfg: CfgNode, processes: int, updates: int) -> dict[str, float]:
    """Returns layers of CGBN, parameters that are trained, and the median seconds of an update."""
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = IMAGES * processes, 1e-8  # it learns nothing
    model = configure_cgbn(Trainer.build_model(cfg).train(), cfg, IMAGES)
    layers = len(cgbn_layers(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if processes > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, find_unused_parameters=True
        )
    batch = make_batch(cfg, IMAGES, SIZE, OBJECTS)
    generator = torch.Generator().manual_seed(1)
    for image in batch:
        image["image"] = torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8)
    optimizer = Trainer.build_optimizer(cfg, model)
    trainer = SimpleTrainer(model, [batch] * (updates + WARM_UP), optimizer)
    seconds = []
    with EventStorage() as trainer.storage:
        for trainer.iter in range(updates + WARM_UP):
            torch.manual_seed(trainer.iter)  # the same regions in every process
            dist.barrier()
            began = time.perf_counter()
            trainer.run_step()
            dist.barrier()
            seconds.append(time.perf_counter() - began)
    return {
        "layers": layers,
        "parameters": trained,
        "seconds": statistics.median(seconds[WARM_UP:]),
        "spread": statistics.stdev(seconds[WARM_UP:]),
    }


if __name__ == "__main__":
    main()
