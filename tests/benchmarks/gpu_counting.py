"""Kernels, bytes and FLOPs that a GPU would be given, counted from tensors without values. No GPU is needed.

The rules. Every one errs, if at all, in the direction of a longer time.

1. An aten operation is one kernel. It reads each tensor it is given and writes each it makes or changes: a tensor
   changed in place counts twice, one that is only overwritten once. Views and allocations are free. A lookup by index
   touches as many entries as it has indices.
2. Products and attention take the FLOPs of torch's own formulas; causal attention half of them.
3. `addmm` with a whole matrix to add to, not in place, first copies it: one kernel more, which reads and writes it.
4. An operation over lists of tensors takes the launches that torch's multi-tensor kernels need.
5. An opaque operation is charged what its implementation does, by these rules. One whose implementation is not Python
   is refused.
6. An operation that gives the host a number is a host sync.
7. A compiled graph is lowered and scheduled for CUDA by inductor, without code being generated. Each fused group is one
   kernel with the bytes that inductor says it reads and writes; what it leaves to others, products and attention among
   them, follows the rules above. Kernels of its own for products, and padding of odd sides, are not tried.
8. A kernel takes the longest of its bytes, its FLOPs and LEAST. A product whose shortest side is s runs at s / (s + 24)
   of the peak.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

BYTES_PER_SECOND = 2.6e12
"""The rate that elementwise kernels reach, of an H100's 3.35e12."""

FLOPS_PER_SECOND = {torch.bfloat16: 620e12, torch.float32: 50e12}
"""The rates that large products reach, of an H100's 989e12 and 67e12."""

LEAST = 2.5e-6
"""Seconds that the smallest kernel takes on the GPU."""

SIDE_LOST = 24

_TRANSPARENT, _WITHOUT_KERNELS = ("aten", "prims"), ("prim", "profiler")
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_OVERWRITE = ("copy_", "fill_", "zero_", "bernoulli_", "normal_", "uniform_", "random_", "exponential_")
_BY_INDEX = ("embedding", "gather", "index_select", "scatter_add_", "scatter_")
_SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")

_LISTS_TENSORS = (110, 64, 48, 36, 30)  # of one launch, by the number of lists: torch's MultiTensorApply.cuh
_LISTS_BLOCKS, _LISTS_CHUNK = 320, 65_536


@dataclass(frozen=True)
class Kernel:
    """One kernel, or the launches of one operation."""

    name: str
    bytes: float
    flops: float = 0
    dtype: torch.dtype | None = None
    """That of the FLOPs."""

    side: int = 0
    """The shortest side of a product."""

    launches: int = 1

    @property
    def limits(self) -> dict[str, float]:
        """Return the seconds that each bound would allow."""
        peak = FLOPS_PER_SECOND.get(self.dtype or torch.float32, 50e12)
        return {
            "bytes": self.bytes / BYTES_PER_SECOND,
            "FLOPs": self.flops / (peak * self.side / (self.side + SIDE_LOST)) if self.flops else 0.0,
            "launches": LEAST * self.launches,
        }

    @property
    def bound(self) -> str:
        return max(self.limits, key=self.limits.__getitem__)

    @property
    def seconds(self) -> float:
        return max(self.limits.values())


class UnknownCostError(Exception):
    """An operation has neither a rule here nor an implementation to look into."""


class Count(TorchDispatchMode):
    """Count what is dispatched inside it. Enter it within a FakeTensorMode."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.syncs: Counter[str] = Counter()
        self.active = False
        self._made: dict[StorageWeakRef, int] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let dynamo find its compiled code: it skips all frames under other modes."""
        return True

    def __enter__(self) -> Count:
        self.active = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.active = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        inside = implementation(func)
        if inside is not None:
            with self:
                made = inside(*args, **kwargs)
            self.active = True
            return made
        name = func._schema.name.partition("::")[2]
        if name in _SYNCS:
            self.syncs[name] += 1
            if name == "_local_scalar_dense":
                return 1.0 if args[0].dtype.is_floating_point else 1
        made = func(*args, **kwargs)
        self.kernels += kernels_of(func, args, kwargs, made)
        self.holds(made)
        return made

    def holds(self, made: Any) -> None:
        """Remember these tensors' memory, as long as it lives."""
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            self._made[StorageWeakRef(storage)] = storage.nbytes()

    def held_bytes(self) -> int:
        """Return the memory that was made while counting and is still in use."""
        self._made = {made: size for made, size in self._made.items() if not made.expired()}
        return sum(self._made.values())


