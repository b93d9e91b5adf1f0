"""Try one change of the recipe at a time on the default setting, with one seed on one thread.

    python results/trials_on_shapes.py --workers 2

Trials in trials_on_shapes.json are not run again. Each takes five to six minutes of one core. The first series
changes a base at 22,400 images. The second starts from what had helped there and asks what pays in five minutes.
What helped became the recipe of detr_nb.training afterwards.
"""
from dataclasses import replace

from side_by_side import ROOT, run_missing

from detr_nb.loading import ShapesData
from detr_nb.model import TinyModel
from detr_nb.shapes import DEFAULT
from detr_nb.training import TrainConfig, fit

MODEL = TinyModel(
    num_queries=16, widths=(32, 64, 128), strides=(4, 8, 8), hidden_dim=128, nheads=4, enc_layers=1, dec_layers=3,
    dim_feedforward=256, dropout=0.0, pre_norm=True, temperature=20,
)
BASE = TrainConfig(
    data=ShapesData(DEFAULT, cache=".cache/scenes"), model=MODEL, steps=1400, batch_size=16, lr=1.5e-3,
    lr_backbone=1.5e-3, lr_muon=5e-3, beta2=0.95, weight_decay=1e-4, clip=0.1, warmup=0.03, weight_ce=5,
    final_weight_ce=1, no_object_weight=0.1, scales=(), evaluations=1, bf16=True, seed=0, progress=False,
)
DEEPER = (32, 64, 128, 128)
EQUAL_IMAGES = {
    "the base": BASE,
    "no-object weighs 0.3": replace(BASE, no_object_weight=0.3),
    "no-object weighs 0.6": replace(BASE, no_object_weight=0.6),
    "no-object weighs 1": replace(BASE, no_object_weight=1.0),
    "four decoder layers": replace(BASE, model=replace(MODEL, dec_layers=4)),
    "a fourth block in the backbone": replace(BASE, model=replace(MODEL, widths=DEEPER, strides=(4, 8, 8, 8))),
    "temperature 0.25: shorter waves": replace(BASE, model=replace(MODEL, temperature=0.25)),
    "a grid of 8 x 8": replace(BASE, model=replace(MODEL, strides=(4, 8, 16))),
    "two encoder layers": replace(BASE, model=replace(MODEL, enc_layers=2)),
    "dropout 0.1": replace(BASE, model=replace(MODEL, dropout=0.1)),
    "norms after the steps": replace(BASE, model=replace(MODEL, pre_norm=False)),
    "temperature 10,000": replace(BASE, model=replace(MODEL, temperature=10000)),
    "32 queries": replace(BASE, model=replace(MODEL, num_queries=32)),
    "AdamW for everything, rate 1e-3": replace(BASE, lr_muon=0, lr=1e-3, lr_backbone=1e-3),
    "cross-entropy weighs 1 throughout": replace(BASE, weight_ce=1),
    "cross-entropy weighs 5 throughout": replace(BASE, final_weight_ce=5),
    "AdamW's beta2 0.999": replace(BASE, beta2=0.999),
    "float32 throughout": replace(BASE, bf16=False),
    "24 images a step, 933 steps": replace(BASE, batch_size=24, steps=933),
}
FIVE = replace(BASE, minutes=5, no_object_weight=0.5)
SMALL = replace(FIVE, scales=((0.7, 0.75),), final_weight_ce=0.5)
EQUAL_MINUTES = {
    "no-object 0.5": FIVE,
    "pictures of 96 for half of the run": replace(FIVE, scales=((0.5, 0.75),)),
    "pictures of 96 for three quarters": replace(FIVE, scales=((0.75, 0.75),)),
    "of 64 for a quarter, of 96 to 0.65": replace(FIVE, scales=((0.25, 0.5), (0.65, 0.75))),
    "of 96 to 0.7, four decoder layers": replace(FIVE, scales=SMALL.scales, model=replace(MODEL, dec_layers=4)),
    "of 96 to 0.7, cross-entropy to 0.5": SMALL,
    "  and a fourth block": replace(SMALL, model=replace(MODEL, widths=DEEPER, strides=(4, 8, 8, 8))),
    "  and rates higher by 1.6": replace(SMALL, lr_muon=8e-3, lr=2.4e-3, lr_backbone=2.4e-3),
    "  and 24 images a step": replace(SMALL, batch_size=24),
    "  and 24 images, rates times 0.7": replace(SMALL, batch_size=24, lr_muon=3.5e-3, lr=1.1e-3, lr_backbone=1.1e-3),
    "  and 32 images a step": replace(SMALL, batch_size=32),
}
TRIALS = EQUAL_IMAGES | EQUAL_MINUTES


def make(name: str) -> dict:
    """Train one trial and return its row."""
    run = fit(TRIALS[name])
    metrics = {key: round(run.metrics[key], 4) for key in ("AP", "AP50", "AP75", "AP_small", "AP_medium")}
    about = {"minutes": run.config.minutes, "steps": run.step}
    return {**about, "milliseconds_per_step": round(1000 * run.seconds / run.step, 1), **metrics}


if __name__ == "__main__":
    run_missing(list(TRIALS), make, ROOT / "results" / "trials_on_shapes.json",
                "one change of the recipe at a time, default setting, one seed, one thread, two trials side by side",
                __doc__, say=lambda row: f"AP {row['AP']:.3f}  {row['steps']} steps")
