"""Build the program as one file with all it needs but Python, the same bytes each time: `make_pyz.py FILE`."""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

ROOT = Path(__file__).resolve().parent.parent
MAIN = b"import sys\n\nfrom copepod.gateway import main\n\nsys.exit(main())\n"


def contents() -> dict[str, bytes]:
    """What is in the file, by name; a folder ends in `/` (without its entry, an import would not see `copepod`)."""
    files = {"__main__.py": MAIN, "copepod/": b"", "json5/": b""}
    files |= {f"copepod/{path.name}": path.read_bytes() for path in ROOT.glob("*.py")}
    files["copepod/LICENSE"] = (ROOT / "LICENSE").read_bytes()
    for path in distribution("json5").files or []:
        if path.suffix == ".py" and path.parts[0] == "json5":
            files[str(path)] = path.read_binary()
        elif path.name == "LICENSE":
            files["json5/LICENSE"] = path.read_binary()
    return files


def build(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        out.write(b"#!/usr/bin/env python3\n")
        with ZipFile(out, "w", ZIP_DEFLATED) as archive:
            for name, data in sorted(contents().items()):
                entry = ZipInfo(name)  # its time is 1980
                entry.compress_type = ZIP_DEFLATED
                entry.external_attr = (0o40755 << 16 | 0x10) if name.endswith("/") else 0o100644 << 16
                archive.writestr(entry, data)
    target.chmod(0o755)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
