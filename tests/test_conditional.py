"""Conditional DETR beside its authors' recorded outputs, Hugging Face's model, and DETR."""

import json

import pytest
import torch
from family import Member
from official import DATA, batch
from torch.testing import assert_close

from detr_nb.checkpoints import rename
from detr_nb.family.conditional import ConditionalDETR, conditional_layouts
from detr_nb.losses import criterion_for
from detr_nb.model import ResNetConfig

NAME = "conditional_detr_small"
SMALL = ConditionalDETR(ResNetConfig("resnet18", pretrained=False), 20, dec_layers=3, enc_layers=2,
                        dim_feedforward=128, dropout=0.0)


@pytest.fixture(scope="module")
def authors(tmp_path_factory) -> Member:
    """The authors' small model."""
    return Member(NAME, SMALL, tmp_path_factory.mktemp(NAME))


def test_predictions_are_the_authors(authors):
    authors.check_predictions()


def test_losses_and_matches_are_the_authors(authors):
    authors.check_losses()


def test_detections_are_the_authors(authors):
    authors.check_detections()


def test_references_are_the_authors(authors):
    model = authors.model()
    with torch.no_grad():
        memory = model.memory(*batch("image0_", (192, 256), (160, 224)))
        assert_close(model.queries(memory).ref, authors["reference_points"], atol=1e-5, rtol=0)


def test_gradients_are_the_authors(authors):
    """The size of the gradient of each parameter; the authors' stacked maps have those of their three parts."""
    model, targets = authors.model(), authors.targets()
    criterion = criterion_for(model)
    losses = criterion(model(*batch("image0_", (192, 256), (160, 224))), targets)
    ours = authors.gradient_norms(model, criterion.total(losses))
    names, (_, rules, _) = json.loads((DATA / f"{NAME}.json").read_text())["grad_names"], conditional_layouts(SMALL)
    for name, norm in zip(names, authors["grad_norms"], strict=True):
        stem, stacked, kind = rename(name, rules[1]).rpartition("in_proj_")
        parts = [f"{stem}{part}.{kind}" for part in "qkv"] if stacked else [kind]
        found = torch.tensor([ours.get(part, 0.0) for part in parts]).double().norm()
        assert_close(found, norm, rtol=1e-2, atol=1e-4, check_dtype=False, msg=lambda text, n=name: f"{n}: {text}")
