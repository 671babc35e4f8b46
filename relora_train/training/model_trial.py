"""Try all that a run does with a model, in little: load, wrap, train, merge, write, load again, and adapt with peft."""

import json
import tempfile
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from relora_train.data.tokenizer import load_tokenizer
from relora_train.errors import ModelError, TokenizerError, UntrainedLayerError
from relora_train.method.experts import low_rank_layers
from relora_train.method.fast_path import share_inputs
from relora_train.method.layer import lora_parameters
from relora_train.method.merge import merge
from relora_train.method.wrap import apply_relora, parameter_kinds, unwrap
from relora_train.process import quiet_libraries
from relora_train.settings.base import FrozenConfig
from relora_train.training.files import save_model
from relora_train.training.models.causal_lm import NextTokenLoss
from relora_train.training.models.kinds import CAUSAL_LM, check_place, read_config
from relora_train.training.models.model import embedding, evaluating, logits, probe_tokens
from relora_train.training.models.pretrained import load_model
from relora_train.training.peft_export import adapter_config, adapter_on_base, adapter_state
from relora_train.training.progress import listed, split_idle

_UPDATES = 3
_SEQUENCES, _LENGTH = 4, 24
_ROUNDING = 1e-4
"""Largest change of the output that rounding alone can explain, relative to the largest logit."""

_OF_THE_PLACE = ("_name_or_path", "dtype", "transformers_version", "architectures")
"""Keys of a configuration that say how a model was loaded and by what."""


class Finding(FrozenConfig):
    """One part of a trial; `works` is None where it could not be tried."""

    part: str
    works: bool | None
    said: str
    error: float | None = None
    """Largest change of a logit, relative to the largest."""


class Trial(FrozenConfig):
    """The findings about one model."""

    family: str
    parameters: int
    wrapped: tuple[str, ...]
    """Names of the layers."""

    kinds: dict[str, int]
    """Parameters by their kind, A and B being factors; see method.wrap.parameter_kinds."""

    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.works is False)


def try_model(
    place: str | Path, *, revision: str | None = None, rank: int = 4, target_modules: tuple[str, ...] | None = None
) -> Trial:
    """Try the causal model of a directory or hub id in float32 on this CPU; A and B alone are trained.

    Holds up to two copies of it. Raises what a run raises before its first update, by the same checks.
    """
    quiet_libraries()
    if directory := check_place(place):
        read_config(directory, CAUSAL_LM, key="vocab_size")
    torch.manual_seed(0)
    model = load_model(place, revision=revision)
    rows = embedding(model).num_embeddings
    family, size = cast(Any, model).config.model_type, sum(p.numel() for p in model.parameters())
    names = apply_relora(model, rank=rank, alpha=rank, dropout=0, target_modules=target_modules, seed=0)
    kinds: Counter[str] = Counter()
    kind_of = parameter_kinds(model)
    for name, parameter in model.named_parameters():
        kinds[kind_of[name]] += parameter.numel()
    findings = [_trained(model)]
    updates, settings = adapter_state(model), adapter_config(model)
    expected = _scores(model)
    merge(model)
    findings.append(_compared("merge", "output unchanged", expected, _scores(model)))
    unwrap(model)
    with tempfile.TemporaryDirectory() as scratch:
        save_model(model, Path(scratch), weights=model.state_dict())
        config, expected = _config(model), _scores(model)
        del model  # two copies at most
        model = load_model(scratch)
    export = _compared("export", "logits and config.json as before", expected, _scores(model), exactly=True)
    if changed := sorted(key for key, value in _config(model).items() if config.get(key, value) != value):
        export = export.model_copy(update={"works": False, "said": f"config.json changed: {', '.join(changed)}"})
    findings += [export, _adapted(model, load_model(place, revision=revision, tells=False), updates, settings)]
    findings.append(_tokenizer(place, revision, rows))
    return Trial(family=family, parameters=size, wrapped=tuple(names), kinds=dict(kinds), findings=tuple(findings))


