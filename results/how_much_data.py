"""How AP grows with the number of images, with the length of the training, and with augmentation.

    python results/how_much_data.py                all that is missing
    python results/how_much_data.py --list

Two runs go side by side, a core each; the longest takes some five minutes, and memory stays under 3 GB.
"""
from dataclasses import asdict, dataclass

from side_by_side import ROOT, run_missing

from detr_nb.evaluation import evaluate
from detr_nb.loading import MemoryDataset, MemoryLoader, ShapesData
from detr_nb.shapes import EASY
from detr_nb.training import TrainConfig, fit

AMOUNTS, STEPS, SEEDS = (100, 400, 1600, 6400, 16000), 600, (0, 1)
LENGTHS = (150, 300, 600, 1200)


class AsDrawn(MemoryDataset):
    """Scenes that are never turned."""

    def loader(self, batch_size: int, seed: int = 0) -> MemoryLoader:
        """Batches to train on, without symmetries."""
        return MemoryLoader(self, batch_size, seed, augment=False)


@dataclass(frozen=True)
class NeverTurned(ShapesData):
    """Scenes to learn from as they were drawn, without flips and transpositions."""

    def load(self) -> tuple[MemoryDataset, MemoryDataset]:
        """The series to learn from, and the held-out one."""
        train, held_out = super().load()
        return AsDrawn(train.images, train.targets, train.names, train.category_ids), held_out


def config(images: int, steps: int, turned: bool, seed: int) -> TrainConfig:
    """One run; all series begin with the same scenes."""
    source = ShapesData if turned else NeverTurned
    return TrainConfig(data=source(EASY, train_images=images, cache=".cache/scenes"), steps=steps, evaluations=1,
                       bf16=True, seed=seed, progress=False)


def title(images: int, steps: int, turned: bool, seed: int) -> str:
    """What a run is called."""
    return f"{images} images, {steps} steps, {'turned' if turned else 'as drawn'}, seed {seed}"


PLAN = [(images, STEPS, True, seed) for seed in SEEDS for images in AMOUNTS]
PLAN += [(AMOUNTS[-1], steps, True, seed) for seed in SEEDS for steps in LENGTHS if steps != STEPS]
PLAN += [(images, STEPS, False, seed) for seed in SEEDS for images in AMOUNTS[::2]]
RUNS = {title(*row): row for row in PLAN}


def make(name: str) -> dict[str, object]:
    """Train one setting and return its row, with AP on images that it learned from, too."""
    images, steps, turned, seed = RUNS[name]
    run = fit(config(images, steps, turned, seed))
    seen, _ = run.config.data.load()
    few = MemoryDataset(seen.images[:500], seen.targets[:500], seen.names, seen.category_ids)
    kinds = ("AP", "AP50", "AP75", "AP_small", "AP_medium")
    return {
        "images": images, "steps": run.step, "turned": turned, "seed": seed, "config": asdict(run.config),
        "epochs": round(run.step / run.epoch_steps, 1), "seconds": round(run.seconds, 1),
        "metrics": {kind: round(run.metrics[kind], 4) for kind in kinds},
        "on_seen_images": round(evaluate(run.model, few)["AP"], 4),
    }


if __name__ == "__main__":
    run_missing(list(RUNS), make, ROOT / "results" / "how_much_data.json",
                "AP by number of images, by steps, with and without symmetries; easy scenes, two seeds", __doc__)
