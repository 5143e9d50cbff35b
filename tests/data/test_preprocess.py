import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from data.images import decode
from data.preprocess import CHANCES, Preprocess, affine_maps
from tests.data.conftest import picture

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo(seed, size=(60, 80)):
    """Random, but smooth as photos are."""
    return decode(picture(seed, (8, 10))).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(112, 112), (48, 48), (80, 60)])
def test_equals_the_transform_of_timm(interpolation, size):
    preprocess = Preprocess((80, 60), size, interpolation, MEAN, STD)
    images = [photo(seed) for seed in range(4)]
    reference = create_transform(
        (3, *size), interpolation=interpolation, mean=MEAN, std=STD, crop_pct=1.0, crop_mode="squash"
    )
    expected = torch.stack([reference(image) for image in images])
    got = preprocess(torch.from_numpy(np.stack([preprocess.to_canvas(image) for image in images])))
    assert got.shape == (4, 3, *size)
    assert got.dtype == torch.float32
    levels = (got - expected).abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.max() < 1.01  # rounding, one step of 255
    assert levels.mean() < 0.2


@pytest.mark.parametrize("size", [(112, 112), (80, 60)])
def test_flips_the_named_rows_alone(size):
    preprocess = Preprocess((80, 60), size, "bilinear", MEAN, STD)
    pixels = torch.randint(0, 256, (3, 80, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = pixels.clone()
    plain, flipped = preprocess(pixels), preprocess(pixels, torch.tensor([True, False, True]))
    assert torch.allclose(flipped[0], plain[0].flip(-1), atol=1 / 255 / min(STD) + 1e-6)
    assert torch.equal(flipped[1], plain[1])
    assert not torch.equal(flipped[2], plain[2])
    assert torch.equal(pixels, before)


def test_augmenting_without_a_warp_mirrors_half_and_no_more():
    preprocess = Preprocess((80, 60), (112, 112), "bicubic", MEAN, STD)
    pixels = torch.randint(0, 256, (64, 80, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    images, plain = preprocess.augmented(pixels, torch.rand(CHANCES, 64)), preprocess(pixels)
    mirrored = preprocess(pixels, torch.ones(64, dtype=torch.bool))
    same = [torch.equal(a, b) for a, b in zip(images, plain, strict=True)]
    assert 20 < sum(same) < 44
    assert all(s or torch.equal(a, b) for s, a, b in zip(same, images, mirrored, strict=True))


def test_a_warp_moves_a_dot_as_far_as_it_says_and_keeps_colours():
    """A flat sheet stays flat; a dot in the centre moves with the shift, and grows or shrinks with the stretch."""
    preprocess = Preprocess((64, 64), (64, 64), "bicubic", (0.0,) * 3, (1.0,) * 3)
    pixels = torch.full((500, 64, 64, 3), 200, dtype=torch.uint8)
    torch.manual_seed(0)
    flat = preprocess.augmented(pixels, torch.rand(CHANCES, 500), 0.2)
    assert torch.allclose(flat, torch.full_like(flat, 200 / 255), atol=1e-4)
    pixels[:, 30:34, 30:34] = 0
    dark = 200 / 255 - preprocess.augmented(pixels, torch.rand(CHANCES, 500), 0.2)[:, 0]  # (B, 64, 64)
    where = torch.stack([(dark.sum(axis) * torch.arange(64)).sum(1) / dark.sum((1, 2)) for axis in (1, 2)], dim=1)
    moved = (where - 31.5).abs()
    assert 6 < moved.max() < 0.2 * 32 * 1.3, "a fifth of half a side, seen through a picture up to a fifth smaller"
    size = dark.sum((1, 2)) / (200 / 255)
    assert size.min() < 16 / 1.3 and size.max() > 16 * 1.3


def test_drawn_maps_stay_within_what_was_asked_for():
    torch.manual_seed(0)
    maps = affine_maps(*(0.1 * (2 * torch.rand(5, 2000) - 1)))
    stretch = maps[:, :, :2].norm(dim=1)  # (N, 2), of each side
    assert 0.9 <= stretch.min() < 0.905 and 1.095 < stretch.max() <= 1.1
    turn = torch.atan2(maps[:, 1, 0], maps[:, 0, 0])
    assert 0.095 < turn.abs().max() <= 0.1 and maps[:, :, 2].abs().max() <= 0.1


def test_survives_json():
    preprocess = Preprocess((80, 60), (112, 112), "bicubic", MEAN, STD)
    read = Preprocess(**json.loads(json.dumps(dataclasses.asdict(preprocess))))
    assert read == preprocess
    assert read.mean == MEAN


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_gpu_gives_what_the_cpu_gives(interpolation):
    preprocess = Preprocess((80, 60), (112, 112), interpolation, MEAN, STD)
    pixels = torch.from_numpy(np.stack([np.asarray(photo(seed)) for seed in range(4)]))
    levels = (preprocess(pixels.cuda()).cpu() - preprocess(pixels)).abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.max() < 1.01
