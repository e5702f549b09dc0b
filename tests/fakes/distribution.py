"""A distribution as pip leaves it behind: a module, and metadata with entry points, in a folder that Python looks into."""

from __future__ import annotations

import textwrap
from pathlib import Path


def install(folder: Path, name: str, group: str, entries: dict[str, str], **modules: str) -> None:
    """Put a distribution with these entry points (name → "module:object") and modules (name → source) into a folder of sys.path."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]) + "\n")
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