def implementation(func: Any) -> Callable[..., Any] | None:
    """Return what an operation consists of, if it is a custom one or one that torch composes of others."""
    from torch._library.custom_ops import OPDEFS

    if func.namespace in _WITHOUT_KERNELS:
        return None
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(func.name(), "CPU"):
        return func.decompose  # met inside custom operations only: outside them autograd comes first
    if func.namespace in _TRANSPARENT:
        return None
    known = OPDEFS.get(func._schema.name)
    if known is None:
        raise UnknownCostError(f"{func} is opaque: its kernels, bytes and FLOPs cannot be counted, and it is not free.")
    return known._init_fn


def kernels_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Any) -> list[Kernel]:
    """Return the kernels of an aten operation (rules 1 to 4)."""
    name = func._schema.name.partition("::")[2]
    if name in _ALLOCATIONS:
        return []
    read, written = _touched(func, args, kwargs)
    given = {tensor.untyped_storage()._cdata for tensor in [*read, *written]}
    written += [tensor for tensor in _tensors(made) if tensor.untyped_storage()._cdata not in given]
    if not written:
        return []
    sizes = [_size(tensor) for tensor in read] + [_size(tensor) for tensor in written]
    if name in _BY_INDEX:
        table = args[0]
        touched = made if name in ("embedding", "gather", "index_select") else args[2]
        share = min(1.0, touched.numel() / table.numel())
        sizes = [size * share if t is table else size for size, t in zip(sizes, [*read, *written], strict=True)]
    flops, side, dtype = _flops(func, args, kwargs, made)
    launches = _launches(args) if name.startswith(("_foreach", "_fused_adam")) else 1
    kernels = [Kernel(name, sum(sizes), flops, dtype, side, launches)]
    if name == "addmm" and _size(args[0]) == _size(made):
        kernels.insert(0, Kernel("addmm's copy", 2 * _size(made)))
    return kernels


