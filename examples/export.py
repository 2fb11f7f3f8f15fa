"""Exports a trained detector as TorchScript, and compares what both detect in one image.

python examples/export.py output/demo

The exported file needs torch and torchvision, neither Detectron2 nor this plugin.
"""

import argparse
from pathlib import Path

import torch
import torchvision  # noqa: F401  # the exported detector calls its NMS
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_test_loader
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model

import megdet_d2
from megdet_d2.data import register_datasets


def export(run: Path) -> Path:
    """Writes RUN/model.ts and returns its path.

    Args:
        run: OUTPUT_DIR of a training.
    """
    cfg = megdet_d2.load_config(run / "config.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(str(run / "model_final.pth"))
    megdet_d2.revert_cgbn(model)  # plain batch norms: the same numbers, and no process groups

    register_datasets(cfg, ("TEST",))
    image = next(iter(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])))[0]["image"]
    # Detectron2's adapter turns the detector's list of dicts into tensors, which can be traced.
    adapter = TracingAdapter(
        model, [{"image": image}], lambda m, inputs: m.inference(inputs, do_postprocess=False)
    )
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs)
        expected = adapter(*adapter.flattened_inputs)
    path = run / "model.ts"
    traced.save(str(path))

    found = torch.jit.load(str(path))(image)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    print(f"{path} detects the same {len(found[0])} objects as {run / 'model_final.pth'}")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="OUTPUT_DIR of a training")
    export(parser.parse_args().run)
