"""Compares the loader with that of the official code, and measures the time to order 10 million records.

    python benchmarks/loader.py --records=600 --workers=2        # writes benchmarks/results/loader.json
    python benchmarks/loader.py --plan=10000000

Both readers read the same samples: latents of 64 x 64 x 8 (mean and std; 512 px images), and text with 4096
channels and 20 to 120 tokens, all lengths equally likely. Our side reads feature shards with `FeatureLoader`,
in threads; they hold unpadded text in bfloat16 (and int8) and latents in float16. The official side reads,
for each sample, one compressed .npz with float32 [1, 120, 4096] and its mask, and one .npy with float32 [8,
64, 64], in the worker processes of a PyTorch DataLoader. On both sides text values are representable in
bfloat16, as if T5 had computed them in bfloat16, so that the .npz files compress as real ones do.

"Cold" means that all files were dropped from the page cache before the run (POSIX_FADV_DONTNEED); the host of
a virtual machine may still have them in its cache. Each figure is the median of the repetitions.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from pixart_jax.constants import VAE_DOWNSAMPLING
from pixart_jax.data import features
from pixart_jax.data.buckets import Bucket, bucket_table
from pixart_jax.data.features import FeatureDataset
from pixart_jax.data.loader import FeatureLoader
from pixart_jax.data.order import SampleOrder
from pixart_jax.data.records import FeatureBucket, Record, encode_caption
from pixart_jax.files import write_json

TOKENS, WIDTH = 120, 4096


def latent_shape(bucket: Bucket) -> tuple[int, int, int]:
    """Returns (h, w, channels) of the latents of the SD VAE."""
    return bucket.height // VAE_DOWNSAMPLING, bucket.width // VAE_DOWNSAMPLING, 4


BUCKET = Bucket(512, 512, "1.0")
LATENT = latent_shape(BUCKET)


def samples(count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Yields mean, std, float32 text [120, 4096] of bfloat16 values, and the number of valid tokens."""
    for i in range(count):
        rng = np.random.default_rng(i)
        mean = rng.normal(0, 4, LATENT).astype(np.float32)
        std = rng.uniform(0.001, 0.1, LATENT).astype(np.float32)
        # Values have the scale of T5's features, in which a few channels are much larger than the others.
        text = rng.normal(0, 0.1, (TOKENS, WIDTH)).astype(np.float32)
        text[:, :8] *= 30
        yield mean, std, text.astype(ml_dtypes.bfloat16).astype(np.float32), int(rng.integers(20, TOKENS + 1))


def write_ours(folder: Path, count: int, dtype: str) -> None:
    """Writes feature shards of at most 250 records."""
    folder.mkdir(parents=True)

    def records() -> Iterator[Record]:
        for i, (mean, std, text, length) in enumerate(samples(count)):
            caption = encode_caption("caption", 1.0, f"caption {i}", text[:length], dtype)
            latent = (mean.astype(np.float16), std.astype(np.float16))
            yield Record(f"{i:06d}.jpg", *latent, BUCKET, (512, 512), (512, 512), captions=(caption,))

    stream, entries = records(), []
    for index, start in enumerate(range(0, count, 250)):
        file = features.shard_name(BUCKET, index)
        part = (record for _, record in zip(range(min(250, count - start)), stream))
        entry = features.write_shard(folder / file, part)
        entries.append({"file": file, "bucket": BUCKET.name, **entry})
    manifest = features.make_manifest(
        config={"text_dtype": dtype},
        source={"kind": "benchmark"},
        buckets=[FeatureBucket(BUCKET, LATENT)],
        shards=entries,
        text={"width": WIDTH, "length": TOKENS, "null_length": 1, "file": "", "sha256": ""},
    )
    write_json(folder / features.MANIFEST, manifest)


def write_official(folder: Path, count: int) -> None:
    """Writes one .npz and one .npy per sample, as the official extractor does."""
    folder.mkdir(parents=True)
    for i, (mean, std, text, length) in enumerate(samples(count)):
        mask = (np.arange(TOKENS) < length).astype(np.int64)[None]
        np.savez_compressed(folder / f"{i:06d}.npz", caption_feature=text[None], attention_mask=mask)
        np.save(folder / f"{i:06d}.npy", np.concatenate([mean, std], -1).transpose(2, 0, 1))


