"""The page on security promises what tests show, and releases are made with the rights they need and no more."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2.exceptions import SecurityError

from ncalign.model.policy import load_policy, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_every_promise_names_tests_that_are_there() -> None:
    promised = PAGE.split("## What is promised")[1].split("\n## ")[0]
    promises = re.split(r"^- ", promised, flags=re.MULTILINE)[1:]
    assert len(promises) > 5
    for promise in promises:
        named = re.search(r"<!-- tests: (.*?) -->", promise)
        assert named is not None, promise
        for test in named[1].split():
            file, _, name = test.partition("::")
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^ *def {name}\(", source, re.MULTILINE), test


def test_how_to_report_is_said() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "Report a vulnerability" in text
    assert "Supported versions" in text


def test_a_release_has_the_rights_it_needs_and_pinned_actions() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    assert found["permissions"] == {}
    rights = {name: job["permissions"] for name, job in found["jobs"].items()}
    assert rights == {
        "build": {"contents": "read"},
        "publish": {"id-token": "write"},
        "bill-of-materials": {"contents": "write"},
    }
    used = re.findall(r"uses: (.*)", text)
    assert used
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in used)
    assert "password" not in text


def changed(source: Path, target: Path, file: str, **settings: Any) -> Path:
    """A copy of a model's folder with other settings in a file."""
    shutil.copytree(source, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return target


@pytest.mark.parametrize("model_type", ["llama", "made-up"])
def test_code_in_a_model_folder_is_not_run(model_type: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    folder = changed(tiny_model_dir, tmp_path / "model", "config.json", auto_map=names, model_type=model_type)
    folder = changed(folder, tmp_path / "again", "tokenizer_config.json", auto_map=names)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    if model_type == "llama":
        load_policy(str(folder))
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_policy(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.getcwd() }}"]
)
def test_a_chat_template_reaches_nothing_else(template: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = changed(tiny_model_dir, tmp_path / "model", "tokenizer_config.json", chat_template=template)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = load_tokenizer(str(folder))
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
