"""batch.documents = "mask": a token is predicted from its own document alone, and as if that stood alone."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import family_model
from stage_runs import CPU, TINY, metrics_of, run_all, stage_request, tiny_profile
from tiny_data import VOCABULARY, write_tiny_dataset
from tiny_models import COMPILER_WARNINGS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedModel

from relora_train.data.dataset import TokenDataset
from relora_train.errors import ModelUnsuitableError
from relora_train.method.stages import fingerprint_settings, plan_stages
from relora_train.settings.profile import Profile, default_run_id
from relora_train.training.build import prepare_stage
from relora_train.training.evaluate import evaluation_key
from relora_train.training.models import model as model_module
from relora_train.training.models.causal_lm import NextTokenLoss
from relora_train.training.models.compiling import compile_blocks
from relora_train.training.models.documents import flex_attention_works, places_in_documents
from relora_train.training.models.model import attend_without_mask, checkpoint_activations, logits
from relora_train.training.models.registry import objective_of

END = 2
MASK = {"batch": {**TINY["batch"], "documents": "mask"}}
FAMILIES = [
    ("llama", {}),
    ("llama, as in training", {}),
    ("llama, tied", {}),
    ("gpt_neox", {}),
    ("gpt_neox, as in training", {}),
    ("qwen2", {}),
    ("mistral", {"sliding_window": 4}),
    ("gemma2", {"sliding_window": 4}),  # capped logits: not by the fused loss
]
by_family = pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=[name for name, _ in FAMILIES])


def made(family: str, changes: dict[str, Any]) -> PreTrainedModel:
    name = family.removesuffix(", as in training")
    model = family_model(name, **changes).eval()
    if family != name:
        attend_without_mask(model)
        assert "without_mask" in model.config._attn_implementation
    return model


def rows_of_documents(*lengths: list[int]) -> Tensor:
    """Return token ids (rows, 25); a row's documents have these lengths, and the last goes on beyond it."""
    tokens = torch.randint(3, 128, (len(lengths), 25), generator=torch.Generator().manual_seed(0))
    for row, ends in zip(tokens, lengths, strict=True):
        row[np.cumsum(ends) - 1] = END
    return tokens


# the last documents of these rows: 6 tokens, one token alone, all of them
ROWS = rows_of_documents([7, 1, 11], [1, 3, 20], [])


def documents_of(tokens: Tensor) -> list[Tensor]:
    bounds = [[0, *(index + 1 for index, token in enumerate(row) if token == END), len(row)] for row in tokens.tolist()]
    return [
        row[start:end].unsqueeze(0)
        for row, ends in zip(tokens, bounds, strict=True)
        for start, end in itertools.pairwise(ends)
    ]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@by_family
def test_a_row_has_the_loss_and_the_gradient_of_its_documents_one_by_one(family: str, changes: dict[str, Any]):
    model = made(family, changes)
    joined, alone = NextTokenLoss(model, END), NextTokenLoss(model)
    documents = [document for document in documents_of(ROWS) if document.shape[1] > 1]
    assert len(documents) == 6
    expected_loss = torch.stack([alone.loss(document) for document in documents]).sum()
    expected = gradients(model, expected_loss)
    loss = joined.loss(ROWS)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for name, gradient in gradients(model, loss).items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    assert joined.terms(ROWS) == sum(alone.terms(document) for document in documents)
    with torch.no_grad():  # in chunks of its own
        assert torch.isclose(joined.sums(ROWS)[0], expected_loss.double(), rtol=1e-6)
    assert joined.sums(ROWS)[1] == joined.terms(ROWS)
    assert not torch.isclose(alone.loss(ROWS), loss, rtol=1e-3)