class OfficialDataset:
    """`__getitem__` of the official InternalData dataset, without its image branch."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        import torch

        stem = self.folder / f"{index:06d}"
        with np.load(f"{stem}.npz") as file:
            text = torch.from_numpy(file["caption_feature"])
            mask = torch.from_numpy(file["attention_mask"])
        latent = torch.from_numpy(np.load(f"{stem}.npy"))
        return latent, text, mask


def read_ours(folder: Path, batch_size: int, workers: int) -> Callable[[], Iterator[int]]:
    def batches() -> Iterator[int]:
        dataset = FeatureDataset(folder)
        loader = FeatureLoader(
            [dataset],
            batch_size=batch_size,
            seed=0,
            arrays=("text", "text_mask"),
            text_length=TOKENS,
            threads=workers,
            prefetch=workers,
        )
        for batch in loader.iterate():
            yield len(batch.arrays["index"])

    return batches


def read_official(folder: Path, count: int, batch_size: int, workers: int) -> Callable[[], Iterator[int]]:
    def batches() -> Iterator[int]:
        import torch

        generator = torch.Generator().manual_seed(0)
        while True:
            data = torch.utils.data.DataLoader(
                OfficialDataset(folder, count),
                batch_size=batch_size,
                shuffle=True,
                generator=generator,
                num_workers=workers,
                drop_last=True,
            )
            for latent, *_ in data:
                yield len(latent)

    return batches


def drop_from_cache(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of the child processes that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def rate(batches: Callable[[], Iterator[int]], limit: int) -> tuple[float, float]:
    """Returns samples per second over `limit` samples, including start-up, and CPU seconds per sample."""
    start, cpu, seen = time.perf_counter(), cpu_seconds(), 0
    iterator = batches()
    for rows in iterator:
        seen += rows
        if seen >= limit:
            break
    elapsed = time.perf_counter() - start
    iterator.close()
    gc.collect()  # this ends the worker processes
    return seen / elapsed, (cpu_seconds() - cpu) / seen


def compare(arguments: argparse.Namespace) -> dict:
    root = Path(arguments.folder or tempfile.mkdtemp(prefix="loader-"))
    count, batch, workers = arguments.records, arguments.batch, arguments.workers
    readers, sizes, results = {}, {}, {}
    try:
        for dtype in ("bfloat16", "int8"):
            if not (root / dtype).is_dir():
                write_ours(root / dtype, count, dtype)
            readers[dtype] = read_ours(root / dtype, batch, workers)
        if not (root / "official").is_dir():
            write_official(root / "official", count)
        readers["official"] = read_official(root / "official", count, batch, workers)
        for name in readers:
            sizes[name] = sum(path.stat().st_size for path in (root / name).iterdir()) / count
        results = {name: {"bytes_per_sample": round(size)} for name, size in sizes.items()}
        limit = count // batch * batch
        for name in readers:  # warm up the page cache and everything else
            rate(readers[name], limit)
        for state in ("warm", "cold"):
            # The readers alternate, so that other work on the machine affects all of them equally.
            rounds = []
            # From a cold disk only one pass can be measured, because the next would be warm.
            limits = {name: limit if state == "cold" or name == "official" else 4 * limit for name in readers}
            for _ in range(arguments.repeats):
                rounds.append({})
                for name, reader in readers.items():
                    if state == "cold":
                        drop_from_cache(root / name)
                    rounds[-1][name] = rate(reader, limits[name])
                print(state, {name: round(pair[0]) for name, pair in rounds[-1].items()}, flush=True)
            for name, size in sizes.items():
                rates, cpu = zip(*(one[name] for one in rounds))
                median = statistics.median(rates)
                results[name][state] = {
                    "samples_per_second": round(median, 1),
                    "MB_per_second": round(median * size / 1e6, 1),
                    "cpu_ms_per_sample": round(1000 * statistics.median(cpu), 3),
                    "all_samples_per_second": [round(value, 1) for value in rates],
                }
            ratios = [one["bfloat16"][0] / one["official"][0] for one in rounds]
            results[f"times_official_{state}"] = round(statistics.median(ratios), 2)
    finally:
        if not arguments.folder:
            shutil.rmtree(root)
    return results


def plan(records: int, batch_size: int, folder: str | None) -> dict:
    """Opens a manifest with `records` records in 40 buckets and computes the order of one epoch."""
    root = Path(tempfile.mkdtemp(prefix="plan-", dir=folder))
    table = bucket_table(512)
    # Bucket sizes are as uneven as for photos: the square has most images, the extreme ratios have few.
    share = np.exp(-3 * np.abs(np.log([bucket.ratio for bucket in table])))
    counts = np.floor(records * share / share.sum()).astype(int)
    counts[np.argmax(counts)] += records - counts.sum()
    per_shard, per_record = 1000, 700_000
    entries = []
    try:
        for bucket, count in zip(table, counts.tolist()):
            for index, start in enumerate(range(0, count, per_shard)):
                file = features.shard_name(bucket, index)
                size = min(per_shard, count - start) * per_record
                with open(root / file, "wb") as shard:
                    os.truncate(shard.fileno(), size)  # a sparse file; opening it checks only the size
                entry = {"file": file, "bucket": bucket.name, "bytes": size, "sha256": "0" * 64}
                entries.append(entry | {"records": min(per_shard, count - start)})
        manifest = features.make_manifest(
            config={},
            source={"kind": "benchmark"},
            buckets=[FeatureBucket(bucket, latent_shape(bucket)) for bucket in table],
            shards=entries,
            text={"width": WIDTH, "length": TOKENS, "null_length": 1, "file": "", "sha256": ""},
        )
        write_json(root / features.MANIFEST, manifest)

        start = time.perf_counter()
        dataset = FeatureDataset(root)
        opened = time.perf_counter() - start
        loader = FeatureLoader([dataset], batch_size=batch_size, seed=0, arrays=(), text_length=TOKENS)
        start = time.perf_counter()
        steps = records // batch_size
        met = [np.zeros(entry.count, np.uint8) for entry in loader.buckets]
        order: SampleOrder = loader.order
        for step in range(steps):
            bucket, _, positions = order.batch(step, range(batch_size))
            np.add.at(met[bucket], positions, 1)
        planned = time.perf_counter() - start
        start = time.perf_counter()
        loader.positions(10**9)
        far = time.perf_counter() - start
        times = np.bincount(np.concatenate(met))
        return {
            "records": records,
            "buckets": len(table),
            "shards": len(entries),
            "batch_size": batch_size,
            "manifest_MB": round((root / features.MANIFEST).stat().st_size / 1e6, 2),
            "open_seconds": round(opened, 2),
            "whole_pass_seconds": round(planned, 2),
            "batch_of_step_1e9_seconds": round(far, 5),
            "peak_memory_GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
            "records_by_times_met": times.tolist(),
        }
    finally:
        shutil.rmtree(root)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=600, help="samples written and read")
    parser.add_argument("--batch", type=int, default=32, help="samples per batch")
    parser.add_argument("--workers", type=int, default=2, help="reader threads, or DataLoader processes")
    parser.add_argument("--repeats", type=int, default=3, help="number of runs; the median is reported")
    parser.add_argument("--plan", type=int, default=0, help="plan this many records instead of reading")
    parser.add_argument("--folder", help="keeps the files for the next run; default: a temporary folder")
    parser.add_argument("--note", default="", help="a remark to store with the figures")
    parser.add_argument(
        "--out", default="benchmarks/results/loader.json", help="JSON file; its other parts are kept"
    )
    arguments = parser.parse_args()

    if arguments.plan:
        part = {"plan": plan(arguments.plan, 256, arguments.folder)}
    else:
        part = {
            "records": arguments.records,
            "batch_size": arguments.batch,
            "workers": arguments.workers,
            "readers": compare(arguments),
        }
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "load_average": os.getloadavg()}
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(out.read_text()) if out.is_file() else {}
    before |= part | {"machine": machine, "note": arguments.note or before.get("note", "")}
    out.write_text(json.dumps(before, indent=1) + "\n")
    print(json.dumps(part, indent=1))


if __name__ == "__main__":
    main()
