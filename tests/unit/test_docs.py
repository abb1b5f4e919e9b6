"""The documents say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from sftd.cli import COMMANDS, main
from sftd.cli.config import reference

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_configuration_reference_is_up_to_date() -> None:
    made = "sftd config --markdown > docs/configuration.md"
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), f"make it anew: {made}"


def test_every_key_has_a_meaning() -> None:
    rows = [line.split("|") for line in reference().splitlines() if line.startswith("| `")]
    assert all(row[-2].strip() for row in rows)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_readme_names_every_command(command: str) -> None:
    assert re.search(rf"\bsftd {command}\b", README)


def test_readme_uses_only_commands_and_options_that_exist() -> None:
    code = "\n".join(
        re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) + re.findall(r"`(sftd [^`]+)`", README)
    )
    used = re.findall(r"(?:^|\()sftd ([a-z]+)([^\n#|)]*)", code, flags=re.MULTILINE)
    assert len(used) > 20
    for name, rest in used:
        command = main.get_command(click.Context(main), name)
        assert command is not None, f"README: sftd {name}"
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        for option in re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", rest):
            assert option in known, f"README: sftd {name} {option}"


@pytest.mark.parametrize("target", ["demo", "test", "install", "clean"])
def test_readme_names_the_make_targets_that_exist(target: str) -> None:
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
