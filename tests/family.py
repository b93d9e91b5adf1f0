"""Members of the family beside the authors' recorded outputs: their checkpoint is written, loaded, and compared."""

from argparse import Namespace
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import torch
from official import Reference, batch, official_weights
from torch import Tensor, nn
from torch.testing import assert_close

from detr_nb.config import ModelConfig
from detr_nb.losses import criterion_for
from detr_nb.model import DETR, RecordedDraws, SigmoidScores
from detr_nb.pretrained import load_pretrained

SIZES = {"hidden_dim": 16, "nheads": 2, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 16, "dropout": 0.0}
LOSSES = ("loss_ce", "loss_bbox", "loss_giou")
BATCHES = {"": ("image0_", (192, 256), (160, 224)), "odd/": ("image5_", (203, 251), (150, 217))}


def pictures(count: int = 2, height: int = 64, width: int = 96) -> Tensor:
    """Random numbers, always the same."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def lively(config: ModelConfig) -> DETR:
    """A model whose boxes move; those of a fresh one stay where they start."""
    torch.manual_seed(0)
    model = config.build(3)
    nn.init.normal_(model.head.boxes[-1].weight, std=0.2)
    return model.eval()


class Member(Reference):
    """A member with the authors' weights of a reference, read from a checkpoint such as their programs save.

    Args:
        name: of the reference under tests/data.
        config: ours for the same model.
        folder: where the checkpoint is written.
    """

    def __init__(self, name: str, config: ModelConfig, folder: Path):
        super().__init__(name)
        self.config = config
        self.file = folder / f"{name}.pth"
        torch.save({"model": official_weights(name), "args": Namespace(**self.args)}, self.file)

    @cached_property
    def loaded(self) -> DETR:
        """Our model with the weights of the file, read once."""
        classes = self["pred_logits"].shape[-1] - self.config.scores().spare
        return load_pretrained(self.config.build(classes), self.file).eval()

    def model(self) -> DETR:
        """A copy of it, to be changed."""
        return deepcopy(self.loaded)

    def check_predictions(self) -> None:
        """All layers of a padded batch, of sizes that are no multiple of the stride, and of one image alone."""
        model = self.model()
        with torch.no_grad():
            for key, (name, *sizes) in BATCHES.items():
                out = model(*batch(name, *sizes))
                assert_close(out.logits[:-1], self[f"{key}aux_logits"], atol=5e-4, rtol=0)
                assert_close(out.boxes[:-1], self[f"{key}aux_boxes"], atol=1e-4, rtol=0)
                assert_close(out.logits[-1], self[f"{key}pred_logits"], atol=5e-4, rtol=0)
                assert_close(out.boxes[-1], self[f"{key}pred_boxes"], atol=1e-4, rtol=0)
            alone = model(*batch("image0_", (192, 256)))
        assert_close(alone.logits[-1], self["single0/pred_logits"], atol=5e-4, rtol=0)
        assert_close(alone.boxes[-1], self["single0/pred_boxes"], atol=1e-4, rtol=0)

    def check_losses(self) -> None:
        """Matches equal, losses to one in a thousand, their weighted sum too."""
        model, targets = self.model(), self.targets()
        with torch.no_grad():
            out = model(*batch(*BATCHES[""]))
            criterion = criterion_for(model)
            found = criterion.matcher(out, targets)
            losses = criterion(out, targets)
        for ours, theirs in zip(found, self.matches(), strict=True):
            for (queries, objects), pairs in zip(ours, theirs, strict=True):
                order, other = queries.argsort(), pairs[0].argsort()
                assert_close(torch.stack((queries[order], objects[order])), pairs[:, other], check_dtype=False)
        for name, value in self.under("loss/").items():
            if name.rstrip("_0123456789") in LOSSES:
                assert_close(losses[name], value, rtol=1e-3, atol=1e-6, check_dtype=False)
        assert_close(criterion.total(losses), self["total_loss"], rtol=1e-3, atol=1e-6, check_dtype=False)

    def check_detections(self) -> None:
        """Scores, labels and boxes as the authors report them, best first; ties may swap."""
        model, targets = self.model(), self.under("target")
        sizes = [tuple(targets[f"{i}/orig_size"].tolist()) for i in range(2)]
        with torch.no_grad():
            found = model.postprocess(model(*batch(*BATCHES[""])), sizes)
        for i, ours in enumerate(found):
            theirs = self.under(f"post{i}/")
            assert_close(ours["scores"], theirs["scores"], atol=1e-4, rtol=0)
            apart = theirs["scores"].diff().abs() > 1e-5
            sure = torch.cat((apart.new_ones(1), apart)) & torch.cat((apart, apart.new_ones(1)))
            assert torch.equal(ours["labels"][sure], theirs["labels"][sure].long())
            assert_close(ours["boxes"][sure], theirs["boxes"][sure], atol=1e-4 * max(sizes[i]), rtol=0)

    def gradient_norms(self, model: DETR, losses: Tensor) -> dict[str, float]:
        """The size of the gradient of each of our parameters."""
        model.zero_grad()
        losses.backward()
        return {name: float(p.grad.double().norm()) for name, p in model.named_parameters() if p.grad is not None}


class NoisedMember(Member):
    """A member that learns with noised queries: the authors' draws, and their number of answers."""

    def model(self) -> DETR:
        """A copy of our model with the authors' weights."""
        model = super().model()
        model.scores = SigmoidScores(self.args["num_select"])
        model.queries.draws = RecordedDraws(**self.under("dn/draw_"))
        return model

    def order(self) -> Tensor:
        """Ours of their places: they put the noised queries first."""
        noised, answering = int(self["dn/pad_size"]), self.args["num_queries"]
        return torch.cat((torch.arange(noised) + answering, torch.arange(answering)))
