"""Do claims about classifier sharing, two heads, semantic diversity, long tails and injection show on made pictures?

One thing changes between the two arms of a claim, as their recipes say:

- TH-KD and SH-KD over plain distillation (arXiv:2201.06945): scenes_thkd and scenes_shkd over scenes_kd.
- DHKD over the same two losses on one head (arXiv:2411.08937): scenes_dhkd over scenes_same_head.
- Semantic diversity learning with several vectors a picture over one (arXiv:2105.05926): scenes_sdl over
  scenes_sdl_single, labels that were never seen.
- COMIC over ASL on the rarest labels (arXiv:2304.10539): scenes_comic over scenes_long_tail_asl.
- Labels injected into a self-supervised network over supervised training, in transfer (arXiv:2204.09134):
  scenes_injection over scenes_injection_supervised.

The harness is `experiments.py`.
"""
import dataclasses
from pathlib import Path

import torch
from experiments import Arm, Claim, Job, Study, run_study

from timm_miil.data import TreeSceneConfig, make_tree_scenes
from timm_miil.metrics import effective_rank, filter_diversity, multilabel_average_precision
from timm_miil.train import TrainResult, read_splits
from timm_miil.train.build import build_eval_loader
from timm_miil.train.evaluate import score_batches
from timm_miil.train.linear_probe import embed_pictures, linear_probe

# Pictures of one of ten digits, as those of scenes_injection but for their labels.
DIGITS = TreeSceneConfig(
    shares=(0.0, 1.0, 0.0), num_train=500, num_val=100, num_test=1000, image_size=32, digit_side=(0.6, 0.9),
    fragments=(0, 4))
TAIL = 10  # the rarest labels of the training pictures, of 30
TINY = {
    'epochs': '1', 'scenes.num_train': '128', 'scenes.num_val': '64', 'scenes.num_test': '64',
    'tree_scenes.num_train': '256', 'tree_scenes.num_val': '256', 'tree_scenes.num_test': '256'}

TAUGHT = {'teacher.name': 'local-dir:{}'}
ARMS = {
    'sharing, teacher': Arm('scenes_sharing_teacher'),
    'sharing, KD': Arm('scenes_kd', TAUGHT, 'sharing, teacher'),
    'sharing, TH-KD': Arm('scenes_thkd', TAUGHT, 'sharing, teacher'),
    'sharing, SH-KD': Arm('scenes_shkd'),
    'two heads, teacher': Arm('scenes_usi_teacher'),
    'two heads, DHKD': Arm('scenes_dhkd', TAUGHT, 'two heads, teacher'),
    'two heads, same head': Arm('scenes_same_head', TAUGHT, 'two heads, teacher'),
    'long tail, COMIC': Arm('scenes_comic'),
    'long tail, ASL': Arm('scenes_long_tail_asl'),
    'long tail, PU': Arm('scenes_pu'),
    'long tail, negative': Arm('scenes_long_tail_negative'),
    'zero shot, SDL': Arm('scenes_sdl'),
    'zero shot, one vector': Arm('scenes_sdl_single'),
    'transfer, injection': Arm('scenes_injection'),
    'transfer, supervised': Arm('scenes_injection_supervised'),
    'transfer, self-supervised': Arm('scenes_rotation'),
}
CLAIMS = (
    Claim('TH-KD over distillation', 'sharing, TH-KD', 'sharing, KD', 'top1'),
    Claim('SH-KD over distillation', 'sharing, SH-KD', 'sharing, KD', 'top1'),
    Claim('DHKD over the same head', 'two heads, DHKD', 'two heads, same head', 'top1'),
    Claim('COMIC over ASL, the ten rarest labels', 'long tail, COMIC', 'long tail, ASL', 'tail_map'),
    Claim('COMIC over ASL', 'long tail, COMIC', 'long tail, ASL', 'map'),
    Claim('PU-MLC over unknown as absent', 'long tail, PU', 'long tail, negative', 'map'),
    Claim('several vectors over one, unseen labels', 'zero shot, SDL', 'zero shot, one vector', 'unseen_map'),
    Claim('injection over supervised, in transfer', 'transfer, injection', 'transfer, supervised', 'transfer'),
    Claim('several vectors over one, seen labels', 'zero shot, SDL', 'zero shot, one vector', 'map', False),
    Claim('injection over supervised, the poor labels', 'transfer, injection', 'transfer, supervised', 'top1', False),
    Claim(
        'injection over none, in transfer', 'transfer, injection', 'transfer, self-supervised', 'transfer', False),
    Claim('teacher over the student of plain distillation', 'sharing, teacher', 'sharing, KD', 'top1', False),
)


def measure(job: Job, result: TrainResult, data: Path) -> dict[str, object]:
    """What a claim asks for beyond the figures of every run."""
    if job.arm.startswith('long tail'):
        return {'tail_map': rarest_map(result, data)}
    if job.arm.startswith('zero shot'):
        return {'unseen_map': result.unseen_metrics['map'], 'generalised_map': result.generalised_metrics['map']}
    if job.arm.startswith('transfer'):
        return transferred(job, result)
    return {}


def rarest_map(result: TrainResult, data: Path) -> float:
    """mAP in percent over the test pictures of the labels that the fewest training pictures show."""
    device = next(result.model.parameters()).device
    loader = build_eval_loader(result.splits.test, result.model, batch_size=64, device=device)
    logits, targets = (torch.cat(parts).cpu() for parts in zip(*score_batches(result.model, loader)))
    frequency = (read_splits(data).train.targets == 1).sum(0)  # before any was forgotten
    return 100 * float(multilabel_average_precision(logits, targets)[frequency.argsort()[:TAIL]].mean())


def transferred(job: Job, result: TrainResult) -> dict[str, object]:
    """What ten pictures of each digit give on the frozen network, percent, and how diverse its embeddings are."""
    config = dataclasses.replace(DIGITS, seed=job.seed)
    splits = read_splits(make_tree_scenes(job.scratch / 'pictures' / f'digits-{job.arm}-{job.seed}', config))
    known, tested = (embed_pictures(result.model, source) for source in (splits.train, splits.test))
    return {
        'transfer': linear_probe(*known, *tested, shots=10, draws=5, seed=job.seed),
        'effective_rank': effective_rank(tested[0]), 'filter_diversity': filter_diversity(result.model)}


if __name__ == '__main__':
    run_study(Study('systems', ARMS, CLAIMS, measure, TINY), __doc__)
