"""What a TLS context trusts is tested over real connections, here only what it refuses before."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

import tls


def test_files_that_are_no_certificates(tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    other.write_text("not a certificate", encoding="ascii")
    with pytest.raises(OSError, match=rf"gateway\.tls: {other} and {other} cannot be used \(.+\): name a certificate"):
        tls.server_context(str(other), str(other))
    with pytest.raises(ssl.SSLError):
        tls.client_context(str(other))
    with pytest.raises(FileNotFoundError):
        tls.client_context(str(tmp_path / "missing.pem"))
