"""Tasks made of what a profile holds out: measures of a model of code beside its loss.

    python tests/benchmarks/downstream.py DIR --profile tiny --count 900

writes two tasks of lm-evaluation-harness into DIR, and for each an experiment: the arms and runs of table2-tiny, judged
by the task. Runs that were trained before are used as they are.

brackets: does ) or ] come next? The context ends where the code closes one, and holds both kinds opened; each is right
equally often, so guessing comes to 0.5.  identifiers: which of four names of the context comes next? All four
stand in it and begin differently; the score is of whole names, by their logarithm per byte, and guessing comes to 0.25.
"""

import argparse
import io
import json
import random
import token
import tokenize
import tomllib
from collections.abc import Iterator
from keyword import iskeyword
from pathlib import Path
from typing import Any

from relora_train.data.sources import read_documents, resolve_source
from relora_train.data.splitting import split_digest, split_of
from relora_train.experiments.experiment import experiment_directory
from relora_train.settings.load import load_profile

CONTEXT_CHARACTERS = 96
"""With the longest name they fit into a sequence of `tiny`."""

OPENING = {")": "(", "]": "["}
NAMES = range(4, 17)
METRICS = {"brackets": "acc", "identifiers": "acc_norm"}
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: '{{{{context}}}}'
doc_to_choice: '{{{{choices}}}}'
doc_to_target: answer
target_delimiter: ''
metric_list: [{{metric: {metric}}}]
metadata: {{version: 1.0}}
"""


def held_out(profile: str) -> Iterator[str]:
    """Yield the documents that a profile validates on."""
    data = load_profile(profile).data
    for text in read_documents(resolve_source(data)):
        if text and split_of(split_digest(text), data.validation_fraction) == "val":
            yield text


def tokens_with_places(text: str) -> list[tuple[tokenize.TokenInfo, int]]:
    """Return the tokens of Python code, each with the character it begins at; none of code that does not parse."""
    begins = [0]
    for line in text.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    try:
        found = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return []
    return [(each, begins[each.start[0] - 1] + each.start[1]) for each in found if each.start[0] <= len(begins)]


def brackets(text: str) -> Iterator[dict[str, Any]]:
    """Yield each place where a bracket closes that was opened in its context, beside one of another kind."""
    opened = list[tuple[str, int]]()
    for each, place in tokens_with_places(text):
        if each.type != token.OP:
            continue
        if each.string in OPENING.values():
            opened.append((each.string, place))
        elif each.string in OPENING and opened:
            kind, since = opened.pop()
            context = text[max(0, place - CONTEXT_CHARACTERS) : place]
            if kind == OPENING[each.string] and 1 < place - since < len(context) and {"(", "["} <= set(context):
                yield {"context": context, "choices": list(OPENING), "answer": list(OPENING).index(each.string)}


def identifiers(text: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield each place where a name stands that its context has had, with three others that it has had."""
    seen = list[tuple[str, int]]()
    for each, place in tokens_with_places(text):
        if each.type != token.NAME or iskeyword(each.string) or len(each.string) not in NAMES:
            continue
        begin = max(0, place - CONTEXT_CHARACTERS)
        near = {name for name, at in seen if at >= begin}
        others = sorted(name for name in near if name[0] != each.string[0])
        if each.string in near and len({name[0] for name in others}) >= 3:
            rng.shuffle(others)
            chosen = {name[0]: name for name in others}
            choices = [*list(chosen.values())[:3], each.string]
            rng.shuffle(choices)
            answer = choices.index(each.string)
            yield {"context": text[begin:place], "choices": choices, "answer": answer}
        seen.append((each.string, place))


def make_tasks(texts: list[str], count: int) -> dict[str, list[dict[str, Any]]]:
    """Return so many examples of each task at most, drawn from all texts; of brackets as many of each kind."""
    rng = random.Random(0)
    found = {
        "brackets": [example for text in texts for example in brackets(text)],
        "identifiers": [example for text in texts for example in identifiers(text, rng)],
    }
    for examples in found.values():
        rng.shuffle(examples)
    by_kind = [[each for each in found["brackets"] if each["answer"] == kind] for kind in range(len(OPENING))]
    each_kind = min(count // len(OPENING), *map(len, by_kind))
    return {
        "brackets": [example for kind in by_kind for example in kind[:each_kind]],
        "identifiers": found["identifiers"][:count],
    }


def experiment(name: str) -> str:
    """Return table2-tiny, judged by a task beside it."""
    text = (experiment_directory() / "table2-tiny.toml").read_text()
    title = tomllib.loads(text)["title"]
    measure = f'measure = {{ score = "{name}/{METRICS[name]}", include = "." }}'
    return text.replace(f'title = "{title}"', f'title = "{title}; by {name}"\n{measure}')


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--count", type=int, default=900)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    for name, examples in make_tasks(list(held_out(options.profile)), options.count).items():
        lines = "".join(json.dumps(example) + "\n" for example in examples)
        (options.directory / f"{name}.jsonl").write_text(lines)
        (options.directory / f"{name}.yaml").write_text(
            TASK.format(name=name, data=f"{name}.jsonl", metric=METRICS[name])
        )
        (options.directory / f"table2-{name}.toml").write_text(experiment(name))


if __name__ == "__main__":
    main()
