"""A small text encoder, trained from scratch: titles are short and use few different words."""

import torch
from torch import Tensor, nn

PAD, *_ = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # tokens of every vocabulary, with BERT's names
WIDTH, LAYERS, HEADS, DROPOUT = 128, 2, 4, 0.1


class TextEncoder(nn.Module):
    """Tokens (B, T) -> a summary (B, `WIDTH`): the output of two transformer layers at the first token, [CLS].

    Args:
        vocab: the number of tokens in the vocabulary.
        length: T.
        pad: the token that fills up short titles; nothing attends to it.
    """

    def __init__(self, vocab: int, length: int, pad: int):
        super().__init__()
        self.pad = pad
        self.words = nn.Embedding(vocab, WIDTH)
        self.places = nn.Embedding(length, WIDTH)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)
        like = (WIDTH, HEADS, 4 * WIDTH, DROPOUT, "gelu")
        layers = [nn.TransformerEncoderLayer(*like, batch_first=True, norm_first=True) for _ in range(LAYERS)]
        self.layers = nn.TransformerEncoder(layers[0], LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.layers.layers = nn.ModuleList(layers)  # torch copies the first, so all would start with the same weights

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))  # (B, T, WIDTH)
        return self.layers(x, src_key_padding_mask=tokens == self.pad)[:, 0]
