"""Record the experiment "full training on a GPU": one data set, one budget, one seed, one JSON file.

    python results/train_on_gpu.py --data shapes --minutes 20
    DETR_NB_DATA=... python results/train_on_gpu.py --data bccd --minutes 20

A run that was stopped goes on when the command is given again. Scenes and checkpoints are kept under .cache/, which git
ignores. It needs a graphics card; `--minutes 0.1 --anywhere` tries it on a processor and records nothing.
"""
import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from detr_nb.formats import Sizes, VocData
from detr_nb.loading import ShapesData
from detr_nb.model import TinyModel
from detr_nb.runs import write_record
from detr_nb.shapes import HARD
from detr_nb.training import TrainConfig, fit

ROOT = Path(__file__).resolve().parents[1]
LARGE = TinyModel(num_queries=40, widths=(64, 128, 256, 512), strides=(4, 8, 16, 16), hidden_dim=256, nheads=8,
                  enc_layers=3, dec_layers=6, dim_feedforward=1024, dropout=0.0)
COMMON = TrainConfig(model=LARGE, batch_size=32, evaluations=10, bf16=True, ema=0.999, weight_ce=5, save_every=120)


def scenes() -> TrainConfig:
    """The hard setting at 512 pixels."""
    data = ShapesData(replace(HARD, size=512), train_images=8192, cache=".cache/scenes")
    return replace(COMMON, data=data)


def photographs() -> TrainConfig:
    """BCCD at its full size, 480 x 640; the smaller sizes of the paper's rule are left out, as cells are small."""
    sizes = Sizes(short_sides=(400, 440, 480), longest=640, crop=(320, 480), before_crop=(440, 480, 520), eval_side=480)
    folder = Path(os.environ["DETR_NB_DATA"]) / "bccd"
    return replace(COMMON, data=VocData(folder, sizes=sizes, workers=8), batch_size=16, scales=())


DATA = {"shapes": scenes, "bccd": photographs}


def main() -> None:
    """Train and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="shapes")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="let torch compile the model")
    parser.add_argument("--anywhere", action="store_true", help="without a graphics card, and without a record")
    args = parser.parse_args()
    os.chdir(ROOT)
    if not (args.anywhere or torch.accelerator.is_available()):
        parser.error("torch finds no graphics card; --anywhere tries the script without one")
    name = f"gpu_{args.data}_{args.minutes:g}min_seed{args.seed}"
    config = replace(DATA[args.data](), minutes=args.minutes, seed=args.seed, compile=args.compile,
                     folder=f".cache/runs/{name}")
    if args.anywhere:
        config = replace(config, batch_size=2, evaluations=1, folder="", data=replace(config.data))
    run = fit(config)
    flags = f"--data {args.data} --minutes {args.minutes:g} --seed {args.seed}{' --compile' if args.compile else ''}"
    if not args.anywhere:
        what = f"a larger DETR from scratch on a graphics card, {args.data}, {args.minutes:g} minutes"
        write_record(run, what, f"python results/train_on_gpu.py {flags}", Path("results") / f"{name}.json")
    print(name, run.line())


if __name__ == "__main__":
    main()