def _touched(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that are read and those that are changed."""
    overwrites = func._schema.name.partition("::")[2] in _OVERWRITE
    read: list[Tensor] = []
    written: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if not changed or not (argument.is_out or overwrites):
            read += _tensors(value)
        if changed:
            written += _tensors(value)
    return read, written


def _flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Any) -> tuple[float, int, torch.dtype | None]:
    packet, tensors = func._overloadpacket, [a for a in args if isinstance(a, Tensor)]
    name = packet.__name__
    formula = flop_registry.get(torch.ops.aten.addmm if name == "addmm_" else packet)
    if formula is None:
        return 0, 0, None
    flops = float(formula(*args, **kwargs, out_val=made))
    if "attention" in name:
        names = [argument.name for argument in func._schema.arguments]
        causal = dict(zip(names, args, strict=False)).get("is_causal", kwargs.get("is_causal", False))
        return flops / (2 if causal else 1), tensors[0].shape[-1], tensors[0].dtype
    one, other = tensors[-2:]
    return flops, min(*one.shape[-2:], *other.shape[-2:]), one.dtype


def _launches(args: Sequence[Any]) -> int:
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    tensors = len(lists[0])
    chunks = sum(-(-tensor.numel() // _LISTS_CHUNK) for tensor in lists[0])
    at_once = _LISTS_TENSORS[min(len(lists), len(_LISTS_TENSORS)) - 1]
    return max(-(-tensors // at_once), -(-chunks // _LISTS_BLOCKS))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes; of an expanded tensor, those that it really has."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


_SCHEDULED: dict[str, list[Kernel]] = {}
"""The kernels of graphs, by their code and inputs."""


class FusedGroups:
    """A backend for torch.compile that computes nothing: it charges a Count with the kernels of compiled graphs.

    The graphs are those of inductor's own front: decompositions, partition into forward and backward, its passes.
    """

    def __init__(self, count: Count) -> None:
        self.count = count
        self.graphs: list[list[Kernel]] = []

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(force_disable_caches=True):
            return compile_fx(graph, inputs, inner_compile=self._inner)

    def _inner(self, graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        if self.count.active:
            raise AssertionError("a graph was compiled in the update that is counted: the one before has another shape")
        _call_directly(graph)
        given = [(i.shape, i.stride(), i.dtype) if isinstance(i, Tensor) else i for i in inputs]
        key = f"{graph.code} {given}"
        if key not in _SCHEDULED:
            copied, is_backward = copy.deepcopy(graph), settings.get("is_backward", False)
            _SCHEDULED[key] = fused_kernels(copied, inputs, is_backward=is_backward)
        kernels = _SCHEDULED[key]
        self.graphs.append(kernels)

        def run(boxed: list[Any]) -> Any:
            given = list(boxed)
            boxed.clear()
            with self.count.paused():
                made = graph(*given)
            if self.count.active:
                self.count.kernels += kernels
                self.count.holds(made)
            return made

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def fused_kernels(graph: fx.GraphModule, inputs: Sequence[Any], *, is_backward: bool) -> list[Kernel]:
    """Return the kernels that inductor would make of an aten graph on CUDA (rule 7). Changes the graph."""
    from torch._inductor import compile_fx, ir, scheduler
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    view_to_reshape(graph)
    with torch.no_grad():
        fake = compile_fx.fake_tensor_prop(graph, inputs, True)
    kernels: list[Kernel] = []
    with as_if_on_cuda(), V.set_fake_mode(fake), V.set_debug_handler(DebugContext()), torch.no_grad():
        compile_fx._recursive_record_original_output_strides(graph)
        post_grad_passes(graph, False)
        values = {node: node.meta.get("val") for node in graph.graph.nodes}
        with fake:
            for node in graph.graph.nodes:
                if node.kwargs.get("device") is not None:
                    node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
                node.meta["val"] = pytree.tree_map(_on_cuda, values[node])
            inputs = [_on_cuda(value) for value in inputs]
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=fake.shape_env, is_backward=is_backward)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            for node in lowering.scheduler.nodes:
                if isinstance(node, scheduler.ExternKernelSchedulerNode):
                    if not isinstance(node.node, ir.MultiOutput):
                        kernels += _left_to_others(node.node, values, fake)
                elif not isinstance(node, scheduler.NopKernelSchedulerNode):
                    operations = [part.node for part in node.get_nodes() if part.node is not None]
                    kernels.append(Kernel(_name(operations), float(node.get_read_write_buffers_sizes())))
    return kernels


def _call_directly(graph: fx.GraphModule) -> None:
    """Drop the random state that checkpointing keeps for attention, which draws no dropout here."""
    from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state

    for node in list(graph.graph.nodes):
        with graph.graph.inserting_before(node):
            if node.target is run_and_save_rng_state:
                made = graph.graph.call_function(node.args[0], node.args[1:], node.kwargs)
                state = graph.graph.call_function(torch.ops.aten.empty.memory_format, ([16],), {"dtype": torch.uint8})
                for part in list(node.users):
                    part.replace_all_uses_with(made if part.args[1] == 1 else state)
                    graph.graph.erase_node(part)
            elif node.target is run_with_rng_state:
                made = graph.graph.call_function(node.args[1], node.args[2:], node.kwargs)
                node.replace_all_uses_with(made)
            else:
                continue
        graph.graph.erase_node(node)
    graph.recompile()


def _left_to_others(kernel: Any, values: dict[fx.Node, Any], fake: Any) -> list[Kernel]:
    """Return the kernels of an operation that inductor calls as it is, such as 'extern_kernels.mm'."""
    words = (getattr(kernel, "python_kernel_name", None) or "").split(".")
    # A kernel whose result is only looked at in parts is noted under the name of a part.
    named = [kernel.get_origin_node()] if _packet(kernel.get_origin_node()) in words else kernel.get_origins()
    found = [node for node in named if _packet(node) in words]
    if len(found) != 1:
        raise UnknownCostError(f"a compiled graph calls {'.'.join(words)!r}, which cannot be counted, and is not free.")
    arguments = fx.node.map_arg((found[0].args, found[0].kwargs), lambda given: values[given])
    with fake, Count() as count:
        found[0].target(*arguments[0], **arguments[1])
    return count.kernels


def _packet(node: fx.Node | None) -> str | None:
    """Return 'mm' for aten.mm.default."""
    target = getattr(node, "target", None)
    return target._overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else None


def _name(operations: Sequence[Any]) -> str:
    names = sorted({origin.target.__name__.partition(".")[0] for op in operations for origin in op.get_origins()
                    if hasattr(origin.target, "__name__")})  # fmt: skip
    return "fused " + " ".join(names)


def _on_cuda(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")


@contextmanager
def as_if_on_cuda() -> Iterator[None]:
    """Let inductor plan for an H100 that this machine does not have."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.fx_passes import post_grad
    from torch._inductor.runtime.hints import DeviceProperties

    h100 = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 << 30,
        shared_memory_per_block_optin=232_448, L2_cache_size=50 << 20, gcnArchName="",
    )  # fmt: skip
    with ExitStack() as stack:
        for holder, name, value in (
            (scheduler, "has_triton", lambda *_: True),
            (post_grad, "is_gpu", lambda _: True),  # these passes run before the graph's tensors are said to be on one
            (CudaInterface, "get_device_properties", staticmethod(lambda *_: h100)),
            (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: h100)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90)),
            (torch.cuda, "get_device_properties", lambda *_: h100),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "current_device", lambda: 0),
        ):
            stack.enter_context(mock.patch.object(holder, name, value))
        DeviceProperties.create.cache_clear()
        stack.callback(DeviceProperties.create.cache_clear)
        yield
