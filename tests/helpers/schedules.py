"""Lists the schedules of the paper, for COCO of 118,000 images; runs a schedule."""

import torch

import megdet_d2

GPUS_PER_MACHINE = 8

# iterations = floor(epochs x 118,000 / batch); learning rate = 0.02 x batch / 16.
# batch: (GPUs, LR, iterations, decays, warm-up's iterations and start)
NORMAL = {
    16: (8, 0.02, 81125, (59000, 73750), 7375, 1.0),
    32: (16, 0.04, 40562, (29500, 36875), 3687, 0.5),
    64: (32, 0.08, 20281, (14750, 18437), 1843, 0.25),
    128: (64, 0.16, 10140, (7375, 9218), 921, 0.125),
    256: (128, 0.32, 5070, (3687, 4609), 460, 0.0625),
}
LONG = {
    16: (8, 0.02, 132750, (81125, 103250, 125375), 7375, 1.0),
    32: (16, 0.04, 66375, (40562, 51625, 62687), 3687, 0.5),
    64: (32, 0.08, 33187, (20281, 25812, 31343), 1843, 0.25),
    128: (64, 0.16, 16593, (10140, 12906, 15671), 921, 0.125),
    256: (128, 0.32, 8296, (5070, 6453, 7835), 460, 0.0625),
}


def learning_rates(cfg, build=megdet_d2.build_lr_scheduler):
    """Returns the learning rate of each iteration of a resolved config."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build(cfg, optimizer)
    rates = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates
