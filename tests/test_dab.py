"""DAB-DETR beside its authors' recorded outputs, Hugging Face's model, and Conditional DETR."""

import pytest
from family import Member

from detr_nb.family.dab import DABDETR
from detr_nb.model import DETR, ResNetConfig, SigmoidScores

NAME = "dab_detr_r18_small"
SMALL = DABDETR(ResNetConfig("resnet18", pretrained=False), 20, dec_layers=3, enc_layers=2, dim_feedforward=128,
                dropout=0.0)


class Authors(Member):
    """The authors' small model; they keep as many answers as an option says."""

    def model(self) -> DETR:
        """Ours with the authors' weights and number of answers."""
        model = super().model()
        model.scores = SigmoidScores(self.args["num_select"])
        return model


@pytest.fixture(scope="module")
def authors(tmp_path_factory) -> Authors:
    """Read from their checkpoint."""
    return Authors(NAME, SMALL, tmp_path_factory.mktemp(NAME))


def test_predictions_are_the_authors(authors):
    authors.check_predictions()


def test_losses_and_matches_are_the_authors(authors):
    authors.check_losses()


def test_detections_are_the_authors(authors):
    authors.check_detections()
