"""Deformable DETR beside its authors' recorded outputs, Hugging Face's model, and what it is without its new parts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from family import Member
from official import DATA
from torch import Tensor
from torch.testing import assert_close

from detr_nb.family.deformable import DeformableDETR, sample_grids
from detr_nb.model import ResNetConfig, SigmoidScores
from detr_nb.pretrained import load_pretrained, pretrained_model

SMALL = DeformableDETR(ResNetConfig("resnet50", pretrained=False), 20, 64, 4, 2, 2, 128, 0.0)
REFERENCES = {"deformable_detr_small": SMALL, "deformable_detr_refine_small": replace(SMALL, with_box_refine=True)}


# --- the operator ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def core() -> dict[str, Tensor]:
    """What the authors' operator was given and gave, in double precision."""
    return {name: torch.from_numpy(value) for name, value in np.load(DATA / "ms_deform_attn_core.npz").items()}


def test_the_operator_and_its_gradients_are_the_authors(core):
    given = [core[name].clone().requires_grad_() for name in ("value", "loc", "weights")]
    found = sample_grids(given[0], [tuple(shape) for shape in core["shapes"].tolist()], *given[1:])
    assert_close(found, core["out"], atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(found, given, core["grad_out"])
    for ours, name in zip(gradients, ("gv", "gloc", "gw"), strict=True):
        assert_close(ours, core[name], atol=1e-12, rtol=0)


# --- the authors ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=REFERENCES)
def authors(request, tmp_path_factory) -> Member:
    """The authors' small model, read from their checkpoint once."""
    member = Member(request.param, REFERENCES[request.param], tmp_path_factory.mktemp(request.param))
    model = member.model()
    member.model = lambda: model
    return member


def test_predictions_are_the_authors(authors):
    authors.check_predictions()


def test_losses_and_matches_are_the_authors(authors):
    authors.check_losses()


def test_detections_are_the_authors(authors):
    authors.check_detections()


def test_their_file_tells_what_it_holds(authors):
    model = pretrained_model(authors.file)
    assert replace(model.config, dropout=0.0) == authors.config and model.scores == SigmoidScores(100)
    assert model.threshold == DeformableDETR.THRESHOLD
    assert_close(model.state_dict(), authors.model().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("other", [{"nheads": 8}, {"num_feature_levels": 3}, {"enc_n_points": 2}, {"num_queries": 10}])
def test_their_file_is_refused_by_a_model_of_other_options(authors, other):
    with pytest.raises(ValueError, match="does not fit"):
        load_pretrained(replace(authors.config, **other).build(91), authors.file)
