"""The course of a training run: steps, epochs, what is measured and what is saved."""
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_miil._errors import TrainingError, TrainingInterrupted
from timm_miil.data import ImageStream, LabelledImages
from timm_miil.losses import LabelPriorEstimator
from timm_miil.tasks import kept_network, merge_adapter
from timm_miil.train._failures import has_spoilt_weights, not_finite
from timm_miil.train._host import Host
from timm_miil.train._interrupt import Stopped, StopRequest
from timm_miil.train._loaders import Batch
from timm_miil.train._output import RunFolder
from timm_miil.train._scoring import Scored, Scorer
from timm_miil.train._state import get_random_state, seed_process, set_random_state
from timm_miil.train._task_parts import Prepared
from timm_miil.train._zero_shot import measure_label_sets
from timm_miil.train.build import (
    build_loss, build_mixup, build_model, build_optimizer, build_scheduler, build_task, build_train_loader,
    check_unknown)
from timm_miil.train.evaluate import METRIC_OF_TASK
from timm_miil.train.recipe import Recipe
from timm_miil.train.results import EpochRecord, StepRecord, TrainResult
from timm_miil.train.splits import Splits
from timm_miil.train.teaching import build_hierarchy, build_teacher

__all__ = ['Reports', 'Run']

LOG_EVERY_STEPS = 50


