import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.sources import load_source
from data.store import common_size, open_store

HEADER = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"


def picture(seed, size=(60, 80), kind="png", **options):
    """Encoded bytes of a random picture, lossless unless `kind` is jpeg."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def write_kaggle(folder, pictures, titles=None):
    """A folder in Kaggle's layout: id 100 + i has the bytes `pictures[i]`, or no file where they are None."""
    (folder / "images").mkdir(parents=True)
    lines = [HEADER]
    for i, content in enumerate(pictures):
        title = titles[i] if titles else f"Brand{i} Men Blue Shirt"
        lines.append(f"{100 + i},Men,Apparel,Topwear,Shirts,Blue,Summer,2012,Casual,{title}")
        if content is not None:
            (folder / "images" / f"{100 + i}.jpg").write_bytes(content)
    (folder / "styles.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_tar(path, members):
    """A tar of {name: bytes}, in this order."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def real(shared, cache_dir):
    """The real catalogue, loaded and decoded once for all tests: (catalogue, store)."""
    catalogue = load_source(str(shared / "data" / "fashion-product-images-small"), cache_dir)
    return catalogue, open_store(catalogue, common_size(catalogue, 224), cache_dir)
