import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from data.images import decode
from data.preprocess import Preprocess
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


def test_survives_json():
    preprocess = Preprocess((80, 60), (112, 112), "bicubic", MEAN, STD)
    read = Preprocess(**json.loads(json.dumps(dataclasses.asdict(preprocess))))
    assert read == preprocess
    assert read.mean == MEAN


def test_an_unknown_interpolation_is_refused():
    with pytest.raises(ValueError, match="interpolation is 'random': bicubic or bilinear"):
        Preprocess((80, 60), (112, 112), "random", MEAN, STD)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_gpu_gives_what_the_cpu_gives(interpolation):
    preprocess = Preprocess((80, 60), (112, 112), interpolation, MEAN, STD)
    pixels = torch.from_numpy(np.stack([np.asarray(photo(seed)) for seed in range(4)]))
    levels = (preprocess(pixels.cuda()).cpu() - preprocess(pixels)).abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.max() < 1.01
