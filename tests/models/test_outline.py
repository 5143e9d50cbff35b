"""Where a picture's edges lie and which way they run."""

import math

import pytest
import torch

from models.outline import CELL, DIRECTIONS, SIDE, WIDTH, article, edges, outlines, sample

CELLS = SIDE // CELL


@pytest.mark.parametrize("direction", range(DIRECTIONS))
def test_edges_count_for_the_direction_in_which_brightness_changes(direction):
    angle = math.pi * direction / DIRECTIONS
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    slope = 0.01 * (math.cos(angle) * x + math.sin(angle) * y)
    for view in (slope, -slope):  # from dark to bright or back: the same edge
        found = edges(view[None, None]).view(DIRECTIONS, CELLS, CELLS)[:, 1:-1, 1:-1]  # at the border half is cut off
        torch.testing.assert_close(found[direction], found.sum(0), atol=2e-2, rtol=0)
        assert found[direction].min() > 1


def test_an_edge_lies_between_two_directions_and_in_one_cell():
    view = torch.zeros(1, 1, SIDE, SIDE)
    view[..., CELL * 2 + 4 :] = 1.0
    found = edges(view).view(DIRECTIONS, CELLS, CELLS)
    assert (found[0].argmax(1) == 2).all() and found[0, :, [0, 1, 3, 4, 5, 6]].max() == 0
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    half = math.pi / DIRECTIONS / 2
    found = edges((math.cos(half) * x + math.sin(half) * y)[None, None]).view(DIRECTIONS, CELLS, CELLS)
    found = found[:, 1:-1, 1:-1].mean((1, 2))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=0)
    assert found[0] > 10 * found[2:].max()


def test_the_article_is_what_differs_from_the_background():
    grey = torch.full((3, 1, 40, 20), 0.8)
    grey[0, 0, 10:30, 5:15] = -1.0
    grey[1, 0, 0:20, 0:10] = 0.4  # it may touch the border
    boxes = article(grey)
    expected = [[[0.25, 0.75], [0.25, 0.75]], [[0, 0.5], [0, 0.5]], [[0, 1], [0, 1]]]
    torch.testing.assert_close(boxes, torch.tensor(expected))
    for picture, box, value in zip(grey, boxes, (-1.0, 0.4, 0.8), strict=True):
        assert (sample(picture[None], box[None])[..., 4:-4, 4:-4] - value).abs().max() < 1e-6


def test_neither_margins_nor_colours_nor_sizes_make_a_difference():
    drawing = torch.Generator().manual_seed(0)
    shape = torch.nn.functional.interpolate(torch.rand(1, 1, 6, 6, generator=drawing), size=(56, 56))[0, 0]
    pictures = torch.ones(4, 3, 112, 112)
    pictures[0, :, 10:66, 10:66] = -shape
    pictures[1, :, 50:106, 40:96] = -shape  # elsewhere
    pictures[2, 0, 10:66, 10:66] = 1 - 3 * (1 + shape)  # as dark, in another colour
    pictures[3, :, 10:66, 10:66] = -shape.T  # another shape
    whole, article_ = outlines(pictures).view(4, 2, -1).unbind(1)
    alike = torch.nn.functional.cosine_similarity
    assert alike(article_[0], article_[1], dim=0) > 0.999 > 0.6 > alike(whole[0], whole[1], dim=0)
    assert alike(whole[0], whole[2], dim=0) > 0.999
    assert alike(article_[0], article_[3], dim=0) < 0.9
    larger = torch.nn.functional.interpolate(pictures, scale_factor=2)
    assert alike(outlines(larger), outlines(pictures)).min() > 0.99


def test_any_size_and_kind_of_number_is_taken():
    for size in ((112, 112), (224, 224), (64, 48), (8, 8), (500, 3)):
        images = torch.randn(2, 3, *size, dtype=torch.bfloat16)
        images[1] = 1.0
        found = outlines(images)
        assert found.shape == (2, WIDTH) and found.dtype is torch.float32
        assert found[0].square().mean() > 0.8 and found[1].max() < 0.05, "nothing is in the second"