@by_family
@torch.no_grad()
def test_logits_do_not_depend_on_the_document_before(family: str, changes: dict[str, Any]):
    model = made(family, changes)
    other = ROWS.clone()
    other[0, :6] = 5
    places = places_in_documents(ROWS, END)
    found = [logits(model, tokens, places)[0] for tokens in (ROWS, other)]
    assert torch.allclose(found[0][7:], found[1][7:], atol=1e-5 * found[0].abs().max().item())
    assert not torch.allclose(found[0][:6], found[1][:6], rtol=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@torch.no_grad()
def test_a_model_in_training_gives_the_bits_that_transformers_own_mask_gives(family: str):
    places = places_in_documents(ROWS, END)
    own, theirs = (logits(made(name, {}), ROWS, places) for name in (f"{family}, as in training", family))
    assert torch.equal(own, theirs)


def test_places_start_anew_after_each_end_and_with_each_row():
    tokens = torch.tensor([[5, END, END, 5, 6, END], [END, 5, 5, 5, 5, 5]])
    assert places_in_documents(tokens, END).tolist() == [[0, 1, 0, 0, 1, 2], [0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("family", ["opt", "lfm2", "falcon", "bloom", "mamba"])
def test_a_model_that_does_not_take_documents_apart_is_refused_before_any_work(family: str):
    model = family_model(family)
    NextTokenLoss(model)
    objective = objective_of(tiny_profile(**MASK))
    with pytest.raises(
        ModelUnsuitableError, match=rf"{type(model).__name__} does not take .*batch.documents to 'join'"
    ):
        objective.check_fits(model, None)  # as the check before a run does
    with pytest.raises(ModelUnsuitableError):
        NextTokenLoss(model, END)
    objective_of(tiny_profile()).check_fits(model, None)


@torch.no_grad()
def test_a_model_that_masks_but_goes_on_counting_positions_is_refused():
    model = family_model("gpt2")
    NextTokenLoss(model, END)
    forward = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda places: forward(torch.arange(places.shape[1]).expand_as(places))
    with pytest.raises(ModelUnsuitableError):
        NextTokenLoss(model, END)


@pytest.mark.parametrize("family", ["llama", "llama, as in training"])
def test_checkpointed_activations_give_the_same_bits(family: str):
    plain, recomputed = made(family, {}).train(), made(family, {}).train()
    checkpoint_activations(recomputed)
    expected = gradients(plain, NextTokenLoss(plain, END).loss(ROWS))
    found = gradients(recomputed, NextTokenLoss(recomputed, END).loss(ROWS))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@COMPILER_WARNINGS
@pytest.mark.parametrize("family", ["llama", "llama, as in training"])
def test_compiled_blocks_give_the_same_up_to_rounding(family: str):
    torch.compiler.reset()
    plain, compiled = made(family, {}).train(), made(family, {}).train()
    loss_functions = NextTokenLoss(plain, END), NextTokenLoss(compiled, END)
    compile_blocks(compiled, backend="aot_eager")
    for rows in (ROWS, ROWS[2:]):  # also one without an end, for which transformers makes no mask of its own
        expected, found = (each.loss(rows) for each in loss_functions)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        ours = gradients(compiled, found)
        for name, gradient in gradients(plain, expected).items():
            assert (ours[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("family", ["llama, as in training", "gpt_neox, as in training"])
@torch.no_grad()
def test_attention_by_blocks_gives_the_logits_of_the_mask_by_one_graph_for_all_documents(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    """On a GPU it trains so; flex attention has no backward pass on a CPU."""
    model = made(family, {}).train()
    expected = [logits(model, rows, places_in_documents(rows, END)) for rows in (ROWS, ROWS.flip(0))]
    asked: list[torch.device] = []
    monkeypatch.setattr(model_module, "flex_attention_works", lambda device: asked.append(device) is None)
    torch.compiler.reset()
    compiler = CompileCounter()
    compile_blocks(model, backend=compiler)
    for rows, exact in zip((ROWS, ROWS.flip(0)), expected, strict=True):
        found = logits(model, rows, places_in_documents(rows, END))
        assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert compiler.frame_count == 1 and asked == [ROWS.device] * 2
    logits(model.eval(), ROWS, places_in_documents(ROWS, END))
    assert len(asked) == 2  # evaluation does not compile, and flex attention alone would keep all scores


def test_flex_attention_is_not_tried_on_a_cpu():
    assert not flex_attention_works(torch.device("cpu"))


# --- in a run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny dataset with documents of 1 to 39 tokens."""
    directory = write_tiny_dataset(tmp_path_factory.mktemp("data") / "dataset")
    for shard in directory.glob("*/*.bin"):
        tokens = np.fromfile(shard, dtype="<u2")
        ends = np.cumsum(np.random.default_rng(0).integers(1, 40, len(tokens)))
        tokens[ends[ends < len(tokens)]] = VOCABULARY - 1
        tokens.tofile(shard)
    return directory


def test_a_run_learns_and_scores_what_it_learns(dataset: Path, tmp_path: Path):
    made = run_all(tiny_profile(**MASK, schedule={"cycles": 1}), dataset, tmp_path)
    first, last = (metrics_of(made[stage], "evaluation") for stage in ("warm-start", "cycle-1"))
    assert last[-1]["val_loss"] < first[0]["val_loss"] - 0.05
    examples = TokenDataset(dataset, "val", sequence_length=32).read_spread(0, 16, of=16)
    assert last[-1]["val_tokens"] == (examples[:, :-1] != VOCABULARY - 1).sum() < examples[:, 1:].size


def test_micro_batches_of_uneven_documents_make_the_update_of_one_big_batch(dataset: Path, tmp_path: Path):
    found = []
    for size in (8, 2, 1):
        profile = tiny_profile(batch={**MASK["batch"], "micro_sequences": size})
        training = prepare_stage(stage_request(profile, "warm-start", dataset, tmp_path / str(size)), CPU)
        loss, _ = training.update(1)
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in training.trainable])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert (gradient - found[0][1]).abs().max() <= 1e-6 * found[0][1].abs().max()


def test_joined_documents_are_in_no_name_and_masked_ones_in_every_one(dataset: Path, tmp_path: Path):
    joined, explicit, masked = tiny_profile(), tiny_profile(batch={"documents": "join"}), tiny_profile(**MASK)

    def names(profile: Profile) -> list[Any]:
        request = stage_request(profile, "warm-start", dataset, tmp_path)
        settings = fingerprint_settings(profile, plan_stages(profile)[0], "d" * 64)
        return [default_run_id(profile), settings, evaluation_key(request)]

    assert names(joined) == names(explicit)
    assert all(one != other for one, other in zip(names(joined), names(masked), strict=True))
    assert "batch.documents" not in names(joined)[1] and names(masked)[1]["batch.documents"] == "mask"


def test_documents_that_go_on_are_read_as_before(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With "join" no model is told of places, and none is asked for more than causality."""
    monkeypatch.setattr(model_module, "places_in_documents", None)
    monkeypatch.setattr("relora_train.training.models.causal_lm.check_documents", None)
    training = prepare_stage(stage_request(tiny_profile(), "warm-start", dataset, tmp_path), CPU)
    training.update(1)


def test_images_have_no_documents():
    with pytest.raises(ValueError, match=r"batch\.documents is of objective 'causal_lm'"):
        Profile.model_validate(
            {
                "objective": "image_classification",
                "data": {"source": "digits"},
                "batch": {"sequence_length": 16, "documents": "mask"},
            }
        )