def check_layers_are_called(model: nn.Module) -> None:
    """Raise UntrainedLayerError for wrapped layers whose B gets no gradient: their weight is read past their forward.

    One forward and backward pass over a short sequence. Leaves A and B alone to be trained, without gradients.
    """
    _train_factors_alone(model)
    logits(model, probe_tokens(model, rows=2)).float().sum().backward()  # type: ignore[no-untyped-call]
    layers = low_rank_layers(model)
    dead, _ = split_idle(layers, [name for name, layer in layers.items() if layer.lora_B.grad is None])
    model.zero_grad(set_to_none=True)
    if dead:
        others = sorted({name.rpartition(".")[2] for name in {*layers} - {*dead}})
        raise UntrainedLayerError(
            f"No gradient reaches {listed(dead)} of this {type(model).__name__}: the model reads the weight past the "
            "layer, or does not use it, so low-rank factors there would learn nothing. To wrap the others, set "
            f"relora.target_modules to {', '.join(others) or 'other layers'}."
        )


def _train_factors_alone(model: nn.Module) -> None:
    factors = {name for name, _ in lora_parameters(model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in factors)


def _trained(model: nn.Module) -> Finding:
    """Do some updates of A and B on random tokens, as a stage does."""
    check_layers_are_called(model)
    loss_function = NextTokenLoss(model)  # refuses a model that looks ahead
    rows = embedding(model).num_embeddings
    tokens = torch.randint(0, rows, (_SEQUENCES, _LENGTH + 1), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([factor for _, factor in lora_parameters(model)], lr=1e-2, foreach=False)
    share_inputs(model)  # and no optimizer: the update is not in the products yet when the merge is judged
    losses, alive = [], dict.fromkeys((name for name, _ in lora_parameters(model)), False)
    for _ in range(_UPDATES):
        loss = loss_function.loss(tokens) / loss_function.terms(tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, factor in lora_parameters(model):  # A's gradient is zero as long as B is
            alive[name] |= factor.grad is not None and bool(factor.grad.any())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    dead, unreached = split_idle(alive, [name for name, lives in alive.items() if not lives])
    said = f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {_UPDATES} updates of A and B on random tokens"
    if unreached:
        said += f"; no token reached {listed(unreached)}"
    if dead:
        said += f"; no gradient for {listed(dead)}"
    return Finding(part="training", works=not dead and losses[-1] < losses[0], said=said)


def _tokenizer(place: str | Path, revision: str | None, rows: int) -> Finding:
    """Look whether the model's own tokenizer can be used, as a run does by default."""
    try:
        entries = load_tokenizer(str(place), revision=revision).vocab_size
    except TokenizerError as error:
        return Finding(part="tokenizer", works=None, said=str(error))
    said = f"{entries:,} entries, {rows:,} rows of the embedding"
    return Finding(part="tokenizer", works=entries <= rows, said=said)


def _adapted(model: nn.Module, base: nn.Module, updates: dict[str, Tensor], settings: dict[str, Any]) -> Finding:
    if find_spec("peft") is None:
        return Finding(part="adapter", works=None, said="not tried: peft is not installed")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning
        )  # peft asks for it
        return _adapted_by_peft(model, base, updates, settings)


def _adapted_by_peft(
    model: nn.Module, base: nn.Module, updates: dict[str, Tensor], settings: dict[str, Any]
) -> Finding:
    from peft import PeftModel

    expected = _scores(model)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            tensors, changes = adapter_on_base(model, base, updates, settings)
        except ModelError as error:
            return Finding(part="adapter", works=None, said=str(error))
        save_file(tensors, Path(scratch) / "adapter_model.safetensors", metadata={"format": "pt"})
        (Path(scratch) / "adapter_config.json").write_text(json.dumps(settings | changes))
        try:
            adapted = PeftModel.from_pretrained(cast(Any, base), scratch)
        except Exception as error:  # whatever peft raises
            return Finding(part="adapter", works=None, said=f"peft does not load it: {error}".splitlines()[0])
    return _compared("adapter", "base and adapter in peft give the checkpoint's logits", expected, _scores(adapted))


@torch.no_grad()
def _scores(model: nn.Module) -> Tensor:
    with evaluating(model):
        return logits(model, probe_tokens(model, rows=4)).float()


def _compared(part: str, said: str, expected: Tensor, found: Tensor, *, exactly: bool = False) -> Finding:
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    works = torch.equal(found, expected) if exactly else error <= _ROUNDING
    return Finding(part=part, works=works, said=said if works else f"not so: {said}", error=error)


def _config(model: nn.Module) -> dict[str, Any]:
    config = cast(Any, model).config.to_dict()
    return {key: value for key, value in config.items() if key not in _OF_THE_PLACE}
