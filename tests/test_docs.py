"""The documents: every command is accepted by its program, and every link leads to a file."""
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT, docstring_backbone

import f1
import inference
import tools.check_data
import tools.check_labels
import tools.demo
import tools.ensemble
import tools.export
import tools.sample_data
import train

DOCUMENTS = ["README.md", "README.ko.md", *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
PARSERS = {
    "train.py": train.parse_args, "inference.py": inference.parse_args, "f1.py": f1.parse_args,
    "tools.check_data": tools.check_data.parse_args,
    "tools.check_labels": tools.check_labels.parse_args, "tools.demo": tools.demo.parse_args,
    "tools.ensemble": tools.ensemble.parse_args, "tools.export": tools.export.parse_args,
    "tools.sample_data": tools.sample_data.parse_args,
}


def commands(text):
    """The commands of this project in a document: [script or module, *arguments]."""
    lines = re.findall(r"^    (.*)$", text, re.M) + re.findall(r"`([^`]+)`", text)
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part.split("  # ")[0], comments=True) if "'" not in part else []
            starts = [i for i, word in enumerate(words) if word in PARSERS]
            if words[:1] in (["python"], ["torchrun"]) and starts:
                yield words[starts[0]:]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_accepted(document, tmp_path, monkeypatch):
    found = list(commands((ROOT / document).read_text()))
    assert found or document == "docs/troubleshooting.md"
    (tmp_path / "FILE").write_text("")
    (tmp_path / "results-mine").mkdir()
    (tmp_path / "results-mine/args.txt").write_text("--lr 1e-3\n")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for program, *argv in found:
        if argv == ["--help"]:
            continue
        PARSERS[program](argv)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file(document):
    folder = (ROOT / document).parent
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / document).read_text()):
        assert link.startswith("https://") or (folder / link).exists(), link


def test_the_korean_readme_shows_commands_of_the_english_one():
    english, korean = (list(commands((ROOT / name).read_text()))
                       for name in ("README.md", "README.ko.md"))
    assert len(korean) >= 12 and all(command in english for command in korean)


def test_the_backbone_in_the_readme_is_that_of_model_py():
    assert textwrap.indent(docstring_backbone(), "    ") in (ROOT / "README.md").read_text()


def test_files_that_are_named_exist():
    table = (ROOT / "README.md").read_text().split("## Files")[1].split("\n## ")[0]
    names = re.findall(r"^\| (.*?) \|", table, re.M)[2:]
    for name in re.findall(r"`([^`]+)`", " ".join(names)):
        assert Path(ROOT / name).exists(), name
