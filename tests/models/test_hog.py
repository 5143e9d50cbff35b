"""Where a picture's edges lie and which way they run."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.hog import CELL, DIRECTIONS, PLAIN, SIDE, WIDTH, article, histograms, hog, sample

CELLS = SIDE // CELL


def slope(angle):
    """A view that gets brighter that way."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return 0.01 * (math.cos(angle) * x + math.sin(angle) * y)[None, None]


@pytest.mark.parametrize("direction", range(DIRECTIONS))
def test_edges_count_for_the_direction_in_which_brightness_changes(direction):
    view = slope(math.pi * direction / DIRECTIONS)
    for way in (view, -view):  # from dark to bright or back
        found = histograms(way).view(DIRECTIONS, CELLS, CELLS)[:, 1:-1, 1:-1]
        torch.testing.assert_close(found[direction], found.sum(0), atol=2e-2, rtol=0)
        assert found[direction].min() > 1


def test_an_edge_lies_between_two_directions_and_in_one_cell():
    view = torch.zeros(1, 1, SIDE, SIDE)
    view[..., CELL * 2 + 4 :] = 1.0
    found = histograms(view).view(DIRECTIONS, CELLS, CELLS)
    assert (found[0].argmax(1) == 2).all() and found[0, :, [0, 1, 3, 4, 5, 6]].max() == 0
    found = histograms(slope(math.pi / DIRECTIONS / 2)).view(DIRECTIONS, CELLS, CELLS)[:, 1:-1, 1:-1].mean((1, 2))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=0)
    assert found[0] > 10 * found[2:].max()


def test_the_article_is_what_differs_from_the_background():
    grey = torch.full((4, 1, 40, 20), 0.8)
    grey[0, 0, 4:24, 10:15] = -1.0
    grey[1, 0, 0:20, 0:10] = -1.0  # it touches the border
    grey[2, 0, 7, 9] = 0.8 - 1.1 * PLAIN
    grey[3, 0, 7, 9] = 0.8 - 0.9 * PLAIN
    boxes = article(grey)
    expected = [[[0.1, 0.6], [0.5, 0.75]], [[0, 0.5], [0, 0.5]], [[7 / 40, 0.2], [0.45, 0.5]], [[0, 1], [0, 1]]]
    torch.testing.assert_close(boxes, torch.tensor(expected))
    for picture, box in zip(grey[:2], boxes, strict=False):
        assert (sample(picture[None], box[None])[..., 6:-6, 6:-6] + 1).abs().max() < 1e-6


def test_neither_margins_nor_colours_nor_contrast_nor_sizes_make_a_difference():
    drawing = torch.Generator().manual_seed(0)
    shape = F.interpolate(torch.rand(1, 1, 6, 6, generator=drawing), size=(56, 56))[0, 0]
    pictures = torch.ones(4, 3, 112, 112)
    pictures[0, :, 10:66, 10:66] = -shape
    pictures[1, :, 50:106, 40:96] = -shape  # elsewhere
    pictures[2, 0, 10:66, 10:66] = 1 - 3 * (1 + shape)  # as dark, in another colour
    pictures[3, :, 10:66, 10:66] = -shape.T  # another shape
    found = hog(pictures)
    whole, cut_out = found.view(4, 2, -1).unbind(1)
    assert F.cosine_similarity(cut_out[0], cut_out[1], dim=0) > 0.999 > 0.6 > F.cosine_similarity(*whole[:2], dim=0)
    assert F.cosine_similarity(whole[0], whole[2], dim=0) > 0.999
    assert F.cosine_similarity(cut_out[0], cut_out[3], dim=0) < 0.9
    torch.testing.assert_close(hog(pictures / 2), found, atol=0.01, rtol=0.05)
    assert F.cosine_similarity(hog(F.interpolate(pictures, scale_factor=2)), found).min() > 0.999
    for size in (224, 168):  # blurred at the article's rim, where its box ends
        larger = F.interpolate(pictures, size=(size, size), mode="bilinear")
        assert F.cosine_similarity(hog(larger).view(4, 2, -1)[:, 0], whole).min() > 0.9


@pytest.mark.parametrize("size", [(112, 112), (224, 224), (64, 48), (8, 8), (500, 3)])
def test_any_size_and_any_precision_is_taken(size):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).bfloat16()
    images[1] = 1.0
    found = hog(images)
    assert found.shape == (2, WIDTH) and found.dtype is torch.float32
    assert found[0].square().mean() > 0.8
    assert found[1].max() < 0.05, "nothing is in the second"
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(hog(images.float()), found)
