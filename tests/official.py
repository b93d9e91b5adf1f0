"""The official DETR's reference outputs, and its weights under our names; see tests/data/REFERENCE.md."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detr_nb.backbone import ResNet
from detr_nb.checkpoints import rename, split_stacked
from detr_nb.model import DETR, detr
from detr_nb.notation import Target
from detr_nb.pretrained import OFFICIAL

DATA = Path(__file__).parent / "data"
spec = importlib.util.spec_from_file_location("fill", DATA / "fill.py")
fill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill)

def official_weights(reference: str) -> dict[str, Tensor]:
    """The weights of a reference under the names of the authors, as their checkpoints hold them."""
    return {name: torch.from_numpy(array) for name, array in fill.state_dict(DATA / reference).items()}


class Reference:
    """One reference file: our model with the official weights, and what the official model gave.

    Args:
        name: of the files under tests/data, without their ending.
    """

    def __init__(self, name: str):
        self.args = json.loads((DATA / f"{name}.json").read_text())["args"]
        self.values = np.load(DATA / f"{name}.npz")
        self.state = split_stacked({rename(key, OFFICIAL): value for key, value in official_weights(name).items()})

    def fresh_model(self, num_classes: int = 91) -> DETR:
        """Our model with the architecture of the reference and random weights."""
        sizes = ("hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward")
        backbone = ResNet(self.args["backbone"], pretrained=False)
        return detr(backbone, num_classes, self.args["num_queries"], **{key: self.args[key] for key in sizes})

    def model(self) -> DETR:
        """Our model with the official weights, every one of which must find its place."""
        model = self.fresh_model()
        model.load_state_dict(self.state)
        return model.eval()

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.values[key]))

    def __contains__(self, key: str) -> bool:
        return key in self.values.files

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Everything whose key starts with the prefix, under the rest of its key."""
        return {key.removeprefix(prefix): self[key] for key in self.values.files if key.startswith(prefix)}

    def targets(self, prefix: str = "") -> list[Target]:
        """The targets of the batch."""
        found = []
        while f"{prefix}target{len(found)}/labels" in self:
            i = len(found)
            found.append(Target(labels=self[f"{prefix}target{i}/labels"], boxes=self[f"{prefix}target{i}/boxes"],
                                image_id=i))
        return found

    def matches(self, prefix: str = "") -> list[list[Tensor]]:
        """For each layer and image, the query ids and the target ids as the rows of a tensor."""
        layers: list[list[Tensor]] = []
        while f"{prefix}match/layer{len(layers)}/img0" in self:
            i = len(layers)
            images = sum(key.startswith(f"{prefix}match/layer{i}/") for key in self.values.files)
            layers.append([self[f"{prefix}match/layer{i}/img{b}"] for b in range(images)])
        return layers


def batch(name: str, *sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Padded images and their mask, as the references define them."""
    images, pad = fill.batch(sizes, name)
    return torch.from_numpy(images), torch.from_numpy(pad)
