"""The checks in their order: what each proves, what makes it pass, and how long it takes on one H100. Light."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """A function of a module in this directory, `function(run)`, that runs in the process of its group."""

    id: str
    title: str
    seconds: float
    """Estimate for one H100. The check is skipped if less time is left, and stopped after three times as long."""

    place: str
    """Module and function, as 'right_numbers.environment'."""

    criterion: str
    """The condition to pass; a check of B that misses it notes a finding."""

    reserve: bool = False
    """True for a repetition, which runs if a minute is left after all others."""

    @property
    def group(self) -> str:
        """Checks of one group share a process. Those of C have one each: each joins ranks of its own."""
        return self.id if self.id.startswith("C") else self.id[0]


CHECKS = (
    Check(
        "A0", "environment", 3, "right_numbers.environment",
        "torch can use a GPU, and the driver is not older than torch's CUDA",
    ),
    Check(
        "A1", "the same update as a CPU's, in float32", 5, "right_numbers.same_update",
        "5 losses within 1e-5, gradients within 1e-4 of a CPU's; TF32 is off",
    ),
    Check(
        "A2", "the logged loss under bfloat16", 6, "right_numbers.logged_loss",
        "the loss within 1e-3, both gradients within 4e-3 of float64",
    ),
    Check(
        "A3", "the low-rank autograd function", 8, "right_layers.fast_path",
        "equal to the reference under the same mask: 1e-5 in float32, 2e-2 in bfloat16; one mask both ways",
    ),
    Check("A4", "no wait for the device in a step", 8, "right_layers.no_sync", "torch's sync debug mode finds none"),
    Check(
        "A5", "the optimizer's state by way of files", 4, "right_state.optimizer_round_trip",
        "the update after loading has the bits of one never stopped",
    ),
    Check(
        "A6", "resets", 4, "right_state.resets",
        "the masks of a CPU; 33.5 million entries within 0.5 s",
    ),
    Check(
        "A7", "merge", 6, "right_state.merges",
        "W + sBA within 1e-6 of float64 and of a CPU's; the output within 1e-4, 2e-2 in bfloat16",
    ),
    Check(
        "A8", "a run", 25, "right_runs.whole_run",
        "validation losses within 1 % of a CPU's; stopped and continued to the same bytes; memory given back",
    ),
    Check(
        "A9", "determinism", 6, "right_runs.determinism",
        "10 steps twice to the same bits, and no kernel that warns of the opposite",
    ),
    Check(
        "A10", "pinned prefetch", 4, "right_runs.prefetch",
        "500 batches hold the dataset's rows; a rank touches its own GPU only",
    ),
    Check(
        "A11", "faults have names", 16, "faults.named_faults",
        "DeviceMemoryError, DeviceError and TrainerCrashedError, in time, and their processes gone",
    ),
    Check(
        "A12", "frozen weights and moments in few bytes", 8, "right_few_bytes.few_bytes",
        "codes of a CPU, read within rounding; 5 losses of a stage within 1e-2 of a CPU's",
    ),
    Check(
        "A13", "documents apart", 15, "right_documents.documents_apart",
        "attention by blocks equal to a mask of all pairs: 1e-4 in float32, 2e-2 in bfloat16; times recorded",
    ),
    Check(
        "B1", "tokens a second of the profiles", 170, "speed.profiles",
        "llama_1b: full rank at least 52,000 tokens a second, low rank 66,000",
    ),
    Check("B2", "where a step goes", 25, "speed.breakdown", "recorded"),
    Check(
        "B3", "odd sides", 6, "speed_parts.odd_shapes",
        "a padded side is at most 1.15 times as fast",
    ),
    Check("B4", "loss heads", 10, "speed_parts.loss_heads", "ours is the fastest of those within 1e-3 of float64"),
    Check(
        "B5", "compile", 60, "speed_compile.compiling",
        "no graph break; for a short micro-batch one graph more of the blocks and of the loss, none for an evaluation; "
        "losses within 1e-2",
    ),
    Check("B6", "dropout and its mask", 4, "speed_parts.dropout", "recorded"),
    Check("B7", "attention", 3, "speed_parts.attention", "a flash, cuDNN or fmha kernel; K and V are not copied"),
    Check(
        "B8", "memory", 75, "memory.peaks",
        "peaks within 10 % of what plan predicts; recorded what fits 24 GB",
    ),
    Check("B9", "snapshot and stop at 1.3B", 70, "memory.snapshot_and_stop", "saved within 25 s of a stop"),
    Check("B10", "the end of a cycle at 1.3B", 45, "memory.end_of_cycle", "recorded"),
    Check("B11", "float32", 12, "speed_parts.float32", "the chosen order of products is the faster one"),
    Check("B12", "the host", 40, "speed.host", "recorded"),
    Check("B13", "beside others", 60, "speed.others", "faster than the paper's code and peft"),
    Check("C0", "NCCL alone", 8, "several_ranks.one_rank", "sums, broadcasts and barriers without a warning"),
    Check("C1", "FSDP2 on one GPU", 12, "several_ranks.sharded_alone", "3 losses within 1e-3 of the whole model's"),
    Check(
        "C2", "two ranks are one", 30, "several_ranks.two_ranks",
        "losses within 1e-5 of one rank's, in both kinds of sharding",
    ),
    Check(
        "C3", "a rank fails", 40, "several_ranks.failing_rank",
        "told within 60 s by its name, and no process left",
    ),
    Check("C4", "scaling", 150, "several_ranks.scaling", "recorded"),
    Check("C5", "two machines", 30, "several_ranks.two_agents", "the losses of two ranks on one machine"),
    Check(
        "B1R", "llama_1b again, 40 steps", 40, "speed.again",
        "recorded", reserve=True,
    ),
    Check(
        "A9R", "determinism, compiled", 40, "right_runs.determinism_compiled",
        "as A9", reserve=True,
    ),
)  # fmt: skip
