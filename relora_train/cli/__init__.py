"""The `relora` command."""
