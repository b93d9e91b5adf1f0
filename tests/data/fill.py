"""Deterministic weights and inputs, so that reference outputs can be compared without shipping weights.

Every tensor is a function of its name and shape alone (numpy's frozen RandomState stream), so a state dict can be
rebuilt anywhere from the list of names and shapes in a reference's .json file. Numbers only; no model code.
"""
import json
import zlib
from pathlib import Path

import numpy as np

EMBEDDINGS = ("query_embed.weight", "refpoint_embed.weight", "tgt_embed.weight", "level_embed", "position.weight",
              "pattern.weight", "patterns.weight", "query_embedding.weight", "reference_points_embed.weight",
              "row_embed.weight", "col_embed.weight")


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 array that belongs to parameter or buffer `name` of the given shape."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    x = rng.randn(*shape) if shape else np.asarray(rng.randn())
    if name.endswith("running_var"):
        out = 0.5 + rng.rand(*shape)
    elif name.endswith("running_mean"):
        out = 0.1 * x
    elif name.endswith("sampling_offsets.bias"):
        out = 1.5 * x
    elif name.endswith("sampling_offsets.weight"):
        out = 0.5 * x / np.sqrt(shape[1])
    elif name.endswith(EMBEDDINGS):
        out = x
    elif len(shape) <= 1:
        batch_norm = ".bn" in name or "downsample.1" in name
        scale = 0.5 + 0.5 * rng.rand(*shape) if batch_norm else 1 + 0.1 * x
        out = scale if name.endswith("weight") else 0.1 * x
    elif len(shape) == 4:
        out = x * np.sqrt(2.0 / np.prod(shape[1:]))
    else:
        out = x / np.sqrt(shape[-1])
        if name.endswith("in_proj_weight"):           # sharper attention than a fresh initialisation gives
            out[: -shape[1]] *= 4.0
        elif any(t in name for t in ("q_proj", "k_proj", "qcontent_proj", "kcontent_proj", "qpos_proj", "kpos_proj",
                                     "qpos_sine_proj", "kpos_sine_proj", "q_linear", "k_linear")):
            out *= 2.2
        elif "bbox_embed" in name and name.endswith("layers.2.weight"):
            out *= 2.0
    return np.asarray(out, dtype=np.float32)


def state_dict(reference: str | Path) -> dict[str, np.ndarray]:
    """Rebuild the official state dict listed in `reference`.json: {"state": [[name, shape, source, values?]...]}."""
    rows = json.loads(Path(reference).with_suffix(".json").read_text())["state"]
    return {name: np.asarray(values[0], dtype=np.float32) if values else tensor(source, tuple(shape))
            for name, shape, source, *values in rows}


def image(name: str, height: int, width: int) -> np.ndarray:
    """Return a 3 x height x width float32 image: blocks of 16 pixels plus noise, roughly unit variance."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    low = rng.randn(3, -(-height // 16), -(-width // 16))
    blocks = np.kron(low, np.ones((1, 16, 16)))[:, :height, :width]
    return (blocks + 0.3 * rng.randn(3, height, width)).astype(np.float32)


def batch(sizes, name: str = "image") -> tuple[np.ndarray, np.ndarray]:
    """Return padded images (b 3 y x, zeros at the bottom and right) and their mask (b y x, True = padding)."""
    y, x = max(h for h, _ in sizes), max(w for _, w in sizes)
    images, pad = np.zeros((len(sizes), 3, y, x), np.float32), np.ones((len(sizes), y, x), bool)
    for i, (h, w) in enumerate(sizes):
        images[i, :, :h, :w], pad[i, :h, :w] = image(f"{name}{i}", h, w), False
    return images, pad
