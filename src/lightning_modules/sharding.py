"""Weights cut over processes with torch's ``fully_shard`` (FSDP2), and put together again for files.

A checkpoint written from sharded weights is the ordinary single file: any number of processes opens it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from safelight.errors import SafelightError


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's weights are cut over processes, so that every process must take part in calling it."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(value: Any) -> Any:
    """A sharded tensor gathered from all processes, which all must ask for it; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def cut_like(value: Tensor, like: Any) -> Tensor:
    """This process's share of a whole tensor, cut as ``like`` is; ``value`` itself where ``like`` is not sharded."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    # Without a source rank nothing is sent: every process has read the whole tensor from the file.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard(module: LightningModule, paths: Sequence[str], mesh: DeviceMesh) -> None:
    """Cut the weights below ``paths`` over the processes of a mesh, block by block; done once, however often called.

    Only one block at a time is whole on a process. A block is a member of an outermost ``nn.ModuleList``, which is
    where transformers and U-Nets keep theirs; what lies outside of blocks is cut with the part itself.

    Args:
        module: the method.
        paths: sub-modules that are called as a whole. For a container (``nn.ModuleDict``) its members are.
        mesh: one-dimensional.

    Raises:
        SafelightError: a trained parameter lies outside of ``paths``: nothing would average its gradient.
    """
    if is_sharded(module):
        return
    parts = [part for path in paths for part in _called(module.get_submodule(path))]
    inside = {id(child) for part in parts for child in part.modules()}
    homes = {
        id(parameter): (owner, name)
        for part in parts
        for owner in part.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    }
    # A method may hold parameters a second time under names of its own, as heal does with its adapters.
    again = [
        (owner, name, *homes[id(parameter)])
        for owner in module.modules()
        if id(owner) not in inside
        for name, parameter in owner._parameters.items()
        if id(parameter) in homes
    ]
    for part in parts:
        for block in _blocks(part):
            _cut(block, mesh)
        _cut(part, mesh)
    for owner, name, home, original in again:
        owner.register_parameter(name, home._parameters[original])
    left = [name for name, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if left:
        raise SafelightError(
            f"{type(module).__name__}.sharded leaves out {', '.join(left[:3])}, whose gradients nothing would average; "
            "add the sub-module that holds them"
        )


def _cut(module: nn.Module, mesh: DeviceMesh) -> None:
    """``fully_shard``, after which the module's class still goes by its own name."""
    origin = type(module)
    # Cut again after every forward pass: averages, checkpoints and the optimiser look at the weights between passes.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # It is a subclass made on the fly now. Libraries look classes up by what they print as; transformers would not
    # find which hidden states to return, of which SDXL takes the last but one.
    kind = type(module)
    kind.__module__, kind.__qualname__ = origin.__module__, origin.__qualname__


def _called(part: nn.Module) -> Iterator[nn.Module]:
    """What is called: a part itself, or the members of a container."""
    yield from part.values() if isinstance(part, nn.ModuleDict) else (part,)


def _blocks(part: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists inside a part."""
    for child in part.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all processes, for methods that say in ``sharded`` what is worth cutting.

    Lightning's strategy would take the number of nodes for the number of shards, and would number the optimiser's
    states in a way of its own; here both are what one process would write and read.

    Args:
        process_group_backend: of torch.distributed; None for nccl on GPUs and gloo on CPUs.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimisers are restored like everywhere else, from the ordinary format."""
        return True

    def setup_environment(self) -> None:
        """Find the other processes; one shard each.

        Raises:
            SafelightError: the method has nothing to shard.
        """
        if not getattr(self.lightning_module, "sharded", ()):
            raise SafelightError(
                f"trainer: {type(self.lightning_module).__name__} declares nothing that could be sharded over "
                "processes; use trainer=ddp, which keeps a copy on each"
            )
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state on rank 0, nothing on the others."""
        assert self.lightning_module is not None
        return self._on_rank_zero(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """An optimiser's whole state on rank 0, as one process would write it; nothing on the others."""
        state = (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        moments = {number: self._on_rank_zero(values) for number, values in state["state"].items()}
        return state | {"state": moments} if self.is_global_zero else {}

    def _on_rank_zero(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values with their tensors whole and on the CPU; every process takes part in gathering them."""
        kept = {}
        for key, value in values.items():
            gathered = whole(value)
            if self.is_global_zero:
                kept[key] = gathered.detach().cpu() if isinstance(gathered, Tensor) else gathered
        return kept

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the ordinary file on every process."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load what ``SafelightModule.load_state_dict`` cuts into shards."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimisers' states, cut as their parameters are."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                number: {
                    key: cut_like(value, parameter)
                    if isinstance(value, Tensor) and value.shape == parameter.shape
                    else value
                    for key, value in saved["state"][number].items()
                }
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in saved["state"]
            }
            optimizer.load_state_dict(saved | {"state": moments})
