"""Put the model of a recorded run into the package, in half precision, and draw the picture of the front page with it.

    python results/carry_weights.py shapes_default_10min_seed0

The run's checkpoint must still be under .cache/runs/, where train_on_shapes.py keeps it.
"""
import argparse
import json
from pathlib import Path

import torch

from detr_nb.boxes import scale_boxes, xyxy_to_cxcywh
from detr_nb.data import normalise
from detr_nb.evaluation import evaluate
from detr_nb.loading import ShapesData
from detr_nb.model import detr_tiny, postprocess
from detr_nb.plots import axes_grid, show_image
from detr_nb.shapes import DEFAULT, Scenes

ROOT = Path(__file__).resolve().parents[1]
README = """# detr_tiny.pt

Weights of `detr_tiny(pretrained=True)` in half precision: trained from scratch on the generator's default setting by
`{command}`; AP {AP:.3f}, AP50 {AP50:.3f} on 500 held-out scenes, measured
in half precision. Recipe, curve, machine and date: `results/{name}.json`. Licence: Apache-2.0, as the code.
"""


@torch.inference_mode()
def draw(path: Path) -> None:
    """Eight scenes that the model has not seen, with everything that scores above one half."""
    scenes, model = Scenes(DEFAULT, count=8, seed=8), detr_tiny(pretrained=True)
    images = torch.stack([scenes[i][0] for i in range(8)])
    detections = postprocess(model(normalise(images)), [(128, 128)] * 8)
    axes = axes_grid(8, width=2.4, height=2.4)
    for ax, image, found in zip(axes, images, detections, strict=True):
        keep = found["scores"] > 0.5
        boxes = scale_boxes(xyxy_to_cxcywh(found["boxes"][keep]), 1 / 128, 1 / 128)
        show_image(image, boxes, found["labels"][keep], scenes.names, found["scores"][keep], ax=ax)
    axes[0].figure.savefig(path, dpi=100, bbox_inches="tight")


def main() -> None:
    """Write the weights, the note beside them, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the recorded run, as the JSON file in results/")
    name = parser.parse_args().name
    row = json.loads((ROOT / "results" / f"{name}.json").read_text())
    saved = torch.load(ROOT / ".cache" / "runs" / name / "checkpoint.pt", weights_only=True)
    state = {key: value.half() if value.is_floating_point() else value for key, value in saved["model"].items()}
    kept = {"model": state, "names": list(saved["names"]), "category_ids": list(saved["category_ids"])}
    folder = ROOT / "detr_nb" / "weights"
    torch.save(kept, folder / "detr_tiny.pt")
    metrics = evaluate(detr_tiny(pretrained=True), ShapesData(DEFAULT, cache=str(ROOT / ".cache" / "scenes")).load()[1])
    note = README.format(name=name, command=row["command"], AP=metrics["AP"], AP50=metrics["AP50"])
    (folder / "README.md").write_text(note)
    draw(ROOT / "book" / "_assets" / "detections.png")
    print(note)


if __name__ == "__main__":
    main()
