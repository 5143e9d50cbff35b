"""The text encoder by itself."""

import torch

from models.text import TextEncoder


def test_layers_start_apart():
    first, second = TextEncoder(vocab=9, length=6, pad=0).layers.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@torch.no_grad()
def test_the_order_of_words_counts_and_padding_does_not():
    torch.manual_seed(0)
    encoder = TextEncoder(vocab=9, length=6, pad=0).eval()
    title, turned = encoder(torch.tensor([[2, 5, 7, 3, 0, 0], [2, 7, 5, 3, 0, 0]]))
    assert (title - turned).abs().max() > 1e-4
    encoder.words.weight[0] += 1
    torch.testing.assert_close(encoder(torch.tensor([[2, 5, 7, 3, 0, 0]]))[0], title)
