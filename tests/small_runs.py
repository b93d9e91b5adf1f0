"""Small training runs that processes of their own can start: what they learn from, and what befalls them."""

import os
import resource
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision.ops import FrozenBatchNorm2d

from detr_nb.cache import render_scenes
from detr_nb.config import ModelConfig, find_kind
from detr_nb.data import Preprocess
from detr_nb.evaluation import evaluate
from detr_nb.formats import CocoData, Sizes
from detr_nb.loading import Augmented, DataConfig, MemoryDataset
from detr_nb.model import DETR, TinyConfig, TinyModel
from detr_nb.runs import find_accelerator
from detr_nb.shapes import EASY, Scenes
from detr_nb.steps import accumulate_gradients, ready_to_train
from detr_nb.training import TrainConfig, build_criterion, create_run, fit

SIZES = TinyModel(num_queries=4, widths=(16, 16, 16), hidden_dim=16, nheads=2, dec_layers=2, dim_feedforward=16,
                  dropout=0.1)


@dataclass(frozen=True)
class Drawn(DataConfig):
    """A few scenes, drawn in this process."""

    count: int = 22

    def load(self) -> tuple[MemoryDataset, MemoryDataset]:
        """Scenes to learn from, and five others."""
        return series(self.count, 1), series(5, 2)


def series(count: int, seed: int, **changes: object) -> MemoryDataset:
    """Some scenes, which may differ from the easy ones."""
    scenes = Scenes(replace(EASY, size=64, **changes), count, seed)
    return MemoryDataset(*render_scenes(scenes, workers=1), scenes.names, scenes.category_ids)


class Dying(Dataset):
    """Scenes of which one takes the process that reads it down."""

    def __init__(self):
        self.scenes = series(22, 1)
        self.names, self.category_ids = self.scenes.names, self.scenes.category_ids

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int):
        if index == 7:
            os._exit(1)
        return self.scenes[index]


@dataclass(frozen=True)
class Deadly(DataConfig):
    """Scenes read by a worker, which dies of one of them."""

    def load(self) -> tuple[Augmented, MemoryDataset]:
        """The scenes, and five others."""
        return Augmented(Dying(), None, Preprocess(size=(64, 64)), workers=1), series(5, 2)


def frozen_norms(model: DETR) -> DETR:
    """The model with every batch norm replaced by a frozen one."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(part, name, FrozenBatchNorm2d(child.num_features))
    return model


@dataclass(frozen=True)
class Frozen(ModelConfig):
    """The small model without batch norm, whose means would differ between parts of a batch, and without dropout."""

    def build(self, num_classes: int) -> DETR:
        """Make it, and replace every batch norm by a frozen one."""
        return frozen_norms(replace(SIZES, dropout=0.0).build(num_classes))


CONFIG = TrainConfig(Drawn(), SIZES, steps=240, batch_size=4, evaluations=2, log_every=7, ema=0.9, save_every=0.02,
                     scales=(), progress=False)
SHARED = replace(CONFIG, model=Frozen(), steps=12, lr_muon=0, ema=0, save_every=60)


def train(folder: str) -> None:
    """One run from its start or from where it was killed."""
    torch.set_num_threads(1)
    fit(replace(CONFIG, folder=folder))


def train_and_save_each_step(folder: str) -> None:
    """One run of 25 steps, each of which is saved."""
    torch.set_num_threads(1)
    fit(replace(CONFIG, steps=25, save_every=0, folder=folder))


def train_with_workers(pictures: str, folder: str) -> None:
    """A long run whose pictures are read by two processes; exits with 7 if one of these dies."""
    torch.set_num_threads(1)
    places = [Path(pictures) / name / part for name in ("train", "val") for part in ("images", "annotations.json")]
    data = CocoData(*places, sizes=Sizes((64,), 64, (), eval_side=64), workers=2)
    seen = Path(folder) / "seen"
    config = replace(CONFIG, data=data, steps=5000, evaluations=0, save_every=3600, log_every=4, folder=folder)
    try:
        fit(config, watch=lambda run: seen.touch())
    except RuntimeError as error:
        sys.exit(7 if "DataLoader worker" in str(error) else 8)


def train_with_little_disk(folder: str) -> None:
    """One run that may write no file of more than a hundred kilobytes; exits with 5 if that is said clearly."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        train(folder)
    except OSError as error:
        sys.exit(5 if "could not be written" in str(error) and "unharmed" in str(error) else 6)


def gradients(config: TrainConfig, parts: int, mean_of_means: bool = False) -> dict[str, object]:
    """Losses and gradient of the first batch, in this number of parts in each process, and the held-out figures."""
    team, (train_set, val) = find_accelerator(), config.data.load()
    run = create_run(config, train_set, team)
    batch = next(train_set.loader(7, 0).epoch(0, share=(team.process_index, team.num_processes)))
    groups = [[part] for part in batch.split(parts)] if mean_of_means else [batch.split(parts)]
    with ready_to_train(run.model, team) as model:
        for group in groups:
            losses = accumulate_gradients(model, build_criterion(config, run.model), group, team)
    gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()]) / len(groups)
    total = float(team.reduce(losses["total"].clone(), "mean"))
    return {"gradient": gradient, "total": total, "metrics": repr(evaluate(run.model, val, 2, shared=True))}


@dataclass(frozen=True)
class Lonely(DataConfig):
    """Four scenes, of which one has objects."""

    def load(self) -> tuple[MemoryDataset, MemoryDataset]:
        """Four scenes to learn from, and five others."""
        drawn = series(4, 1)
        nothing = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
        targets = [drawn.targets[0], *({**target, **nothing} for target in drawn.targets[1:])]
        return MemoryDataset(drawn.images, targets, drawn.names, drawn.category_ids), series(5, 2)


LONELY = replace(CONFIG, data=Lonely(), steps=3, evaluations=0, ema=0, log_every=1)
MEMBERS = ("FocalDETR", "ConditionalDETR", "AnchorDETR", "DABDETR", "SMCADETR", "DNDETR")


def lonely_member(kind: str) -> ModelConfig:
    """A member of the family of the size of `SIZES`."""
    sizes = {name: getattr(SIZES, name) for name in ("num_queries", "nheads", "dec_layers", "dim_feedforward")}
    body = TinyConfig(SIZES.widths, SIZES.strides)
    return find_kind(kind, ModelConfig)(body, hidden_dim=32, enc_layers=1, temperature=20, **sizes)


def two_processes(folder: str) -> None:
    """What `test_distributed` compares: gradients, figures, members of the family of which one process sees no object,
    and a run that is told to end after seven steps."""
    torch.set_num_threads(1)
    for kind in MEMBERS:
        run = fit(replace(LONELY, model=lonely_member(kind)))
        row = [run.step, run.history[-1]["total"], run.model.state_dict()]
        torch.save(row, Path(folder) / f"{kind}{find_accelerator().process_index}.pt")
    found = {parts: gradients(SHARED, parts) for parts in (1, 2)}
    if find_accelerator().is_main_process:
        torch.save(found, Path(folder) / "gradients.pt")

    def tell(run):
        if run.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    code = 0
    try:
        fit(replace(SHARED, folder=str(Path(folder) / "run")), watch=tell)
    except SystemExit as end:
        code = end.code
    (Path(folder) / f"code{find_accelerator().process_index}").write_text(str(code))


def wait_for(path: Path, seconds: float = 60) -> None:
    """Until a file is there."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
