.PHONY: check test docs

# In the order of their speed.
check:
	ruff check .
	ruff format --check .
	mypy

test:
	pytest -n 2

docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