@dataclass(frozen=True)
class Reports:
    """Whom a run tells what, on the main process."""
    on_step: Callable[[StepRecord], None] | None = None
    on_epoch: Callable[[EpochRecord], None] | None = None


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers have not been read yet."""
    step: int
    lr: float
    parts: list[Batch]
    read: Callable[[], tuple[float, bool]]


class Run:
    """One training run.

    Args:
        recipe: All settings.
        splits: The pictures, as they are learnt from.
        host: The place where it runs.
        folder: Where to write; None writes nothing.
        state: State of a checkpoint to go on from.
        fingerprint: What a checkpoint must agree in.
        prepared: What trainings before it leave to it.
        observer: Sees the logits of training pictures. Such a run neither validates nor tests.
        forgets: Whether the observer forgets an epoch when the next one starts.
        reports: Whom to tell.
    """

    def __init__(
            self,
            recipe: Recipe,
            splits: Splits,
            host: Host,
            *,
            folder: RunFolder | None = None,
            state: Mapping[str, Any] | None = None,
            fingerprint: Mapping[str, str] | None = None,
            prepared: Prepared = Prepared(),
            observer: LabelPriorEstimator | None = None,
            forgets: bool = False,
            reports: Reports = Reports(),
    ) -> None:
        self.recipe, self.splits, self.host, self.folder, self.reports = recipe, splits, host, folder, reports
        self.fingerprint, self.observer, self.forgets = dict(fingerprint or {}), observer, forgets
        self.stop = StopRequest()
        device, labels = host.device, splits.label_names
        self.mixup, counts = build_mixup(recipe, len(labels)), splits.train.label_counts()
        hierarchy = build_hierarchy(recipe, splits.tree)
        criterion = build_loss(
            recipe.loss, recipe.task, prior=prepared.prior, is_mixed=self.mixup is not None, hierarchy=hierarchy,
            class_counts=None if counts is None else counts[0])
        check_unknown(criterion, splits.train)
        self.model = host.place(build_model(recipe, labels, pretrained=None if prepared.weights is None else False))
        if prepared.weights is not None:
            self.model.load_state_dict(prepared.weights)
        self.loader = build_train_loader(recipe, splits.train, self.model, share=host.share, device=device)
        self.scorer = Scorer(recipe, host, self.stop, self.model, hierarchy)
        self.val_loader = self.scorer.loader(splits.val)
        self.criterion = criterion
        teacher = build_teacher(recipe, labels, self.model, device, network=prepared.teacher)
        self.task = build_task(
            recipe, self.model, device, criterion=criterion, teacher=teacher, label_names=labels,
            num_train=None if isinstance(splits.train, ImageStream) else len(splits.train),
            class_counts=None if counts is None else counts[0], given=prepared.given)
        host.wrap(self.task)
        self.trained = unwrap_model(self.task.trainable_module)  # the network, and what is trained beside it
        optimizer = build_optimizer(recipe, self.trained)
        self.schedule = build_scheduler(recipe, optimizer, len(self.loader))
        self.optimizer = host.wrap_optimizer(optimizer)
        self.averages = getattr(criterion, 'reduction', 'mean') != 'sum'
        # What makes the sum of all parts' losses one of a picture, or the mean of means.
        self.divisor = host.share.count * recipe.grad_accum_steps if self.averages else recipe.batch_size

        self.epoch = self.step = 0
        self.lr = self.loss_sum = self.seconds = 0.0
        self.last: _Pending | None = None  # step that was read
        self.records: list[EpochRecord] = []
        self.best_epoch, self.best_score, self.best_name = 0, -math.inf, ''
        self.best_weights: dict[str, Tensor] = {}
        self.best_scored: Scored | None = None  # where it was scored by an earlier process it is gone
        self.random: Mapping[str, Any] | None = None  # to be put back in the middle of an epoch
        if state is not None:
            self._restore(state)
        elif host.share.index:
            seed_process(recipe.seed, host.share.index, device)

    def fit(self) -> None:
        """Train to the last epoch, from wherever the run is.

        Raises:
            TrainingError: If the loss is not finite, or a checkpoint cannot be written.
            TrainingInterrupted: If a signal came; all is saved.
        """
        with self.stop.heard() if self.folder is not None else nullcontext():
            while self.epoch < self.recipe.num_epochs:
                self._train_epoch()
                self._end_epoch()
                if self.host.add_up(torch.zeros((), device=self.host.device), bool(self.stop.signal_name))()[1]:
                    raise self._interrupted()

    def finish(self) -> TrainResult:
        """Test the best epoch's model.

        Raises:
            TrainingInterrupted: If a signal came; all is saved.
        """
        with self.stop.heard() if self.folder is not None else nullcontext():
            model = self.best_model()
            scored = self.best_scored or self._score(model, self.val_loader)
            model.to(memory_format=torch.contiguous_format)
            found = self._test(model)
        result = TrainResult(
            model, self.splits.label_names, tuple(self.records), self.best_epoch, found.get('seen', {}),
            found.get('unseen', {}), self.recipe, self.splits, scored.logits, scored.targets, self.host.is_main,
            found.get('generalised', {}))
        if self.folder is not None:
            folder = self.folder
            self.host.on_main(lambda: folder.write_summary(result))
        return result

    # ---- an epoch

    def _train_epoch(self) -> None:
        """The steps of an epoch that are left."""
        self.task.train()
        steps, start = len(self.loader), self.step
        if not start and self.observer is not None and self.forgets:
            self.observer.reset()
        batches = self.loader.batches(self.epoch, start)
        if self.random is not None:
            set_random_state(self.random, self.host.device)
            self.random = None
        began = time.monotonic() - self.seconds
        pending: deque[_Pending] = deque()
        stops = False
        for step in range(start, steps):
            parts = [next(batches) for _ in range(self.recipe.grad_accum_steps)]
            self.optimizer.zero_grad()
            self.lr = self.optimizer.param_groups[0]['lr']
            pending.append(_Pending(
                step, self.lr, parts, self.host.add_up(self._backward(parts), bool(self.stop.signal_name))))
            while len(pending) > self.host.lag:
                stops |= self._read(pending.popleft())
            self._update(self.epoch * steps + step + 1)
            self.step, self.seconds = step + 1, time.monotonic() - began
            is_due = self.recipe.checkpoint_steps and (
                (self.epoch * steps + self.step) % self.recipe.checkpoint_steps == 0 and self.step < steps)
            if stops or is_due or self.step == steps:
                while pending:
                    stops |= self._read(pending.popleft())
            if stops or is_due:
                self._save()
                if stops:
                    raise self._interrupted()

    def _backward(self, parts: Sequence[Batch]) -> Tensor:
        """Add the gradients of a step's pictures; the sum of the parts' losses."""
        losses = []
        for number, part in enumerate(parts, start=1):
            images, targets = self.host.bring(part.images), self.host.bring(part.targets)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            with self.host.part(self.task, number == len(parts)), self.host.autocast():
                result = self.task(images, targets, *self._indices(part))
            # Processes average their gradients, parts add theirs.
            loss = result['loss']
            self.host.backward(loss / len(parts) if self.averages else loss * self.host.share.count)
            losses.append(loss.detach())
            if self.observer is not None:
                self.observer.update(result['output'].detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _indices(self, part: Batch) -> tuple[Tensor, ...]:
        """Places of the pictures in the training set, for the task that asks for them."""
        if part.indices is None or not getattr(self.task, 'needs_indices', False):
            return ()
        return (self.host.bring(part.indices),)

    def _update(self, done: int) -> None:
        """Step the optimizer and all that follows it."""
        if self.recipe.clip_grad:
            self.host.clip(self.trained.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.schedule.step_update(done)
        self.task.update_ema(step=done)

    def _read(self, pending: _Pending) -> bool:
        """Take the numbers of a step; whether to stop."""
        loss, stops = pending.read()
        loss /= self.divisor
        self.last = pending
        if not math.isfinite(loss):
            raise self._not_finite(pending, f'the loss became {loss}')
        self.loss_sum += loss
        if self.host.is_main and self.reports.on_step is not None:
            self.reports.on_step(StepRecord(
                self.epoch + 1, pending.step + 1, len(self.loader), loss, pending.lr, self.recipe.batch_size,
                is_prior=self.observer is not None))
        done = self.epoch * len(self.loader) + pending.step + 1
        if done % LOG_EVERY_STEPS == 0:
            self._log({'train_loss_step': loss, 'lr': pending.lr}, done)
        return stops

    def _end_epoch(self) -> None:
        """Validate, keep the best and save."""
        steps = len(self.loader)
        self._check_weights()
        self.optimizer.zero_grad()  # it frees memory, and heads with none waiting evaluate faster, to rounding
        averaged = self.task.trainable_module_ema.module if self.task.has_ema() else self.trained
        for module in {id(module): module for module in (self.trained, averaged)}.values():
            self.host.match_buffers(module)
        metrics: dict[str, float] = {}
        epoch = self.epoch + 1
        if self.observer is None:
            random = get_random_state(self.host.device)
            try:
                scored = self.scorer.score(averaged, self.val_loader)
            except Stopped:
                self._save(random)
                raise self._interrupted() from None
            metrics = self.scorer.figures(scored)
            score = math.nan if self.recipe.task == 'self_supervised' else metrics[METRIC_OF_TASK[self.recipe.task]]
            self._keep_if_best(epoch, score, kept_network(averaged), scored)
        record = EpochRecord(
            epoch, self.lr, self.loss_sum / steps, metrics, self.seconds,
            steps * self.recipe.batch_size / max(self.seconds, 1e-9))
        self.records.append(record)
        self.epoch, self.step, self.loss_sum, self.seconds = epoch, 0, 0.0, 0.0
        if self.folder is not None:
            folder = self.folder
            self._save()
            self.host.on_main(lambda: folder.write_epochs(self.records))
        self._log(record.as_row(), epoch * steps)
        if self.host.is_main and self.reports.on_epoch is not None:
            self.reports.on_epoch(record)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        """Tell the trackers; the temporary network has curves of its own."""
        prefix = '' if self.observer is None else 'prior/'
        self.host.log({f'{prefix}{name}': value for name, value in values.items()}, step)

    # ---- measuring

    def _score(self, model: nn.Module, loader: Any) -> Scored:
        """What is said of all processes' pictures, when all steps are saved."""
        try:
            return self.scorer.score(model, loader)
        except Stopped:
            raise self._interrupted() from None

    def _keep_if_best(self, epoch: int, score: float, model: nn.Module, scored: Scored) -> None:
        if self.best_epoch and score <= self.best_score:  # where there is no score, being nan, the last epoch is kept
            return
        self.best_epoch, self.best_score, self.best_scored = epoch, score, scored
        weights = self.host.get_weights(model)
        if self.folder is not None:
            folder = self.folder
            self.best_name = self.host.on_main(lambda: folder.save_best(epoch, weights))
        elif self.host.is_main:
            self.best_weights = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}

    def best_model(self) -> nn.Module:
        """The network as the recipe names it, without what training needed around it, with the best weights."""
        model = self.model
        if self.host.rebuilds:
            model = build_model(self.recipe, self.splits.label_names, pretrained=False)
        if self.host.is_main:
            weights = self.folder.load_best(self.best_name) if self.folder is not None else self.best_weights
            model.load_state_dict(weights)
        merge_adapter(model)
        model.zero_grad()
        model.eval().to(self.host.device)
        self.host.match_weights(model)
        return model

    def _test(self, model: Any) -> dict[str, dict[str, float]]:
        """Figures on the test pictures over the labels that were learnt and, if it can tell them, unseen ones."""
        source, labels = self.splits.test, self.splits.label_names
        if source is None:
            return {}

        def figures(images: LabelledImages | ImageStream) -> dict[str, float]:
            return self.scorer.figures(self._score(model, self.scorer.loader(images)))

        if self.recipe.task == 'zero_shot' and self.splits.unseen_labels and isinstance(source, LabelledImages):
            return measure_label_sets(model, self.recipe, source, labels, self.splits.unseen_labels, figures)
        is_own = self.recipe.verification is not None or labels == source.label_names
        return {'seen': figures(source if is_own else source.with_labels(labels))}  # type: ignore[union-attr]

    # ---- saving

    def _save(self, random: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint of this moment, with other random states if they are given."""
        if self.folder is None:
            return
        self._check_weights()
        observed = {} if self.observer is None else {
            name: self.host.total(buffer).cpu() for name, buffer in self.observer.named_buffers()}
        state = {
            **self.host.get_states(self.task, self.optimizer),
            'criterion': self.criterion.state_dict(), 'schedule': self.schedule.state_dict(),
            'observed': observed, 'fingerprint': self.fingerprint, 'epoch': self.epoch, 'step': self.step,
            'lr': self.lr, 'loss_sum': self.loss_sum, 'seconds': self.seconds,
            'records': [dataclasses.asdict(record) for record in self.records],
            'best_epoch': self.best_epoch, 'best_score': self.best_score, 'best_weights': self.best_name,
            'random': self.host.gather_objects(random or get_random_state(self.host.device))}
        folder, done = self.folder, self.epoch * len(self.loader) + self.step
        self.host.on_main(lambda: folder.save(done, state))

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.host.set_states(self.task, self.optimizer, state)
        self.criterion.load_state_dict(state['criterion'])
        self.schedule.load_state_dict(state['schedule'])
        if self.observer is not None and self.host.is_main:
            self.observer.load_state_dict(state['observed'])
        self.epoch, self.step = state['epoch'], state['step']
        self.lr, self.loss_sum, self.seconds = state['lr'], state['loss_sum'], state['seconds']
        self.records = [EpochRecord(**record) for record in state['records']]
        self.best_epoch, self.best_score = state['best_epoch'], state['best_score']
        self.best_name = state['best_weights']
        index = self.host.share.index
        if index < len(state['random']):
            set_random_state(state['random'][index], self.host.device)
            self.random = state['random'][index] if self.step else None
        else:  # there are more processes than there were
            seed_process(self.recipe.seed + self.epoch, index, self.host.device)

    # ---- what stops a run

    def _interrupted(self) -> TrainingInterrupted:
        where = f'step {self.step} of {len(self.loader)} of epoch {self.epoch + 1}' if self.step else (
            f'epoch {self.epoch}')
        return TrainingInterrupted(
            f'{self.stop.signal_name or "a signal to another process"}: stopped after {where}, and saved all in '
            f"{self.folder and self.folder.checkpoints}. Go on with resume='auto' (--resume auto).")

    def _check_weights(self) -> None:
        """Raise TrainingError if a step has spoilt the weights: its loss was of the ones before."""
        if self.last is not None and has_spoilt_weights(self.trained, self.host):
            raise self._not_finite(self.last, 'weights became infinite or nan')

    def _not_finite(self, pending: _Pending, what: str) -> TrainingError:
        words = (
            f'{what} in epoch {self.epoch + 1}, step {pending.step + 1} of {len(self.loader)}, at learning rate '
            f'{pending.lr:.3g}; lower optimizer.lr or lengthen schedule.warmup_epochs')
        facts = {'epoch': self.epoch + 1, 'step': pending.step + 1, 'what': what, 'lr': pending.lr,
                 'label_names': list(self.splits.label_names)}
        return not_finite(words, facts, pending.parts, self.host, self.folder)
