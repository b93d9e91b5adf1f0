"""Record the experiment "full training on a GPU": draw or read the data, train, evaluate, write one JSON file.

    python results/train_on_gpu.py                                      planned for twelve minutes of a card
    DETR_NB_DATA=... python results/train_on_gpu.py --data bccd
    python results/train_on_gpu.py --model DNDETR                       a descendant of DETR with the same sizes

The record (curve, images a second, memory, how busy the card was) is written every twenty seconds, and says
whether the run is finished. A run that was cut at any moment goes on when the command is given again, from a checkpoint
that is at most twenty seconds of training old. It ends by itself, saved, at the first row of the log after `--in_all`
minutes, and goes on in the same way: eight minutes of training and what comes on top are planned for twelve, which no
card has confirmed yet. Scenes and checkpoints are kept under .cache/, which git ignores.
`--anywhere` tries the whole way on a processor, at small size; its record stays under .cache/ too.
"""
import argparse
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryFile
from typing import IO

import torch

from detr_nb.config import find_kind
from detr_nb.files import json_text, replacing
from detr_nb.formats import Sizes, VocData
from detr_nb.loading import ShapesData
from detr_nb.model import DETRConfig, TinyConfig, TinyModel
from detr_nb.runs import Run, Terminated, describe_run
from detr_nb.shapes import HARD
from detr_nb.training import TrainConfig, fit

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(".cache")
SIZES = {"num_queries": 40, "hidden_dim": 256, "nheads": 8, "enc_layers": 3, "dec_layers": 6, "dim_feedforward": 1024,
         "dropout": 0.0}
LARGE = TinyModel(widths=(64, 128, 256, 512), strides=(4, 8, 16, 16), **SIZES)
COMMON = TrainConfig(model=LARGE, batch_size=32, evaluations=6, bf16=True, ema=0.999, weight_ce=5, save_every=20)
SMALL = {"batch_size": 4, "evaluations": 1, "log_every": 2, "save_every": 1, "scales": ()}


def scenes(small: bool) -> TrainConfig:
    """The hard setting at 512 pixels."""
    if small:
        return replace(COMMON, model=TinyModel(), data=ShapesData(replace(HARD, size=64), 32, 8, cache=".cache/scenes"))
    data = ShapesData(replace(HARD, size=512), train_images=4096, val_images=500, cache=".cache/scenes")
    return replace(COMMON, data=data)


def photographs(small: bool) -> TrainConfig:
    """BCCD at its full size, 480 x 640; the smaller sizes of the paper's rule are left out, as cells are small."""
    sizes = Sizes(short_sides=(400, 440, 480), longest=640, crop=(320, 480), before_crop=(440, 480, 520), eval_side=480)
    data = VocData(Path(os.environ["DETR_NB_DATA"]) / "bccd", sizes=sizes, workers=0 if small else 8)
    return replace(COMMON, data=data, batch_size=16, scales=())


def member(kind: str, small: bool) -> DETRConfig:
    """A descendant of DETR with the sizes of the DETR that is trained here."""
    plain = TinyModel() if small else COMMON.model
    sizes = {name: getattr(plain, name) for name in SIZES}
    return find_kind(kind, DETRConfig)(TinyConfig(plain.widths, plain.strides), temperature=20, **sizes)


DATA = {"shapes": scenes, "bccd": photographs}
QUERY = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "--loop=2"]


@contextmanager
def watched_card() -> Iterator[IO[str] | None]:
    """A file in which nvidia-smi notes every two seconds how busy the card is; None where there is no such program."""
    with TemporaryFile("w+") as notes:
        try:
            process = subprocess.Popen(QUERY, stdout=notes, stderr=subprocess.DEVNULL)
        except OSError:
            yield None
            return
        try:
            yield notes
        finally:
            process.terminate()
            process.wait()


def card_use(notes: IO[str] | None) -> dict[str, float] | None:
    """Mean share of the time in which the card worked, in per cent, and its highest memory in megabytes, so far."""
    if notes is None:
        return None
    notes.seek(0)
    rows = [line.split(",") for line in notes.read().splitlines()]
    whole = [[float(part) for part in row] for row in rows if len(row) == 2 and all(p.strip().isdigit() for p in row)]
    return {"busy": round(mean(r[0] for r in whole), 1), "memory_mb": max(r[1] for r in whole)} if whole else None


def write(run: Run, what: str, command: str, card: dict | None, earlier: float, begun: float, file: Path) -> None:
    """The record as far as the run has come; it may be cut off at any moment."""
    told = {"finished": run.progress == 1, "card": card, "seconds_in_all": round(earlier + time.time() - begun, 1)}
    row = describe_run(run, what, command) | told
    with replacing(file) as place:
        place.write(json_text(row, indent=1) + "\n")


def main() -> None:
    """Train and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="shapes")
    parser.add_argument("--model", help="a kind of `detr-nb models` that is built like DETR, such as DABDETR")
    parser.add_argument("--minutes", type=float, default=8, help="of training; drawing and evaluation come on top")
    parser.add_argument("--in_all", type=float, default=12, help="minutes after which it stops, saved")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="let torch compile the model")
    parser.add_argument("--anywhere", action="store_true", help="without a graphics card, small, without a record")
    args = parser.parse_args()
    os.chdir(ROOT)
    if not (args.anywhere or torch.accelerator.is_available()):
        parser.error("torch finds no graphics card; --anywhere tries the script without one")
    kind = f"_{args.model}" if args.model else ""
    name = f"gpu_{args.data}{kind}_{args.minutes:g}min_seed{args.seed}{'_small' * args.anywhere}"
    config = DATA[args.data](args.anywhere)
    if args.model:
        config = replace(config, model=member(args.model, args.anywhere))
    config = replace(config, minutes=args.minutes, seed=args.seed, compile=args.compile,
                     folder=str(CACHE / "runs" / name), **(SMALL if args.anywhere else {}))
    flags = f"--data {args.data} --minutes {args.minutes:g} --seed {args.seed}"
    flags += f"{f' --model {args.model}' if args.model else ''}{' --compile' if args.compile else ''}"
    command = f"python results/train_on_gpu.py {flags}"
    what = f"a larger {args.model or 'DETR'} from scratch on a graphics card, {args.data}"
    file = (CACHE / "runs" if args.anywhere else Path("results")) / f"{name}.json"
    earlier = json.loads(file.read_text("utf8"))["seconds_in_all"] if file.exists() else 0.0
    begun = written = time.time()
    with watched_card() as notes:
        def note(run: Run, least: float = 20) -> None:
            nonlocal written
            if run.progress < 1 and time.time() - begun >= 60 * args.in_all:
                run.stopping = True  # saved after this step, as if SIGTERM had come
            if run.stopping or time.time() - written >= least:
                write(run, what, command, card_use(notes), earlier, begun, file)
                written = time.time()

        try:
            run = fit(config, watch=note)
        except Terminated:
            if time.time() - begun < 60 * args.in_all:
                raise
            print(f"{name}: stopped after {args.in_all:g} minutes, and saved; the same command goes on")
            return
        note(run, least=0)
    print(f"{name}: {run.line()}; the record is {file}")


if __name__ == "__main__":
    main()
