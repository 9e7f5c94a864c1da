"""A small model folder and a small data set of files, for whatever takes both."""
import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

LABELS = ('ant', 'bee <b>', 'cat')
NUM = 12


def save_model(folder: Path, **config) -> Path:
    """A network of three independent classes whose scores differ from picture to picture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(
            'test_resnet', num_classes=len(LABELS),
            pretrained_cfg_overlay={'input_size': (3, 32, 32), 'fixed_input_size': False})
        nn.init.normal_(model.fc.weight, std=0.5)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True, model_config={
        'label_names': list(LABELS), 'problem_type': 'multi_label_classification', **config})
    return folder


def save_data(folder: Path) -> Path:
    """COCO files: a split val of good pictures, and a split odd with a damaged one and another label."""
    draws = np.random.default_rng(0)
    (folder / 'annotations').mkdir()
    for split, labels in (('val', LABELS), ('odd', (*LABELS[:2], 'dog'))):
        (folder / split).mkdir()
        for index in range(NUM):
            pixels = draws.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 36)).save(folder / split / f'{index:02}.png')
        shown = [(index, label) for index in range(NUM) for label in range(3) if draws.random() < 0.5]
        (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps({
            'images': [{'id': index, 'file_name': f'{index:02}.png'} for index in range(NUM)],
            'annotations': [{'image_id': index, 'category_id': label} for index, label in shown],
            'categories': [{'id': number, 'name': name} for number, name in enumerate(labels)]}))
    (folder / 'odd' / '03.png').write_bytes(b'no picture')
    return folder
