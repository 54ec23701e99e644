# make demo: compare stock and balanced SGLang on this machine, no GPU needed.
# make test: everything CI runs. make check: the part without servers, for while you work.
# make test-all: the whole suite and the demo in both forms of the seams, about 70 minutes on two cores.
BIN := .venv/bin

.PHONY: demo test test-all check bench install lean clean

demo: lean
	$(BIN)/python -m sglang_moelb.demo

test: install
	bash scripts/test.sh ci

test-all: install
	bash scripts/test.sh all

check: install
	bash scripts/test.sh check

bench: install
	set -e; export PYTHONPATH=benchmarks; for file in benchmarks/bench_*.py; do echo "== $$file"; \
	  $(BIN)/python -m benchmarks.$$(basename $$file .py); done

# The environment that `make demo` needs, then the test tools on top.
lean:
	bash scripts/install_cpu.sh

install: lean
	cmp -s requirements/test.txt .venv/moelb-test.txt || { \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/test.txt && \
	  cp requirements/test.txt .venv/moelb-test.txt; }
	bash scripts/install_promtool.sh .venv/bin || true  # the tests that need it tell

clean:
	rm -rf .venv build dist models demo-out ab-out *.egg-info .pytest_cache .ruff_cache \
	  .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
