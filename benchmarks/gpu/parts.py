"""Defines what `performance_gpu.sh` measures: a table of parts, the most important first.

A part is a list of cases. A case is a command that writes its result to the file given by --out. `small` is
the same list with a tiny network, on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

# Image side in pixels -> batch size with which XL/2 trains without rematerialization in 80 GB. A 512 px image
# then takes 1.6 GiB, in addition to 9.1 GiB for weights, moments and moving average.
BATCH = {256: 64, 512: 16, 1024: 4}

# Blocks, rematerialization, attention, batch size ('default' as above).
TRAIN = (
    ("scanned", "dots", "auto", "default"),
    ("scanned", "dots", "auto", "largest"),
    ("unrolled", "none", "auto", "default"),
    ("scanned", "none", "auto", "default"),
    ("scanned", "dots", "xla", "default"),
    ("scanned", "full", "auto", "default"),
    ("unrolled", "dots", "auto", "default"),
    ("unrolled", "dots", "auto", "largest"),
    ("scanned", "save_attention", "auto", "default"),
    ("scanned", "save_attention", "auto", "largest"),
    ("scanned", "full", "auto", "largest"),
    ("scanned", "none", "auto", "largest"),
    ("unrolled", "none", "xla", "default"),
)
# Options of benchmarks/options.py, except those that the training parts measure.
OPTIONS = (
    "half of the tokens routed",
    "Muon",
    "two micro-batches",
    "no donation",
    "min-SNR",
    "no caption dropout",
)
# With this flag a program gives the same bits each time it runs.
DETERMINISTIC = "--config.compile.deterministic=True"
# Size of the tiny network of `small`.
TINY = {"size": "custom", "depth": 2, "hidden_size": 24, "num_heads": 2, "dtype": "float32"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A command and its requirements."""

    name: str
    # Arguments of Python. --out=FILE is added, and also --batch if `batch` is not None.
    command: tuple[str, ...]
    batch: int | None = None
    # Whether to search for the largest batch that fits, starting from `batch`.
    largest: bool = False
    # The case is not started if less time than this is left.
    seconds: int = 60
    # Whether PyTorch needs a part of the GPU's memory, which JAX then must not reserve.
    torch: bool = False
    # The case is skipped if any of these packages is missing.
    packages: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """Cases that share a results file. The argument of `cases` says whether this is the small list."""

    what: str
    cases: Callable[[bool], list[Case]]


def _overrides(values: dict[str, object]) -> tuple[str, ...]:
    return tuple(f"--config.model.{name}={value}" for name, value in values.items())


def _train(pixels: int) -> Callable[[bool], list[Case]]:
    def cases(small: bool) -> list[Case]:
        common = ("-m", "pixart_jax.benchmark", "train", f"--config=configs/stage3.py:{pixels}", "--noparts")
        common += ("--rounds=1", "--calls=1", *_overrides(TINY)) if small else ("--rounds=5", "--calls=3")
        default = 1 if small else BATCH[pixels]
        found = {}
        for blocks, remat, attention, batch in TRAIN:
            model = {"scan_layers": blocks == "scanned", "remat": remat, "attention": attention}
            name = f"{blocks} {remat} {attention} {default if batch == 'default' else batch}"
            found[name] = Case(
                name,
                common + _overrides(model),
                batch=default,
                largest=batch == "largest",
                seconds=120 if blocks == "unrolled" else 60,
            )
        chosen = list(found.values())
        if small:
            # Only one case of each kind.
            return [chosen[0], *[case for case in chosen if case.largest][: pixels == 256]]
        return chosen

    return cases


def _compare(pixels: int) -> Callable[[bool], list[Case]]:
    def cases(small: bool) -> list[Case]:
        common = ("benchmarks/compare/training.py", "--case=xl2", f"--size={pixels}")
        if small:
            # torch.compile takes minutes on a CPU.
            common += ("--platform=cpu", "--modes", "eager", "--rounds=1", "--depth=1", "--heads=2")
        else:
            common += ("--platform=gpu", "--modes", "compiled", "--rounds=10", "--calls=5")
        # Both sides hold weights, moments and moving average, and neither frees the memory that it has
        # allocated.
        batch = 1 if small else BATCH[pixels] // 2
        found = [
            Case(f"{name} {batch}", (*common, flag), batch=batch, torch=True, seconds=180)
            for name, flag in (("scanned", "--scan_layers"), ("unrolled", "--no-scan_layers"))
        ]
        return found[:1] if small else found

    return cases


