"""Training on one device or many: the one file that knows processes, ranks, devices and precision.

Hugging Face Accelerate tells which processes there are, whoever launched them (torchrun, accelerate launch or nobody),
and brings devices, mixed precision and trackers; timm's task is what is trained.
"""
import contextlib
import datetime
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from timm.layers import convert_sync_batchnorm
from timm.task import ClassificationTask
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from timm_miil._checks import check_choice
from timm_miil._extras import require
from timm_miil.train._loaders import Share
from timm_miil.train._output import RunFolder
from timm_miil.train._run import Reports, Run
from timm_miil.train._stages import Stages
from timm_miil.train._state import fingerprint, seeded_run
from timm_miil.train.build import build_loss
from timm_miil.train.pipeline import prepare
from timm_miil.train.recipe import Recipe
from timm_miil.train.results import EpochRecord, StepRecord, TrainResult
from timm_miil.train.splits import Splits, prepare_splits

__all__ = ['TRACKERS', 'train']

TRACKERS = ('tensorboard', 'trackio')

# Others wait while the main process measures and writes; an hour of it means that it is gone.
TIMEOUT = datetime.timedelta(hours=1)
GATHER_ELEMENTS = 1 << 24
SHARD_PARAMETERS = 1_000_000  # smaller blocks cost more messages than they save memory

_T = TypeVar('_T')
_logger = logging.getLogger(__name__)


def train(
        recipe: Recipe,
        data: str | Path | Splits,
        *,
        output: str | Path | None = None,
        resume: str | Path | None = None,
        device: torch.device | str | None = None,
        log: Sequence[str] = (),
        on_step: Callable[[StepRecord], None] | None = None,
        on_epoch: Callable[[EpochRecord], None] | None = None,
) -> TrainResult:
    """Train on a data set of pictures and test the best epoch.

    The same recipe and data give the same weights, to the bit, on one machine's CPU with one number of threads, also
    where the run was killed and resumed. Several processes take the same pictures for each step as one would; what
    they give differs by rounding, dropout and what sees the pictures of one process: batch norms unless `sync_bn`, and
    the budget of CSL. The caller's random number generators are left as they were.

    Started by torchrun or accelerate launch, each process calls this with the same arguments.

    Args:
        recipe: All settings.
        data: Folder of a data set, see `read_splits`, or its splits.
        output: Folder to write to: recipe.toml, results.csv after each epoch, checkpoints, summary.json at the end.
            None writes nothing. Of several machines it is the first one's.
        resume: A checkpoint to go on from, or 'auto': the newest in `output` that is whole, or a fresh start.
        device: Where to run; None takes what Accelerate finds, an accelerator if there is one.
        log: Trackers to tell, of `TRACKERS`. Tensorboard's files go to `output`; trackio has a place of its own.
        on_step: Called after each step, also of the temporary network of a prior, in the main process.
        on_epoch: Called after each epoch, in the main process.

    Returns:
        The trained model with what was measured, in every process.

    Raises:
        CheckpointError: If the checkpoint to resume, or the file of the tree, is damaged.
        FileNotFoundError: If a data file or the checkpoint is missing.
        ImageError: If a picture cannot be read.
        ImportError: If Accelerate or a tracker is not installed.
        OSError: If `output` cannot be written to, or another run is going on in it.
        TrainingError: If the loss is not finite (the pictures of that step are then in `output`), or a checkpoint
            cannot be written.
        TrainingInterrupted: If SIGTERM or Ctrl-C came and there is an `output`; all is saved.
        ValueError: If data, recipe and processes do not fit together, or `output` has another run in it.
    """
    for name in log:
        check_choice(log=name, choices=TRACKERS)
        require(name)
    if output is None and (resume is not None or log):
        raise ValueError('output must be given to resume a run or to log it, got None.')
    if recipe.prior is not None:
        build_loss(recipe.loss, recipe.task)  # what is wrong with it is found before the temporary network trains
    splits = prepare_splits(recipe, data)
    with _processes(recipe, device, log, output) as processes, contextlib.ExitStack() as stack:
        reports, known = Reports(on_step, on_epoch), fingerprint(recipe, splits, processes.count)
        folder = None if output is None else RunFolder(output, keep=recipe.keep_checkpoints)
        if folder is not None:
            processes.on_main(lambda: stack.enter_context(folder.held()))
        state = None if folder is None else processes.on_main(lambda: folder.begin(recipe, resume, known))
        prepared = prepare(recipe, Stages(
            splits, processes, None if output is None else Path(output), resume is not None, on_step))
        with seeded_run(recipe.seed, processes.device):
            run = Run(
                recipe, splits, processes, folder=folder, state=state, fingerprint=known, prepared=prepared,
                reports=reports)
            run.fit()
            return run.finish()


