"""The state of the project before its models had one description: what was saved then must load, go on and agree.

`python tests/stored.py` wrote tests/data/stored with the library of commit 2e2e108; it is not run again. The functions
below compute with today's library what was stored. Bits are those of one kind of processor and one release of torch:
there numbers are compared exactly, elsewhere closely.
"""

import json
import os
import platform
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from official import Reference, batch  # noqa: E402

from detr_nb.data import collate  # noqa: E402
from detr_nb.loading import ShapesData
from detr_nb.losses import SetCriterion  # noqa: E402
from detr_nb.model import (
    TinyModel,
    detr_tiny,  # noqa: E402
)
from detr_nb.shapes import EASY, Scenes  # noqa: E402
from detr_nb.training import TrainConfig, fit

STORED = Path(__file__).parent / "data" / "stored"
SMALL = {"num_queries": 4, "widths": (16, 16, 16), "hidden_dim": 16, "nheads": 2, "dec_layers": 2,
         "dim_feedforward": 16}


def processor() -> dict[str, str]:
    """What decides the last bits of a sum: processor, its instructions, torch."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    return {"processor": name, "instructions": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def small_model() -> nn.Module:
    """The model of the stored folder, as it was made."""
    torch.manual_seed(0)
    model = detr_tiny(num_classes=3, dropout=0.1, **SMALL).eval()
    model.names, model.category_ids, model.threshold = ["square", "disc", "star"], [3, 7, 9], 0.4
    return model


def config(folder: str = "") -> TrainConfig:
    """The stored run: twelve steps on drawn scenes, with dropout and a running average."""
    data = ShapesData(replace(EASY, size=64), train_images=22, val_images=5)
    return TrainConfig(data, TinyModel(dropout=0.1, **SMALL), steps=12, batch_size=4, evaluations=2, log_every=1,
                       ema=0.9, scales=((0.5, 0.75),), folder=folder, progress=False)


def answers(model: nn.Module, criterion: SetCriterion, images: Tensor, pad: Tensor, targets: list) -> dict[str, Tensor]:
    """Predictions, every loss and the norm of the gradient of one batch."""
    out = model(images, pad)
    losses = criterion(out, targets)
    model.zero_grad()
    criterion.total(losses).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"logits": out.logits, "boxes": out.boxes, "gradient": norm, **losses}


def tiny_answers() -> dict[str, Tensor]:
    """Those of the small trained model on eight scenes."""
    scenes = Scenes(EASY, 8, seed=5)
    made = collate([scenes[i] for i in range(8)])
    return answers(detr_tiny(pretrained=True), SetCriterion(6, dec_layers=3), made.images, made.pad,
                   made.targets)


def reference_answers() -> dict[str, Tensor]:
    """Those of the small reference on its odd sizes."""
    reference = Reference("detr_r18_small")
    images, pad = batch("image5_", (203, 251), (150, 217))
    return answers(reference.model(), SetCriterion(91, dec_layers=3), images, pad, reference.targets())


def plain(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors as arrays."""
    return {name: value.detach().numpy() for name, value in values.items()}


def stop_at_six(run) -> None:
    """Tell the run to end, as a machine does that is switched off."""
    if run.step == 6:
        os.kill(os.getpid(), signal.SIGTERM)


def curve(run) -> list[dict]:
    """The log without its seconds."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run.history]


def main() -> None:
    """Write everything."""
    torch.set_num_threads(1)
    shutil.rmtree(STORED, ignore_errors=True)
    STORED.mkdir()
    small_model().save_pretrained(STORED / "model")
    os.chdir(STORED)  # so that the configuration names no machine's folder
    try:
        fit(config("run"), watch=stop_at_six)
    except SystemExit:
        print("stopped")
    whole = fit(config())
    state = {name: float(value.double().sum()) for name, value in whole.model.state_dict().items()}
    images, pad = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 64, 64).bool()
    out = small_model()(images, pad)
    np.savez_compressed(STORED / "tiny.npz", **plain(tiny_answers()))
    np.savez_compressed(STORED / "reference.npz", **plain(reference_answers()))
    np.savez_compressed(STORED / "small.npz", logits=out.logits.detach(), boxes=out.boxes.detach())
    text = json.dumps({"processor": processor(), "curve": curve(whole), "sums": state}, indent=1)
    (STORED / "stored.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
