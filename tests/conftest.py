"""What every test relies on: shapes checked at run time, two threads, the same random cases each time."""

import sys

import hypothesis
import torch
from jaxtyping import install_import_hook

assert not any(name.startswith("detr_nb.") for name in sys.modules), "detr_nb was imported before the type checker"
install_import_hook("detr_nb", "beartype.beartype")

torch.set_num_threads(2)

hypothesis.settings.register_profile("book", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("book")
