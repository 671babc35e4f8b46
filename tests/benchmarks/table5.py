"""Labelled texts for the experiment table5-tiny, made of the packages that `tiny` reads, and its search.

    python tests/benchmarks/table5.py DIR

writes into DIR the tasks comments.jsonl (is a line from a docstring or a comment?) and packages.jsonl (from which of
the four packages does a line of code come?); search.toml, each arm of table5-tiny at four learning rates, an equal
budget for all; and packages.toml, table5-tiny on the second task, each arm at the rate that its search found best.
"""

import argparse
import ast
import hashlib
import io
import json
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relora_train.data.python_sources import package_files
from relora_train.experiments.experiment import experiment_directory
from relora_train.settings.load import load_profile

EXAMPLES = 2400
"""Of each class of 'comments', and of four classes of 'packages' together."""

CHARACTERS = range(24, 61)
RATES = {"full": (1e-4, 3e-4, 1e-3, 3e-3), "lora": (1e-3, 3e-3, 1e-2, 3e-2), "relora": (1e-3, 3e-3, 1e-2, 3e-2)}
PACKAGES_SHA256 = "30df816659b27b0c7fb876a50862206d1b8c5e3c8832c04090705a98e9947b3d"
"""Pins packages.jsonl; table5-tiny pins comments.jsonl."""

BEST_ON_PACKAGES = {"full": 1e-3, "lora": 3e-3, "relora": 3e-3}  # on the old corpus: RESULTS.md


def sources() -> Iterator[tuple[str, str]]:
    """Yield the package and the text of each module that parses."""
    for package in load_profile("tiny").data.packages:
        for file in package_files([package]):
            try:
                text = file.path.read_text(encoding="utf-8")
                ast.parse(text)
            except (SyntaxError, ValueError):
                continue
            yield package.partition("==")[0], text


def comments() -> Iterator[tuple[str, str]]:
    """Yield lines of docstrings and comments, without the signs that tell them apart."""
    for _, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for line in (ast.get_docstring(node) or "").splitlines()[:2]:
                    yield "docstring", line.strip()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield "comment", token.string.lstrip("#!: ").strip()


def packages() -> Iterator[tuple[str, str]]:
    """Yield lines of code of the packages."""
    for package, text in sources():
        yield from ((package, line.strip()) for line in text.splitlines() if not line.strip().startswith("#"))


def write(path: Path, lines: Iterator[tuple[str, str]], each: int) -> None:
    """Write so many different lines of each class: those whose digest is lowest, so that none is preferred."""
    found: dict[str, dict[str, bytes]] = {}
    for label, text in lines:
        if len(text) in CHARACTERS:
            found.setdefault(label, {})[text] = hashlib.blake2b(text.encode()).digest()
    ambiguous = {text for label in found for text in found[label] if sum(text in other for other in found.values()) > 1}
    with path.open("w", encoding="utf-8") as file:
        for label, texts in sorted(found.items()):
            for text in sorted(texts.keys() - ambiguous, key=texts.__getitem__)[:each]:
                file.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")


def search() -> str:
    """Return an experiment with an arm for each arm of table5-tiny and each learning rate."""
    shipped, arms = _table5(), dict[str, Any]()
    for (name, arm), rate in ((item, rate) for item in shipped["arms"].items() for rate in RATES[item[0]]):
        own = {**arm["set"], "optimizer": {"learning_rate": rate}}
        arms[f"{name}-{rate:g}"] = {"label": f"{arm['label']}, {rate:g}", "set": own}
    kept = {key: shipped[key] for key in ("profile", "budget_tokens", "base")}
    return _written(
        {**kept, "title": "The search of table5-tiny", "seeds": [100], "reference": next(iter(arms)), "arms": arms}
    )


def second_task() -> str:
    """Return table5-tiny on packages.jsonl."""
    own = _table5()
    own["base"]["data"] |= {"name": "packages", "paths": ["table5/packages.jsonl"], "content_sha256": PACKAGES_SHA256}
    for name, rate in BEST_ON_PACKAGES.items():
        own["arms"][name]["set"]["optimizer"]["learning_rate"] = rate
    del own["search"]
    return _written(own | {"title": "Table 5 on a CPU, the second task: the package of a line of code"})


def _table5() -> dict[str, Any]:
    return tomllib.loads((experiment_directory() / "table5-tiny.toml").read_text())


def _written(settings: dict[str, Any]) -> str:
    return "".join(f"{key} = {_toml(value)}\n" for key, value in settings.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / "comments.jsonl", comments(), EXAMPLES)
    write(directory / "packages.jsonl", packages(), EXAMPLES // 4)
    (directory / "search.toml").write_text(search())
    (directory / "packages.toml").write_text(second_task())


if __name__ == "__main__":
    main()
