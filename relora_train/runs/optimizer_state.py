"""The numbers in an optimizer's state, counted from a model's shape alone."""

from collections.abc import Collection

from relora_train.settings.profile import Profile
from relora_train.training.models.shape import LinearShape, ModelShape

_MOMENTS = 2


def state_numbers(
    profile: Profile,
    shape: ModelShape,
    *,
    frozen: Collection[str] = (),
    factors: int = 0,
    wrapped: tuple[LinearShape, ...] = (),
) -> tuple[int, int]:
    """Return how many numbers are held of A and B, and of all else that is trained.

    The arguments are those of costs._phase_cost. Not counted: steps and norms, one number a tensor. Matrices outside
    linear layers, embedding and head (positions, patches, routers) count in full where a factored state is smaller.
    """
    optimizer = profile.optimizer
    of_factors = _MOMENTS * factors
    if factors and optimizer.low_rank_state == "factored":  # of A (rank, in) and B (out, rank): rows and columns
        of_factors = shape.layers * sum(
            round(linear.sides + 2 * profile.relora.rank * linear.copies) for linear in wrapped
        )
    counts = {kind: n for kind, n in shape.parameters_by_kind(wrapped).items() if kind not in frozen}
    plain = [linear for linear in shape.linears if linear not in wrapped] if "others" in counts else []
    trained = sum(counts.values())
    if optimizer.kind == "adamw":
        return of_factors, _MOMENTS * trained
    weights = shape.layers * sum(linear.weights for linear in plain)
    if optimizer.kind == "factored":
        table, ends = shape.vocab_size * shape.hidden_size, shape.vocab_size + shape.hidden_size
        tables = ("head",) if shape.classifies else ("embeddings", "head")
        saved = sum(table - ends for kind in tables if counts.get(kind, 0) >= table)
        return of_factors, trained - saved - weights + shape.layers * sum(linear.sides for linear in plain)
    sides = [(linear.copies, linear.in_features, linear.out_features) for linear in plain]
    entries = sum(round(copies * (min(a, b) + _MOMENTS * max(a, b))) for copies, a, b in sides)
    return of_factors, _MOMENTS * (trained - weights) + shape.layers * optimizer.subspace_rank * entries
