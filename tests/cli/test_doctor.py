"""megatron doctor says what is there, what is not, and what follows."""

import importlib.metadata
import importlib.util

import pytest

from swiftmeg.cli import doctor
from swiftmeg.cli.main import run


def test_it_reports_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("megatron", ["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("torch", "megatron-core", "transformers"):
        assert f"{name} {importlib.metadata.version(name)}" in text
    if importlib.util.find_spec("transformer_engine") is None:
        assert "--    no TransformerEngine: the native layers are used" in text
        assert "fix: pip install 'swiftmeg[te]'" in text
    lines = text.splitlines()
    missing = [i for i, line in enumerate(lines) if line.startswith("--    ")]
    assert all(lines[i + 1].startswith("      fix: ") for i in missing)


def test_it_fails_where_nothing_can_be_trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: "0.16.1" if name == "megatron-core" else version(name)
    )
    assert run("megatron", ["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAIL  megatron-core 0.16.1: nothing can be trained or converted" in text
    assert "fix: pip install 'megatron-core[training]>=0.19.2,<0.20'" in text


def test_a_missing_package_changes_the_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    for there in (True, False):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, there=there: there or None if name == "wandb" else find(name),
        )
        run("megatron", ["doctor"])
        assert ("ok    wandb" in capsys.readouterr().out) == there


def test_it_takes_no_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("megatron", ["doctor", "--model", "x"]) == 1
    assert "megatron doctor takes no flags, but got --model x" in capsys.readouterr().err
