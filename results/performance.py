"""Measure this library beside others on this machine, with nothing else running: about ten minutes on two cores.

    python results/performance.py
    python results/performance.py --paper-size

It calls the function behind `detr-nb bench` with its standard options and writes results/performance.json. With
`--paper-size` training steps and their memory are measured on images of 800 x 1066, of which two take some GB, and
results/performance_paper_size.json is written.
"""

import argparse
import json
from pathlib import Path

import torch

from detr_nb.bench import Bench, bench
from detr_nb.files import json_text, replacing

FOLDER = Path(__file__).resolve().parent
STANDARD = Bench(out=FOLDER / "performance.json")
PAPER_SIZE = Bench(only=("training", "memory"), size=(800, 1066), rounds=3, out=FOLDER / "performance_paper_size.json")


def main() -> int:
    """Measure, and name the command that does it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper-size", action="store_true", help="training steps and memory at 800 x 1066")
    large = parser.parse_args().paper_size
    options = PAPER_SIZE if large else STANDARD
    torch.manual_seed(0)
    code = bench(options)
    record = json.loads(options.out.read_text("utf8"))
    command = f"python results/performance.py{' --paper-size' * large}"
    with replacing(options.out) as file:
        file.write(json_text(record | {"command": command}, indent=1) + "\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
