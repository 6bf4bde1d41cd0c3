"""Adapts stage 3 of the demo to ten inverted scans (dark ink on light paper) with a LoRA.

    make demo-lora       # after `make demo`; writes benchmarks/results/demo_lora.json and docs/demo-lora.png

Stage 3 knows white digits on black. `prepare` takes one scan of each digit, inverts it, and writes them as a
feature folder; `configs/digits.py:lora` trains an adapter on these ten. `measure` generates digits with the
adapter at several weights. A classifier that was trained on the real scans reads the images, inverted where
their paper is light.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from pixart_jax.data import features  # noqa: E402
from pixart_jax.evaluation.digits import generate_digits, train_reader  # noqa: E402
from pixart_jax.files import write_json  # noqa: E402
from pixart_jax.sampling import picture_grid  # noqa: E402
from pixart_jax.weights.adapters import merge  # noqa: E402
from pixart_jax.weights.checkpoints import read_weights  # noqa: E402
from pixart_jax.weights.trained_adapters import read_run_adapter  # noqa: E402

WEIGHTS = (0.0, 0.5, 1.0)


def prepare(source: Path, out: Path) -> None:
    """Writes the first scan of each digit, inverted, as a feature folder.

    Args:
      source: the features of stage 3.
      out: the new folder.
    """
    dataset = features.FeatureDataset(source)
    first: dict[int, int] = {}
    for index in range(len(dataset)):
        first.setdefault(dataset[index].label, index)
    chosen = [dataset[first[digit]] for digit in range(10)]
    inverted = [dataclasses.replace(record, mean=255 - record.mean) for record in chosen]
    manifest = features.read_manifest(source)
    out.mkdir(parents=True, exist_ok=True)
    file = features.shard_name(dataset.buckets[0].bucket, 0)
    entry = features.write_shard(out / file, iter(inverted))
    note = features.write_null_text(out, dataset.null_text())
    text = {**manifest["text"], **note}
    new = features.make_manifest(
        config=manifest["config"],
        source={"kind": "digits, ten of them inverted"},
        buckets=[dataset.buckets[0]],
        shards=[{"file": file, "bucket": dataset.buckets[0].bucket.name, **entry}],
        text=text,
        classes=manifest["classes"],
    )
    write_json(out / features.manifest_name(0, 1), new)


def measure(base: Path, run: Path, count: int) -> tuple[dict, np.ndarray]:
    """Generates digits with the adapter at each weight.

    Returns:
      the results, and a picture with one row for each weight.
    """
    params, config = read_weights(base)
    adapter = read_run_adapter(run)
    reader = train_reader(config.features.image_size)
    results, rows = {"reader accuracy on held-out scans": reader.accuracy, "images": count}, []
    for weight in WEIGHTS:
        merged = merge(params, config.model, [(adapter, weight)])
        if not weight:
            same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), params, merged)
            results["weights equal at weight 0"] = all(jax.tree.leaves(same))
        images, digits = generate_digits(merged, config, count)
        # The ink rarely reaches the left and the right edge.
        paper = images[:, :, [0, -1]].mean(axis=(1, 2, 3))
        upright = np.where(paper[:, None, None, None] > 127, 255 - images, images)
        results[f"weight {weight:g}"] = {
            "share with light paper": float(np.mean(paper > 127)),
            "mean brightness of the paper": float(paper.mean()),
            "legible": float(np.mean(reader.read(upright) == digits)),
        }
        rows.append(images[:20])
    return results, picture_grid(np.concatenate(rows), 20, magnify=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("prepare", "measure"))
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="Folder of `make demo`.")
    parser.add_argument("--count", type=int, default=500, help="Images for each weight.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/demo_lora.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/demo-lora.png")
    given = parser.parse_args()
    if given.mode == "prepare":
        prepare(given.demo / "features/stage3/train", given.demo / "features/lora/train")
        return
    from PIL import Image

    results, picture = measure(given.demo / "stage3", given.demo / "lora", given.count)
    given.out.write_text(json.dumps(results, indent=1) + "\n")
    Image.fromarray(picture).save(given.picture)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
