.PHONY: check docs newest test

check:
	ruff check .
	ruff format --check .
	pyright
	lint-imports

test:
	pytest

# The newest releases that pyproject.toml allows, in an environment of their own.
newest:
	python3 -m venv .venv-newest
	.venv-newest/bin/pip install -q --upgrade --upgrade-strategy eager -e '.[test]'
	.venv-newest/bin/pip list
	. .venv-newest/bin/activate && pytest -m 'not slow and not gpu'

docs:
	mkdocs build --strict
