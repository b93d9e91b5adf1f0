"""Measure this library beside others on this machine, with nothing else running: about ten minutes on two cores.

    python results/performance.py

It calls the function behind `detr-nb bench` with its standard options and writes results/performance.json.
"""

import json
from pathlib import Path

import torch

from detr_nb.bench import Bench, bench

FILE = Path(__file__).resolve().parent / "performance.json"


def main() -> int:
    """Measure, and name the command that does it again."""
    torch.manual_seed(0)
    code = bench(Bench(out=FILE))
    record = json.loads(FILE.read_text("utf8"))
    FILE.write_text(json.dumps(record | {"command": "python results/performance.py"}, indent=1) + "\n", "utf8")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
