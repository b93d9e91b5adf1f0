"""Check that detr_nb/ is what the notebooks export, its packages included.

The export is made in a temporary copy, so that the check changes nothing and needs no git. Written by hand are the
`__init__.py` of each package (the export adds an empty one where there is none), and the modules that only forward the
names of an earlier release.
"""

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "detr_nb"
BY_HAND = "__init__.py"
FORWARDS = ("muon.py",)


def python_files(package: Path) -> set[Path]:
    """The Python files of a package and of the packages inside, by their paths in it."""
    return {path.relative_to(package) for path in package.rglob("*.py")}


def export_copy(folder: Path) -> Path:
    """Export the notebooks into a fresh package under `folder`; returns the package."""
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    package = folder / PACKAGE
    package.mkdir()
    for name in (BY_HAND, *FORWARDS):
        shutil.copy(ROOT / PACKAGE / name, package)
    tool = Path(sys.executable).with_name("nbdev_export")
    subprocess.run([str(tool)], cwd=folder, check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    return package


def differences(exported: Path, committed: Path) -> list[str]:
    """One entry a file that differs, with the first lines of the difference."""
    found = []
    for name in sorted(python_files(exported) | python_files(committed)):
        new, old = exported / name, committed / name
        if not old.exists():
            found.append(f"{PACKAGE}/{name} is missing")
        elif not new.exists():
            found.append(f"{PACKAGE}/{name} is exported by no notebook")
        elif (name.name != BY_HAND or name == Path(BY_HAND)) and new.read_text("utf8") != old.read_text("utf8"):
            lines = difflib.unified_diff(
                old.read_text("utf8").splitlines(),
                new.read_text("utf8").splitlines(),
                f"{PACKAGE}/{name} as it is",
                f"{PACKAGE}/{name} as the notebooks export it",
                lineterm="",
                n=1,
            )
            found.append("\n".join(list(lines)[:30]))
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = differences(export_copy(Path(folder)), ROOT / PACKAGE)
    for text in found:
        print(text)
    if found:
        print(f"{len(found)} file(s) out of sync: edit the notebooks, then run `make export`.")
        return 1
    print(f"{PACKAGE}/ is what the notebooks export.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
