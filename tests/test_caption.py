"""The caption command: statistics, and input errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

from source_files import crops, write_folder

from pixart_jax import caption as cap
from pixart_jax.data.sources import open_source

REPOSITORY = Path(cap.__file__).parents[1]


def command(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pixart_jax.caption", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip


def test_stats_of_a_caption_file(tmp_path, capsys):
    records = [
        {"path": key, "captions": [{"text": one, "name": "original"}, {"text": other, "name": "vlm"}]}
        for key, one, other in [("a", "a dog", "the dog on a beach"), ("b", "two dogs", "a mountain lake")]
    ]
    records.append({"path": "c", "captions": []})
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    cap.print_statistics(open_source("auto", path), valid_above=1)
    # Nouns of 'original': dog, dogs; of 'vlm': dog, beach, mountain, lake.
    assert [line.split() for line in capsys.readouterr().out.splitlines()[:3]] == [
        ["captions", "images", "VN", "DN", "VN/DN", "total", "nouns", "average"],
        ["original", "2", "0", "2", "0.0%", "2", "1.0"],
        ["vlm", "2", "0", "4", "0.0%", "4", "2.0"],
    ]


def test_commands_in_a_shell(tmp_path):
    folder = write_folder(tmp_path / "photos", crops())
    (tmp_path / "captions.txt").write_text("a dog on a beach\n\n" + "a cat\n" * 11)
    wrong = tmp_path / "empty.jsonl"
    wrong.write_text("")
    calls = [
        (["stats", tmp_path / "captions.txt"], 0, "caption       12   1   3  33.3%           13      1.1"),
        (["stats", wrong], 2, "the list is empty"),
        (["stast", "x"], 2, "Did you mean 'stats'"),
        (["--images=x"], 2, "--out is missing"),
        ([f"--images={folder}", "--out=x", "--shard=3"], 2, "0 <= i < n"),
        ([f"--images={folder}", "--out=x", "--imgaes=y"], 2, "imgaes"),
    ]
    processes = [(command(*arguments), status, words) for arguments, status, words in calls]
    for process, status, words in processes:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == status, stderr
        assert words in (stdout if status == 0 else stderr)
        assert status == 0 or (stderr.startswith("error: ") and stderr.count("\n") == 1), stderr
