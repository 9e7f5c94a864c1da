"""Dropout in training against the same layer written down with torch's own modules: equal in distribution."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_miil.heads import MLDecoder

COPIES = 20_000
WIDTH, HEADS, HIDDEN = 8, 2, 6


class WrittenDown(nn.Module):
    """ML-Decoder by `nn.MultiheadAttention` and `nn.Dropout`, on the weights of a head."""

    def __init__(self, head, rate, fc_rate):
        super().__init__()
        self.head, self.drop, self.fc_drop = head, nn.Dropout(rate), nn.Dropout(fc_rate)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, rate, batch_first=True)
        self.attn.load_state_dict(head.decoder.attn.state_dict())

    def forward(self, tokens):
        head, layer = self.head, self.head.decoder
        memory = F.relu(head.embed(tokens))
        query = head.query_embed.expand(len(tokens), -1, -1)
        query = layer.norm1(query + self.drop(query))
        query = layer.norm2(query + self.drop(self.attn(query, memory, memory)[0]))
        query = layer.norm3(query + self.drop(layer.linear2(self.drop(F.relu(layer.linear1(query))))))
        logits = torch.einsum('bgd,gdf->bgf', self.fc_drop(query), head.group_fc.weight)
        return logits.flatten(1)[:, :head.num_classes] + head.group_fc.bias


@pytest.mark.parametrize('rate, fc_rate, silent', [
    (0.3, 0.0, ()),
    (0.3, 0.0, ('attn.out_proj', 'linear2')),  # only the queries drop out, which the branches would cover up
    (0.0, 0.3, ()),
])
@torch.no_grad()
def test_dropout_spreads_each_logit_as_the_layer_written_down(rate, fc_rate, silent):
    torch.manual_seed(0)
    head = MLDecoder(
        6, 5, 3, embed_dim=WIDTH, num_heads=HEADS, feedforward_dim=HIDDEN, drop_rate=rate, fc_drop_rate=fc_rate)
    for parameter in head.decoder.parameters():
        nn.init.normal_(parameter)  # so that no residual branch, hidden unit or position is without weight
    for name in silent:
        nn.init.zeros_(head.decoder.get_submodule(name).weight)
    tokens = torch.randn(1, 4, 6).expand(COPIES, -1, -1)
    got, wanted = (model.train()(tokens) for model in (head, WrittenDown(head, rate, fc_rate)))
    torch.testing.assert_close(got.std(0), wanted.std(0), rtol=0.03, atol=0)
    error = (got.var(0) + wanted.var(0)).sqrt() / math.sqrt(COPIES)
    assert ((got.mean(0) - wanted.mean(0)).abs() < 4 * error).all()
