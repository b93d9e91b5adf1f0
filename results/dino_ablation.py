"""Record DINO with each of its three changes taken away, in small: two seeds, one core a run.

    python results/dino_ablation.py               all that is missing: about half an hour of two cores
    python results/dino_ablation.py --names "DINO, seed 0"
    python results/dino_ablation.py --list

The small scenes of results/why_slow.py, 1,200 steps, two levels. "Content from the box" makes the content of a query
from its proposal, as two stages do. "Without copies to refuse" has as many noised copies, all of them to be repaired.
"Forward once" stops the gradient between the layers.
"""
from dataclasses import dataclass, replace

from family_race import SIZES
from family_sampling import FEW_COPIES
from side_by_side import ROOT, run_missing
from torch import Tensor, nn

from detr_nb.family.denoising import NoisedQueries
from detr_nb.family.dino import DINO, ContrastiveNoise, MixedQueries
from detr_nb.family.focal import focal_criterion
from detr_nb.family.references import RefiningHead, reference_sine
from detr_nb.family.two_stage import ProposingQueries
from detr_nb.loading import ShapesData
from detr_nb.losses import SetCriterion, authors_criterion
from detr_nb.notation import Memory, Prediction, Queries
from detr_nb.runs import describe_run
from detr_nb.shapes import EASY
from detr_nb.training import TrainConfig, fit

WHAT = "DINO without one of its three changes: AP after 1,200 steps on small scenes"
SCENES = replace(EASY, size=64, min_side=0.2)  # as large as a core trains on in minutes
DATA = ShapesData(SCENES, train_images=8192, val_images=200, cache=".cache/scenes")


# --- each change undone -------------------------------------------------------------------------------------------
class BoxContents(ProposingQueries):
    """The cells that DINO chooses; the content of a query is made of its box."""

    def __init__(self, count: int, d: int, columns: int):
        super().__init__(count, d, columns)
        self.width, self.own = d // 2, nn.Sequential(nn.Linear(2 * d, d), nn.LayerNorm(d))

    def forward(self, memory: Memory, targets: object = None) -> Queries:
        """Boxes as in DINO, other contents."""
        found = self.propose(memory)
        chosen = self.best(found, found.logits.amax(-1))
        ref = chosen.boxes.detach()
        return Queries(self.own(reference_sine(ref, self.width)), ref=ref, proposals=chosen)


class RepairingNoise(ContrastiveNoise):
    """Every copy is to be repaired."""

    copies = 1


class ForwardOnceHead(RefiningHead):
    """The next layer counts from the moved reference without its gradient, too."""

    def refine(self, layer: int, content: Tensor, prediction: Prediction, ref: Tensor) -> tuple[Tensor, Tensor]:
        """The same place twice."""
        (moved, _) = super().refine(layer, content, prediction, ref)
        return moved, moved


@dataclass(frozen=True)
class BoxContentDINO(DINO):
    """DINO without mixed selection."""

    def queries(self, columns: int, memory: nn.Module) -> nn.Module:
        """Contents of boxes."""
        known = super().queries(columns, memory).known
        return NoisedQueries(BoxContents(self.num_queries, self.hidden_dim, columns), known)


@dataclass(frozen=True)
class RepairingDINO(DINO):
    """DINO without copies that must be refused."""

    def queries(self, columns: int, memory: nn.Module) -> nn.Module:
        """As many copies, all to be repaired."""
        noise = 2 * self.dn_number, self.dn_label_noise_ratio, self.dn_box_noise_scale
        chosen = MixedQueries(self.num_queries, self.hidden_dim, columns)
        return NoisedQueries(chosen, RepairingNoise(columns, self.hidden_dim, *noise))


@dataclass(frozen=True)
class ForwardOnceDINO(DINO):
    """DINO without the look ahead."""

    def decoder(self, columns: int, memory: nn.Module, queries: nn.Module) -> nn.Module:
        """Another head."""
        decoder = super().decoder(columns, memory, queries)
        decoder.head = ForwardOnceHead(self.hidden_dim, columns, 1e-3)
        return decoder


@dataclass(frozen=True)
class QuietDINO(DINO):
    """DINO without any denoising."""

    def queries(self, columns: int, memory: nn.Module) -> nn.Module:
        """The chosen cells alone."""
        return MixedQueries(self.num_queries, self.hidden_dim, columns)


@authors_criterion.register
def quiet_criterion(config: QuietDINO, model: nn.Module, **weights: object) -> SetCriterion:
    """DINO's loss, of which no part judges copies."""
    cells = focal_criterion(config, model, **{**weights, "suffix": "interm", "dec_layers": 1})
    return focal_criterion(config, model, **weights, extra={"proposals": cells})


# --- the runs -----------------------------------------------------------------------------------------------------
KINDS = {
    "DINO": DINO,
    "content from the box": BoxContentDINO,
    "without copies to refuse": RepairingDINO,
    "without denoising": QuietDINO,
    "forward once": ForwardOnceDINO,
}
NAMES = [f"{name}, seed {seed}" for seed in (0, 1) for name in KINDS]


def make(name: str) -> dict[str, object]:
    """Train, and return the row."""
    what, seed = name.rsplit(", seed ", 1)
    model = KINDS[what](**SIZES, **FEW_COPIES)
    run = fit(TrainConfig(DATA, model, steps=1200, seed=int(seed), evaluations=4, bf16=True, progress=False))
    return describe_run(run, WHAT, f'python results/dino_ablation.py --names "{name}"')


if __name__ == "__main__":
    run_missing(NAMES, make, ROOT / "results" / "dino_ablation.json", WHAT, __doc__)
