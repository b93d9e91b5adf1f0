"""The official DETR's reference outputs, and its weights under our names; see tests/data/REFERENCE.md."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detr_nb.backbone import ResNet
from detr_nb.model import DETR, detr
from detr_nb.notation import Target

DATA = Path(__file__).parent / "data"
spec = importlib.util.spec_from_file_location("fill", DATA / "fill.py")
fill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill)

# Official names on the left, ours on the right; the query, key and value maps are split before.
RENAMES = [
    (r"^backbone\.0\.body\.", "memory.backbone.body."),
    (r"^input_proj\.", "memory.project."),
    (r"^query_embed\.", "queries.embedding."),
    (r"^class_embed\.", "decoder.head.classes."),
    (r"^bbox_embed\.layers\.(\d)\.", lambda m: f"decoder.head.boxes.{2 * int(m[1])}."),
    (r"^transformer\.", ""),
    (r"\.self_attn\.", ".attention."),
    (r"\.multihead_attn\.", ".cross.attention."),
    (r"\.out_proj\.", ".out."),
    (r"\.linear1\.", ".feed_forward.0."),
    (r"\.linear2\.", ".feed_forward.3."),
    (r"\.norm1\.", ".attention_step.norm."),
    (r"(encoder.*)\.norm2\.", r"\1.feed_step.norm."),
    (r"(decoder.*)\.norm2\.", r"\1.cross_step.norm."),
    (r"\.norm3\.", ".feed_step.norm."),
]


def our_name(name: str) -> str:
    """The name that our models give to an official parameter or buffer."""
    for pattern, ours in RENAMES:
        name = re.sub(pattern, ours, name)
    return name


def ours(official: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """An official state dict under our names, with the stacked query, key and value maps apart."""
    state = {}
    for name, array in official.items():
        value = torch.from_numpy(array)
        if match := re.match(r"(.*)in_proj_(weight|bias)$", name):
            for part, third in zip("qkv", value.chunk(3), strict=True):
                state[our_name(f"{match[1]}{part}.{match[2]}")] = third
        else:
            state[our_name(name)] = value
    return state


class Reference:
    """One reference file: our model with the official weights, and what the official model gave.

    Args:
        name: of the files under tests/data, without their ending.
    """

    def __init__(self, name: str):
        self.args = json.loads((DATA / f"{name}.json").read_text())["args"]
        self.values = np.load(DATA / f"{name}.npz")
        self.state = ours(fill.state_dict(DATA / name))

    def model(self, num_classes: int = 91) -> DETR:
        """Our model with the official weights, every one of which must find its place."""
        sizes = ("hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward")
        backbone = ResNet(self.args["backbone"], pretrained=False)
        model = detr(backbone, num_classes, self.args["num_queries"], **{key: self.args[key] for key in sizes})
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
