import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kill_library import MISSING, compiled


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_run_that_is_killed_at_a_system_call_ends_with_the_same_bits(tmp_path):
    """Before the first checkpoint exists, while an old one is removed, and three times in a row."""
    script = Path(__file__).with_name("kill_at.py")
    done = subprocess.run(
        [
            sys.executable, script, "--only", "9", "22", "23",
            f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'results.json'}",
        ],
        env=os.environ | {"LD_PRELOAD": str(compiled(tmp_path))},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["equal_bit_for_bit"] == 3
    assert [len(result["killed"]) for result in results["results"]] == [1, 1, 3]
