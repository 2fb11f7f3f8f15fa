"""Trains a LazyConfig with CGBN, saves and evaluates it.

python examples/lazy_train.py --config-file examples/lazy_digits.py train.max_iter=200
"""

from argparse import Namespace

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    HookBase,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

import megdet_d2


class CGBNHook(HookBase):
    def after_backward(self) -> None:
        megdet_d2.raise_if_out_of_step()  # on GPUs; on CPUs the layers themselves raise

    def after_train(self) -> None:
        # BN groups have different running statistics. Every process has to call this.
        megdet_d2.average_statistics(self.trainer.model)


def main(args: Namespace) -> dict:
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    default_setup(cfg, args)

    model = instantiate(cfg.model).to(cfg.train.device)
    images_per_gpu = cfg.dataloader.train.total_batch_size // comm.get_world_size()
    megdet_d2.set_bn_size(model, cfg.BN_SIZE, images_per_gpu)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir)
    checkpointer.load(cfg.train.init_checkpoint)

    distributed = comm.get_world_size() > 1
    trained = DistributedDataParallel(model, broadcast_buffers=False) if distributed else model
    trainer = SimpleTrainer(trained, instantiate(cfg.dataloader.train), optimizer)
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
    trainer.register_hooks(
        [
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            CGBNHook(),
            hooks.PeriodicWriter(writers) if comm.is_main_process() else None,
        ]
    )
    trainer.train(0, cfg.train.max_iter)

    if comm.is_main_process():
        checkpointer.save("model_final")
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    return inference_on_dataset(model, loader, evaluator)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    megdet_d2.launch(main, args)