def _sample(small: bool) -> list[Case]:
    common = ("benchmarks/compare/sampling.py",)
    if small:
        common += ("--platform=cpu", "--steps=2", "--rounds=1", "--depth=1", "--heads=2", "--no-compile")
        return [Case("256 px, batch 2", (*common, "--sizes=256", "--scan_layers"), batch=2, torch=True)]
    return [
        Case(
            f"{pixels} px, batch {batch}, {blocks}",
            (*common, "--platform=gpu", "--torch_mode=default", f"--sizes={pixels}", flag),
            batch=batch,
            torch=True,
            seconds=120,
        )
        for blocks, flag, pixels, batch in (
            ("scanned", "--scan_layers", 512, 1),
            ("scanned", "--scan_layers", 512, 8),
            ("scanned", "--scan_layers", 1024, 1),
            ("unrolled", "--no-scan_layers", 512, 1),
            ("scanned", "--scan_layers", 1024, 8),
            ("unrolled", "--no-scan_layers", 512, 8),
        )
    ]


def _profile(small: bool) -> list[Case]:
    model = {"scan_layers": False, "remat": "none"} | (TINY if small else {})
    few = ("--rounds=1", "--calls=1") if small else ("--rounds=3", "--calls=3")
    return [
        Case(
            f"{pixels} px",
            (
                *("benchmarks/gpu/kernels.py", f"--config=configs/stage3.py:{pixels}", *few),
                *(() if small else (f"--profile=build/profile/{pixels}",)),
                *_overrides(model),
            ),
            batch=1 if small else BATCH[pixels],
        )
        for pixels in ((256,) if small else (256, 512))
    ]


def _options(small: bool) -> list[Case]:
    common = ("benchmarks/options.py", "--scan_layers")
    if small:
        # With three blocks, there is one block that routed tokens can skip.
        shape = {name: value for name, value in TINY.items() if name != "size"} | {"depth": 3}
        common += ("--rounds=1", *(f"--{name}={value}" for name, value in shape.items()))
    else:
        common += ("--size=XL/2", "--dtype=bfloat16")
    # From the second option on, the plain step is loaded from the compile cache.
    found = [Case(name, (*common, "--only", name), batch=2 if small else 32) for name in OPTIONS]
    return found[:1] if small else found


def _digits(small: bool) -> list[Case]:
    steps = 4 if small else 400
    model = _overrides({"depth": 1, "hidden_size": 24, "num_heads": 2}) if small else ()
    common = ("benchmarks/gpu/resume.py", f"--steps={steps}", "--config=configs/digits.py:stage2", *model)
    # Wide enough for bfloat16 kernels, with heads as wide as those of XL/2.
    wide = {"hidden_size": 288, "num_heads": 4, "dtype": "bfloat16"}
    found = [
        Case("resume, deterministic", (*common, DETERMINISTIC, "--expect_equal")),
        Case(
            "resume, deterministic, bfloat16",
            (*common, DETERMINISTIC, "--expect_equal", *_overrides(wide)),
        ),
        Case("resume, as it is", common),
        Case(
            "resume, real digits, deterministic",
            (
                *("benchmarks/gpu/resume.py", "--images=digits", "--config=configs/digits.py:stage1", *model),
                *(f"--steps={steps if small else 1200}", DETERMINISTIC, "--expect_equal"),
            ),
            packages=("grain", "array_record", "sklearn", "tensorboardX", "tqdm"),
        ),
    ]
    return [found[0], found[-1]] if small else found


def _encoders(small: bool) -> list[Case]:
    common = ("benchmarks/gpu/encoders.py", *(("--small",) if small else ()))
    return [
        Case("T5-XXL", (*common, "--what=t5"), batch=2 if small else 64),
        Case("VAE encode", (*common, "--what=encode"), batch=1 if small else 16),
        Case("VAE decode", (*common, "--what=decode"), batch=1 if small else 16),
    ]


def _attention(small: bool) -> list[Case]:
    common = ("benchmarks/gpu/attention.py", *(("--small",) if small else ()))
    names = ("xla",) if small else ("cudnn", "xla", "tokamax")
    return [
        Case(name, (*common, f"--implementation={name}"), packages=("tokamax",) if name == "tokamax" else ())
        for name in names
    ]


PARTS = {
    "train-256": Part("training XL/2 at 256 px: scanned, unrolled, remat, attention, batch", _train(256)),
    "train-512": Part("the same at 512 px", _train(512)),
    "train-1024": Part("the same at 1024 px", _train(1024)),
    "compare-256": Part("training XL/2 at 256 px beside compiled diffusers", _compare(256)),
    "compare-512": Part("the same at 512 px", _compare(512)),
    "sample": Part("sampling at 512 and 1024 px beside compiled diffusers", _sample),
    "profile": Part("kernels of a training step at 256 and 512 px and their shares", _profile),
    "options": Part("each option of the training step against the plain step", _options),
    "digits": Part("the digits model: training, and a resumed run bit for bit", _digits),
    "encoders": Part("an encoder of T5-XXL's size, and the VAE at 512 px", _encoders),
    "attention": Part("attention alone: cuDNN, XLA and, where it is installed, tokamax", _attention),
}
