"""How often, and how surely, a map points at the digit whose label it explains, on scenes whose boxes are known.

    python benchmarks/pointing.py                    # makes the scenes and trains two networks, minutes on one core
"""
import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from run import save
from torch import Tensor, nn

from timm_miil.data import make_scenes
from timm_miil.inference import Explainer, Tagger, load_image
from timm_miil.train import evaluate, load_recipe, read_splits, train

SPLIT = 'test'
UNSEEN = load_recipe('scenes_zero_shot').unseen_labels
FEW_QUERIES = '5'  # each serves six classes
# Network -> the methods that explain it, and whether the measured offset is used.
CONTESTANTS = {
    'mldecoder_scenes': [('attention', True), ('attention', False), ('layer_cam', True), ('grad_cam', True)],
    'mldecoder_zero_shot_scenes': [('attention', True), ('layer_cam', True)],
    'recipe scenes_asl, 5 queries': [('attention', True), ('layer_cam', True)],
    'recipe scenes_gap': [('grad_cam', True), ('grad_cam', False), ('layer_cam', True)],
}

# Of a picture: its labels' class indices, each with the mask of its boxes (H, W).
Boxes = dict[int, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data', type=Path, help='default scenes, made before; default: make them')
    ns = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scenes = make_scenes(ns.data or Path(folder, 'scenes'))
        pictures, names = read_boxes(scenes)
        rows: list[dict[str, object]] = []
        for network, methods in CONTESTANTS.items():
            model, test_map = build(network, scenes)
            unseen = UNSEEN if network == 'mldecoder_zero_shot_scenes' else ()
            for method, is_aligned in methods:
                explainer = Explainer(Tagger(model, label_names=names), method=method)
                if not is_aligned:
                    explainer.offset = (0.0, 0.0)
                case = {'network': network, 'test_map': test_map, 'method': method, 'aligned': is_aligned}
                rows += [{**case, **row} for row in measure(explainer, pictures, names, unseen)]
    save('pointing-scenes', rows)


def build(network: str, scenes: Path) -> tuple[nn.Module, float]:
    """The network, with its test mAP in percent."""
    if not network.startswith('recipe'):
        model, test = timm.create_model(network, pretrained=True), read_splits(scenes).test
        if hasattr(model, 'set_labels'):
            model.set_labels(test.label_names)
        return model, round(evaluate(model, test)['map'], 2)
    recipe = load_recipe(network.removeprefix('recipe ').partition(',')[0])
    if network.endswith('queries'):
        recipe = recipe.override({'model.args.num_groups': FEW_QUERIES})
    result = train(recipe, scenes, device='cpu', on_epoch=print)
    return result.model, round(result.test_map, 2)


def read_boxes(scenes: Path) -> tuple[dict[Path, Boxes], list[str]]:
    content = json.loads((scenes / 'annotations' / f'instances_{SPLIT}.json').read_text(encoding='utf-8'))
    pictures: dict[int, tuple[Path, Boxes]] = {}
    for row in content['images']:
        empty = torch.zeros(row['height'], row['width'], dtype=torch.bool)
        pictures[row['id']] = scenes / SPLIT / row['file_name'], defaultdict(empty.clone)
    for row in content['annotations']:
        left, top, width, height = row['bbox']
        mask = pictures[row['image_id']][1][row['category_id'] - 1]
        mask[top:top + height, left:left + width] = True
    return dict(pictures.values()), [row['name'] for row in content['categories']]


def measure(
        explainer: Explainer,
        pictures: dict[Path, Boxes],
        names: list[str],
        unseen: Sequence[str],
) -> list[dict[str, object]]:
    """Pointing game over the labels that are there: all, the digits, the coloured ones, those never trained on."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for path, boxes in pictures.items():
        classes = list(boxes)
        for index, heat in zip(classes, explainer(load_image(path), classes)):
            inside = boxes[index]
            hit = bool(heat.any()) and bool(inside.flatten()[heat.argmax()])
            found = torch.tensor([hit, heat[inside].sum(), inside.float().mean(), not heat.any()])
            name = names[index]
            kinds = ['all', 'digits' if name.startswith('digit') else 'coloured digits']
            for group in [*kinds, 'unseen'] if name in unseen else kinds:
                groups[group].append(found)
    rows = []
    for group, found in groups.items():
        hit, share, chance, is_empty = (round(float(value), 4) for value in torch.stack(found).mean(0))
        rows.append({
            'labels': group, 'count': len(found), 'pointing': hit, 'share_inside': share, 'chance': chance,
            'empty': is_empty})
    return rows


if __name__ == '__main__':
    main()
