"""Tasks of lm-evaluation-harness in a directory: multiple choice, text to predict, text to generate; no network."""

import json
from pathlib import Path

CHOICES = [{"question": f"What is {i}?", "choices": [" a", " b", " c"], "answer": i % 3} for i in range(12)]
PAGES = [{"page": f"The number {i} is followed by {i + 1}."} for i in range(4)]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: {text}
{more}
metadata: {{version: {version}}}
"""


def write_tasks(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    for name, records in (("choices", CHOICES), ("pages", PAGES)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    question = "'{{question}}'"
    choice = "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\nmetric_list: [{metric: acc}, {metric: acc_norm}]"
    pages = "doc_to_target: '{{page}}'\nmetric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"
    echo = "doc_to_target: ''\ngeneration_kwargs: {until: [x], max_gen_toks: 3}\nmetric_list: [{metric: exact_match}]"
    for name, data, kind, text, more, version in (
        ("choice", "choices.jsonl", "multiple_choice", question, choice, 1.5),
        ("pages", "pages.jsonl", "loglikelihood_rolling", "''", pages, 2.0),
        ("echo", "choices.jsonl", "generate_until", question, echo, 3.0),
    ):
        filled = TASK.format(name=name, data=data, kind=kind, text=text, more=more, version=version)
        (directory / f"{name}.yaml").write_text(filled)
    return directory
