"""Start the one file: `copepod` and `json5` are imported from its member `modules`, which make_pyz.py writes."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from zipimport import zipimporter


class Pack(SourceFileLoader):
    """The standard loader of one module, with what is in `modules` where it, or the module, would read a file."""

    archive = os.path.dirname(os.path.abspath(__file__))
    sources: dict[str, bytes]  # by path, as if `modules` were a folder

    def get_data(self, path: str) -> bytes:
        return self.sources[path]

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The spec of a module of the one file, None for another: what `sys.meta_path` asks for (PEP 451)."""
        if name == "copepod":  # it has no `__init__`
            return ModuleSpec(name, None, is_package=True)
        stem = os.path.join(cls.archive, *name.split("."))
        files = [file for file in (f"{stem}.py", f"{stem}/__init__.py") if file in cls.sources]
        return spec_from_file_location(name, files[0], loader=cls(name, files[0])) if files else None


if __name__ == "__main__":
    parts = [part.split(b"\n", 1) for part in zipimporter(Pack.archive).get_data("modules").split(b"\f")[1:]]
    Pack.sources = {os.path.join(Pack.archive, name.decode()): source for name, source in parts}
    sys.meta_path.insert(0, Pack)  # first, so that what this Python has installed does not count
    sys.exit(import_module("copepod.gateway").main())
