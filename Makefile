.PHONY: check docs test

check:
	ruff check .
	ruff format --check .
	pyright
	lint-imports

test:
	pytest

docs:
	mkdocs build --strict
