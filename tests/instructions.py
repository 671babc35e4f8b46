"""Made-up conversations and labelled texts."""

import json
import random
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "naïve", "漢字"]


def sentence(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def record(seed: int) -> dict[str, Any]:
    """A record that is an example of any kind: a conversation, a prompt with its completion, a labelled pair."""
    rng = random.Random(seed)
    messages = [{"role": "system", "content": sentence(rng, 5)}] if seed % 3 == 0 else []
    for _ in range(rng.randint(1, 3)):
        messages += [{"role": "user", "content": sentence(rng, 9)}, {"role": "assistant", "content": sentence(rng, 20)}]
    return {
        "messages": messages,
        "prompt": sentence(rng, 9),
        "completion": sentence(rng, 9),
        "text": sentence(rng, 12),
        "pair": sentence(rng, 12),
        "label": rng.choice(["b", "a", "c"]),
    }


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
    return path
