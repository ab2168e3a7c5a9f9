"""Every script in examples/ runs, with small settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SETTINGS = {"quantize_and_generate.py": ["4"]}


def test_each_example_is_run_here(repo_root: Path) -> None:
    assert {path.name for path in (repo_root / "examples").glob("*.py")} == SETTINGS.keys()


def test_quantize_and_generate(repo_root: Path, assets: Path, tmp_path: Path) -> None:
    script = repo_root / "examples" / "quantize_and_generate.py"
    paths = [str(repo_root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "small"), *SETTINGS[script.name]],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    sizes, matrices, *texts = done.stdout.splitlines()
    before, after = (float(size.split()[0]) for size in sizes.split(" -> "))
    assert after < 0.25 * before
    assert int(matrices.split(" matrices in ")[0]) >= 13, "two projections of six blocks, and the head"
    text = "\n".join(texts)
    assert text.startswith("It was a") and "\nThe captain" in text
    assert (tmp_path / "small" / "config.json").is_file()
