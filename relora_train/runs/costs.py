"""The cost of training at full rank or low rank, whichever stage does it, and the cards that it fits."""

import math
from collections.abc import Collection
from typing import Any

from relora_train.method import products
from relora_train.runs.optimizer_state import state_numbers
from relora_train.settings.base import FrozenConfig
from relora_train.settings.profile import Profile
from relora_train.training.models.activations import activations
from relora_train.training.models.registry import facts_of
from relora_train.training.models.shape import LinearShape, ModelShape, model_flops_per_token, wrapped_layers

_FP32_BYTES = 4
_BF16_BYTES = 2
_MOMENTS = 2
_CODE_BYTES = 1 + 4 / 256
"""A moment in 8 bits, with its share of a scale."""

_CARDS = (24 * 10**9, 80 * 10**9)
_USABLE = 0.9
"""The share of a card that a stage may take: the rest is for the driver, libraries and fragments."""

_SAVING = {
    "launch.gradient_checkpointing=true": ("launch", "gradient_checkpointing", True),
    "precision.dtype=pure-bfloat16": ("precision", "dtype", "pure-bfloat16"),
}


class MemoryEstimate(FrozenConfig):
    """Bytes on every device."""

    weights: int
    gradients: int
    optimizer: int
    merged: int = 0
    """Merged weights that are kept for the length of an update, where that is the faster order."""

    activations: int = 0
    """The most that a micro-batch takes on top; 'auto' counts as a GPU."""

    @property
    def held(self) -> int:
        """Bytes for as long as a stage lasts."""
        return self.total - self.activations

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.merged + self.activations


class LayerOrder(FrozenConfig):
    """How low-rank layers that read one input multiply; see method/products.py."""

    layers: tuple[str, ...]
    """Names in one block."""

    order: str
    flops_per_token: int


class ParameterKind(FrozenConfig):
    """Parameters of a kind, and their lot in training."""

    name: str
    """wrapped, factors (A and B), or a kind of relora.train."""

    parameters: int
    trained: bool


class PhaseCost(FrozenConfig):
    """The cost of full-rank or low-rank training, whichever stage does it."""

    trainable_parameters: int
    adapter_parameters: int
    """The part of them in A and B."""

    flops_per_token: int
    """Forward and backward, in the cheapest order of products."""

    memory: MemoryEstimate
    snapshot_bytes: int
    """One snapshot inside a stage: all that moves, and its optimizer state."""

    state_of_factors: int
    """Numbers that the optimizer holds of A and B."""

    state_of_others: int
    """Numbers that it holds of all else."""

    orders: tuple[LayerOrder, ...] = ()
    """The low-rank layers of a block, on the kind of device that the profile names; 'auto' counts as a CPU."""

    kinds: tuple[ParameterKind, ...] = ()
    """All parameters, A and B included, by kind."""


class CardFit(FrozenConfig):
    """The largest micro-batches with which a run leaves a tenth of a card free; None: none, or no such stage."""

    card_bytes: int
    options: tuple[str, ...]
    """The settings that this takes, beside the profile's."""

    full: int | None = None
    low_rank: int | None = None


def card_fits(profile: Profile, shape: ModelShape, kinds: set[bool]) -> tuple[CardFit, ...]:
    """Return the fit of each card, by the first options with which stages of all kinds (low-rank or not) fit."""
    if profile.launch.device == "cpu":
        return ()
    slower, rounded = _SAVING
    ways = [(), (slower,), (rounded,), (slower, rounded)] if profile.launch.sharding == "none" else [(), (slower,)]
    fits = []
    for card in _CARDS:
        fit = CardFit(card_bytes=card, options=())
        for way in ways:
            changed = _changed(profile, ("launch", "device", "cuda"), *(_SAVING[option] for option in way))
            found = {low_rank: _largest_micro_batch(changed, shape, low_rank, card) for low_rank in kinds}
            if all(found.values()):
                fit = CardFit(card_bytes=card, options=way, full=found.get(False), low_rank=found.get(True))
                break
        fits.append(fit)
    return tuple(fits)


def _largest_micro_batch(profile: Profile, shape: ModelShape, low_rank: bool, card: int) -> int | None:
    """Return the largest divisor of a rank's share of a batch with which a stage fits the card."""
    whole = _changed(profile, ("batch", "micro_sequences", None)).batch
    share, _ = whole.forward_passes(profile.launch.world_size or 1)
    count = low_rank_cost if low_rank else full_cost
    for size in range(share, 0, -1):
        if share % size == 0:
            memory = count(_changed(profile, ("batch", "micro_sequences", size)), shape).memory
            if memory.total <= _USABLE * card:
                return size
    return None


def _changed(profile: Profile, *changes: tuple[str, str, Any]) -> Profile:
    for section, key, value in changes:
        profile = profile.model_copy(update={section: getattr(profile, section).model_copy(update={key: value})})
    return profile


def full_cost(profile: Profile, shape: ModelShape) -> PhaseCost:
    flops = model_flops_per_token(shape, sequence_length=profile.batch.sequence_length)
    return _phase_cost(profile, shape, flops_per_token=flops)