class _Processes:
    """See `Host`: one process for each device, or one alone."""

    def __init__(self, recipe: Recipe, accelerator: Any) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.device: torch.device = accelerator.device
        self.is_main: bool = accelerator.is_main_process
        self.share = Share(accelerator.process_index, accelerator.num_processes, recipe.grad_accum_steps)
        self.lag = 0 if self.device.type == 'cpu' else 1
        self.is_sharded = recipe.fsdp and self.share.count > 1
        self.count = self.share.count
        self.rebuilds = self.count > 1 and (recipe.fsdp or recipe.sync_bn)

    def place(self, model: nn.Module) -> nn.Module:
        if self.recipe.sync_bn and self.count > 1:
            model = convert_sync_batchnorm(model)
        # FSDP has plain weights only; what the layers compute follows the pictures.
        is_last = self.recipe.channels_last and not self.is_sharded
        return model.to(self.device).to(memory_format=torch.channels_last if is_last else torch.contiguous_format)

    def bring(self, tensor: Tensor) -> Tensor:
        if self.lag and tensor.ndim == 4 and self.recipe.channels_last:
            return tensor.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        return tensor.to(self.device, non_blocking=True)

    def wrap(self, task: ClassificationTask) -> None:
        if self.is_sharded:
            self._shard(task.trainable_module)
            if task.has_ema():
                self._shard(task.trainable_module_ema.module)
        if self.recipe.torchcompile:
            task.compile()
        if self.count > 1 and not self.is_sharded:
            task.prepare_distributed(
                device_ids=None if self.device.type == 'cpu' else [self.accelerator.local_process_index],
                gradient_as_bucket_view=True)

    def _shard(self, model: nn.Module) -> None:
        mesh = init_device_mesh(self.device.type, (self.count,))
        half = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(self.recipe.precision)
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
        for block in _blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    def wrap_optimizer(self, optimizer: Optimizer) -> Optimizer:
        return cast(Optimizer, self.accelerator.prepare_optimizer(optimizer))

    def autocast(self) -> AbstractContextManager[object]:
        return cast(AbstractContextManager[object], self.accelerator.autocast())

    @contextlib.contextmanager
    def part(self, task: ClassificationTask, is_last: bool) -> Iterator[None]:
        if self.is_sharded:
            cast(Any, task.trainable_module).set_requires_gradient_sync(is_last)
            yield
            return
        with contextlib.nullcontext() if is_last else task.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, parameters: Iterator[nn.Parameter], max_norm: float) -> None:
        self.accelerator.clip_grad_norm_(parameters, max_norm)

    def add_up(self, loss: Tensor, stops: bool) -> Callable[[], tuple[float, bool]]:
        if self.count == 1 and not self.lag:
            alone = loss.item(), stops
            return lambda: alone
        dtype = torch.float32 if self.device.type == 'mps' else torch.float64
        values = torch.stack([loss.to(dtype), torch.full_like(loss, float(stops), dtype=dtype)])
        if self.count > 1:
            distributed.all_reduce(values)
        found = values.to('cpu', non_blocking=True)
        event = None
        if self.lag:
            event = torch.Event(self.device.type)
            event.record()

        def read() -> tuple[float, bool]:
            if event is not None:
                event.synchronize()
            total, stopping = found.tolist()
            return total, stopping > 0
        return read

    def total(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        if self.count > 1:
            distributed.all_reduce(total)
        return total

    def gather(self, rows: Tensor) -> Tensor | None:
        if self.count == 1:
            return rows.cpu()
        sizes, parts = self.gather_objects(len(rows)), []
        length = max(GATHER_ELEMENTS // max(rows.shape[1:].numel(), 1), 1)
        for process, size in enumerate(sizes):
            for start in range(0, size, length):
                if process == self.share.index:
                    chunk = rows[start:start + length].to(self.device).contiguous()
                else:
                    chunk = rows.new_empty((min(length, size - start), *rows.shape[1:]), device=self.device)
                distributed.broadcast(chunk, src=process)
                if self.is_main:
                    parts.append(chunk.cpu())
        return torch.cat(parts) if parts else rows.cpu() if self.is_main else None

    def gather_objects(self, value: _T) -> list[_T]:
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], _T]) -> _T:
        if self.count == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(_T, outcome[0])

    def match_buffers(self, module: nn.Module) -> None:
        self._match(module.buffers())

    def match_weights(self, module: nn.Module) -> None:
        self._match(module.state_dict().values())

    def _match(self, tensors: Any) -> None:
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def get_states(self, task: ClassificationTask, optimizer: Optimizer) -> dict[str, Any]:
        model, inner = _inner(task), cast(Any, optimizer).optimizer
        states: dict[str, Any] = {'model': self.get_weights(model)}
        if task.has_ema():
            states['ema'] = self.get_weights(task.trainable_module_ema.module)
        if self.accelerator.scaler is not None:
            states['scaler'] = self.accelerator.scaler.state_dict()
        states['optimizer'] = get_optimizer_state_dict(
            model, inner, options=_WHOLE) if self.is_sharded else inner.state_dict()
        return states

    def set_states(self, task: ClassificationTask, optimizer: Optimizer, states: Mapping[str, Any]) -> None:
        model, inner = _inner(task), cast(Any, optimizer).optimizer
        self._set_weights(model, states['model'])
        if task.has_ema():
            self._set_weights(task.trainable_module_ema.module, states['ema'])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(states['scaler'])
        if self.is_sharded:
            set_optimizer_state_dict(model, inner, states['optimizer'], options=_WHOLE)
        else:
            inner.load_state_dict(states['optimizer'])

    def get_weights(self, module: nn.Module) -> dict[str, Tensor]:
        whole = get_model_state_dict(module, options=_WHOLE) if self.is_sharded else module.state_dict()
        return cast(dict[str, Tensor], whole)

    def _set_weights(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        if self.is_sharded:
            set_model_state_dict(module, cast(Any, weights), options=_WHOLE)
        else:
            module.load_state_dict(weights)

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self.accelerator.trackers:
            self.accelerator.log(dict(values), step=step)


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _inner(task: ClassificationTask) -> nn.Module:
    """The network inside the wrappers of DDP and the compiler."""
    module = task.trainable_module
    while inner := getattr(module, 'module', None) or getattr(module, '_orig_mod', None):
        module = inner
    return module


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost elements of sequences that have many parameters: stages and layers."""
    for module in model.children():
        elements = module.children() if isinstance(module, nn.Sequential | nn.ModuleList) else [module]
        for element in elements:
            if isinstance(element, nn.Sequential | nn.ModuleList) or element is module:
                yield from _blocks(element)
            elif sum(parameter.numel() for parameter in element.parameters()) >= SHARD_PARAMETERS:
                yield element


@contextlib.contextmanager
def _processes(
        recipe: Recipe, device: torch.device | str | None, log: Sequence[str], output: str | Path | None,
) -> Iterator[_Processes]:
    """Join the other processes, if there are such, and leave them at the end."""
    accelerate, states, utils = map(require, ('accelerate', 'accelerate.state', 'accelerate.utils'))
    if device is None and not torch.accelerator.is_available():
        device = 'cpu'  # told so, Accelerate joins processes that were launched where there is no accelerator
    wanted = None if device is None else torch.device(device)
    was_joined = distributed.is_available() and distributed.is_initialized()
    # What Accelerate remembers is the process's own, and fixed once; it is lent to this run. Nothing public does this.
    memories = [kind._shared_state for kind in (
        states.AcceleratorState, states.PartialState, states.GradientState)]
    before = [dict(memory) for memory in memories]
    for memory in memories:
        memory.clear()
    try:
        with _chosen(wanted):
            accelerator = accelerate.Accelerator(
                cpu=wanted is not None and wanted.type == 'cpu',
                mixed_precision='no' if recipe.precision == 'fp32' else recipe.precision, dynamo_backend='no',
                gradient_accumulation_plugin=utils.GradientAccumulationPlugin(num_steps=1),
                log_with=list(log) or None, project_dir=output,
                kwargs_handlers=[utils.InitProcessGroupKwargs(timeout=TIMEOUT)])
            _check(recipe, accelerator, wanted)
            if log:
                settings = {name: str(value) for name, value in vars(recipe).items()}
                accelerator.init_trackers('timm-miil', config=settings)
            try:
                yield _Processes(recipe, accelerator)
            finally:
                for tracker in accelerator.trackers:
                    tracker.finish()
    finally:
        if not was_joined and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        for memory, old in zip(memories, before):
            memory.clear()
            memory.update(old)


@contextlib.contextmanager
def _chosen(device: torch.device | None) -> Iterator[None]:
    """Let Accelerate take one device of several."""
    if device is None or device.index is None or device.type == 'cpu':
        yield
        return
    module, key = torch.get_device_module(device), 'ACCELERATE_TORCH_DEVICE'
    current, before = module.current_device(), os.environ.get(key)
    os.environ[key] = str(device)
    module.set_device(device.index)
    try:
        yield
    finally:
        module.set_device(current)
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _check(recipe: Recipe, accelerator: Any, wanted: torch.device | None) -> None:
    """Raise ValueError if the recipe cannot run on these devices."""
    count, device = accelerator.num_processes, accelerator.device
    if wanted is not None and (wanted.type != device.type or (count > 1 and wanted.index not in (None, device.index))):
        raise ValueError(
            f'device must be one that this process may use, got {wanted}, where Accelerate found {device} for process '
            f'{accelerator.process_index} of {count}; leave it out or name only its kind.')
    if str(accelerator.distributed_type).rpartition('.')[2] not in (
            'NO', 'MULTI_CPU', 'MULTI_GPU', 'MULTI_XPU', 'MULTI_NPU', 'MULTI_MLU'):
        raise ValueError(
            f'{accelerator.distributed_type} is not supported; launch without it and set fsdp in the recipe to share '
            f'parameters out.')
    if device.type == 'cpu' and recipe.precision == 'fp16':
        raise ValueError("precision 'fp16' needs an accelerator, got cpu; take 'bf16'.")
    if device.type == 'cpu' and recipe.sync_bn and count > 1:
        raise ValueError('sync_bn needs an accelerator for each process, got cpu; leave it out.')
    if recipe.fsdp and count == 1:
        _logger.warning('fsdp shares parameters out over processes; this is one.')
