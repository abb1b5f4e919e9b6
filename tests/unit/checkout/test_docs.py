"""The documents say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import click
import pytest

from sftd.cli import COMMANDS, main
from sftd.cli.look.config import reference
from sftd.domain.run.failures import Cause
from sftd.domain.spec.parse import LEAVES, SECTIONS, parse
from sftd.wire.spec.yaml_text import load_yaml
from tests.builders.paths import ROOT

README = (ROOT / "README.md").read_text()


def test_configuration_reference_is_up_to_date() -> None:
    made = "sftd config --markdown > docs/configuration.md"
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), f"make it anew: {made}"


def test_command_reference_is_up_to_date() -> None:
    script = ROOT / "scripts" / "cli_reference.py"
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "cli.md").read_text() == made, f"python {script.relative_to(ROOT)} > docs/cli.md"


def test_the_page_for_people_from_other_trainers_is_up_to_date() -> None:
    script = ROOT / "scripts" / "coming_from.py"
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "coming-from.md").read_text()
    assert page == made, f"python {script.relative_to(ROOT)} > docs/coming-from.md"


def test_every_cause_of_a_failure_is_explained() -> None:
    told = (ROOT / "docs" / "recovering.md").read_text()
    assert [cause for cause in get_args(Cause) if f"`{cause}`" not in told] == []


def test_the_index_names_every_document() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\(([a-z-]+\.md)\)", index)) == pages


def test_every_key_has_a_meaning() -> None:
    rows = [line.split("|") for line in reference().splitlines() if line.startswith("| `")]
    assert all(row[-2].strip() for row in rows)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_page_that_is_not_generated_names_every_command(command: str) -> None:
    generated = {"cli.md", "configuration.md", "coming-from.md", "models.md"}
    pages = [page.read_text() for page in (ROOT / "docs").glob("*.md") if page.name not in generated]
    assert any(re.search(rf"\bsftd {command}\b", text) for text in (README, *pages))


# One idea, one word, and the words of the field: see "Style" in CONTRIBUTING.
STILTED = re.compile(
    r"\b(tells?|telling|told|mend\w*|go(es)? on|went on|going on|whoever|anew|comes? out|came out|so many|became of it|came of it"
    r"|stands?|stood|but for rounding)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
)
def test_what_people_read_is_plain_english(page: Path) -> None:
    """docs/cli.md and docs/configuration.md have the help of every command and the meaning of every key."""
    # A name of a file or a column is not a word.
    text = re.sub(r"`[^`\n]*`", "", page.read_text())
    assert [line for line in text.splitlines() if STILTED.search(line)] == []


def test_the_readme_is_two_screens() -> None:
    assert len(README.splitlines()) <= 100


@pytest.mark.parametrize(
    ("page", "at_least"),
    [
        ("README.md", 7),
        ("docs/quickstart.md", 30),
        ("docs/coming-from.md", 20),
        ("docs/compare-and-watch.md", 10),
        ("docs/lora.md", 8),
        ("docs/mlflow.md", 8),
        ("docs/operations.md", 10),
        ("docs/notifications.md", 3),
        ("docs/plan.md", 5),
        ("docs/postgresql.md", 4),
        ("docs/prepare.md", 1),
        ("docs/recovering.md", 15),
        ("docs/scheduling.md", 8),
        ("docs/several-gpus.md", 4),
        ("docs/slurm.md", 1),
    ],
)
def test_a_page_uses_only_commands_and_options_that_exist(page: str, at_least: int) -> None:
    text = (ROOT / page).read_text()
    code = "\n".join(
        re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) + re.findall(r"`(sftd [^`]+)`", text)
    )
    used = re.findall(r"(?:^|\()sftd ([a-z]+)([^\n#|>)]*)", code, flags=re.MULTILINE)
    assert len(used) > at_least
    for name, rest in used:
        command = main.get_command(click.Context(main), name)
        assert command is not None, f"{page}: sftd {name}"
        words = rest.split()
        if isinstance(command, click.Group) and words:
            command = command.commands[words[0]]
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        for option in re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", rest):
            assert option in known, f"{page}: sftd {name} {option}"


def test_the_configs_of_a_page_are_valid_and_its_keys_exist() -> None:
    text = (ROOT / "docs" / "lora.md").read_text()
    configs = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert len(configs) == 4
    for config in configs:
        spec, warnings = parse(
            load_yaml(config, "docs/lora.md"), [("data.train_files", "/t"), ("data.val_files", "/v")]
        )
        assert spec.model.is_partly_frozen
        assert warnings == []
    written = re.findall(
        r"(?<=\s)([a-z_]+(?:\.[a-z_]+)+)=", "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
    )
    named = [name for name in re.findall(r"`((?:model|optimizer)\.[a-z_.]+)`", text) if name not in SECTIONS]
    assert len(written) == 4
    assert set(written + named) <= LEAVES.keys()


@pytest.mark.parametrize("target", ["demo", "test", "install", "clean"])
def test_readme_names_the_make_targets_that_exist(target: str) -> None:
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_every_path_of_the_architecture_page_exists() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    named = {name for name in re.findall(r"`([\w/]+/[\w/.*]*)`", page) if "NAME" not in name}
    assert len(named) > 40
    assert [
        n for n in named if not any(list(root.glob(n.rstrip("/"))) for root in (ROOT, ROOT / "sftd"))
    ] == []


def test_the_metrics_are_those_that_the_daemon_writes() -> None:
    written = set(re.findall(r'"(sftd_[a-z_]+)"', (ROOT / "sftd/daemon/metrics.py").read_text()))
    told = set(re.findall(r"`(sftd_[a-z_]+)(?:\{[a-z_,]+\})?`", (ROOT / "docs/operations.md").read_text()))
    assert written == told
