"""Do two claims about pretraining and distillation show on painted digits?

(1) A network that was pretrained with semantic softmax goes on better than one that was pretrained with a flat softmax:
recipes tree_semantic and tree_flat, then tree_transfer from the weights of each. (2) Any network learns better with a
teacher beside the labels (USI): recipes scenes_usi and scenes_no_teacher for four kinds of network, which differ in the
network alone, and the same for several labels. A seed decides pictures, weights and order. A claim appears if the mean
gap over the seeds, less two standard errors, is above zero.

The harness is `experiments.py`.
"""
from collections.abc import Mapping
from pathlib import Path

import torch
from experiments import Arm, Claim, Job, Study, run_study
from timm.models import build_model_with_cfg, register_model
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from timm_miil.data import TREE_FILE
from timm_miil.losses import SemanticHierarchy
from timm_miil.metrics import semantic_accuracy
from timm_miil.train import TrainResult
from timm_miil.train.build import build_eval_loader
from timm_miil.train.evaluate import score_batches

TEACHER_SEEDS = 3
# What another kind of network changes in the recipes scenes_usi and scenes_no_teacher: nothing but the network.
FAMILIES: Mapping[str, Mapping[str, str]] = {
    'CNN': {'model.name': 'test_resnet'},
    'ViT': {
        'model.name': 'levit_128s', 'model.args.img_size': '32', 'model.args.stem_type': 's8',
        'model.args.embed_dim': '[48, 64, 96]', 'model.args.num_heads': '[3, 4, 6]', 'model.args.depth': '[2, 2, 2]'},
    'mobile': {'model.name': 'test_efficientnet'},
    'MLP': {'model.name': 'mixer_scenes', 'model.args.img_size': '32'},
}
TINY = {
    'epochs': '1', 'scenes.num_train': '128', 'scenes.num_val': '64', 'scenes.num_test': '64',
    'tree_scenes.num_train': '256', 'tree_scenes.num_val': '256', 'tree_scenes.num_test': '256'}


class SmallMixer(MlpMixer):
    """timm's MLP-Mixer, whose tokens are made by three convolutions of stride 2 as LeViT's are: from plain patches it
    learns next to nothing of 3,000 pictures."""

    def __init__(self, embed_dim: int, in_chans: int = 3, **kwargs: object) -> None:
        super().__init__(embed_dim=embed_dim, in_chans=in_chans, patch_size=8, **kwargs)
        widths = (in_chans, embed_dim // 4, embed_dim // 2, embed_dim)
        self.stem = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in zip(widths, widths[1:])), nn.Flatten(2), Transpose())


class Transpose(nn.Module):
    """Channels (B, D, N) to tokens (B, N, D)."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.transpose(1, 2)


@register_model
def mixer_scenes(pretrained: bool = False, **kwargs: object) -> SmallMixer:
    """A mixer small enough for pictures of 32 pixels; timm's entry points fix the sizes of theirs."""
    return build_model_with_cfg(
        SmallMixer, 'mixer_s16_224', pretrained, **{'num_blocks': 6, 'embed_dim': 96, **kwargs})


def arms() -> dict[str, Arm]:
    start = {'model.name': 'local-dir:{}', 'model.pretrained': 'true'}
    table = {
        'tree, semantic': Arm('tree_semantic'),
        'tree, flat': Arm('tree_flat'),
        'transfer, semantic': Arm('tree_transfer', start, 'tree, semantic'),
        'transfer, flat': Arm('tree_transfer', start, 'tree, flat'),
        'transfer, none': Arm('tree_transfer'),
        'teacher': Arm('scenes_usi_teacher', seeds=TEACHER_SEEDS),
        'teacher of several labels': Arm('scenes_asl', seeds=TEACHER_SEEDS),
        'several labels, taught': Arm(
            'scenes_usi_multi_label', {'teacher.name': 'local-dir:{}'}, 'teacher of several labels',
            TEACHER_SEEDS),
        'several labels, alone': Arm('scenes_no_teacher_multi_label', seeds=TEACHER_SEEDS),
    }
    for family, changes in FAMILIES.items():
        table[f'{family}, taught'] = Arm(
            'scenes_usi', {**changes, 'teacher.name': 'local-dir:{}'}, 'teacher', TEACHER_SEEDS)
        table[f'{family}, alone'] = Arm('scenes_no_teacher', changes, seeds=TEACHER_SEEDS)
    return table


ARMS = arms()

CLAIMS = (
    Claim('semantic softmax over flat softmax, in transfer', 'transfer, semantic', 'transfer, flat', 'map'),
    *(Claim(f'with a teacher over alone, {family}', f'{family}, taught', f'{family}, alone', 'top1')
      for family in FAMILIES),
    Claim('with a teacher over alone, several labels', 'several labels, taught', 'several labels, alone', 'map'),
)
# No claims of the papers: what helps to read them.
BESIDE = (
    Claim('semantic over flat, accuracy over the tree itself', 'tree, semantic', 'tree, flat', 'semantic', False),
    Claim('semantic softmax over no pretraining, in transfer', 'transfer, semantic', 'transfer, none', 'map', False),
    Claim('flat softmax over no pretraining, in transfer', 'transfer, flat', 'transfer, none', 'map', False),
    *(Claim(f'teacher over the {family} it teaches', 'teacher', f'{family}, taught', 'top1', False)
      for family in FAMILIES),
)


def measure(job: Job, result: TrainResult, data: Path) -> dict[str, object]:
    """Accuracy over the tree of the arms that learn one."""
    if not job.arm.startswith('tree'):
        return {}
    return {'semantic': accuracy_over_tree(result.model, result.splits.test, data)}


def accuracy_over_tree(model: nn.Module, source: object, data: Path) -> float:
    """Semantic accuracy in percent, all three depths being levels, of a network trained with whatever loss."""
    hierarchy = SemanticHierarchy.from_tree_file(data / TREE_FILE, include_deepest=True)
    device = next(model.parameters()).device
    batches = list(score_batches(model, build_eval_loader(source, model, batch_size=64, device=device)))
    logits, targets = (torch.cat(parts).cpu() for parts in zip(*batches))
    return 100 * float(semantic_accuracy(logits, targets.argmax(1), hierarchy))


if __name__ == '__main__':
    run_study(Study('pretraining', ARMS, CLAIMS + BESIDE, measure, TINY), __doc__)
