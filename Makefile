.PHONY: check test

check:
	ruff check .
	ruff format --check .
	pyright
	lint-imports

test:
	pytest
