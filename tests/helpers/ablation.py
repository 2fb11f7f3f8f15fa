"""Replaces the trainings of an ablation by a script that writes their files."""

import csv
from pathlib import Path

from megdet_d2.ablation.rows import read_rows

TABLE3 = "configs/ablations/table3"
# Writes the files of a training that Detectron2 writes.
SCRIPT = """
import json, os, shutil, sys
args = sys.argv[1:]
value = lambda key: args[args.index(key) + 1]
folder = value("OUTPUT_DIR")
with open("{log}", "a") as log:
    log.write(folder + "\\n")
os.makedirs(folder, exist_ok=True)
shutil.copy("{config}." + os.path.basename(os.path.dirname(folder)), folder + "/config.yaml")
with open(folder + "/log.txt", "a") as file:
    file.write("Starting training from iteration 0\\n")
    if "half" in folder:
        file.write("FloatingPointError: Loss became infinite or NaN\\n")
if "half" in folder:
    sys.exit("FloatingPointError: Loss became infinite or NaN")
end = 5070
rows = [{{"iteration": end - 1, "total_loss": 1.0, "lr": 0.1, "time": 0.5}}]
if "linear" in folder or "{finish}":
    ap = 30.0 + float(value("SEED"))
    rows.append({{"iteration": end, "bbox/AP": ap, "bbox/AP50": 50.0, "bbox/AP75": 40.0}})
with open(folder + "/metrics.json", "w") as file:
    file.writelines(json.dumps(row) + "\\n" for row in rows)
"""


def write_script(listed, tmp_path, finish="yes", overrides=()):
    script, log, config = (tmp_path / name for name in ("train.py", "log", "config.yaml"))
    for row in read_rows(listed, overrides):
        Path(f"{config}.{row.name}").write_text(row.cfg.dump())
    script.write_text(SCRIPT.format(log=log, config=config, finish=finish))
    log.touch()
    return str(script), log


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
