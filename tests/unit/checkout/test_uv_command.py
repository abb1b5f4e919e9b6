"""scripts/uv-command: uv gets pip's configuration, or pip installs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

from tests.builders.paths import ROOT

SCRIPT = ROOT / "scripts" / "uv-command"


def run(**variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environ |= {"PIP_CONFIG_FILE": os.devnull, **variables}
    return subprocess.run(
        [sys.executable, str(SCRIPT)], env=environ, capture_output=True, text=True, timeout=60
    )


def test_indexes_wheels_and_certificates_are_passed_on() -> None:
    words = run(
        PIP_INDEX_URL="https://one.example/simple",
        PIP_EXTRA_INDEX_URL="https://two.example/simple https://three.example/simple",
        PIP_FIND_LINKS="/wheels",
        PIP_CERT="/own/ca.pem",
        PIP_NO_CACHE_DIR="1",
        PIP_QUIET="1",
    )
    assert words.returncode == 0, words.stderr
    options = words.stdout.splitlines()
    assert options[:2] == ["SSL_CERT_FILE=/own/ca.pem", ".venv/bin/uv"]
    given = set(itertools.pairwise(options))
    assert ("--default-index", "https://one.example/simple") in given
    assert ("--index", "https://two.example/simple") in given
    assert ("--index", "https://three.example/simple") in given
    assert ("--find-links", "/wheels") in given


def test_nothing_configured_adds_nothing() -> None:
    options = run().stdout.splitlines()
    assert options[0] == ".venv/bin/uv"
    assert options[-2:] == ["--index-strategy", "unsafe-best-match"]


@pytest.mark.parametrize(("variable", "value"), [("PIP_TARGET", "/elsewhere"), ("PIP_ONLY_BINARY", ":all:")])
def test_what_uv_does_not_have_leaves_it_to_pip(variable: str, value: str) -> None:
    done = run(**{variable: value})
    assert (done.returncode, done.stdout) == (3, "")
    assert f"pip is configured with {variable[4:].lower().replace('_', '-')}" in done.stderr