def low_rank_cost(profile: Profile, shape: ModelShape) -> PhaseCost:
    relora, batch, launch = profile.relora, profile.batch, profile.launch
    wrapped = wrapped_layers(shape, target_modules=relora.target_modules, rank=relora.rank)
    factors = shape.layers * relora.rank * sum(linear.sides for linear in wrapped)
    sharded = launch.sharding == "full" and launch.world_size != 1
    device = "cuda" if launch.device == "cuda" else "cpu"
    exact = relora.dropout == 0 and profile.precision.frozen_as == profile.precision.dtype == "float32"
    merges = exact and not sharded and not launch.compiles_on(device)
    sequences, micro_steps = batch.forward_passes(launch.world_size or 1)
    tokens = sequences * facts_of(profile).rows_per_sequence()
    by_name = {linear.name: linear for linear in wrapped}
    orders, flops, merged = [], {}, 0
    for names in products.sibling_groups(list(by_name)):  # as fast_path.share_inputs will choose
        layers = tuple(by_name[name] for name in names)
        sizes = layers[0].in_features, [linear.out_features for linear in layers], relora.rank
        how = products.choose_products(*sizes, merges=merges, device=device)
        flops[layers] = products.flops_per_token(how, *sizes, tokens=tokens, micro_steps=micro_steps)
        flops[layers] *= float(layers[0].copies * layers[0].used)
        orders.append(LayerOrder(layers=names, order=how, flops_per_token=round(flops[layers])))
        merged += sum(linear.weights for linear in layers) if how != "split" else 0
    return _phase_cost(
        profile,
        shape,
        frozen={"wrapped", *relora.frozen},
        factors=factors,
        wrapped=wrapped,
        merged=shape.layers * merged,
        flops_per_token=model_flops_per_token(
            shape, sequence_length=batch.sequence_length, wrapped=flops, frozen=relora.frozen
        ),
        orders=tuple(orders),
    )


def _plain_matrices(shape: ModelShape, wrapped: tuple[LinearShape, ...], kinds: Collection[str]) -> int:
    """Return the parameters of these kinds in embeddings of tokens and in linear layers that are not wrapped."""
    table = shape.vocab_size * shape.hidden_size
    matrices = {
        "embeddings": 0 if shape.classifies else table + shape.other_matrices,
        "head": 0 if shape.tied and not shape.classifies else table,
        "others": shape.layers * sum(linear.weights for linear in shape.linears if linear not in wrapped),
    }
    return sum(number for kind, number in matrices.items() if kind in kinds)


def _held_as(profile: Profile, linear: LinearShape) -> str:
    """Return what a device holds the wrapped weights of a layer in; experts take codes or float32."""
    kind = profile.precision.frozen_as
    return "float32" if linear.is_expert and kind == "bfloat16" else kind


def bytes_per_weight(kind: str, in_features: int) -> float:
    """Return the bytes of a frozen weight with its share of the scales (method/frozen.py)."""
    return {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / in_features, "nf4": 0.5 + 4 / 64}[kind]


def _phase_cost(
    profile: Profile,
    shape: ModelShape,
    *,
    flops_per_token: int,
    frozen: Collection[str] = (),
    factors: int = 0,
    wrapped: tuple[LinearShape, ...] = (),
    merged: int = 0,
    orders: tuple[LayerOrder, ...] = (),
) -> PhaseCost:
    """Return the cost of training all parameters but the frozen kinds, and factors beside them."""
    counts = {**shape.parameters_by_kind(wrapped), "factors": factors}
    kinds = tuple(ParameterKind(name=name, parameters=n, trained=name not in frozen) for name, n in counts.items() if n)
    held = shape.layers * sum(
        math.ceil(linear.weights * bytes_per_weight(_held_as(profile, linear), linear.in_features))
        for linear in wrapped
    )
    held += _FP32_BYTES * (sum(kind.parameters for kind in kinds if not kind.trained) - counts["wrapped"])
    if wrapped and profile.precision.rounds_others and profile.launch.sharding == "none":
        held -= (_FP32_BYTES - _BF16_BYTES) * _plain_matrices(shape, wrapped, frozen)
    trainable = sum(kind.parameters for kind in kinds if kind.trained)
    trained = _FP32_BYTES * trainable
    optimizer = profile.optimizer
    numbers = state_numbers(profile, shape, frozen=frozen, factors=factors, wrapped=wrapped)
    if profile.precision.trains_in_bfloat16:  # under autocast all that is trained stays fp32
        vectors = shape.vector_parameters - sum(counts[kind] for kind in {"norms", "biases"} & {*frozen})
        trained = _BF16_BYTES * trainable + (_FP32_BYTES - _BF16_BYTES) * vectors
    # Ranks that share the model hold a part each. Not covered: the blocks gathered for a moment.
    ranks = (profile.launch.world_size or 1) if profile.launch.sharding == "full" else 1
    micro_batch = activations(profile, shape, wrapped, device="cpu" if profile.launch.device == "cpu" else "cuda")
    state = _FP32_BYTES * sum(numbers) if optimizer.has_rules else _MOMENTS * trained  # in bfloat16 too
    largest = max(shape.vocab_size * shape.hidden_size, *(linear.weights for linear in shape.linears))
    sizes = {
        "weights": held + trained,
        "gradients": _FP32_BYTES * largest if optimizer.in_backward else trained,
        "optimizer": state if optimizer.state == "float32" else _MOMENTS * _CODE_BYTES * trainable,
        "merged": _FP32_BYTES * merged,
    }
    return PhaseCost(
        trainable_parameters=trainable,
        memory=MemoryEstimate(
            **{name: math.ceil(size / ranks) for name, size in sizes.items()}, activations=sum(micro_batch)
        ),
        snapshot_bytes=trained + state,
        state_of_factors=numbers[0],
        state_of_others=numbers[1],
        adapter_parameters=factors,
        flops_per_token=flops_per_token,
        orders=orders,
        kinds=kinds,
    )
